"""What lets a run go on: whole checkpoints told from torn ones, the state beside the weights, a shut-down in time."""

import json
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints


STATE_FILE = "apa_state_{process}.pt"
# Options that a plan of optimizer steps, or the order of the prompts, was made by.
MUST_AGREE = (
    "loss_type",
    "seed",
    "batch_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_epochs_per_batch",
    "num_generations",
    "world_size",
)


def described(network: nn.Module) -> str:
    """What tells the networks of one run from those of another: kinds, and numbers of weights and of trained ones."""
    kinds = [type(part).__name__ for part in network.modules() if isinstance(part, PreTrainedModel | PeftModel)]
    weights = [parameter.numel() for parameter in network.parameters()]
    trained = [parameter.numel() for parameter in network.parameters() if parameter.requires_grad]
    outermost = ", ".join(dict.fromkeys(kinds))
    return f"{outermost} with {sum(weights):,} weights in {len(weights)} parts, {sum(trained):,} of them trained"


def save_state(folder: str, process_index: int, args: Any, networks: str, state: dict[str, Any]) -> None:
    """Write one process's part of a checkpoint beside weights and optimizer.

    Args:
        folder: the checkpoint's.
        process_index: whose part it is.
        args: the options of the run, of which those in `MUST_AGREE` are kept.
        networks: `described` before the run began.
        state: tensors, numbers, texts and containers of these.
    """
    options = {name: getattr(args, name) for name in MUST_AGREE} | {"networks": networks}
    torch.save({"options": options, **state}, _state_file(folder, process_index))


def load_state(folder: str, process_index: int, args: Any, networks: str) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        ValueError: if there is none, or if it is of a run with other options or networks, naming them.
    """
    path = _state_file(folder, process_index)
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint={os.fspath(folder)!r} has no {path.name}: it is no checkpoint of train(), or one "
            "of fewer processes, or one written with save_only_model"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    then, now = state["options"], {name: getattr(args, name) for name in MUST_AGREE} | {"networks": networks}
    differing = [name for name in now if then.get(name) != now[name]]
    if differing:
        was = ", ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in differing)
        raise ValueError(f"resume_from_checkpoint={os.fspath(folder)!r} is of another run: {was}")
    return state


def _state_file(folder: str, process_index: int) -> Path:
    return Path(folder) / STATE_FILE.format(process=process_index)


def is_complete(checkpoint: str) -> bool:
    """Whether a checkpoint was written to its end, of which the Trainer's own state is the last part."""
    try:
        TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    except (OSError, json.JSONDecodeError, TypeError):
        return False
    return True


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest checkpoint in `output_dir` that was written to its end; warns of torn ones after it.

    Raises:
        ValueError: if there is none.
    """
    checkpoints = sort_checkpoints(output_dir) if os.path.isdir(output_dir) else []
    for checkpoint in reversed(checkpoints):
        if is_complete(checkpoint):
            return checkpoint
        warnings.warn(f"{checkpoint} was not written to its end; going on from the one before it", stacklevel=3)
    raise ValueError(f"resume_from_checkpoint=True, but output_dir={output_dir!r} has no complete checkpoint")


class StopOnSigterm(TrainerCallback):
    """On SIGTERM, saves a checkpoint after the current optimizer step and ends the run.

    Schedulers send that signal some seconds before they end a process. All processes stop at the same step, even if
    only some of them were told.

    Args:
        sum_over_processes: adds a tensor up over the processes.
    """

    def __init__(self, sum_over_processes: Callable[[Tensor], Tensor]):
        self.sum_over_processes = sum_over_processes
        self.noted = self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM only leaves a note; afterwards its handler is what it was.

        Signals reach the main thread alone: elsewhere nothing is changed. A signal that came after the last optimizer
        step, when there is nothing to save any more, is passed on.
        """
        self.noted = self.received = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.noted and not self.received:
            signal.raise_signal(signal.SIGTERM)

    def _note(self, signum: int, frame: Any) -> None:
        self.noted = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Two flags, because a signal may come while the processes agree.
        self.received = self.noted
        if args.world_size > 1:
            self.received = bool(self.sum_over_processes(torch.tensor(float(self.noted), device=args.device)))
        if self.received:
            control.should_save = control.should_training_stop = True


@contextmanager
def random_state_restored_on_error() -> Iterator[None]:
    """If the inside fails, the generators of Python, NumPy and torch go on as if it had not been tried."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    except BaseException:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        raise
