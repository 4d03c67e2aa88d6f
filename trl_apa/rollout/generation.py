"""Prompts to responses with transformers' `generate`, one response a prompt, each cut where it ended."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from trl_apa.models.autocasting import frozen_weights_cast_once
from trl_apa.models.layouts import cache_is_exact, rows_can_be_joined, rows_can_be_selected, sampling_batches
from trl_apa.models.network_parts import Network, max_positions, padding_id
from trl_apa.rollout.batch import pad_queries
from trl_apa.rollout.finished_rows import FEWEST_DROPPED, generate_selecting_rows, options_allow_selection
from trl_apa.rollout.generation_defaults import neutral_generation_config
from trl_apa.rollout.refilled_rows import RefilledRows
from trl_apa.rollout.sampled_logprobs import LogprobNoter, SampledLogprobs
from trl_apa.rollout.shared_prompts import equal_queries, have_common
from trl_apa.rollout.stopping import ResponseLengths, row_criteria
from trl_apa.trainer.validation import check_positions


def generate_responses(
    model: Network,
    queries: Sequence[Tensor],
    generation_config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_strings: list[str] | str | None = None,
    max_length: int | None = None,
    batch_size: int = 4,
    length_sampler: Callable[[], int] | None = None,
    remove_padding: bool = True,
    pad_to_multiple_of: int | None = None,
    model_inputs: dict[str, Any] | None = None,
    notes: SampledLogprobs | None = None,
    row_limits: Sequence[int] | None = None,
    refills: bool = True,
) -> list[Tensor]:
    """Sample one response to each query.

    Queries are batched by length, so that short ones do not wait behind the padding of long ones, and padded inside
    (on the left; on the right for an encoder), unless the model then answers otherwise than it does alone: those of
    equal length are batched then. Where it answers otherwise with a cache, none is used. The answers come back in the
    callers' order. The model's own generation config (a top_k of 50, say) has no influence: what `generation_config`
    leaves unset is off.

    Args:
        model: a language model in eval mode.
        queries: 1-D tensors of token ids, at least one token each.
        generation_config: sampling options, `max_new_tokens`, `pad_token_id` (which may be beyond the embedding),
            `eos_token_id` (one or several), and for an encoder-decoder `decoder_start_token_id`.
        tokenizer: decodes for `stop_strings`.
        stop_strings: texts that end a response when it holds them; the tokens that spell them belong to it.
        max_length: most tokens of a query and its response together, in place of `max_new_tokens`.
        batch_size: queries that are sampled at a time. Where there are more, and nothing forbids it, waiting ones take
            the places of those that have ended, and each is sampled with its own random numbers.
        length_sampler: if given, draws `max_new_tokens` for each batch.
        remove_padding: cut each response where it ended; otherwise all of a batch are as long as the longest.
        pad_to_multiple_of: round the prompt width up to a multiple of it, where prompts are padded.
        model_inputs: passed on to `generate` (such as a logits processor); `stopping_criteria` among them, a list,
            are added to what ends a response.
        notes: keeps the log-probs of what is sampled.
        row_limits: most tokens of each response, in place of `max_new_tokens`.
        refills: whether waiting queries may take the places of others; batch after batch is sampled otherwise, with
            the random numbers of transformers' `generate`.

    Returns:
        1-D int64 tensors on the queries' devices: the generated tokens up to and with the one that ended the response.

    Raises:
        ValueError: if a response could grow beyond the model's positions.
    """
    model_inputs = dict(model_inputs or {})
    given = model_inputs.pop("stopping_criteria", ())
    responses: list[Tensor] = [queries[0]] * len(queries)
    device = next(model.parameters()).device
    two_stacks = model.config.is_encoder_decoder
    pad_token_id, sampling = generation_config.pad_token_id, copy.copy(generation_config)
    sampling.pad_token_id = padding_id(pad_token_id, [model])
    if length_sampler is None and max_length is None:
        most = response_limits([len(query) for query in queries], generation_config, limits=row_limits)
        check_positions(queries, most, model, "query + max_new_tokens")

    def limits_of(rows: Sequence[int]) -> list[int]:
        before = [1 if two_stacks else len(queries[row]) for row in rows]
        own = None if row_limits is None else [row_limits[row] for row in rows]
        limits = response_limits(before, generation_config, max_length, length_sampler, own)
        check_positions([queries[row] for row in rows], limits, model, "batch")
        return limits

    pads = bool(pad_to_multiple_of)
    criteria = row_criteria(generation_config.eos_token_id, stop_strings, tokenizer)
    of_batches = given or model_inputs or pads or not (remove_padding and refills) or length_sampler is not None
    with frozen_weights_cast_once(model):
        if len(queries) > batch_size > 1 and not of_batches:
            limits = limits_of(range(len(queries)))
            refilled = _refilled_responses(model, queries, limits, batch_size, sampling, criteria, notes)
            if refilled is not None:
                return refilled
        for rows, limits_B, padded, cached in _exact_batches(model, queries, batch_size, pads, limits_of):
            batch = [queries[row] for row in rows]
            side = "right" if two_stacks else "left"
            inputs = pad_queries(batch, sampling.pad_token_id, pad_to_multiple_of if padded else None, side)
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            sampling.max_new_tokens = max(limits_B)
            sampling.use_cache = generation_config.use_cache is not False and cached
            width = 1 if two_stacks else inputs["input_ids"].shape[1]
            lengths = ResponseLengths(width, criteria, torch.tensor(limits_B, device=device), given)
            noting = nullcontext(LogprobNoter()) if notes is None else notes.noting(model, sampling, model_inputs)
            with neutral_generation_config(model), noting as noter:
                tokens_BT = _tokens_of_batch(model, batch, inputs, sampling, lengths, noter, model_inputs)
            cut = lengths.cut(tokens_BT)
            if notes is not None:
                notes.keep(batch, cut, noter.logprobs(tokens_BT.shape[1] - width))
            if not remove_padding:
                cut = list(lengths.padded(tokens_BT, pad_token_id))
            for row, response in zip(rows, cut, strict=True):
                responses[row] = response.to(queries[row].device)
    return responses


def _tokens_of_batch(
    model: Network,
    batch: Sequence[Tensor],
    inputs: dict[str, Tensor],
    sampling: GenerationConfig,
    lengths: ResponseLengths,
    noter: LogprobNoter,
    model_inputs: dict[str, Any],
) -> Tensor:
    """Prompts and what was sampled, `(B, T)`.

    Where nothing forbids it, rows with one prompt read it once, and those that have ended are left out of the batch.
    What a caller brings (a logits processor, a stopping criterion) may count on the complete batch.
    """
    num_rows, width = inputs["input_ids"].shape
    allowed = num_rows > 1 and sampling.use_cache and options_allow_selection(sampling)
    if allowed and not lengths.given and not model_inputs:
        prompts = equal_queries(batch)
        pays = num_rows > FEWEST_DROPPED or have_common(prompts)
        if pays and rows_can_be_selected(model, width + sampling.max_new_tokens):
            return generate_selecting_rows(model, inputs, sampling, lengths, noter, prompts)
    criteria = StoppingCriteriaList([lengths, noter])
    tokens_BT: Tensor = model.generate(
        **inputs, generation_config=sampling, stopping_criteria=criteria, **model_inputs
    )
    return tokens_BT


def _refilled_responses(
    model: Network,
    queries: Sequence[Tensor],
    limits: Sequence[int],
    size: int,
    sampling: GenerationConfig,
    criteria: list[StoppingCriteria],
    notes: SampledLogprobs | None,
) -> list[Tensor] | None:
    """Responses of rows that take the places of others; None where some would be answered otherwise than alone."""
    lengths = [len(query) for query in queries]
    longest = max(map(sum, zip(lengths, limits, strict=True)))
    if sampling.use_cache is False or not options_allow_selection(sampling) or not rows_can_be_joined(model, longest):
        return None
    if not sampling_batches(model, sorted(lengths), longest)[1] or not cache_is_exact(model, longest):
        return None
    if torch.are_deterministic_algorithms_enabled() and next(model.parameters()).is_cuda:
        return None  # a GPU's sums of probabilities are not deterministic
    noting = nullcontext(LogprobNoter()) if notes is None else notes.noting(model, sampling, {})
    with neutral_generation_config(model), noting as noter:
        rows = RefilledRows(model, queries, limits, size, sampling, criteria, noter)
        responses, logprobs_BR = rows.run()
    if notes is not None:
        notes.keep(queries, responses, logprobs_BR)
    return [response.to(query.device) for response, query in zip(responses, queries, strict=True)]


def _exact_batches(
    model: Network,
    queries: Sequence[Tensor],
    batch_size: int,
    pads: bool,
    limits_of: Callable[[Sequence[int]], list[int]],
) -> Iterator[tuple[list[int], list[int], bool, bool]]:
    """Rows in order of length, most tokens of the response to each, whether they may be padded, and a cache be used.

    Args:
        model, queries, batch_size: see `generate_responses`.
        pads: whether batches of equally long prompts are padded, too.
        limits_of: called once for each `batch_size` rows.
    """
    by_length = sorted(range(len(queries)), key=lambda row: len(queries[row]))
    for start in range(0, len(queries), batch_size):
        rows = by_length[start : start + batch_size]
        limits, lengths = limits_of(rows), [len(queries[row]) for row in rows]
        total = max if model.config.is_encoder_decoder else sum
        longest = max(total(pair) for pair in zip(lengths, limits, strict=True))
        batches, padded = sampling_batches(model, lengths, longest, pads)
        cached = cache_is_exact(model, longest)
        before = [1] * len(rows) if model.config.is_encoder_decoder else lengths
        for batch in within_positions([list(batch) for batch in batches], before, limits, max_positions(model)):
            yield [rows[i] for i in batch], [limits[i] for i in batch], padded, cached


def within_positions(
    batches: list[list[int]], before: Sequence[int], limits: Sequence[int], positions: int | None
) -> list[list[int]]:
    """Batches in which no row runs out of the model's positions while another one is still sampled.

    A row that has ended is filled with pads up to the end of the longest response, each at a position of its own.

    Args:
        batches: numbers of rows.
        before: tokens that the decoder reads before each row's response.
        limits: most tokens of each response; with `before` at most `positions`.
        positions: of the model; None if it sets no limit.
    """
    if positions is None:
        return batches
    parts = []
    for batch in batches:
        left = list(batch)
        while left:
            most = max(limits[row] for row in left)
            part = [row for row in left if before[row] + most <= positions]
            # The row of the largest limit is among them; without one, the limits were too large from the start.
            parts.append(part or left)
            left = [row for row in left if row not in parts[-1]]
    return parts


def response_limits(
    prompt_lengths: Sequence[int],
    generation_config: GenerationConfig,
    max_length: int | None = None,
    length_sampler: Callable[[], int] | None = None,
    limits: Sequence[int] | None = None,
) -> list[int]:
    """Most tokens that each response of a batch may have, after what the decoder reads before it.

    Raises:
        ValueError: if `max_length` leaves no token for one, or `limits` is not one number of at least 1 for each.
    """
    if limits is not None:
        if len(limits) != len(prompt_lengths) or min(limits) < 1:
            raise ValueError(
                f"max_new_tokens is {list(limits)}; it should be a number, or one for each of {len(prompt_lengths)} "
                "queries, at least 1"
            )
        return list(limits)
    if length_sampler is not None:
        return [length_sampler()] * len(prompt_lengths)
    if max_length is None:
        return [generation_config.max_new_tokens] * len(prompt_lengths)
    limits = [max_length - length for length in prompt_lengths]
    if min(limits) < 1:
        raise ValueError(
            f"max_length={max_length} leaves no token for the response to a query of {max(prompt_lengths)}"
        )
    return limits


def generation_options(defaults: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The caller's options of `generate`, over `defaults`, as arguments of `generate_responses`.

    Args:
        defaults: `temperature`, `top_p`, `top_k` (read when sampling), `max_new_tokens`, `pad_token_id`,
            `eos_token_id`.
        kwargs: the caller's; None leaves the default, and a `generation_config` among them counts for what it sets.

    Returns:
        `generation_config`, `stop_strings`, `max_length`, `row_limits` (of a list as `max_new_tokens`, one number for
        each query), and what is left as `model_inputs`. Warns if the caller samples at another temperature than the
        default, at which the update takes its log-probs.

    Raises:
        ValueError: for an option under which a query has not one response, for inputs beside the queries, or if
            `stopping_criteria` cannot be called.
    """
    options = {"do_sample": True, "use_cache": True, **defaults}
    if (given := kwargs.get("generation_config")) is not None:
        kwargs = {**given.to_diff_dict(), **kwargs}
    kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "generation_config"}
    for name, only in (("num_beams", 1), ("num_return_sequences", 1), ("return_dict_in_generate", False)):
        if kwargs.get(name, only) != only:
            raise ValueError(f"{name}={kwargs[name]}: generate returns one sampled (or greedy) response per query")
    for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask"):
        if name in kwargs:
            raise ValueError(f"{name} was given to generate: give token ids as query_tensor")
    if "stopping_criteria" in kwargs:
        kwargs["stopping_criteria"] = _list_of_criteria(kwargs["stopping_criteria"])
    if not kwargs.get("do_sample", True):
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name)
    elif kwargs.get("temperature", defaults["temperature"]) != defaults["temperature"]:
        warnings.warn(
            f"generate samples at temperature={kwargs['temperature']}, but the update takes log-probs at "
            f"config.temperature={defaults['temperature']}; set the option in the config instead",
            UserWarning,
            stacklevel=4,
        )
    max_new_tokens_given = "max_new_tokens" in kwargs
    row_limits = kwargs.get("max_new_tokens")
    row_limits = list(row_limits) if isinstance(row_limits, list | tuple) else None
    if row_limits is not None:
        kwargs["max_new_tokens"] = max(row_limits, default=1)
    max_length, stop_strings = kwargs.pop("max_length", None), kwargs.pop("stop_strings", None)
    generation_config = GenerationConfig(**options)
    return {
        "model_inputs": generation_config.update(**kwargs),
        "generation_config": generation_config,
        "stop_strings": stop_strings,
        "max_length": None if max_new_tokens_given else max_length,
        "row_limits": row_limits,
    }


