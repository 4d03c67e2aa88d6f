"""The seam for inference engines: a `Sampler` of the user's answers prompts, everything else stays the trainer's."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trl_apa.distributed.processes import Processes
from trl_apa.models.network_parts import Network
from trl_apa.rollout.generation import response_limits, responses_of_completions
from trl_apa.rollout.sampled_logprobs import SampledLogprobs
from trl_apa.trainer.validation import check_positions


class SamplingRequest(NamedTuple):
    """How to sample.

    Args:
        generation_config: transformers' options: `do_sample`, `temperature`, `top_p`, `top_k`, `eos_token_id`, ...
        limits: most tokens of each response.
        stop_strings: texts that end a response, or None.
        model_inputs: what else the caller gave to `generate` (a logits processor, say).
        step: optimizer steps made so far.
    """

    generation_config: GenerationConfig
    limits: list[int]
    stop_strings: list[str] | str | None
    model_inputs: dict[str, Any]
    step: int


class SampledTokens(NamedTuple):
    """Responses, and what the engine says of their tokens.

    Args:
        token_ids: of each response.
        logprobs: of each of its tokens under the distribution that it was sampled from, nats; NaN or None where
            the engine does not know it.
    """

    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float | None]]


@runtime_checkable
class Sampler(Protocol):
    """An inference engine, given to the trainer as `sampler=`."""

    def sample(
        self, policy: Network, prompts: list[list[int]], request: SamplingRequest
    ) -> Sequence[Sequence[int]] | SampledTokens:
        """One response to each prompt, sampled from the policy as it is.

        Args:
            policy: the network that is trained, in eval mode; an engine with weights of its own takes them from here
                when `request.step` has changed. With adapters it is a PEFT model: `models.merged_parameters` gives
                the weights with the active adapter merged.
            prompts: token ids.
            request: how to sample.

        Returns:
            Token ids, at least one for each prompt. They may go on behind the end of a response: the trainer cuts
            them at the first end token, stop string or limit. With [`SampledTokens`] their log-probs too, which
            `importance_correction` and `sampling/logprob_difference_mean` need.
        """


class EngineSampler:
    """Responses of a [`Sampler`], cut and checked as those of the model's own `generate`.

    Args:
        sampler: the user's engine.
        policy: the network that is trained.
        tokenizer: the policy's.
        processes: of the run; if the engine fails on one, all raise.

    Raises:
        ValueError: if `sampler` has no method `sample`, or the policy is an encoder-decoder.
    """

    def __init__(self, sampler: Sampler, policy: Network, tokenizer: PreTrainedTokenizerBase, processes: Processes):
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler is a {type(sampler).__name__}; it should have a method sample")
        if policy.config.is_encoder_decoder:
            raise ValueError("sampler: model is an encoder-decoder, which samples with its own generate alone")
        self.sampler, self.policy, self.tokenizer, self.processes = sampler, policy, tokenizer, processes

    def responses(
        self,
        queries: Sequence[Tensor],
        generation_config: GenerationConfig,
        step: int,
        stop_strings: list[str] | str | None = None,
        max_length: int | None = None,
        length_sampler: Callable[[], int] | None = None,
        remove_padding: bool = True,
        model_inputs: dict[str, Any] | None = None,
        notes: SampledLogprobs | None = None,
        row_limits: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """One response to each query, cut where `generation.generate_responses` would cut it.

        Args:
            queries: 1-D tensors of token ids.
            generation_config, step, stop_strings, model_inputs: see [`SamplingRequest`].
            max_length: most tokens of a query and its response together, in place of `max_new_tokens`.
            length_sampler: if given, draws `max_new_tokens`, once for all queries.
            remove_padding: cut each response; otherwise all are as long as the longest.
            notes: keep the engine's log-probs, if it gives them.
            row_limits: most tokens of each response, in place of `max_new_tokens`.

        Returns:
            1-D int64 tensors on the queries' devices.

        Raises:
            ValueError: if the engine gives another number of responses than prompts, an empty one, or log-probs that
                are not one number a token.
        """

        def sample() -> list[Tensor]:
            lengths = [len(query) for query in queries]
            most = response_limits(lengths, generation_config, max_length, length_sampler, row_limits)
            check_positions(queries, most, self.policy, "query + max_new_tokens")
            request = SamplingRequest(generation_config, most, stop_strings, model_inputs or {}, step)
            prompts = [query.tolist() for query in queries]
            with torch.no_grad():
                sampled = self.sampler.sample(self.policy, prompts, request)
            logprobs = None
            completions: Sequence[Sequence[int]]
            if isinstance(sampled, SampledTokens):
                completions, logprobs = sampled
            else:
                completions = sampled
            if len(completions) != len(prompts):
                raise ValueError(f"sampler gave {len(completions)} responses to {len(prompts)} prompts")
            given = request.model_inputs.get("stopping_criteria", ())
            cutting = (generation_config, stop_strings, self.tokenizer, remove_padding, given)
            responses = responses_of_completions(queries, completions, most, *cutting)
            if logprobs is not None:
                note_logprobs(notes, queries, responses, completions, logprobs, generation_config)
            return responses

        return self.processes.together(sample)


def note_logprobs(
    notes: SampledLogprobs | None,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float | None]],
    generation_config: GenerationConfig,
) -> None:
    """Keep what an engine says of the tokens that it sampled, if it sampled them at the update's temperature.

    Args:
        notes: where they are kept; None: they are checked only.
        queries, responses: 1-D token ids, each response cut, or padded behind its end.
        completions: what the engine gave, of which the responses are the beginnings.
        logprobs: of each token of `completions`, nats; NaN or None: unknown.
        generation_config: `do_sample` and `temperature` of it are read.

    Raises:
        ValueError: if there is not one log-prob a token, or one is above 0 or infinite.
    """
    if [len(row) for row in logprobs] != [len(ids) for ids in completions]:
        raise ValueError("sampler gave log-probs of other lengths than its responses; it should give one a token")
    rows = [torch.tensor([math.nan if value is None else float(value) for value in row]) for row in logprobs]
    flat = torch.cat(rows)
    if bool((flat > 1e-3).any() or flat.isinf().any()):
        worst = float(flat.abs().nan_to_num(nan=0.0, posinf=math.inf).max())
        raise ValueError(f"sampler gave a log-prob of size {worst}; they should be nats, finite and not above 0")
    temperature = 1.0 if generation_config.temperature is None else generation_config.temperature
    if notes is None or not generation_config.do_sample or temperature != notes.temperature:
        return
    width = max(max(map(len, rows)), max(map(len, responses)))
    padded_BR = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    notes.keep(queries, responses, padded_BR, of_engine=True)
