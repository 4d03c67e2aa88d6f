"""SIGTERM and Ctrl-C: a checkpoint after the current optimizer step, then the end."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


logger = logging.getLogger(__name__)
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
# torchrun passes a Ctrl-C on to processes that have had it from the terminal already.
SAME_KEYPRESS_SECONDS = 1.0


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT, saves a checkpoint after the current optimizer step and ends the run.

    Schedulers send SIGTERM some seconds before they end a process. All processes stop at the same step, even if only
    some of them were told. A second Ctrl-C ends the process at once.

    Args:
        sum_over_processes: adds a tensor up over the processes.
    """

    def __init__(self, sum_over_processes: Callable[[Tensor], Tensor]):
        self.sum_over_processes = sum_over_processes
        self._forget()

    def _forget(self) -> None:
        self.noted: signal.Signals | None = None
        self.received: signal.Signals | None = None
        self.at_once = False
        self._noted_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal is only recorded; afterwards the old handlers are restored.

        Signals reach the main thread alone: elsewhere nothing is changed. A signal that came after the last optimizer
        step, when there is nothing to save any more, is passed on.
        """
        self._forget()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Background jobs of a shell ignore Ctrl-C; keep that.
        heard = [number for number in NAMES if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.noted and not self.received:
            signal.raise_signal(self.noted)

    def _note(self, number: int, frame: Any) -> None:
        if self.noted is not None:
            if number == signal.SIGINT and not self._is_same_keypress():
                self.at_once = True
                raise KeyboardInterrupt
            return
        self.noted, self._noted_at = signal.Signals(number), time.monotonic()
        again = "; a second Ctrl-C ends it at once, without a checkpoint" if number == signal.SIGINT else ""
        with suppress(RuntimeError):  # the signal may have come in the middle of another line
            logger.warning("%s: the run ends with a checkpoint after this optimizer step%s", NAMES[self.noted], again)

    def _is_same_keypress(self) -> bool:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        return launched and time.monotonic() - self._noted_at < SAME_KEYPRESS_SECONDS

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Two attributes, because a signal may come while the processes agree.
        self.received = self.noted
        if args.world_size > 1:
            largest = self.sum_over_processes(torch.tensor(float(self.noted or 0), device=args.device))
            if largest and self.received is None:
                self.received = signal.SIGTERM
        if self.received:
            control.should_save = control.should_training_stop = True

    def raise_exit(self, step: int, where: str) -> None:
        """Raise SystemExit with the signal's status, 143 or 130, if a signal ended the run.

        Args:
            step: optimizer steps of the last checkpoint.
            where: its folder.
        """
        if self.received:
            logger.warning(
                "%s: a checkpoint of step %d is in %s; continue with train(resume_from_checkpoint=True)",
                NAMES[self.received],
                step,
                where,
            )
            raise SystemExit(128 + self.received)