def _list_of_criteria(given: Any) -> list[Any]:
    criteria = list(given) if isinstance(given, list | tuple) else [given]
    for number, criterion in enumerate(criteria):
        if not callable(criterion):
            raise ValueError(
                f"stopping_criteria[{number}] is a {type(criterion).__name__}; it should be a StoppingCriteria"
            )
    return criteria


def unmasked_queries(queries: Sequence[Tensor], attention_mask: Any, two_stacks: bool) -> list[Tensor]:
    """The tokens of each query that the model is to read.

    Positions are counted over the tokens that are read, so that leaving out a token is what masking it means. In an
    encoder this is true of the tokens at its end only.

    Args:
        queries: 1-D token ids.
        attention_mask: None, or 1-D tensors of the queries' lengths, 1 = read; of one query also `(L,)` or `(1, L)`.
        two_stacks: whether an encoder reads them.

    Raises:
        ValueError: if a mask has another shape than its query, is not of 0 and 1, or leaves no token.
    """
    if attention_mask is None:
        return list(queries)
    if isinstance(attention_mask, Tensor) and len(queries) == 1:
        is_row = attention_mask.dim() == 2 and len(attention_mask) == 1
        attention_mask = [attention_mask[0] if is_row else attention_mask]
    if not isinstance(attention_mask, list | tuple) or len(attention_mask) != len(queries):
        raise ValueError(
            f"attention_mask is a {type(attention_mask).__name__}; it should be a list of {len(queries)} 1-D tensors, "
            "one for each query"
        )
    kept = []
    for row, (query, mask) in enumerate(zip(queries, attention_mask, strict=True)):
        name, mask = f"attention_mask[{row}]", torch.as_tensor(mask, device=query.device)
        if mask.shape != query.shape:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}; its query has {tuple(query.shape)}")
        if not ((mask == 0) | (mask == 1)).all() or not mask.any():
            raise ValueError(f"{name} is {mask.tolist()}; it should hold 0 and 1, and at least one 1")
        if two_stacks and not mask[: int(mask.sum())].all():
            raise ValueError(f"{name} masks tokens before others; an encoder's query can be masked at its end only")
        kept.append(query[mask.bool()])
    return kept


