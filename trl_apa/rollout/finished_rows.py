"""Sampling that leaves out the rows that have ended: `generate` from drop to drop, with the cache of the rows left."""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trl_apa.models.network_parts import Network
from trl_apa.rollout.sampled_logprobs import LogprobNoter


# Rows are dropped when this share of those that are left has ended, and at least so many: each drop copies the cache
# and begins a call of `generate`.
DROPPED_SHARE, FEWEST_DROPPED = 0.25, 4
# Options that `RowChoice` knows, or that do not change which token is chosen.
KNOWN = {
    *("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "use_cache", "pad_token_id", "eos_token_id"),
    *("bos_token_id", "decoder_start_token_id", "transformers_version", "return_dict_in_generate"),
}


def options_allow_dropping(generation_config: GenerationConfig) -> bool:
    """Whether the choice of a token depends on nothing but its row's logits, temperature, top-k and top-p."""
    return KNOWN.issuperset(generation_config.to_diff_dict())


def restarted(model: Network, tokens_BT: Tensor, mask_BT: Tensor, cache: Any, rows: Tensor, **options: Any) -> Any:
    """`generate`, from where it was when all tokens but the last were in the cache, for some of its rows.

    Args:
        model: a language model.
        tokens_BT: int64, left-padded prompts and what was generated; the last column is not in the cache.
        mask_BT: int64, 1 = a token that is read.
        cache: of all rows; those that are not among `rows` are deleted.
        rows: int64, which to continue.
        options: of `generate`, whose config uses the cache.
    """
    cache.batch_select_indices(rows)
    return model.generate(input_ids=tokens_BT[rows], attention_mask=mask_BT[rows], past_key_values=cache, **options)


class RowChoice(LogitsProcessor):
    """Leaves each row one token: what `generate` would sample of the complete batch, from the same random numbers.

    `torch.multinomial` takes the token with the largest quotient of its probability and an exponential number. Here
    these numbers are drawn for every row that there was, and used for those that are left.

    Args:
        config: `do_sample`, `temperature`, `top_k`, `top_p`.
        num_rows: of the complete batch.
    """

    def __init__(self, config: GenerationConfig, num_rows: int):
        self.num_rows, self.rows = num_rows, torch.arange(num_rows)
        self.warpers = LogitsProcessorList()
        self.samples = bool(config.do_sample)
        if config.temperature not in (None, 1.0):
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(config.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.samples:
            return scores
        probabilities_AV = self.warpers(input_ids, scores).softmax(dim=-1)
        noise_BV = scores.new_empty(self.num_rows, scores.shape[-1]).exponential_()
        chosen_A = (probabilities_AV / noise_BV[self.rows.to(scores.device)]).argmax(dim=-1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_A[:, None], 0.0)


class _UntilSomeEnd(StoppingCriteria):
    """Ends `generate` when enough of its rows have ended.

    Args:
        ends: says which rows have ended.
        enough: rows.
    """

    def __init__(self, ends: StoppingCriteria, enough: int):
        self.ends, self.enough = ends, enough

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done_A: Tensor = self.ends(input_ids, scores, **kwargs)
        done_A = done_A | (done_A.sum() >= self.enough)
        return done_A


def generate_dropping_finished(
    model: Network, inputs: dict[str, Tensor], config: GenerationConfig, lengths: Any, noter: LogprobNoter
) -> Tensor:
    """What `model.generate` returns, from the same random numbers; rows are left out of the batch once they ended.

    Args:
        model: a decoder in eval mode for which `models.layouts.rows_can_be_dropped`.
        inputs: `input_ids` and `attention_mask` `(B, P)`, padded on the left.
        config: options, all among `KNOWN`.
        lengths: the `ResponseLengths` of the batch, which learns where each row ended.
        noter: sees the logits.

    Returns:
        int64 `(B, P + R)`; behind the end of a response is the pad token.
    """
    prompts_BP, mask_AT = inputs["input_ids"], inputs["attention_mask"]
    num_rows, width = prompts_BP.shape
    limit = config.max_new_tokens
    result_BT = torch.nn.functional.pad(prompts_BP, (0, limit), value=config.pad_token_id)
    lengths_B = torch.zeros(num_rows, dtype=torch.long, device=prompts_BP.device)
    choice, greedy = RowChoice(config, num_rows), copy.copy(config)
    greedy.update(do_sample=False, temperature=None, top_k=None, top_p=None, return_dict_in_generate=True)
    alive = torch.arange(num_rows, device=prompts_BP.device)
    tokens_AT, cache, kept = prompts_BP, None, alive
    while True:
        choice.rows = alive
        noter.rows = (alive, num_rows)
        ends = lengths.of_rows(alive)
        until = _UntilSomeEnd(ends, max(FEWEST_DROPPED, math.ceil(DROPPED_SHARE * len(alive))))
        greedy.max_new_tokens = limit - (tokens_AT.shape[1] - width)
        options = {
            "generation_config": greedy,
            "logits_processor": LogitsProcessorList([choice]),
            "stopping_criteria": StoppingCriteriaList([until, noter]),
        }
        if cache is None:
            output = model.generate(**inputs, **options)
        else:
            output = restarted(model, tokens_AT, mask_AT, cache, kept, **options)
            mask_AT = mask_AT[kept]
        tokens_AT, cache = output.sequences, output.past_key_values
        result_BT[alive, : tokens_AT.shape[1]] = tokens_AT
        lengths_B[alive] = ends.lengths_B
        mask_AT = torch.nn.functional.pad(mask_AT, (0, tokens_AT.shape[1] - mask_AT.shape[1]), value=1)
        kept = (ends.lengths_B == 0).nonzero()[:, 0]
        if len(kept) == 0 or tokens_AT.shape[1] - width >= limit:
            break
        alive = alive[kept]
    lengths.lengths_B = lengths_B
    return result_BT[:, : tokens_AT.shape[1]]
