"""ILQL's policy: the language model with every token's logit moved by its advantage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trl_apa.algorithms.masking import at_least_float32
from trl_apa.models.caches import CACHE_ARGUMENT, cache_of
from trl_apa.models.logprobs import forward_parameters, forward_replaced, last_hidden_states
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.offline.networks import QValueModel


@contextmanager
def advantage_shifted(policy: Network, q_model: QValueModel, beta: float) -> Iterator[Network]:
    """
    Inside, `policy` is ILQL's (Snell et al. 2022, arXiv 2206.11871, section 5.3):

        log pi(a|s) = log pi_beta(a|s) + beta (Q^(s,a) - V(s)) + a constant

    Its logits are moved in every forward pass, in float32, so that `generate` and log-probs see the same policy.

    Args:
        policy: pi_beta, a decoder that was fine-tuned on the data. Used as it is, with its cache and its padding.
        q_model: the values, on a trunk that reads the same tokens.
        beta: nats per reward unit; 0 leaves the policy as it is.
    """
    # `generate` and forward of a PEFT model both come to the model inside.
    network = inner_model(policy)
    had_its_own, forward = "forward" in vars(network), network.forward
    network.forward = _Shifted(forward, q_model, beta)
    try:
        with forward_replaced(network):
            yield policy
    finally:
        if had_its_own:
            network.forward = forward
        else:
            del network.forward


class _Shifted:
    """A forward pass with shifted logits; it keeps a cache of the values' trunk in addition to the policy's."""

    def __init__(self, forward: Callable[..., Any], q_model: QValueModel, beta: float):
        self.forward, self.q_model, self.beta = forward, q_model, beta
        self.cache: DynamicCache | None = None
        update_wrapper(self, forward)  # `generate` looks for the names of its arguments

    def __call__(self, **kwargs: Any) -> Any:
        output = self.forward(**kwargs)
        with torch.no_grad():
            hidden_BTH = self._hidden_states(kwargs, output)
            kept = output.logits.shape[1]
            advantages_BKV = self.q_model.advantages(hidden_BTH[:, -kept:])
        output.logits = at_least_float32(output.logits) + self.beta * advantages_BKV
        return output

    def _hidden_states(self, kwargs: dict[str, Any], output: Any) -> Tensor:
        trunk = self.q_model.trunk
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        inputs = {name: value for name, value in inputs.items() if name in forward_parameters(trunk)}
        policy_cache = cache_of(output) if kwargs.get("use_cache") else None
        if policy_cache is None:
            return last_hidden_states(trunk(**inputs, use_cache=False))
        if policy_cache.get_seq_length() == inputs["input_ids"].shape[1]:
            self.cache = DynamicCache(config=trunk.config)  # the first pass of a new batch
        name = CACHE_ARGUMENT if CACHE_ARGUMENT in forward_parameters(trunk) else "past_key_values"
        return last_hidden_states(trunk(**inputs, **{name: self.cache}, use_cache=True))
