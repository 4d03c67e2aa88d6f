"""Queries and responses in classic's layout, and log-probs, logits, values and mask of every position in it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from trl_apa.algorithms.masking import at_least_float32
from trl_apa.classic.core import logprobs_from_logits
from trl_apa.models.logprobs import forward_parameters
from trl_apa.rollout.batch import pad_queries


class ForwardOutputs(NamedTuple):
    """What classic's `batched_forward_pass` returns. Column `t` is of the token at position `t + 1`.

    Args:
        logprobs: nats, at least float32 `(B, T - 1)`, of the query's tokens too.
        logits: at least float32 `(B, T - 1, V)`, or None.
        values: V of the state before the token, reward units `(B, T - 1)`; None if the network has no values.
        masks: 1 = a response token that counts, int64 `(B, T - 1)`.
    """

    logprobs: Tensor
    logits: Tensor | None
    values: Tensor | None
    masks: Tensor


def classic_inputs(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    pad_token_id: int,
    padding_side: str,
    decoder_start_token_id: int | None = None,
) -> BatchEncoding:
    """What a classic wrapper reads of queries and responses.

    Args:
        queries, responses: `B` 1-D tensors each; an encoder-decoder's responses without the start token.
        pad_token_id: what to fill with.
        padding_side: "left" or "right".
        decoder_start_token_id: of an encoder-decoder.

    Returns:
        `input_ids` and `attention_mask`, int64 `(B, T)`; of an encoder-decoder those are the queries', and the
        responses behind a start token are in `decoder_input_ids` and `decoder_attention_mask`.
    """

    def padded(sequences: list[Tensor]) -> dict[str, Tensor]:
        return pad_queries(sequences, pad_token_id, padding_side=padding_side)

    if decoder_start_token_id is None:
        return BatchEncoding(padded([torch.cat(pair) for pair in zip(queries, responses, strict=True)]))
    starts = [response.new_full((1,), decoder_start_token_id) for response in responses]
    decoder = padded([torch.cat(pair) for pair in zip(starts, responses, strict=True)])
    return BatchEncoding({**padded(list(queries)), **{f"decoder_{name}": ids for name, ids in decoder.items()}})


def forward_pass(
    model: nn.Module,
    network: Any,
    prefix_lengths: Sequence[int],
    responses: Sequence[Tensor],
    inputs: Mapping[str, Tensor],
    response_masks: Sequence[Tensor] | None = None,
    temperature: float = 1.0,
    return_logits: bool = False,
) -> ForwardOutputs:
    """One call of `model`, with gradient if the caller has not switched it off.

    Args:
        model: what returns `(logits, loss, values)`, or an output with `logits`.
        network: the language model in it.
        prefix_lengths: tokens of each row that stand before its response in the stack that reads both.
        responses: 1-D tensors.
        inputs: of `classic_inputs`, or laid out like it.
        response_masks: for each response which of its tokens count.
        temperature: logits are divided by it.
        return_logits: whether logits are among the outputs.
    """
    inputs = dict(inputs)
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    ids_BT = inputs[f"{prefix}input_ids"]
    attention_BT = inputs.get(f"{prefix}attention_mask", torch.ones_like(ids_BT))
    if not prefix and "position_ids" in forward_parameters(network):
        # Otherwise networks with learned positions count the pads on the left.
        inputs.setdefault("position_ids", (attention_BT.cumsum(dim=1) - 1).clamp(min=0))
    outputs: Any = model(**inputs)
    logits, values = (outputs[0], outputs[2]) if isinstance(outputs, tuple) else (outputs.logits, None)
    logits = at_least_float32(logits[:, :-1]) / temperature
    num_pads = (attention_BT.cumsum(dim=1) == 0).sum(dim=1).tolist()
    masks = torch.zeros_like(ids_BT[:, 1:])
    for row, (response, pads, length) in enumerate(zip(responses, num_pads, prefix_lengths, strict=True)):
        start = pads + length - 1
        counted = torch.ones_like(response) if response_masks is None else response_masks[row]
        masks[row, start : start + len(response)] = counted.to(masks)
    logprobs = logprobs_from_logits(logits, ids_BT[:, 1:])
    return ForwardOutputs(
        logprobs, logits if return_logits else None, None if values is None else values[:, :-1], masks
    )


def joined(parts: Sequence[ForwardOutputs]) -> ForwardOutputs:
    """The rows of several passes, one behind the other."""
    fields: Any = zip(*parts, strict=True)
    joined_fields: Any = (None if field[0] is None else torch.cat(field) for field in fields)
    return ForwardOutputs(*joined_fields)
