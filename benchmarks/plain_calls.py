"""The network calls of an APA update and nothing else: what no trainer can be faster than, with the same kernels.

Log pi_init and values of all rollouts; then, for each mini-batch, forward and backward pass of the policy and of a
value network as large, without padding, with logits where a response token is predicted; clipping; fused AdamW. No
statistics, no checks, no generalised advantage estimation: the advantages are the scores.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.workload import Workload
from trl_apa.models.packed_rows import PackedRow
from trl_apa.models.packing import PER_SEQUENCE


KL_COEF = 0.1


class PlainUpdate:
    """Networks, optimizer and rollouts of a workload; `step` is one iteration over them."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.policy = workload.model()
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.value_trunk = copy.deepcopy(self.policy.model)
        width = self.policy.config.hidden_size
        self.value_head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
        for network in (self.policy, self.reference, self.value_trunk):
            network.set_attn_implementation(PER_SEQUENCE)
        self.parameters = [
            parameter
            for network in (self.policy, self.value_trunk, self.value_head)
            for parameter in network.parameters()
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1.41e-5, weight_decay=0.0, fused=True)
        self.queries, self.responses, self.scores = workload.rollouts()

    def step(self) -> None:
        rows, size = range(len(self.queries)), self.workload.mini_batch_size
        mini_batches = [list(rows)[start : start + size] for start in range(0, len(rows), size)]
        with torch.no_grad():
            known = []
            for mini_batch in mini_batches:
                inputs, positions, targets = self.layout(mini_batch)
                ref_logprobs = logprobs(self.reference, inputs, positions, targets)
                values = self.values(inputs, positions)
                advantages = torch.cat([self.scores[row].expand(len(self.responses[row])) for row in mini_batch])
                known.append((ref_logprobs, advantages, values + advantages))
        for _ in range(self.workload.epochs):
            for mini_batch, (ref_logprobs, advantages, returns) in zip(mini_batches, known, strict=True):
                inputs, positions, targets = self.layout(mini_batch)
                residual = logprobs(self.policy, inputs, positions, targets) - ref_logprobs - advantages / KL_COEF
                error = self.values(inputs, positions) - returns
                (residual.square().mean() + 0.5 * error.square().mean()).backward()
                nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def layout(self, rows: list[int]) -> tuple[dict, Tensor, Tensor]:
        """All sequences in one row; the positions that predict their responses; the response tokens."""
        sequences = [torch.cat([self.queries[row], self.responses[row]]) for row in rows]
        lengths = tuple(len(sequence) for sequence in sequences)
        starts = torch.tensor((0, *lengths[:-1])).cumsum(0).tolist()
        positions = [
            torch.arange(start + len(self.queries[row]) - 1, start + length - 1)
            for row, start, length in zip(rows, starts, lengths, strict=True)
        ]
        inputs = {
            "input_ids": torch.cat(sequences)[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
            "packed_row": PackedRow(lengths),
            "use_cache": False,
        }
        return inputs, torch.cat(positions), torch.cat([self.responses[row] for row in rows])

    def values(self, inputs: dict, positions: Tensor) -> Tensor:
        return self.value_head(self.value_trunk(**inputs).last_hidden_state[0, positions])[:, 0]


def logprobs(model: nn.Module, inputs: dict, positions: Tensor, targets: Tensor) -> Tensor:
    logits = model.lm_head(model.model(**inputs).last_hidden_state[0, positions])
    return -cross_entropy(logits, targets, reduction="none")
