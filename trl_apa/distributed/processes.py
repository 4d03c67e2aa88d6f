"""What the processes of a run do together: sums, and work that fails on all of them if it fails on one."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from trl_apa.trainer.signals import StopOnSignal
from trl_apa.values import described_error


T = TypeVar("T")


class Processes:
    """All processes of a run.

    Args:
        accelerator: of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        # A second Ctrl-C does not wait for other processes.
        self.stop_on_signal = StopOnSignal(self.sum)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, the same on each."""
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def largest(self, count: int) -> int:
        """The largest count of all processes."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def together(self, work: Callable[[], T]) -> T:
        """Do `work`; if it fails in one process, with `SystemExit` too, all raise: none is left waiting.

        Work that talks to other processes has to have talked to all of them before it fails.

        Raises:
            ValueError: if it failed only in other processes, with their messages.
        """
        error: BaseException | None = None
        results: list[T] = []
        try:
            results.append(work())
        except BaseException as failed:
            if self.stop_on_signal.at_once:
                raise
            error = failed
        failures = self.sum(torch.tensor(float(error is not None), device=self.accelerator.device))
        if failures and self.accelerator.num_processes > 1:
            process = self.accelerator.process_index
            told = [] if error is None else [f"process {process}: {described_error(error)[:1000]}"]
            messages = gather_object(told)
        if error is not None:
            raise error
        if failures:
            raise ValueError(f"{int(failures)} other process(es) failed at the same point: {'; '.join(messages)}")
        return results[0]
