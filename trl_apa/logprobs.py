"""Per-token log-probabilities and entropies of a language model, at response positions only, in float32."""

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from trl_apa._trl import entropy_from_logits, is_peft_model, selective_log_softmax
from trl_apa.masking import at_least_float32


def response_logprobs(
    model: nn.Module,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    position_ids_BT: Tensor,
    response_width: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi(a|s) of the last `response_width` tokens of each row, at the temperature they were sampled at.

    The vocabulary head runs only where a response token is predicted, in the model's own precision; the softmax is
    taken in float32 (in bfloat16 it is off by up to 0.06 nats, and APA squares it).

    Args:
        model: a decoder language model, with or without PEFT adapters.
        input_ids_BT: token ids `(B, T)`, the response in the last `response_width` positions.
        attention_mask_BT: 1 = real token, `(B, T)`.
        position_ids_BT: position of each token in its own sequence, `(B, T)`.
        response_width: `R`, tokens.
        temperature: logits are divided by it.
        with_entropy: also return the entropy of the whole next-token distribution, without gradient.

    Returns:
        `logprobs_BR` (nats, float32, with gradient) and `entropy_BR` (nats, float32, detached) or None. Values at
        padded positions are arbitrary.
    """
    accepted = forward_parameters(model)
    inputs: dict[str, Any] = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "use_cache": False}
    if "position_ids" in accepted:
        inputs["position_ids"] = position_ids_BT
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = response_width + 1
    logits = model(**inputs).logits
    # The logits at position t predict token t + 1, so the last column predicts nothing.
    logits_BRV = at_least_float32(logits[:, -response_width - 1 : -1]) / temperature
    logprobs_BR = selective_log_softmax(logits_BRV, input_ids_BT[:, -response_width:])
    if not with_entropy:
        return logprobs_BR, None
    with torch.no_grad():
        return logprobs_BR, entropy_from_logits(logits_BRV)


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names that the forward of `model` (of the network inside, for a PEFT wrapper) takes."""
    return _forward_parameters(type(model.get_base_model() if is_peft_model(model) else model))


@lru_cache
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)
