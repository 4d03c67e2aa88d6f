"""Logits, per-token log-probabilities and entropies of a language model, at response positions only, in float32."""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from trl_apa._trl import entropy_from_logits, is_peft_model, selective_log_softmax
from trl_apa.masking import at_least_float32


TOKEN_FIELDS = ("input_ids", "attention_mask", "position_ids", "encoder_input_ids", "encoder_attention_mask")


def response_logprobs(
    model: nn.Module,
    tokens: Mapping[str, Tensor],
    response_width: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi(a|s) of the last `response_width` tokens of each row, at the temperature they were sampled at.

    Args:
        model: a language model, with or without PEFT adapters.
        tokens: what `rollouts.pad_tokens` gives.
        response_width: `R`, tokens.
        temperature: logits are divided by it.
        with_entropy: also return the entropy of the whole next-token distribution, without gradient.

    Returns:
        `logprobs_BR` (nats, float32, with gradient) and `entropy_BR` (nats, float32, detached) or None. Values at
        padded positions are arbitrary.
    """
    logits_BRV, _ = response_logits(model, tokens, response_width, temperature)
    logprobs_BR = sampled_logprobs(logits_BRV, tokens)
    return logprobs_BR, response_entropy(logits_BRV) if with_entropy else None


def response_logits(
    model: nn.Module,
    tokens: Mapping[str, Tensor],
    response_width: int,
    temperature: float = 1.0,
    with_hidden: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The logits that predict the last `response_width` tokens of each row, over the temperature, in float32.

    The vocabulary head runs only where a response token is predicted, in the model's own precision.

    Args:
        model, tokens, response_width, temperature: see `response_logprobs`.
        with_hidden: also return the last hidden states of the same positions.

    Returns:
        `logits_BRV` (nats up to a constant a position, float32) and `hidden_BRH` or None.
    """
    inputs = network_inputs(model, tokens)
    if "logits_to_keep" in forward_parameters(model):
        inputs["logits_to_keep"] = response_width + 1
    output = model(**inputs, output_hidden_states=True) if with_hidden else model(**inputs)
    # The logits at position t predict token t + 1, so the last column predicts nothing.
    logits_BRV = at_least_float32(output.logits[:, -response_width - 1 : -1]) / temperature
    return logits_BRV, last_hidden_states(output)[:, -response_width - 1 : -1] if with_hidden else None


def sampled_logprobs(logits_BRV: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
    """Log-probs of the tokens that the logits predict, nats, float32 `(B, R)`.

    The softmax is taken in float32: in bfloat16 it is off by up to 0.06 nats, and APA squares it.
    """
    return selective_log_softmax(logits_BRV, tokens["input_ids"][:, -logits_BRV.shape[1] :])


@torch.no_grad()
def response_entropy(logits_BRV: Tensor) -> Tensor:
    """Entropy of each next-token distribution, nats, float32 `(B, R)`, without gradient."""
    return entropy_from_logits(logits_BRV)


def network_inputs(network: nn.Module, tokens: Mapping[str, Tensor]) -> dict[str, Any]:
    """`tokens` (see `rollouts.pad_tokens`) under the names that the forward of `network` takes."""
    inputs: dict[str, Any] = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    if "encoder_input_ids" in tokens:
        inputs = {f"decoder_{name}": tensor for name, tensor in inputs.items()}
        inputs |= {"input_ids": tokens["encoder_input_ids"], "attention_mask": tokens["encoder_attention_mask"]}
    elif "position_ids" in forward_parameters(network):
        inputs["position_ids"] = tokens["position_ids"]
    return {**inputs, "use_cache": False}


def last_hidden_states(output: Any) -> Tensor:
    """The last hidden states `(B, T, H)` (of the decoder, if there are two stacks) in what a network returned."""
    if (hidden_BTH := getattr(output, "last_hidden_state", None)) is not None:
        return hidden_BTH
    states = getattr(output, "decoder_hidden_states", None)
    return (output.hidden_states if states is None else states)[-1]


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names that the forward of `model` (of the network inside, for a PEFT wrapper) takes."""
    return _forward_parameters(type(model.get_base_model() if is_peft_model(model) else model))


@lru_cache
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)
