"""One iteration of Algorithm 1, from its rollouts to its last optimizer step: its plan and its progress."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trl_apa.rollout.batch import Layout, Rollouts, send
from trl_apa.trainer.statistics import UpdateRecord


@dataclass
class Iteration:
    """The rollouts of one iteration, the optimizer steps planned over them, and how many micro-batches are done.

    It can be saved and restored at any point: see `state_dict`.

    Args:
        rollouts: with log pi_init and advantages, and with a value model values and returns, filled in.
        ended_B: bool, whether a response ended with EOS.
        plan: the rows of each optimizer step, an epoch after the other.
        num_tokens: counted tokens of each optimizer step on all processes, `(len(plan),)`.
        num_responses: responses with a counted token, likewise; None in an iteration that an older version saved.
        groups: a number for each row, the same for rows that the loss compares; None if it compares none.
        steps_per_epoch: optimizer steps of one pass over the rollouts.
        micro_batch_size: rows a forward pass.
        record: what the passes leave behind for the statistics.
        position: micro-batches of `micro_batch_size` rows handed out so far.
        cuts: for each optimizer step the rows of its forward passes, where `tokens_per_micro_batch` cuts them and not
            `micro_batch_size`; not saved.
        stopped: whether what remains is left out.
    """

    rollouts: Rollouts
    ended_B: Tensor
    plan: list[list[int]]
    num_tokens: Tensor
    steps_per_epoch: int
    micro_batch_size: int
    record: UpdateRecord
    position: int = 0
    stopped: bool = False
    num_responses: Tensor | None = None
    groups: list[int] | None = None
    cuts: list[list[list[int]]] | None = None

    @classmethod
    def begin(
        cls,
        rollouts: Rollouts,
        ended_B: Tensor,
        epochs: list[list[list[int]]],
        micro_batch_size: int,
        reduce_sum: Callable[[Tensor], Tensor],
        groups: list[int] | None = None,
    ) -> "Iteration":
        """
        Args:
            epochs: for each pass over the rollouts, the rows of its optimizer steps.
            reduce_sum: adds a tensor up over the processes.
            groups: as above.
        """
        plan = [rows for epoch in epochs for rows in epoch]
        counts_B = rollouts.response_mask_BR.sum(dim=1)
        counts = torch.stack([torch.stack([counts_B[rows].sum(), (counts_B[rows] > 0).sum()]) for rows in plan])
        num_tokens, num_responses = reduce_sum(counts).clamp(min=1).unbind(dim=1)
        record = UpdateRecord.empty(rollouts.response_mask_BR)
        sizes = len(epochs[0]), micro_batch_size
        return cls(rollouts, ended_B, plan, num_tokens, *sizes, record, num_responses=num_responses, groups=groups)

    @property
    def micro_batches_per_step(self) -> int:
        return -(-len(self.plan[0]) // self.micro_batch_size)

    @property
    def steps_done(self) -> int:
        """Optimizer steps whose micro-batches were all handed out."""
        return self.position // self.micro_batches_per_step

    @property
    def starts_step(self) -> bool:
        """Whether the micro-batch that was handed out last was the first of its optimizer step."""
        return (self.position - 1) % self.micro_batches_per_step == 0

    @property
    def ends_step(self) -> bool:
        """Whether the micro-batch that was handed out last was the last of its optimizer step."""
        return self.position % self.micro_batches_per_step == 0

    @property
    def ends_epoch(self) -> bool:
        """Whether the optimizer step that was handed out last was the last of its pass over the rollouts."""
        return self.ends_step and self.steps_done % self.steps_per_epoch == 0

    @property
    def finished(self) -> bool:
        return self.stopped or self.steps_done == len(self.plan)

    @property
    def epochs_done(self) -> float:
        return self.steps_done / self.steps_per_epoch

    def next_passes(self) -> list[list[int]]:
        """The rows of the forward passes of the plan's next micro-batch.

        One pass; with `cuts` none until the last micro-batch of an optimizer step, which has all of the step's.
        """
        step, number = divmod(self.position, self.micro_batches_per_step)
        if number == 0:
            self.record.observing = step < self.steps_per_epoch
            self.record.optimizer_steps.append({})
        self.position += 1
        if self.cuts is not None:
            return self.cuts[step] if self.ends_step else []
        start = number * self.micro_batch_size
        return [self.plan[step][start : start + self.micro_batch_size]]

    def batch(self, rows: list[int], pad_token_id: int, layout_for: Callable[..., Layout]) -> dict[str, Any]:
        """Rows of a forward pass as `Rollouts.micro_batch` gives them, and what the loss reads beside.

        Args:
            rows: of a pass that was handed out last.
            pad_token_id: what to fill with.
            layout_for: tokens of the longest row, and whether rows `share` a prompt, to the layout of a pass.
        """
        step = (self.position - 1) // self.micro_batches_per_step
        layout = layout_for(self.rollouts.longest(rows), share=self.rollouts.share_prompts(rows))
        more = {"num_tokens": self.num_tokens[step]}
        if self.num_responses is not None:
            more["num_responses"] = self.num_responses[step]
        if self.groups is not None:
            more["groups"] = send(torch.tensor([self.groups[row] for row in rows]), self.rollouts.device)
        batch = self.rollouts.micro_batch(rows, pad_token_id, layout) | more
        weights_BR = self.rollouts.importance_weights_BR
        if weights_BR is not None:
            batch["advantages"] = batch["advantages"] * weights_BR[batch["rows"], : batch["advantages"].shape[1]]
        return batch

    def rewind(self, position: int, num_norms: int) -> None:
        """As it was when `position` micro-batches, the last one the last of its optimizer step, were handed out.

        Log-probs and entropies of rows that were first visited later stay; they are observed again.

        Args:
            num_norms: gradients whose norms were noted by then; a mini-batch that was skipped has none.
        """
        self.position, self.stopped = position, False
        self.record.observing = self.steps_done <= self.steps_per_epoch
        del self.record.optimizer_steps[self.steps_done :]
        del self.record.grad_norms[num_norms:]

    def take_back_step(self) -> None:
        """The optimizer step whose micro-batches were all handed out last counts as not begun."""
        self.position -= self.micro_batches_per_step
        self.record.optimizer_steps.pop()
        self.record.grad_norms.pop()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the cuts, as tensors, numbers and containers of these."""
        shallow = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "cuts"}
        return shallow | {name: vars(shallow[name]) for name in ("rollouts", "record")}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "Iteration":
        """What `state_dict` gave, with its tensors on `device`."""
        state = _to_device(state, device)
        rollouts, record = Rollouts(**state["rollouts"]), UpdateRecord(**state["record"])
        return cls(**{**state, "rollouts": rollouts, "record": record})


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _to_device(element, device) for name, element in value.items()}
    if isinstance(value, list):
        return [_to_device(element, device) for element in value]
    return value