def responses_of_completions(
    queries: Sequence[Tensor],
    completions: Sequence[Sequence[int]],
    limits: Sequence[int],
    generation_config: GenerationConfig,
    stop_strings: list[str] | str | None,
    tokenizer: PreTrainedTokenizerBase,
    remove_padding: bool = True,
    given: Sequence[StoppingCriteria] = (),
) -> list[Tensor]:
    """What an inference engine has answered, in the form in which `generate_responses` gives its responses.

    Args:
        queries: 1-D token ids.
        completions: token ids, at least one each; they may go on behind their end.
        limits: most tokens of each response.
        generation_config: `eos_token_id` and `pad_token_id` of it are read.
        stop_strings: texts that end a response.
        tokenizer: decodes for `stop_strings`.
        remove_padding: cut each response; otherwise all are as long as the longest.
        given: the caller's `stopping_criteria`, which get no scores.

    Returns:
        1-D int64 tensors on the queries' devices.

    Raises:
        ValueError: if a completion is empty.
    """
    pad_token_id = generation_config.pad_token_id
    criteria = row_criteria(generation_config.eos_token_id, stop_strings, tokenizer)
    responses = cut_responses(queries, completions, criteria, limits, pad_token_id, given)
    if not remove_padding:
        responses = list(pad_sequence(responses, batch_first=True, padding_value=pad_token_id))
    return [response.to(query.device) for response, query in zip(responses, queries, strict=True)]


