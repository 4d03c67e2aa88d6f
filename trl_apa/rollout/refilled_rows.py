"""Sampling in which waiting prompts take the places of rows that have ended."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from trl_apa.models.caches import cache_of
from trl_apa.models.network_parts import Network
from trl_apa.rollout.batch import pad_queries
from trl_apa.rollout.cache_merging import Begun, fitted, joined
from trl_apa.rollout.finished_rows import (
    UntilSomeEnd,
    enough_to_drop,
    greedy_copy,
    one_token,
    read_once,
    restarted,
    warpers_of,
)
from trl_apa.rollout.sampled_logprobs import LogprobNoter
from trl_apa.rollout.shared_prompts import equal_queries


# Waiting prompts are read when this share of the places is free, and at least one: each time the cache is copied and
# calls of `generate` begin.
REFILLED_SHARE = 0.25


class StreamChoice(LogitsProcessor):
    """Leaves each row one token, sampled with the row's own random numbers: one for each of its tokens.

    The token is the first at which the sum of the probabilities exceeds the number.

    Args:
        config: `do_sample`, `temperature`, `top_k`, `top_p`.
        num_rows, limit: rows of the call, and most tokens of a response.
        device: of the tokens; the numbers are drawn from its generator.
    """

    def __init__(self, config: GenerationConfig, num_rows: int, limit: int, device: torch.device):
        self.warpers, self.samples = warpers_of(config), bool(config.do_sample)
        # Which rows are asked, and in which column of their tokens the response of each begins.
        self.rows_A = self.starts_A = torch.zeros(0, dtype=torch.long, device=device)
        if self.samples:
            self.uniform_BR = torch.rand(num_rows, limit, dtype=torch.float64, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.samples:
            return scores
        number_A = input_ids.shape[1] - self.starts_A
        below_AV = self.warpers(input_ids, scores).softmax(dim=-1).double().cumsum(dim=-1)
        total_A1 = below_AV[:, -1:]
        point_A1 = self.uniform_BR[self.rows_A, number_A][:, None].to(scores.device) * total_A1
        # The last token with a probability, where rounding makes the point the total.
        last_A1 = torch.searchsorted(below_AV, total_A1).clamp(max=scores.shape[-1] - 1)
        chosen_A1 = torch.searchsorted(below_AV, point_A1, right=True).minimum(last_A1)
        return one_token(scores, chosen_A1)


class RowEnds(StoppingCriteria):
    """Remembers after how many tokens each row ended: on EOS, a stop string or its limit.

    Args:
        criteria: what ends a row; they see the tokens of its response.
        starts_A: column in which the response of each row begins.
        limits_A: most tokens of each.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria], starts_A: Tensor, limits_A: Tensor):
        self.starts_A, self.limits_A = starts_A, limits_A
        self.lengths_A = torch.zeros_like(starts_A)
        self.of_last = [criterion for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
        self.of_all = [criterion for criterion in criteria if not isinstance(criterion, EosTokenCriteria)]
        starts = set(starts_A.tolist()) if self.of_all else set()
        self.together = [(start, (starts_A == start).nonzero()[:, 0]) for start in sorted(starts)]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        generated_A = input_ids.shape[1] - self.starts_A
        done_A = generated_A >= self.limits_A
        for criterion in self.of_last:
            done_A |= criterion(input_ids, scores, **kwargs).to(done_A.device)
        for start, rows in self.together:
            for criterion in self.of_all:
                done_A[rows] |= criterion(input_ids[rows, start:], scores, **kwargs).to(done_A.device)
        self.lengths_A = torch.where(done_A & (self.lengths_A == 0), generated_A, self.lengths_A)
        return self.lengths_A > 0


class _Read(NamedTuple):
    """Prompts that were read: the number of each, their columns, and the cache and logits of `generate`."""

    prompts: list[int]
    width: int
    cache: Any
    logits_UV: Tensor
    noted_UV: Tensor | None

    def only(self, prompt: int) -> "_Read":
        """Without the other prompts, which are deleted from the cache."""
        kept = torch.tensor([self.prompts.index(prompt)])  # on the CPU, which chooses rows on any device
        self.cache.batch_select_indices(kept)
        noted_UV = None if self.noted_UV is None else self.noted_UV[kept]
        return self._replace(prompts=[prompt], logits_UV=self.logits_UV[kept], noted_UV=noted_UV)


class RefilledRows:
    """The rows that are sampled at a time, and those that wait.

    Args:
        model: a decoder in eval mode for which `models.layouts.rows_can_be_joined`.
        queries: 1-D token ids.
        limits: most tokens of each response.
        size: rows that are sampled at a time.
        config: options, all among `finished_rows.KNOWN`.
        criteria: what ends a row before its limit.
        noter: sees the logits.
    """

    def __init__(
        self,
        model: Network,
        queries: Sequence[Tensor],
        limits: Sequence[int],
        size: int,
        config: GenerationConfig,
        criteria: Sequence[StoppingCriteria],
        noter: LogprobNoter,
    ):
        self.model, self.queries, self.size, self.criteria, self.noter = model, queries, size, criteria, noter
        self.device = next(model.parameters()).device
        self.limits_B = torch.tensor(limits, device=self.device)
        self.greedy = greedy_copy(config)
        self.choice = StreamChoice(config, len(queries), max(limits), self.device)
        self.prompts = equal_queries(queries)
        # Rows with one prompt are neighbours, so that only the newest prompts that were read have to be kept.
        self.waiting = sorted(range(len(queries)), key=lambda row: (len(queries[row]), self.prompts[row]))
        self.read: _Read | None = None
        self.alive = torch.zeros(0, dtype=torch.long, device=self.device)
        self.begun: Begun | None = None
        self.responses: list[Tensor] = [self.alive] * len(queries)
        self.logprobs_BR = torch.zeros(len(queries), max(limits), device=self.device)
        self.saw_all_logits = True

    def run(self) -> tuple[list[Tensor], Tensor | None]:
        """The response to each query; and log-probs of their tokens, nats, `(B, R)`, None unless all were seen."""
        self._refill()
        while self.begun is not None:
            self.begun = self._sample(self.begun)
            self._refill()
        return self.responses, self.logprobs_BR if self.saw_all_logits else None

    def _refill(self) -> None:
        while self.waiting and len(self.alive) < self.size:
            free = self.size - len(self.alive)
            read = self.read or self._read_prompts(self.waiting[:free])
            rows = [row for row in self.waiting[:free] if self.prompts[row] in read.prompts]
            self.waiting = self.waiting[len(rows) :]
            self.read = read if self.waiting and self.prompts[self.waiting[0]] in read.prompts else None
            self._begin(rows, read)
            if self.read is not None:
                self.read = self.read.only(self.prompts[self.waiting[0]])

    def _read_prompts(self, rows: list[int]) -> _Read:
        """Read the prompts of these rows, each once."""
        prompts = list(dict.fromkeys(self.prompts[row] for row in rows))
        queries = [self.queries[self.prompts.index(prompt)] for prompt in prompts]
        inputs = pad_queries(queries, self.greedy.pad_token_id)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        begun = read_once(self.model, inputs, range(len(prompts)), self.greedy)
        noted_UV, self.noter.logits_BV = self.noter.logits_BV, None
        return _Read(prompts, inputs["input_ids"].shape[1], cache_of(begun), begun.logits[0], noted_UV)

    def _begin(self, rows: list[int], read: _Read) -> None:
        """Sample the first tokens of rows whose prompts were read, and let them be sampled with the others."""
        new = torch.tensor(rows, device=self.device)
        of_read = torch.tensor([read.prompts.index(self.prompts[row]) for row in rows], device=self.device)
        inputs = pad_queries([self.queries[row] for row in rows], self.greedy.pad_token_id)
        tokens_NT = fitted(inputs["input_ids"].to(self.device), read.width, value=self.greedy.pad_token_id)
        mask_NT = fitted(inputs["attention_mask"].to(self.device), read.width)
        starts_N = torch.full_like(new, read.width)
        self.choice.rows_A, self.choice.starts_A = new, starts_N
        scores_NV = self.choice(tokens_NT, read.logits_UV[of_read])
        tokens_NT = torch.cat([tokens_NT, scores_NV.argmax(dim=-1, keepdim=True)], dim=1)
        self.noter.logits_BV = read.noted_UV
        self.noter.repeat(of_read)
        self.noter(tokens_NT, None)
        ends = RowEnds(self.criteria, starts_N, self.limits_B[new])
        ends(tokens_NT, None)
        self._note(new, tokens_NT, ends, torch.zeros_like(new))
        kept = (ends.lengths_A == 0).nonzero()[:, 0]
        if len(kept):
            begun = Begun(
                tokens_NT[kept], pad(mask_NT, (0, 1), value=1)[kept], starts_N[kept], read.cache, of_read[kept]
            )
            parts = [begun] if self.begun is None else [self.begun, begun]
            self.begun = joined(parts, self.greedy.pad_token_id, copies=self.begun is None and self.read is not None)
            self.alive = torch.cat([self.alive, new[kept]])

    def _sample(self, begun: Begun) -> Begun | None:
        """Go on until enough rows have ended; those that have not."""
        if begun.of_cache is not None:  # also leaves out columns that only rows that have ended did read
            begun = joined([begun], self.greedy.pad_token_id)
        width, limits_A = begun.tokens_AT.shape[1], self.limits_B[self.alive]
        ends = RowEnds(self.criteria, begun.starts_A, limits_A)
        enough = math.ceil(REFILLED_SHARE * self.size) if self.waiting else enough_to_drop(len(self.alive))
        self.choice.rows_A, self.choice.starts_A = self.alive, begun.starts_A
        # No row goes on beyond its limit, behind which there may be no positions.
        self.greedy.max_new_tokens = int((limits_A + begun.starts_A).min()) - width
        options = {
            "generation_config": self.greedy,
            "logits_processor": LogitsProcessorList([self.choice]),
            "stopping_criteria": StoppingCriteriaList([UntilSomeEnd(ends, enough), self.noter]),
        }
        output = restarted(self.model, begun.tokens_AT, begun.mask_AT, begun.cache, None, **options)
        tokens_AT = output.sequences
        self._note(self.alive, tokens_AT, ends, width - begun.starts_A)
        kept = (ends.lengths_A == 0).nonzero()[:, 0]
        self.alive = self.alive[kept]
        if len(kept) == 0:
            return None
        mask_AT = pad(begun.mask_AT[kept], (0, tokens_AT.shape[1] - width), value=1)
        return Begun(tokens_AT[kept], mask_AT, begun.starts_A[kept], cache_of(output), kept)

    def _note(self, rows: Tensor, tokens_AT: Tensor, ends: RowEnds, already_A: Tensor) -> None:
        """Keep the responses that have ended, and the log-probs of tokens that were sampled behind `already_A`."""
        of_rows = zip(rows.tolist(), ends.starts_A.tolist(), ends.lengths_A.tolist(), tokens_AT, strict=True)
        for row, start, length, tokens_T in of_rows:
            if length:
                self.responses[row] = tokens_T[start : start + length].clone()
        noted_AN = self.noter.take()
        if noted_AN is None:
            self.saw_all_logits = False
            return
        number_AN = already_A[:, None] + torch.arange(noted_AN.shape[1], device=self.device)
        self.logprobs_BR[rows[:, None], number_AN] = noted_AN.to(self.device)
