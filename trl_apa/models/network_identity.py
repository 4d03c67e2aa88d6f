"""Networks that compute the same: the same code, options and weights."""

import hashlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Weights of more bytes are not compared: a trial of them is a small part of whatever is done with such a network.
MOST_BYTES = 2**24
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Hooks with which a network computes the same as without; who defines one adds it.
HARMLESS_HOOKS: list[Any] = []
# What such a hook leaves on a module.
HOOK_FIELDS = {*HOOKS, "_forward_hooks_with_kwargs"}


def identity_of(network: nn.Module) -> Hashable | None:
    """Identifies networks that compute the same: modules and their options, attention, precision, every weight.

    Returns:
        None where that cannot be told, or takes as long as a trial: large networks; hooks and replaced forwards;
        weights that are quantised, spread over processes or without contents.
    """
    modules, tensors = list(network.modules()), list[Tensor]()
    if not isinstance(network, PreTrainedModel) or not all(_is_plain(module) for module in modules):
        return None
    options = [_described(_options_of(module), tensors) for module in modules]
    if not all(_is_dense(tensor) for tensor in tensors) or sum(tensor.nbytes for tensor in tensors) > MOST_BYTES:
        return None
    device, implementation = network.device, network.config._attn_implementation
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    attention = [ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys()]
    shapes = [(tensor.dtype, tensor.shape) for tensor in tensors]
    text = repr((device, autocast, implementation, network.config.to_dict(), options, shapes))
    digest = hashlib.blake2b(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest(), *attention, *(type(module) for module in modules)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's class and options define its computation."""
    ours = vars(module)
    hooks = [hook for name in HOOKS for hook in (ours.get(name) or {}).values()]
    return "forward" not in ours and all(hook in HARMLESS_HOOKS for hook in hooks)


def _options_of(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in HOOK_FIELDS and value is not module}


def _is_dense(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and type(tensor.data) is Tensor
    sharded = hasattr(tensor, "ds_id")  # ZeRO-3 leaves such weights empty
    return plain and not sharded and not tensor.is_meta and tensor.layout is torch.strided


def _described(value: Any, tensors: list[Tensor]) -> Any:
    """A value in numbers and texts, and the class of what is neither; the tensors in it are added to `tensors`."""
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, dict):
        return [(key, _described(part, tensors)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [_described(part, tensors) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((_described(part, tensors) for part in value), key=repr)  # equal sets can differ in order
    if isinstance(value, Tensor):
        tensors.append(value)
    return type(value).__qualname__
