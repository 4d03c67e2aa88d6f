"""The figures of a run's log that a model card shows: first, last and best."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from trl_apa.cards.card import Figure


# Standard errors on either side of a mean, for an interval of 95%.
NUM_STDERRS = 1.96


class Column(NamedTuple):
    """A statistic that is shown.

    Args:
        key: its name in the log, without `eval_` where it is measured on held-out prompts.
        meaning: what it is, with its unit.
        better: 1 if more is better, -1 if less is, 0 if neither.
    """

    key: str
    meaning: str
    better: int = 0


TRAINING = (
    Column("apa/mean_scores", "reward of the rollouts", 1),
    Column("objective/kl", "KL to the initial model, nats per response"),
    Column("apa/policy/entropy", "entropy, nats per token"),
    Column("tokens/responses_len_mean", "response length, tokens"),
    Column("loss", "training loss", -1),
    Column("mean_token_accuracy", "accuracy on tokens", 1),
    Column("accuracy", "accuracy on pairs", 1),
)
HELD_OUT = (
    Column("gold_reward", "gold reward", 1),
    Column("ref_reward", "reward of the initial model"),
    Column("reward", "reward", 1),
    Column("win_rate", "wins over the initial model, a tie counting half", 1),
    Column("kl", "KL to the initial model, nats per response"),
    Column("entropy", "entropy, nats per token"),
    Column("response_length", "response length, tokens"),
    Column("loss", "loss", -1),
    Column("mean_token_accuracy", "accuracy on tokens", 1),
    Column("accuracy", "accuracy on pairs", 1),
)
OF_VALUES = (
    Column("apa/val/var_explained", "share of the returns' variance that is explained", 1),
    Column("apa/loss/value", "value loss", -1),
    Column("value/error", "squared error of the returns", -1),
)
# `eval_reward`, or `eval_<data set>_reward` of one of several.
HELD_OUT_KEY = re.compile(rf"eval_(?:(?P<name>.+?)_)??(?P<key>{'|'.join(column.key for column in HELD_OUT)})")


def figures_of(history: Iterable[Mapping[str, Any]], training: Sequence[Column] = TRAINING) -> list[Figure]:
    """What a log says of `training`, and of held-out prompts.

    Args:
        history: rows of `trainer_state.json`, each with the optimizer step at which it was logged.
        training: statistics of the training to show.
    """
    rows = list(history)
    found = [*training, *(_held_out(rows) if training is TRAINING else ())]
    return [figure for column in found if (figure := _figure(rows, column)) is not None]


def _held_out(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of `HELD_OUT` that the log has, data set by data set."""
    keys = [column.key for column in HELD_OUT]
    found = {}
    for key in {key for row in rows for key in row}:
        if match := HELD_OUT_KEY.fullmatch(key):
            place, column = keys.index(match["key"]), HELD_OUT[keys.index(match["key"])]
            where = "held-out prompts" if match["name"] is None else f"held-out prompts, {match['name']}"
            found[match["name"] or "", place] = Column(key, f"{where}: {column.meaning}", column.better)
    return [found[place] for place in sorted(found)]


def _figure(rows: Sequence[Mapping[str, Any]], column: Column) -> Figure | None:
    key, meaning, better = column
    measured = [row for row in rows if isinstance(row.get(key), Real)]
    if not measured:
        return None
    finite = [row for row in measured if better and math.isfinite(row[key])]
    best = max(finite, key=lambda row: better * row[key]) if finite else None
    return Figure(
        meaning,
        first=_shown(measured[0], key),
        last=_shown(measured[-1], key),
        best="" if best is None else _shown(best, key) + (f" (step {best['step']})" if "step" in best else ""),
    )


def _shown(row: Mapping[str, Any], key: str) -> str:
    text = f"{row[key]:.4g}"
    error = row.get(f"{key}_stderr")
    return text if not isinstance(error, Real) else f"{text} ± {NUM_STDERRS * float(error):.2g}"
