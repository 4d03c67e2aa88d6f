"""What all processes of a run do together, so that none is left waiting for one that failed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trl_apa._trl import _BaseTrainer


class Processes(_BaseTrainer):
    """The part of the trainers in which processes agree on what happened."""

    def _on_all_processes(self, work: Callable[[], Any]) -> Any:
        """Do `work`; if it fails in one process, all raise: none is left waiting.

        Work that talks to other processes has to have talked to all of them before it fails.
        """
        error, result = None, None
        try:
            result = work()
        except Exception as failed:
            error = failed
        failures = self._sum_over_processes(torch.tensor(float(error is not None), device=self.accelerator.device))
        if error is not None:
            raise error
        if failures:
            raise ValueError(f"{int(failures)} other process(es) failed at the same point; see their messages")
        return result

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")
