"""Reddit posts and their summaries (TL;DR), in the layouts of CarperAI/openai_summarize_tldr and _comparisons."""

from pathlib import Path
from typing import TYPE_CHECKING

from trl_apa.data.pairs import Demonstration, Demonstrations, Preference, Preferences, checked_pair, read_pairs
from trl_apa.data.sources import Row, iter_rows, parse_rows, text_column


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "TL;DR:"
DEMONSTRATIONS = "CarperAI/openai_summarize_tldr"
COMPARISONS = "CarperAI/openai_summarize_comparisons"


def tldr_prompt(post: str) -> str:
    """The prompt that a summary continues: the post, and on a line of its own `TL;DR:`, whether it ended so or not.

    Raises:
        ValueError: if there is no post.
    """
    post = post.strip().removesuffix(MARKER).rstrip()
    if not post:
        raise ValueError("the prompt is empty")
    return f"{post}\n{MARKER}"


def cut_tldr_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> str:
    """A prompt of at most `max_tokens` tokens: the end of its post gives way, so that `TL;DR:` survives.

    What cuts a prompt to its last tokens, as `max_prompt_length` does, loses title and subreddit instead.

    Args:
        prompt: a post with or without `TL;DR:`.
        tokenizer: counts.
        max_tokens: special tokens that the tokenizer adds included.

    Raises:
        ValueError: if `TL;DR:` and one token of the post do not fit.
    """
    whole = tldr_prompt(prompt)
    if len(tokenizer(whole)["input_ids"]) <= max_tokens:
        return whole
    post_ids = tokenizer(whole.removesuffix(f"\n{MARKER}"), add_special_tokens=False)["input_ids"]
    # The joint may take a token more or less than its two sides, so the first guess is not always the answer.
    kept = min(len(post_ids), max_tokens)
    while kept > 0:
        post = tokenizer.decode(post_ids[:kept], skip_special_tokens=True).strip()
        over = len(tokenizer(f"{post}\n{MARKER}")["input_ids"]) - max_tokens
        if post and over <= 0:
            return f"{post}\n{MARKER}"
        kept -= max(over, 1)
    raise ValueError(f"max_tokens={max_tokens}: {MARKER!r} and a token of the post do not fit into it")


def read_tldr_demonstrations(
    source: str | Path = DEMONSTRATIONS, *, split: str = "train", limit: int | None = None, strict: bool = False
) -> Demonstrations:
    """Posts with the summaries of their authors: columns `prompt` and `label`.

    Prompts end with `TL;DR:`, and summaries begin with the space that follows it, however the source has it.

    Args:
        source, split: see [`~trl_apa.data.sources.iter_rows`].
        limit: stop after this many rows.
        strict: raise at the first bad row instead of listing it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no row holds a summary or, with `strict`, some row does not.
    """
    rows = iter_rows(source, split=split)
    parsed = parse_rows(rows, lambda row: [demonstration_of_row(row)], str(source), limit, strict)
    found = Demonstrations(str(source), *parsed)
    if not found.rows:
        raise ValueError(f"no summary found\n{found.report()}")
    return found


def read_tldr_comparisons(
    source: str | Path = COMPARISONS, *, split: str = "train", limit: int | None = None, strict: bool = False
) -> Preferences:
    """Posts with two summaries each: columns `prompt`, `chosen` and `rejected`.

    There `TL;DR:` stands before the summaries, not after the post. Here the prompts are as those
    of [`read_tldr_demonstrations`], so that policy and reward model read the same.

    Args, Raises:
        as there.
    """
    return read_pairs(source, lambda row: [comparison_of_row(row)], split=split, limit=limit, strict=strict)


def demonstration_of_row(row: Row) -> Demonstration:
    """A row of [`read_tldr_demonstrations`]; ValueError says why it is none."""
    prompt = tldr_prompt(text_column(row, "prompt"))
    return Demonstration(prompt, _summary(row, "label"), row.number)


def comparison_of_row(row: Row) -> Preference:
    """A row of [`read_tldr_comparisons`]; ValueError says why it is none."""
    prompt = tldr_prompt(text_column(row, "prompt"))
    return checked_pair(prompt, _summary(row, "chosen"), _summary(row, "rejected"), row.number)


def _summary(row: Row, column: str) -> str:
    text = text_column(row, column).strip().removeprefix(MARKER).strip()
    if not text:
        raise ValueError(f"the {column} summary is empty")
    return f" {text}"