def cut_responses(
    queries: Sequence[Tensor],
    completions: Sequence[Sequence[int]],
    criteria: list[StoppingCriteria],
    limits: Sequence[int],
    pad_token_id: int,
    given: Sequence[StoppingCriteria] = (),
) -> list[Tensor]:
    """Each completion up to the token at which transformers' `generate` would have stopped, on the CPU.

    Args:
        queries: what was asked, 1-D token ids.
        completions: token ids, at least one each; they may go on behind their end.
        criteria: what ends a row.
        limits: most tokens of each response.
        pad_token_id: fills up; it does not matter which.
        given: criteria of the caller's, see `ResponseLengths`.

    Raises:
        ValueError: if a completion is empty.
    """
    lengths = [min(len(ids), limit) for ids, limit in zip(completions, limits, strict=True)]
    if min(lengths) == 0:
        raise ValueError(f"the engine gave no token for row {lengths.index(0)}")
    prompts_BP = pad_queries([query.cpu() for query in queries], pad_token_id)["input_ids"]
    rows = [torch.tensor(list(ids)) for ids in completions]
    tokens_BT = torch.cat([prompts_BP, pad_sequence(rows, batch_first=True, padding_value=pad_token_id)], dim=1)
    found = ResponseLengths(prompts_BP.shape[1], criteria, torch.tensor(lengths), given)
    for width in range(prompts_BP.shape[1] + 1, tokens_BT.shape[1] + 1):
        if found(tokens_BT[:, :width], None).all():
            break
    return found.cut(tokens_BT)


def decoder_start_token_id(model: Network) -> int | None:
    """What the decoder of an encoder-decoder reads before a response; None for a decoder alone.

    Raises:
        ValueError: if an encoder-decoder's config does not say.
    """
    if not model.config.is_encoder_decoder:
        return None
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token: int | None = getattr(config, name, None)
            if token is not None:
                return token
    raise ValueError("model has no decoder_start_token_id in its config, the first decoder token of every response")


def end_token_ids(model: Network, tokenizer: PreTrainedTokenizerBase, stop_token_id: int | None = None) -> list[int]:
    """Ids that end a response: `stop_token_id` if given, else the tokenizer's EOS and the generation config's."""
    if stop_token_id is not None:
        return [stop_token_id]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *configured] if token is not None})
