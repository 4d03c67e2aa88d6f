"""Sampling that reads a common prompt once and leaves out rows that ended: `generate`, resumed with chosen rows."""

import copy
import math
from collections.abc import Sequence
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

from trl_apa.models.caches import CACHE_ARGUMENT, cache_of
from trl_apa.models.network_parts import Network
from trl_apa.rollout.sampled_logprobs import LogprobNoter
from trl_apa.rollout.shared_prompts import have_common


# Rows are dropped when this share of those that are left has ended, and at least so many: each drop copies the cache
# and begins a call of `generate`.
DROPPED_SHARE, FEWEST_DROPPED = 0.25, 4
# Options that `RowChoice` knows, or that do not change which token is chosen.
KNOWN = {
    *("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "use_cache", "pad_token_id", "eos_token_id"),
    *("bos_token_id", "decoder_start_token_id", "transformers_version", "return_dict_in_generate"),
}


def options_allow_selection(generation_config: GenerationConfig) -> bool:
    """Whether the choice of a token depends on nothing but its row's logits, temperature, top-k and top-p."""
    return KNOWN.issuperset(generation_config.to_diff_dict())


def restarted(
    model: Network, tokens_AT: Tensor, mask_AT: Tensor, cache: Any, rows_A: Tensor | None, **options: Any
) -> Any:
    """`generate`, from where it was when all tokens but the last were in the cache, with chosen rows of the cache.

    Args:
        model: a language model.
        tokens_AT: int64, left-padded prompts and what was generated; the last column is not in the cache.
        mask_AT: int64, 1 = a token that is read.
        cache: after the call it has the rows that were chosen.
        rows_A: int64, the row of the cache that each row of the tokens continues; one may be chosen many times. None
            where they are the rows of the cache.
        options: of `generate`, whose config uses the cache.
    """
    if rows_A is not None:
        cache.batch_select_indices(rows_A)
    return model.generate(input_ids=tokens_AT, attention_mask=mask_AT, **{CACHE_ARGUMENT: cache}, **options)


def read_once(model: Network, inputs: dict[str, Tensor], prompts: Sequence[int], config: GenerationConfig) -> Any:
    """The first forward pass of `generate`, over the different prompts of a batch.

    Args:
        model: a language model.
        inputs: `input_ids` and `attention_mask` `(B, P)`, padded on the left.
        prompts: a number for each row, counted from 0 in the order of the rows, the same for equal prompts.
        config: options; `max_new_tokens` is not read.

    Returns:
        What `generate` gives for the first row of each prompt: logits and cache among it.
    """
    first = [prompts.index(number) for number in range(max(prompts) + 1)]
    one = copy.copy(config)
    one.update(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    return model.generate(**{name: tensor[first] for name, tensor in inputs.items()}, generation_config=one)


def warpers_of(config: GenerationConfig) -> LogitsProcessorList:
    """What `generate` does to logits for `temperature`, `top_k` and `top_p`."""
    warpers = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


def greedy_copy(config: GenerationConfig) -> GenerationConfig:
    """Options under which `generate` takes the token that a processor has chosen, and returns the cache."""
    greedy = copy.copy(config)
    greedy.update(do_sample=False, temperature=None, top_k=None, top_p=None, return_dict_in_generate=True)
    return greedy


def one_token(scores: Tensor, chosen_A1: Tensor) -> Tensor:
    """Scores of which the largest, and the only ones, are those of the chosen tokens."""
    return torch.full_like(scores, -torch.inf).scatter_(1, chosen_A1, 0.0)


def enough_to_drop(num_rows: int) -> int:
    """How many of so many rows have to end before the others go on without them."""
    return max(FEWEST_DROPPED, math.ceil(DROPPED_SHARE * num_rows))


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
        self.warpers, self.samples = warpers_of(config), bool(config.do_sample)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.samples:
            return scores
        probabilities_AV = self.warpers(input_ids, scores).softmax(dim=-1)
        noise_BV = scores.new_empty(self.num_rows, scores.shape[-1]).exponential_()
        chosen_A1 = (probabilities_AV / noise_BV[self.rows.to(scores.device)]).argmax(dim=-1, keepdim=True)
        return one_token(scores, chosen_A1)


class UntilSomeEnd(StoppingCriteria):
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


class SelectedRows:
    """The rows of a batch that are still sampled, and what `generate` needs to go on with them.

    Args:
        model: a decoder in eval mode for which `models.layouts.rows_can_be_selected`.
        inputs: `input_ids` and `attention_mask` `(B, P)`, padded on the left.
        config: options, all among `KNOWN`.
        lengths: the `ResponseLengths` of the batch.
        noter: sees the logits.
    """

    def __init__(
        self, model: Network, inputs: dict[str, Tensor], config: GenerationConfig, lengths: Any, noter: LogprobNoter
    ):
        self.model, self.inputs, self.config, self.lengths, self.noter = model, inputs, config, lengths, noter
        self.tokens_AT, self.mask_AT = inputs["input_ids"], inputs["attention_mask"]
        self.num_rows, self.width = self.tokens_AT.shape
        self.alive = torch.arange(self.num_rows, device=self.tokens_AT.device)
        self.choice, self.greedy = RowChoice(config, self.num_rows), greedy_copy(config)
        # The cache, and which of its rows each row alive continues.
        self.cache: Any = None
        self.of_cache = self.alive

    @property
    def num_left(self) -> int:
        """Most tokens that are still to be sampled."""
        limit: int = self.config.max_new_tokens
        return limit - (self.tokens_AT.shape[1] - self.width)

    def read_prompts_once(self, prompts: Sequence[int]) -> Any:
        """Read each different prompt, sample the first token of each row, and return what says which rows ended."""
        begun = read_once(self.model, self.inputs, prompts, self.greedy)
        self.cache, self.of_cache = cache_of(begun), torch.tensor(prompts, device=self.alive.device)
        scores_BV = self.choice(self.tokens_AT, begun.logits[0][self.of_cache])
        self.tokens_AT = torch.cat([self.tokens_AT, scores_BV.argmax(dim=-1, keepdim=True)], dim=1)
        self.noter.repeat(self.of_cache)
        self.noter(self.tokens_AT, None)
        ends = self.lengths.of_rows(self.alive)
        ends(self.tokens_AT, None)
        return ends

    def sample(self) -> Any:
        """Go on until enough rows have ended, and return what says which."""
        ends = self.lengths.of_rows(self.alive)
        until = UntilSomeEnd(ends, enough_to_drop(len(self.alive)))
        self.choice.rows, self.noter.rows = self.alive, (self.alive, self.num_rows)
        self.greedy.max_new_tokens = self.num_left
        options = {
            "generation_config": self.greedy,
            "logits_processor": LogitsProcessorList([self.choice]),
            "stopping_criteria": StoppingCriteriaList([until, self.noter]),
        }
        if self.cache is None:
            output = self.model.generate(**self.inputs, **options)
        else:
            output = restarted(self.model, self.tokens_AT, self.mask_AT, self.cache, self.of_cache, **options)
        self.tokens_AT, self.cache = output.sequences, cache_of(output)
        self.of_cache = torch.arange(len(self.alive), device=self.alive.device)
        return ends

    def keep(self, kept: Tensor) -> None:
        """Leave out all rows alive but these."""
        self.alive, self.tokens_AT = self.alive[kept], self.tokens_AT[kept]
        new = self.tokens_AT.shape[1] - self.mask_AT.shape[1]
        self.mask_AT = torch.nn.functional.pad(self.mask_AT[kept], (0, new), value=1)
        self.of_cache = self.of_cache[kept]


def generate_selecting_rows(
    model: Network,
    inputs: dict[str, Tensor],
    config: GenerationConfig,
    lengths: Any,
    noter: LogprobNoter,
    prompts: Sequence[int],
) -> Tensor:
    """What `model.generate` returns, from the same random numbers.

    A prompt that several rows have is read once, and rows are left out of the batch once they ended.

    Args:
        model, inputs, config, lengths, noter: see `SelectedRows`; `lengths` learns where each row ended.
        prompts: a number for each row, counted from 0 in the order of the rows, the same for equal prompts.

    Returns:
        int64 `(B, P + R)`; behind the end of a response is the pad token.
    """
    rows = SelectedRows(model, inputs, config, lengths, noter)
    result_BT = torch.nn.functional.pad(rows.tokens_AT, (0, config.max_new_tokens), value=config.pad_token_id)
    lengths_B = torch.zeros_like(rows.alive)
    ends = rows.read_prompts_once(prompts) if have_common(prompts) else rows.sample()
    while True:
        width = rows.tokens_AT.shape[1]
        result_BT[rows.alive, :width] = rows.tokens_AT
        lengths_B[rows.alive] = ends.lengths_B
        kept = (ends.lengths_B == 0).nonzero()[:, 0]
        if len(kept) == 0 or rows.num_left == 0:
            break
        rows.keep(kept)
        ends = rows.sample()
    lengths.lengths_B = lengths_B
    return result_BT[:, :width]
