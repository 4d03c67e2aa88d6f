"""The denominator of offline losses: the counted tokens of the complete optimizer step, on all processes."""

from collections.abc import Iterator
from typing import Any

import torch

from trl_apa._trl import _BaseTrainer


Batch = dict[str, Any]


class CountsTokens(_BaseTrainer):
    """A trainer whose micro-batches have a `response_mask`, and whose loss is divided by the counted tokens."""

    # The loss is divided by the tokens of the complete optimizer step, so the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The micro-batches of an optimizer step, and its counted tokens on all processes: the losses' denominator."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum((batch["response_mask"].sum() for batch in batches), torch.zeros((), dtype=torch.long))
        return batches, self.accelerator.reduce(count.to(device).float(), reduction="sum")
