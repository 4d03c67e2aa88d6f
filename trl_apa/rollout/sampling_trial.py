"""Compares a network's logits during sampling, in a batch and with its cache, with those of a row alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trl_apa.models.caches import cache_of
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.models.trials import (
    LONG,
    Difference,
    allowed_difference,
    alone,
    difference,
    is_precise,
    special_tokens,
    trial_lengths,
    trial_rows,
)
from trl_apa.rollout.batch import pad_queries
from trl_apa.rollout.cache_merging import Begun, joined
from trl_apa.rollout.finished_rows import restarted
from trl_apa.rollout.generation_defaults import neutral_generation_config


# Tokens of each response: one after the prompt was read, one from the cache.
SAMPLED = 2


@dataclass(frozen=True)
class SamplingTrial:
    """How far the logits that tokens are sampled from are from each other.

    Args:
        lengths: tokens of each row, prompt and response together.
        together: of a batch of equally long prompts, from those of each prompt alone: rounding.
        batched: of a padded batch of both prompts, from those of each prompt alone.
        cached: of each prompt alone, with a cache, from those of the plain forward of the finished row.
        selected: of a row that was chosen several times from the cache, while the others of its batch were deleted,
            from those of the batch; None if the cache cannot do that.
        allowed: the largest relative difference that counts as rounding.
    """

    lengths: tuple[int, ...]
    together: Difference
    batched: Difference
    cached: Difference
    selected: Difference | None
    allowed: float

    @property
    def is_exact_cached(self) -> bool:
        return self.cached.relative <= self.allowed

    @property
    def is_exact_selected(self) -> bool:
        return self.selected is not None and self.selected.relative <= self.allowed

    @property
    def is_exact_together(self) -> bool:
        return self.together.relative <= self.allowed

    @property
    def is_exact_batched(self) -> bool:
        return self.batched.relative <= self.allowed


def try_sampling(
    model: Network, longest: int = LONG, pad_token_id: int | None = None, start: int | None = None
) -> SamplingTrial:
    """Let a model answer a short and a long prompt, alone and in one batch, with tokens that are chosen beforehand.

    Args:
        model: a language model, with or without PEFT adapters, in eval mode.
        longest: tokens of the prompts and responses that it will sample, see `trials.try_layouts`.
        pad_token_id, start: see `trials.try_layouts`.
    """
    base = inner_model(model)
    pad_token_id, start = special_tokens(base, pad_token_id, start)
    lengths, exact = trial_lengths(base.config, longest), is_precise(base)
    queries, responses = _rows_to_sample(model, lengths)
    rows = list(zip(queries, responses, strict=True))
    each = [sampling_logits(model, [query], [response], pad_token_id, start)[0] for query, response in rows]
    twice = ([queries[-1], queries[-1].flip(0)], [responses[-1]] * 2, pad_token_id, start)
    together = difference(each[-1:], sampling_logits(model, *twice)[:1], responses[-1:], exact)
    batched = sampling_logits(model, queries, responses, pad_token_id, start)
    return SamplingTrial(
        lengths=lengths,
        together=together,
        batched=difference(each, batched, responses, exact),
        cached=difference([alone(model, *row, start) for row in rows], each, responses, exact),
        selected=_after_selecting(model, queries, responses, pad_token_id, batched[-1], exact)
        if start is None
        else None,
        allowed=allowed_difference(base, together),
    )


@torch.no_grad()
def try_joining(model: Network, longest: int = LONG) -> Difference:
    """How far the logits of rows that began apart and were then joined are from those of each row alone.

    The last row, which is the longest, joins the others, and they join it.

    Args:
        model: a decoder for which a `SamplingTrial.is_exact_selected`.
        longest: see `try_sampling`.

    Raises:
        TypeError: if the rows of its cache cannot be joined.
    """
    base = inner_model(model)
    pad_token_id = special_tokens(base, None, None)[0]
    queries, responses = _rows_to_sample(model, trial_lengths(base.config, longest))
    rows = list(zip(queries, responses, strict=True))
    each = [sampling_logits(model, [query], [response], pad_token_id)[0][1:] for query, response in rows]
    actual: list[Tensor] = []
    for first, second in (slice(0, -1), slice(-1, None)), (slice(-1, None), slice(0, -1)):
        parts = [_begun(model, queries[part], responses[part], pad_token_id) for part in (first, second)]
        begun = joined(parts, pad_token_id)
        options = {"generation_config": _one_token(pad_token_id)}
        with neutral_generation_config(model):
            output = restarted(model, begun.tokens_AT, begun.mask_AT, begun.cache, begun.of_cache, **options)
        logits = list(output.logits[0].float().cpu().split(1))
        actual += logits if first.stop else [*logits[1:], logits[0]]
    return difference(each * 2, actual, [response[1:] for response in responses] * 2, is_precise(base))


def _rows_to_sample(model: Network, lengths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    queries, responses = trial_rows(model, lengths)
    if len(lengths) == 3 and not inner_model(model).config.is_encoder_decoder:  # the boundary is after the prompt
        row = torch.cat([queries[1], responses[1]])
        queries[1], responses[1] = row[:-SAMPLED], row[-SAMPLED:]
    return queries, [response[:SAMPLED] for response in responses]


@torch.no_grad()
def sampling_logits(
    model: Network,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    pad_token_id: int,
    start: int | None = None,
) -> list[Tensor]:
    """The logits from which `generate` would have sampled the tokens of responses, float32 `(tokens, V)` each.

    Args:
        model: a language model.
        queries: 1-D token ids of prompts, filled up to one width as `generate_responses` does it.
        responses: 1-D token ids that are put in the place of sampled ones.
        pad_token_id, start: see `trials.try_layouts`.
    """
    inputs = pad_queries(queries, pad_token_id, padding_side="left" if start is None else "right")
    width = inputs["input_ids"].shape[1] if start is None else 1
    forced = _Forced(pad_sequence(list(responses), True, pad_token_id), width)
    config: dict[str, Any] = {"pad_token_id": pad_token_id, "decoder_start_token_id": start}
    config |= {"max_new_tokens": forced.tokens_BR.shape[1], "do_sample": False, "num_beams": 1, "use_cache": True}
    config |= {"output_logits": True, "return_dict_in_generate": True}
    with neutral_generation_config(model):
        processors = LogitsProcessorList([forced])
        output = model.generate(**inputs, generation_config=GenerationConfig(**config), logits_processor=processors)
    logits_BRV = torch.stack(output.logits, dim=1).float().cpu()
    return [logits[: len(response)] for logits, response in zip(logits_BRV, responses, strict=True)]


def _after_selecting(
    model: Network,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    pad_token_id: int,
    expected: Tensor,
    exact: bool,
) -> Difference | None:
    """The logits of the last row's second token, when it alone was chosen after the first.

    It is chosen once more than there were rows: what a model keeps of its rows beside the cache then does not fit.
    """
    copies = len(queries) + 1
    chosen = torch.tensor([len(queries) - 1] * copies, device=queries[0].device)
    options = {"generation_config": _one_token(pad_token_id)}
    try:
        begun = _begun(model, queries, responses, pad_token_id)
        with neutral_generation_config(model):
            output = restarted(model, begun.tokens_AT[chosen], begun.mask_AT[chosen], begun.cache, chosen, **options)
    except Exception:  # what a cache of its own cannot do, it says in its own way
        return None
    actual = output.logits[0].float().cpu().split(1)
    return difference([expected[1:]] * copies, actual, [responses[-1][1:]] * copies, exact)


def _begun(model: Network, queries: Sequence[Tensor], responses: Sequence[Tensor], pad_token_id: int) -> Begun:
    """Prompts after the first token of each response."""
    inputs = pad_queries(queries, pad_token_id)
    width = inputs["input_ids"].shape[1]
    first = LogitsProcessorList([_Forced(torch.stack([response[:1] for response in responses]), width)])
    with neutral_generation_config(model):
        output = model.generate(**inputs, generation_config=_one_token(pad_token_id), logits_processor=first)
    starts_A = torch.full((len(queries),), width, device=output.sequences.device)
    mask_AT = pad(inputs["attention_mask"], (0, 1), value=1)
    return Begun(output.sequences, mask_AT, starts_A, cache_of(output), None)


def _one_token(pad_token_id: int) -> GenerationConfig:
    config = GenerationConfig(pad_token_id=pad_token_id, max_new_tokens=1, do_sample=False, use_cache=True)
    config.update(return_dict_in_generate=True, output_logits=True)
    return config


class _Forced(LogitsProcessor):
    """Lets each row continue with tokens that are known beforehand."""

    def __init__(self, tokens_BR: Tensor, width: int):
        self.tokens_BR, self.width = tokens_BR, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens_B = self.tokens_BR[:, input_ids.shape[1] - self.width]
        return torch.full_like(scores, -torch.inf).scatter(1, tokens_B[:, None].to(scores.device), 0.0)
