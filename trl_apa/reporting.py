"""The Trainer's reporters (W&B, TensorBoard, ...) in the classic loop."""

from collections.abc import Iterable

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks


def start_reporters(
    callbacks: Iterable[TrainerCallback],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    model: nn.Module,
) -> None:
    """Tell those of `callbacks` that report to a tracker in `args.report_to` that training begins.

    They open their runs then, and the classic loop never announces it.
    """
    reporters = tuple(get_reporting_integration_callbacks(args.report_to))
    for callback in callbacks:
        if reporters and isinstance(callback, reporters):
            callback.on_train_begin(args, state, control, model=model)
