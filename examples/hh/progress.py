"""What a stage says while it works: plain lines with the time, readable in a terminal and in a log file alike."""

import time

from transformers import PrinterCallback, Trainer, TrainerCallback


_START = time.monotonic()


def say(stage: str, text: str) -> None:
    """One line: seconds since the start, stage, text."""
    print(f"{time.monotonic() - _START:7.1f}s  {stage:<6}  {text}", flush=True)


class ProgressLines(TrainerCallback):
    """Prints what a trainer logs, one line a report."""

    def __init__(self, stage: str, shown: tuple[str, ...]):
        self.stage = stage
        self.shown = shown

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = "  ".join(f"{name} {float(logs[name]):.3f}" for name in self.shown if name in (logs or {}))
        if values:
            say(self.stage, f"step {state.global_step}/{state.max_steps}  {values}")


def use_progress_lines(trainer: Trainer, stage: str, *shown: str) -> None:
    """Have `trainer` report `shown` through [`ProgressLines`] instead of printing dictionaries."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLines(stage, shown))
