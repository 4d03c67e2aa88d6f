"""Pairs of answers to verdicts, each pair in both orders, and verdicts to a win rate with its interval."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from trl_apa.winrate.cache import VerdictCache
from trl_apa.winrate.verdicts import FIRST as FIRST
from trl_apa.winrate.verdicts import SECOND as SECOND
from trl_apa.winrate.verdicts import TIE, WORTH


class Pair(NamedTuple):
    """Two models' answers to one prompt.

    Args:
        prompt: text or chat messages.
        ours, theirs: the answers of the model whose win rate is computed, and of the other.
        reference: an answer that people chose, for the judge to measure by; None if there is none.
        ours_ended, theirs_ended: whether the answers came to their end; False if they met a limit.
    """

    prompt: Any
    ours: str
    theirs: str
    reference: str | None = None
    ours_ended: bool = True
    theirs_ended: bool = True


class Question(NamedTuple):
    """A judge's question: two answers in the order in which it reads them."""

    prompt: Any
    first: str
    second: str
    reference: str | None = None
    first_ended: bool = True
    second_ended: bool = True


class Judge(Protocol):
    """Says which of two answers is better.

    Attributes:
        identity: everything that its verdicts depend on, as JSON types and without secrets; verdicts of another
            identity are not taken from a cache.
        sees_order: whether a verdict may have position bias; both orders are then judged.
        batch_size (*optional*): questions that it judges together. A batch that was interrupted is asked again as it
            was, because the last bits of a score can depend on the rest of the batch.
    """

    identity: dict[str, Any]
    sees_order: bool

    def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Number of a question and its verdict, in any order as they come: one of `WORTH`, None if it gave none."""


class Judgement(NamedTuple):
    """What was found for one pair.

    Args:
        pair: the pair.
        verdicts: of our answer's place: with ours first, then with theirs first; None where the judge gave none.
            A judge without position bias is asked once.
    """

    pair: Pair
    verdicts: tuple[str | None, ...]

    @property
    def score(self) -> float | None:
        """Ours wins 1, a tie 0.5, theirs wins 0: the mean over the orders, so that a love of one place cancels."""
        verdicts = self.complete_verdicts()
        if verdicts is None:
            return None
        return sum(_worth(order, verdict) for order, verdict in enumerate(verdicts)) / len(verdicts)

    def complete_verdicts(self) -> tuple[str, ...] | None:
        """The verdicts, or None if the judge gave none in one of the orders."""
        given = tuple(verdict for verdict in self.verdicts if verdict is not None)
        return given if len(given) == len(self.verdicts) else None


def _worth(order: int, verdict: str) -> float:
    return WORTH[verdict] if order == 0 else 1.0 - WORTH[verdict]


def compare(pairs: Sequence[Pair], judge: Judge, cache: VerdictCache | None = None) -> list[Judgement]:
    """Ask the judge about every pair, in both orders; identical questions are asked once.

    Args:
        pairs: what is compared.
        judge: see `Judge`.
        cache: verdicts that were given before are taken from it, and every new one is written to it as it comes, so
            that a comparison that was interrupted continues where it stopped. A question without a verdict is asked
            again then.

    Returns:
        One judgement a pair, in their order.

    Raises:
        ValueError: if the judge gives a verdict that is none of `WORTH`.
    """
    orders = 2 if judge.sees_order else 1
    questions = [question for pair in pairs for question in _both_orders(pair)[:orders]]
    keys = [VerdictCache.key(judge.identity, _filed_under(question)) for question in questions]
    different = dict(zip(keys, questions, strict=True))
    found = {} if cache is None else {key: cache.get(key) for key in different}
    verdicts = {key: verdict for key, verdict in found.items() if verdict is not None}
    asked = _batches_with_gaps(list(different), verdicts, getattr(judge, "batch_size", 1))
    for place, verdict in judge([different[key] for key in asked]):
        if verdict is not None and verdict not in WORTH:
            raise ValueError(
                f"the judge gave the verdict {verdict!r}; it should be one of {', '.join(WORTH)}, or None"
            )
        if verdict is None or asked[place] in verdicts:
            continue
        verdicts[asked[place]] = verdict
        if cache is not None:
            cache.put(asked[place], verdict)
    in_order = [verdicts.get(key) for key in keys]
    return [
        Judgement(pair, tuple(in_order[number * orders : (number + 1) * orders])) for number, pair in enumerate(pairs)
    ]


def _batches_with_gaps(keys: Sequence[str], verdicts: Mapping[str, str], batch_size: int) -> list[str]:
    """The keys of every batch that lacks a verdict."""
    batches = (keys[start : start + batch_size] for start in range(0, len(keys), batch_size))
    return [key for batch in batches if any(key not in verdicts for key in batch) for key in batch]


def _both_orders(pair: Pair) -> list[Question]:
    prompt, ours, theirs, reference, *ended = pair
    return [
        Question(prompt, ours, theirs, reference, *ended),
        Question(prompt, theirs, ours, reference, *reversed(ended)),
    ]


def _filed_under(question: Question) -> Sequence[Any]:
    """In the cache the ends stand only where an answer has none."""
    return question if not (question.first_ended and question.second_ended) else question[:4]


def win_rate(
    judgements: Iterable[Judgement], seed: int = 0, num_resamples: int = 10_000, confidence: float = 0.95
) -> dict[str, float]:
    """The share of the pairs that ours won, and how sure that is.

    Args:
        judgements: from `compare`.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.
        confidence: of the interval, in (0, 1).

    Returns:
        `win_rate`, the mean score of the pairs, a tie counting half; `low` and `high`, its percentile bootstrap
        interval, prompts drawn with replacement (answers to the same prompt stay together, because they are not
        independent); `wins`, `ties` and `losses`, pairs with a score above, at and below 0.5; `pairs`, their sum;
        `unreadable`, pairs left out because the judge gave no verdict. Of a judge that saw both orders also
        `agreement`, the share of pairs with the same winner in both, and `first_place`, the share of its decided
        verdicts that went to the answer that came first: 0.5 if it has no love of a place.

    Raises:
        ValueError: if no pair has a verdict, or an option is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: it should be between 0 and 1")
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples}: it should be at least 1")
    judgements = list(judgements)
    judged = [judgement for judgement in judgements if judgement.score is not None]
    if not judged:
        raise ValueError(f"the judge gave no verdict on any of the {len(judgements)} pairs")
    scores = np.array([judgement.score for judgement in judged])
    low, high = _interval(
        scores, [repr(judgement.pair.prompt) for judgement in judged], seed, num_resamples, confidence
    )
    counts = {"wins": scores > 0.5, "ties": scores == 0.5, "losses": scores < 0.5}
    return {
        "win_rate": float(scores.mean()),
        "low": low,
        "high": high,
        **{name: int(which.sum()) for name, which in counts.items()},
        "pairs": len(judged),
        "unreadable": len(judgements) - len(judged),
        **_about_the_orders(judged),
    }


def _interval(
    scores: np.ndarray, prompts: Sequence[str], seed: int, num_resamples: int, confidence: float
) -> tuple[float, float]:
    """Percentile interval of the mean over resampled prompts."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    group = np.array([numbers[prompt] for prompt in prompts])
    sums, counts = np.bincount(group, scores), np.bincount(group)
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for resample in range(num_resamples):
        drawn = rng.integers(len(sums), size=len(sums))
        means[resample] = sums[drawn].sum() / counts[drawn].sum()
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _about_the_orders(judged: Sequence[Judgement]) -> dict[str, float]:
    complete = (judgement.complete_verdicts() for judgement in judged)
    both = [verdicts for verdicts in complete if verdicts is not None and len(verdicts) == 2]
    if not both:
        return {}
    agreement = np.mean([_worth(0, one) == _worth(1, other) for one, other in both])
    decided = [WORTH[verdict] for verdicts in both for verdict in verdicts if verdict != TIE]
    return {"agreement": float(agreement), "first_place": float(np.mean(decided)) if decided else 0.5}
