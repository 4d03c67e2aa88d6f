"""The denominator of offline losses: tokens or responses of the complete optimizer step, on all processes."""

from collections.abc import Iterator
from typing import Any

import torch

from trl_apa._trl import _BaseTrainer


Batch = dict[str, Any]


class CountsTokens(_BaseTrainer):
    """A trainer whose micro-batches have a `response_mask`, and whose loss is divided by the counted tokens.

    With `counts_responses` it is divided by the responses that have one.
    """

    counts_responses = False

    # The loss is divided by the tokens of the complete optimizer step, so the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The micro-batches of an optimizer step, and the losses' denominator, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        masks = [batch["response_mask"] for batch in batches]
        counted = [mask_BR.any(dim=1) if self.counts_responses else mask_BR for mask_BR in masks]
        count = sum((mask.sum() for mask in counted), torch.zeros((), dtype=torch.long))
        return batches, self.accelerator.reduce(count.to(device).float(), reduction="sum")
