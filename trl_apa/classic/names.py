"""Other names that scripts for TRL <= 0.11 import."""

import random
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import GenerationConfig, set_seed

from trl_apa.algorithms.kl import AdaptiveKLController, FixedKLController
from trl_apa.models.adapters import held_repeatable
from trl_apa.models.network_parts import Network
from trl_apa.models.reference import create_reference_model
from trl_apa.rollout.generation import decoder_start_token_id
from trl_apa.rollout.generation_defaults import neutral_generation_config


__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "LengthSampler",
    "create_reference_model",
    "get_kbit_device_map",
    "respond_to_batch",
    "set_seed",
]


def get_kbit_device_map() -> dict[str, int] | None:
    """The `device_map` that loads a quantised model on this process's GPU; None where there is none."""
    return {"": PartialState().local_process_index} if torch.cuda.is_available() or torch.xpu.is_available() else None


class LengthSampler:
    """Draws a number of tokens, each of `min_value, ..., max_value - 1` equally often.

    From the global generator of Python's `random`, which `set_seed` seeds: the draws take nothing from torch's
    generator, with which tokens are sampled. (Classic drew from NumPy's.)

    Args:
        min_value (`int`): the least it draws.
        max_value (`int`): one more than the most.

    Raises:
        ValueError: if no number lies between them.
    """

    def __init__(self, min_value: int, max_value: int):
        if not min_value < max_value:
            raise ValueError(f"max_value is {max_value}, it should be above min_value, {min_value}")
        self.values = range(min_value, max_value)

    def __call__(self) -> int:
        return random.choice(self.values)


def respond_to_batch(model: Network, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sampled continuations of equal length, at temperature 1; an EOS among them ends nothing.

    Args:
        model: a language model, with or without a value-head wrapper. Dropout is off while it samples, and its own
            generation config is not consulted.
        queries (`Tensor` `(B, P)`): token ids without padding; of an encoder-decoder, the encoder's.
        txt_len (`int`, *optional*, defaults to `20`): tokens a response.
        top_k (`int`, *optional*, defaults to `0`): sample among the `top_k` most likely tokens; 0 = among all.
        top_p (`float`, *optional*, defaults to `1.0`): sample among the likeliest tokens of this total probability.

    Returns:
        `Tensor` `(B, txt_len)`: token ids, without the queries.

    Raises:
        ValueError: if `queries` is not `(B, P)`.
    """
    if queries.dim() != 2:
        raise ValueError(f"queries has shape {tuple(queries.shape)}, it should be (B, P)")
    model = getattr(model, "pretrained_model", model)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": top_k, "top_p": top_p}
    options["decoder_start_token_id"] = decoder_start_token_id(model)
    generation_config = GenerationConfig(max_new_tokens=txt_len, use_cache=True, **options)
    with torch.no_grad(), held_repeatable(model), neutral_generation_config(model):
        tokens_BT: Tensor = model.generate(
            input_ids=queries, attention_mask=torch.ones_like(queries), generation_config=generation_config
        )
    return tokens_BT[:, -txt_len:]
