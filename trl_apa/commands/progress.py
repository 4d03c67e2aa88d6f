"""What a training command prints: a line of the figures that tell whether it works, instead of every statistic."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

from trl_apa.trainer.tracker_failures import isolate_failures


# Name on the line, statistic, format.
Column = tuple[str, str, str]
APA_COLUMNS: tuple[Column, ...] = (
    ("reward", "apa/mean_scores", "{:+.3f}"),
    ("KL", "objective/kl", "{:.3f}"),
    ("entropy", "apa/policy/entropy", "{:.3f}"),
    ("length", "tokens/responses_len_mean", "{:.1f}"),
    ("value explained", "apa/val/var_explained", "{:.2f}"),
    ("held-out reward", "eval_reward", "{:+.3f}"),
    ("held-out KL", "eval_kl", "{:.3f}"),
    ("wins", "eval_win_rate", "{:.3f}"),
)
SFT_COLUMNS: tuple[Column, ...] = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "mean_token_accuracy", "{:.3f}"),
    ("held-out loss", "eval_loss", "{:.4f}"),
    ("held-out accuracy", "eval_mean_token_accuracy", "{:.3f}"),
)
REWARD_COLUMNS: tuple[Column, ...] = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("margin", "margin", "{:.3f}"),
    ("held-out loss", "eval_loss", "{:.4f}"),
    ("held-out accuracy", "eval_accuracy", "{:.3f}"),
)


def shown_figures(logs: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """`reward +0.125`, for each of `columns` that the log has."""
    return [f"{name} {form.format(logs[key])}" for name, key, form in columns if key in logs]


def print_line(place: str, values: Sequence[str], start: float) -> None:
    """One line of progress.

    Args:
        place: how far it is: `step 4/100`.
        values: of `shown_figures`.
        start: when it began, as `time.monotonic` tells.
    """
    print("  ".join([place, *values, f"({time.monotonic() - start:.0f} s)"]), flush=True)


class ProgressLines(PrinterCallback):
    """Prints one line for each time that the trainer logs.

    Args:
        columns: what stands on it, where the log has it.
    """

    def __init__(self, columns: Sequence[Column]):
        self.columns = columns
        self.start = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = shown_figures(logs or {}, self.columns)
        if values and state.is_world_process_zero:
            print_line(f"step {state.global_step}/{state.max_steps}", values, self.start)


def print_lines(trainer: Trainer, columns: Sequence[Column]) -> None:
    """Let `trainer` print lines in place of its dicts and its bar; neither these nor a tracker can end the run."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressLines(columns))
    isolate_failures(trainer.callback_handler.callbacks)
