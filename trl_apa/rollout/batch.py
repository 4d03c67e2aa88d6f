"""The ragged batch of one iteration, its masks, and its split into trimmed micro-batches."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trl_apa.rollout.shared_prompts import have_common, prompts_worth_sharing
from trl_apa.values import why_unreadable


# Of a field that a later stage fills in; None until then.
UNMEASURED: Any = None


class Layout(Enum):
    """How the rows of a micro-batch lie before a network.

    SHARED: packed, with a prompt that several rows have in common read once.
    PACKED: concatenated in one row (`pack_tokens`), for a network that gets the sequence boundaries.
    PADDED: one a row, filled up with pads (`pad_tokens`).
    SEPARATE: rows of equal length together, without pads (`separate_tokens`).
    ONE_BY_ONE: the same, each row by itself.
    """

    SHARED = "shared"
    PACKED = "packed"
    PADDED = "padded"
    SEPARATE = "separate"
    ONE_BY_ONE = "one by one"


@dataclass
class Rollouts:
    """One iteration's experience: prompts, responses, scores, and the tensors that the update needs.

    Queries and responses stay ragged; everything measured per response token is padded on the right to the longest
    response, `(B, R)`, and is only meaningful where `response_mask_BR` is True. What the stages after the scores
    measure is None until they fill it in.

    Args:
        queries: `B` prompts, 1-D token ids, at least one token each.
        responses: `B` sampled continuations, 1-D token ids, at least one token each.
        response_mask_BR: bool, True = a sampled response token that counts, EOS included.
        scores_B: one score a response, reward units.
        given_rewards_BR: the part of the scores that reward functions gave token by token, reward units.
        ref_rewards_BN: rewards of responses of pi_init to each prompt, reward units, NaN where a prompt has fewer than
            N; None unless the advantage estimator reads them.
        ref_logprobs_BR: log pi_init of the sampled tokens, nats.
        values_BR: V(s) of the state *before* each token under the value model at rollout time, reward units;
            None without one.
        old_logprobs_BR: log pi_old of the sampled tokens, nats, from a pass over the rollouts that only PPO, early
            stopping, a learned log Z(s) and the exact KL of responses from elsewhere need.
        sampling_logprobs_BR: the same when they were sampled, nats; None unless `generate` noted all of them.
        sampled_by_engine: whether those are an engine's own, of weights and kernels that are not the policy's.
        importance_weights_BR: what advantages are multiplied by, for tokens that another policy has sampled.
        kl_penalty_BR: the KL of each token that PPO's reward is charged for, nats.
        rewards_BR: reward of each token, reward units.
        non_score_rewards_BR: the part of them that is no score, where an override of `compute_rewards` says so.
        advantages_BR: the estimate of Adv(s, a), whitened if so configured.
        returns_BR: regression target of the value model, reward units; None without one.
        decoder_start_token_id: of an encoder-decoder, the token that its decoder reads before a response; None for a
            decoder alone, which reads the query there.
        prompts: a number for each row, the same for rows with equal queries: see `equal_queries`.
        sampling_statistics: what sampling says of itself for the log; None if nothing.
        normalizer_statistics: of the learned log Z(s) that the advantages have; None unless it is learned.
    """

    queries: list[Tensor]
    responses: list[Tensor]
    response_mask_BR: Tensor
    scores_B: Tensor
    ref_logprobs_BR: Tensor = UNMEASURED
    values_BR: Tensor = UNMEASURED
    old_logprobs_BR: Tensor = UNMEASURED
    sampling_logprobs_BR: Tensor | None = None
    kl_penalty_BR: Tensor = UNMEASURED
    given_rewards_BR: Tensor | None = None
    ref_rewards_BN: Tensor | None = None
    rewards_BR: Tensor = UNMEASURED
    non_score_rewards_BR: Tensor | None = None
    advantages_BR: Tensor = UNMEASURED
    returns_BR: Tensor | None = UNMEASURED
    decoder_start_token_id: int | None = None
    prompts: list[int] = UNMEASURED
    sampled_by_engine: bool = False
    importance_weights_BR: Tensor | None = None
    sampling_statistics: dict[str, float] | None = None
    normalizer_statistics: dict[str, float] | None = None

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def device(self) -> torch.device:
        return self.response_mask_BR.device

    def by_length(self, rows: Sequence[int]) -> list[int]:
        """`rows` from the shortest query and response to the longest, so that neighbours need little padding."""
        return sorted(rows, key=lambda row: len(self.queries[row]) + len(self.responses[row]))

    def longest(self, rows: Iterable[int] | None = None) -> int:
        """Tokens of the longest of `rows`, by default of all: see `longest_row`."""
        rows = list(range(len(self)) if rows is None else rows)
        pair = [self.queries[row] for row in rows], [self.responses[row] for row in rows]
        return longest_row(*pair, self.decoder_start_token_id)

    def share_prompts(self, rows: Sequence[int]) -> bool:
        """Whether two of `rows` have a prompt that is worth reading once for both."""
        return self.prompts is not None and have_common(self._worth_sharing(rows))

    def _worth_sharing(self, rows: Sequence[int]) -> list[int]:
        queries, responses = [self.queries[row] for row in rows], [self.responses[row] for row in rows]
        return prompts_worth_sharing([self.prompts[row] for row in rows], queries, responses)

    def micro_batch(self, rows: Sequence[int], pad_token_id: int, layout: Layout = Layout.PADDED) -> dict[str, Any]:
        """Tokens, masks and targets of `rows`, trimmed to the longest query and response among them.

        Args:
            rows: which of them.
            pad_token_id: what to fill with.
            layout: how to lay the tokens out.

        Returns:
            What `lay_out` gives, `response_mask` `(B, R)`, `rows` `(B,)`, and those of `ref_logprobs`, `old_logprobs`,
            `values`, `advantages`, `returns` `(B, R)` that are known.
        """
        index = send(torch.tensor(list(rows)), self.device)
        queries = [self.queries[row] for row in rows]
        responses = [self.responses[row] for row in rows]
        prompts = self._worth_sharing(rows) if layout is Layout.SHARED else None
        batch = lay_out(layout, queries, responses, pad_token_id, self.decoder_start_token_id, prompts)
        width = max(len(response) for response in responses)
        batch["rows"] = index
        batch["response_mask"] = self.response_mask_BR[index, :width]
        for name in ("ref_logprobs", "old_logprobs", "values", "advantages", "returns"):
            field = getattr(self, f"{name}_BR")
            if field is not None:
                batch[name] = field[index, :width]
        return batch


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to `device` without waiting for the device.

    From pageable memory, CUDA copies only after all queued work is done, and the host would wait for that.
    """
    if device.type == "mps":  # which reads memory that is not pinned after it was given back
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def response_mask(
    responses: Sequence[Tensor],
    caller_masks: Sequence[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of counted response tokens, built from lengths and never from token ids: pad may equal EOS.

    Args:
        responses: `B` 1-D tensors of token ids.
        caller_masks: for each response a 1-D tensor of its length; zero or False drops the token from every
            reduction (such as the output of a tool), though the model still reads it.
        device: where the mask should be; defaults to where the tensors are.

    Returns:
        bool `(B, R)`, True = counted.
    """
    if caller_masks is None:
        caller_masks = [torch.ones_like(response, dtype=torch.bool) for response in responses]
    masks = [mask.to(device=device, dtype=torch.bool) for mask in caller_masks]
    return pad_sequence(masks, batch_first=True, padding_value=False)


def longest_row(
    queries: Sequence[Tensor], responses: Sequence[Tensor], decoder_start_token_id: int | None = None
) -> int:
    """Tokens that a stack reads of the longest row: query and response, or in two stacks the longer one of them."""
    if decoder_start_token_id is None:
        return max(len(query) + len(response) for query, response in zip(queries, responses, strict=True))
    return max(*(len(query) for query in queries), *(1 + len(response) for response in responses))


def lay_out(
    layout: Layout,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    pad_token_id: int,
    decoder_start_token_id: int | None = None,
    prompts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What a network reads to predict the responses, as `pack_tokens`, `pad_tokens` or `separate_tokens` gives it.

    `prompts` is read by `Layout.SHARED` alone: see `pack_tokens`.
    """
    if layout is Layout.SHARED:
        return pack_tokens(queries, responses, prompts)
    if layout is Layout.PACKED:
        return pack_tokens(queries, responses)
    if layout in (Layout.SEPARATE, Layout.ONE_BY_ONE):
        return separate_tokens(queries, responses, decoder_start_token_id, layout is Layout.SEPARATE)
    return pad_tokens(queries, responses, pad_token_id, decoder_start_token_id)


def pad_tokens(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    pad_token_id: int,
    decoder_start_token_id: int | None = None,
) -> dict[str, Tensor]:
    """What a network reads to predict the responses, which occupy the last `R` of `T` positions in every row.

    A decoder alone reads the queries, padded on the left, and the responses, padded on the right: `T = P + R`. The
    decoder of an encoder-decoder reads one start token and the responses, `T = 1 + R`, and its encoder the queries,
    padded on the right.

    Position ids count real tokens only: without them models with learned positions (GPT-2) shift under left padding.

    Returns:
        `input_ids`, `attention_mask` (1 = real token) and `position_ids`, each int64 `(B, T)`; with
        `decoder_start_token_id` also `encoder_input_ids` and `encoder_attention_mask`, int64 `(B, P)`; and what
        `response_index` gives.
    """
    encoder: dict[str, Tensor] = {}
    if decoder_start_token_id is not None:
        right_padded = pad_queries(queries, pad_token_id, padding_side="right")
        encoder = {f"encoder_{name}": tensor for name, tensor in right_padded.items()}
        queries = [response.new_full((1,), decoder_start_token_id) for response in responses]
    prompt = pad_queries(queries, pad_token_id)
    responses_BR = pad_sequence(list(responses), batch_first=True, padding_value=pad_token_id)
    response_mask_BR = pad_sequence([torch.ones_like(response) for response in responses], batch_first=True)
    attention_mask_BT = torch.cat([prompt["attention_mask"], response_mask_BR], dim=1)
    prompt_width, width = prompt["input_ids"].shape[1], attention_mask_BT.shape[1]
    return {
        "input_ids": torch.cat([prompt["input_ids"], responses_BR], dim=1),
        "attention_mask": attention_mask_BT,
        "position_ids": (attention_mask_BT.cumsum(dim=1) - 1).clamp(min=0),
        **encoder,
        **response_index(responses, [row * width + prompt_width for row in range(len(responses))]),
    }


def pack_tokens(
    queries: Sequence[Tensor], responses: Sequence[Tensor], prompts: Sequence[int] | None = None
) -> dict[str, Any]:
    """The same without padding, for a decoder alone: all queries and responses one behind the other, `N` tokens.

    Rows that share a prompt lie together, the prompt before the first of their responses alone:
    `[prompt | r1 | r2 | other prompt | r3]`.

    Args:
        queries, responses: `B` 1-D tensors of token ids.
        prompts: rows with the same number have the same query, which is read once for all of them. By default none do.

    Returns:
        `input_ids` and `position_ids`, int64 `(1, N)`, positions from 0 in each sequence, and from the end of its
        prompt in a response without one; `sequence_lengths`, how many tokens belong to each row, numbers known to the
        host; where prompts are shared `prompt_lengths`, how many tokens of the last sequence with a prompt come before
        each response without one, 0 before the others; and what `response_index` gives.
    """
    numbers = range(len(queries)) if prompts is None else prompts
    of_prompt: dict[int, list[int]] = {}
    for row, number in enumerate(numbers):
        of_prompt.setdefault(number, []).append(row)
    rows = [row for together in of_prompt.values() for row in together]
    leads = {together[0] for together in of_prompt.values()}
    parts, prompt_lengths, first_tokens, last_before = [], [], [], []
    end = end_of_prompt = 0
    for row in rows:
        if row in leads:
            end_of_prompt = end + len(queries[row])
            parts.append(torch.cat([queries[row], responses[row]]))
        else:
            parts.append(responses[row])
        prompt_lengths.append(0 if row in leads else len(queries[row]))
        end += len(parts[-1])
        first_tokens.append(end - len(responses[row]))
        last_before.append(end_of_prompt - 1)
    input_ids = torch.cat(parts).long()
    ranges = [torch.arange(start, start + len(part)) for start, part in zip(prompt_lengths, parts, strict=True)]
    return {
        "input_ids": input_ids[None],
        "position_ids": send(torch.cat(ranges), input_ids.device)[None],
        "sequence_lengths": tuple(len(part) for part in parts),
        **({"prompt_lengths": tuple(prompt_lengths)} if len(leads) < len(rows) else {}),
        **response_index([responses[row] for row in rows], first_tokens, rows, last_before),
    }


def separate_tokens(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    decoder_start_token_id: int | None = None,
    together: bool = True,
) -> dict[str, Any]:
    """The same for a network that has to read each row by itself.

    Args:
        together: whether a network may read rows of equal length in one batch.

    Returns:
        `input_ids`, int64 `(1, N)`, one row behind the other in order of their lengths; `row_groups`, for each call of
        the network numbers known to the host: rows, tokens of each, and tokens of each query; with
        `decoder_start_token_id` also `encoder_input_ids`, the queries likewise; and what `response_index` gives.
    """
    prefixes = list(queries)
    if decoder_start_token_id is not None:
        prefixes = [response.new_full((1,), decoder_start_token_id) for response in responses]
    lengths = [len(prefix) + len(response) for prefix, response in zip(prefixes, responses, strict=True)]
    # A decoder alone does not know where a query ends.
    in_encoder = [0 if decoder_start_token_id is None else len(query) for query in queries]
    rows = sorted(range(len(queries)), key=lambda row: (lengths[row], in_encoder[row]))
    groups = itertools.groupby(rows, key=lambda row: (lengths[row], in_encoder[row], None if together else row))
    ends = itertools.accumulate(lengths[row] for row in rows)
    first_response_tokens = [end - len(responses[row]) for row, end in zip(rows, ends, strict=True)]
    encoder: dict[str, Any] = {}
    if decoder_start_token_id is not None:
        encoder["encoder_input_ids"] = torch.cat([queries[row].long() for row in rows])[None]
    return {
        "input_ids": torch.cat([part.long() for row in rows for part in (prefixes[row], responses[row])])[None],
        "row_groups": tuple((len(list(group)), length, of_query) for (length, of_query, _), group in groups),
        **encoder,
        **response_index([responses[row] for row in rows], first_response_tokens, rows),
    }


def response_index(
    responses: Sequence[Tensor],
    first_tokens: Sequence[int],
    rows: Sequence[int] | None = None,
    last_before: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Where the `M` response tokens of a layout are, computed from lengths alone: nothing waits for the device.

    Args:
        responses: `B` 1-D tensors.
        first_tokens: where each begins in the flattened layout.
        rows: which row of `(B, R)` each is; by default they are in order.
        last_before: where the last token before each response is; by default just before its first.

    Returns:
        `token_index`: where in the flattened layout they are; `predicting_index`: where the states are that predict
        them, those of the token before; `response_index`: where they are in a flattened `(B, R)`. All int64 `(M,)`.
    """
    lengths = [len(response) for response in responses]
    width = max(lengths)

    def ranges(starts: Iterable[int]) -> Tensor:
        pieces = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        return torch.cat(pieces)

    predicting = ranges(first - 1 for first in first_tokens)
    if last_before is not None:
        predicting[list(itertools.accumulate([0, *lengths[:-1]]))] = torch.tensor(last_before)
    indices = {
        "token_index": ranges(first_tokens),
        "predicting_index": predicting,
        "response_index": ranges(row * width for row in (range(len(lengths)) if rows is None else rows)),
    }
    return {name: send(index, responses[0].device) for name, index in indices.items()}


def pad_queries(
    queries: Sequence[Tensor], pad_token_id: int, pad_to_multiple_of: int | None = None, padding_side: str = "left"
) -> dict[str, Tensor]:
    """Queries of equal width: `input_ids` and `attention_mask`, int64 `(B, P)`; the mask comes from lengths.

    Args:
        queries: `B` 1-D tensors of token ids, of any integer type.
        pad_token_id: what to fill with.
        pad_to_multiple_of: round the width up to a multiple of it.
        padding_side: "left", or "right" for an encoder.
    """
    queries = [query.long() for query in queries]
    input_ids = pad_sequence(queries, True, pad_token_id, padding_side)
    attention_mask = pad_sequence([torch.ones_like(query) for query in queries], True, 0, padding_side)
    if pad_to_multiple_of:
        extra = -input_ids.shape[1] % pad_to_multiple_of
        sides = (extra, 0) if padding_side == "left" else (0, extra)
        input_ids = nn.functional.pad(input_ids, sides, value=pad_token_id)
        attention_mask = nn.functional.pad(attention_mask, sides)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def without_start_tokens(
    responses: list[Tensor], response_masks: list[Tensor] | None, decoder_start_token_id: int
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Responses of an encoder-decoder without the start token that `generate` puts before them, and their masks.

    Responses without it are unchanged, and so are values that are not 1-D tensors: they are checked later.
    """
    starts = [
        isinstance(response, Tensor)
        and why_unreadable(response) is None
        and response.dim() == 1
        and response[:1].tolist() == [decoder_start_token_id]
        for response in responses
    ]
    if isinstance(response_masks, list):
        lengths = [len(response) if start else -1 for response, start in zip(responses, starts, strict=True)]
        response_masks = [
            mask[1:] if isinstance(mask, Tensor) and mask.shape == (length,) else mask
            for mask, length in zip(response_masks, lengths, strict=False)
        ]
    return [r[1:] if start else r for r, start in zip(responses, starts, strict=True)], response_masks


def with_known_pads(responses: Any, response_masks: Any, pad_token_id: int, known_pad: int) -> Any:
    """Responses in which `pad_token_id`, where the caller's mask drops it, is `known_pad`.

    Of a pad token that was added without resizing the embeddings no network knows the id. What is no list of tensors
    of the masks' shapes stays as it is: others check it.

    Args:
        responses, response_masks: of `APATrainer.step`.
        pad_token_id: the tokenizer's.
        known_pad: the id that every network knows.
    """
    if pad_token_id == known_pad or not isinstance(responses, list) or not isinstance(response_masks, list):
        return responses
    masks = [*response_masks, *[None] * (len(responses) - len(response_masks))]

    def replaced(response: Any, mask: Any) -> Any:
        readable = all(isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta for t in (response, mask))
        if not readable or response.shape != mask.shape or response.dtype not in (torch.int64, torch.int32):
            return response
        return response.masked_fill((response == pad_token_id) & (mask == 0), known_pad)

    return [replaced(response, mask) for response, mask in zip(responses, masks, strict=False)]
