"""Questions and voted answers of Stack Exchange: lvwerra/stack-exchange-paired, and the answers it was made from."""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

from trl_apa.data.pairs import Preference, Preferences, checked_pair, read_pairs
from trl_apa.data.sources import Row, text_column, text_of


PAIRED = "lvwerra/stack-exchange-paired"
MAX_PAIRS = 10


def stack_exchange_prompt(question: str) -> str:
    """What stands before an answer in the texts that StackLLaMA's models were trained on.

    The space before the answer belongs to the answer, as in the HH layout: where a token begins with its space, as
    Llama's do, a prompt that ends in one ends in a token that no text of an answer has.
    """
    return f"Question: {question}\n\nAnswer:"


def answer_score(upvotes: int, accepted: bool = False) -> int:
    """What the votes say of an answer (section 4 of the paper, after Askell et al. 2021, arXiv 2112.00861):

        -1                                          if upvotes <= 0
        floor(log2(1 + upvotes) + 0.5) + accepted   otherwise

    Accepted or not, an answer that nobody voted for has -1: the first case of the paper's formula comes first.

    Args:
        upvotes: votes for minus votes against.
        accepted: whether the asker accepted it.

    Raises:
        ValueError: if `upvotes` is no whole number.
    """
    if isinstance(upvotes, bool) or not isinstance(upvotes, int):
        raise ValueError(f"upvotes is {upvotes!r}, expected a whole number")
    return -1 if upvotes <= 0 else math.floor(math.log2(1 + upvotes) + 0.5) + bool(accepted)


def read_stack_exchange(
    source: str | Path = PAIRED,
    *,
    data_dir: str | None = None,
    split: str = "train",
    limit: int | None = None,
    max_pairs: int = MAX_PAIRS,
    strict: bool = False,
) -> Preferences:
    """Read pairs of answers, of which the first had the higher score.

    Understood, row by row: `question`, `response_j` (the better) and `response_k`; or `question` and `answers`, a list
    of objects with `text` and either `pm_score` or `upvotes` and, if it is known, `selected` (`answer_score`). Of the
    latter every two answers of different scores make a pair, up to `max_pairs` a question, the first in their order.

    Args:
        source, split: see [`~trl_apa.data.sources.iter_rows`].
        data_dir: folder inside the hub data set: `data/finetune`, `data/reward`, `data/rl` or `data/evaluation`.
        limit: stop after this many rows.
        max_pairs: most pairs of one question.
        strict: raise at the first bad row instead of listing it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no row holds a pair or, with `strict`, some row does not; `max_pairs` is below 1.
    """
    if max_pairs < 1:
        raise ValueError(f"max_pairs={max_pairs}: expected at least 1")

    return read_pairs(
        source, lambda row: pairs_of_row(row, max_pairs), data_dir=data_dir, split=split, limit=limit, strict=strict
    )


def pairs_of_row(row: Row, max_pairs: int = MAX_PAIRS) -> list[Preference]:
    """The pairs of a row, see [`read_stack_exchange`]; ValueError says why it has none."""
    prompt = prompt_of_row(row)
    if row.fields.get("answers") is not None:
        return _pairs_of_answers(prompt, row, max_pairs)
    return [_pair(prompt, text_column(row, "response_j"), text_column(row, "response_k"), row.number)]


def prompt_of_row(row: Row) -> str:
    """The prompt that a row's question makes; ValueError if it has none."""
    question = text_column(row, "question")
    if not question.strip():
        raise ValueError("the question is empty")
    return stack_exchange_prompt(question)


def _pairs_of_answers(prompt: str, row: Row, max_pairs: int) -> list[Preference]:
    answers = row.fields["answers"]
    if not isinstance(answers, list):
        raise ValueError(f"answers is a {type(answers).__name__}, expected a list")
    scored = [_scored_answer(number, answer) for number, answer in enumerate(answers, start=1)]
    pairs: list[Preference] = []
    for (first, first_score), (second, second_score) in combinations(scored, 2):
        if first_score != second_score and len(pairs) < max_pairs:
            better, worse = (first, second) if first_score > second_score else (second, first)
            pairs.append(_pair(prompt, better, worse, row.number))
    if not pairs:
        raise ValueError("has no two answers of different scores")
    return pairs


def _pair(prompt: str, better: str, worse: str, row: int) -> Preference:
    pair = checked_pair(prompt, better, worse, row)
    return pair._replace(chosen=f" {pair.chosen}", rejected=f" {pair.rejected}")


def _scored_answer(number: int, answer: Any) -> tuple[str, int]:
    if not isinstance(answer, dict):
        raise ValueError(f"answer {number} is a {type(answer).__name__}, expected an object")
    text = text_of(f"answer {number}", answer.get("text"))
    if answer.get("pm_score") is not None:
        return text, answer["pm_score"]
    if answer.get("upvotes") is None:
        raise ValueError(f"answer {number} has neither pm_score nor upvotes")
    return text, answer_score(answer["upvotes"], bool(answer.get("selected")))
