"""The figures of a run's log that a model card shows: first, last and best."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import PurePath
from typing import Any, NamedTuple

from trl_apa.cards.card import Figure


# What a row of the log has that tells of a checkpoint loaded at the end: the step of that one.
LOADED_STEP = "loaded_step"
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
# Every evaluation logs how long it took. Other statistics have prefixes too: TRL's `eval_min_reward`.
NAMED_RUNTIME = re.compile(r"eval_(?P<name>.+)_runtime")


def note_loaded_step(state: Any) -> None:
    """Log that the best checkpoint has replaced the last weights.

    Args:
        state: the trainer's, with the folder of that checkpoint.
    """
    step = int(PurePath(state.best_model_checkpoint).name.rpartition("-")[2])
    state.log_history.append({LOADED_STEP: step, "step": state.global_step})


def step_of_weights(history: Sequence[Mapping[str, Any]], steps: int) -> int:
    """The optimizer step that the weights are of: the last, unless the best checkpoint was loaded after it.

    Args:
        history: rows of `trainer_state.json`.
        steps: optimizer steps made.
    """
    loaded = [row for row in history if LOADED_STEP in row]
    return int(loaded[-1][LOADED_STEP]) if loaded and loaded[-1]["step"] == steps else steps


def figures_of(
    history: Sequence[Mapping[str, Any]], training: Sequence[Column] = TRAINING, steps: int | None = None
) -> list[Figure]:
    """What a log says of `training`, and of held-out prompts.

    The last figures are those of the weights that there are at the end, be it of the best checkpoint.

    Args:
        history: rows of `trainer_state.json`, each with the optimizer step at which it was logged.
        training: statistics of the training to show.
        steps: optimizer steps made; by default those of the last row.
    """
    rows = list(_with_steps_of_weights(history))
    steps = max((row.get("step", 0) for row in history), default=0) if steps is None else steps
    end = step_of_weights(history, steps)
    found = [*training, *(_held_out(rows) if training is TRAINING else ())]
    figures = (_figure(rows, column, end if end < steps else math.inf) for column in found)
    return [figure for figure in figures if figure is not None]


def _with_steps_of_weights(history: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """What is measured after the best checkpoint was loaded is of that one's step."""
    loaded: Mapping[str, Any] = {}
    for row in history:
        loaded = row if LOADED_STEP in row else loaded
        is_of_loaded = bool(loaded) and row.get("step") == loaded["step"]
        yield {**row, "step": loaded[LOADED_STEP]} if is_of_loaded else row


def _held_out(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of `HELD_OUT` that the log has: `eval_reward`, or `eval_<data set>_reward` of one of several."""
    logged = {key for row in rows for key in row}
    names = sorted(match["name"] for key in logged if (match := NAMED_RUNTIME.fullmatch(key)))
    of_names = [
        Column(f"eval_{name}_{key}", f"held-out prompts, {name}: {meaning}", better)
        for name in names
        for key, meaning, better in HELD_OUT
    ]
    taken = {column.key for column in of_names}
    alone = [Column(f"eval_{key}", f"held-out prompts: {meaning}", better) for key, meaning, better in HELD_OUT]
    return [column for column in alone if column.key not in taken] + of_names


def _figure(rows: Sequence[Mapping[str, Any]], column: Column, end: float) -> Figure | None:
    """Args: `end`: the step that the last figure is of at most."""
    key, meaning, better = column
    measured = [row for row in rows if isinstance(row.get(key), Real)]
    if not measured:
        return None
    finite = [row for row in measured if better and math.isfinite(row[key])]
    best = max(finite, key=lambda row: better * row[key]) if finite else None
    by_then = [row for row in measured if row.get("step", 0) <= end]
    return Figure(
        meaning,
        first=_shown(measured[0], key),
        last=_shown(by_then[-1], key) if by_then else "",
        best="" if best is None else _shown(best, key) + (f" (step {best['step']})" if "step" in best else ""),
    )


def _shown(row: Mapping[str, Any], key: str) -> str:
    text = f"{row[key]:.4g}"
    error = row.get(f"{key}_stderr")
    return text if not isinstance(error, Real) else f"{text} ± {NUM_STDERRS * float(error):.2g}"
