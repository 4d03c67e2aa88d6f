"""Attention of all sequences of a packed row in one launch of torch's kernel, `torch.nn.attention.varlen`."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.varlen import varlen_attn

from trl_apa.models.packed_rows import PackedRow


States = tuple[Tensor, Tensor, Tensor]
KERNEL_TYPES = (torch.float16, torch.bfloat16)
# What transformers hands to attention that the kernel has no argument for.
BESIDE = ("position_bias", "softcap", "s_aux", "output_attentions")
# Widths of heads: the kernel takes multiples up to the widest, and no GPU refuses to learn with one outside the gap.
MULTIPLE, WIDEST, GAP = 8, 256, range(193, 225)


def is_for_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these tensors `(1, heads, tokens, width)` are where torch's flash attention runs, and of its kinds.

    Tensors without contents are those of the memory planner, which pretends a GPU.
    """
    if isinstance(query, FakeTensor):
        return True
    if not query.is_cuda or torch.version.hip is not None:
        return False
    grouped = query.shape[1] != key.shape[1]
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, grouped))


def launches_cost(weight: Tensor) -> bool:
    """Whether a launch of a kernel costs what many tokens do where a weight is: on a GPU, or a pretended one."""
    return isinstance(weight, FakeTensor) or weight.device.type != "cpu"


def why_not_at_once(
    module: nn.Module,
    states: States,
    dropout: float,
    scaling: float | None,
    window: int | None,
    options: Mapping[str, Any],
) -> str | None:
    """Why attention of a packed row takes a launch a sequence; None if one launch does.

    Args:
        module: that attends.
        states: queries, keys and values as the kernel gets them: `in_kernel_type`.
        dropout, scaling, options: as transformers passes them.
        window: tokens that a token sees, None for all before it.
    """
    query, key, value = states
    takes, width = _parameters(varlen_attn), query.shape[-1]
    types = {query.dtype, key.dtype, value.dtype}
    if len(types) > 1 or not types <= set(KERNEL_TYPES):
        names = sorted(str(dtype).removeprefix("torch.") for dtype in types)
        return f"it computes in {' and '.join(names)}, not in one type of half precision"
    if value.shape[-1] != width or width % MULTIPLE or width > WIDEST or width in GAP:
        return f"its heads have a width of {width} for keys and {value.shape[-1]} for values"
    beside = [options.get(name) for name in BESIDE]
    if dropout or not is_causal(module, options) or any(part is not None and part is not False for part in beside):
        return "its attention is not plainly causal"
    if window is not None and "window_size" not in takes:
        return f"varlen_attn of torch {torch.__version__} has no windows"
    if "scale" not in takes and scaling is not None and not math.isclose(scaling, width**-0.5):
        return f"varlen_attn of torch {torch.__version__} takes no scale"
    if not is_for_flash(query, key, value):
        return "torch has no flash attention for it on this device"
    return None


def is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """As transformers' SDPA decides it."""
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def in_kernel_type(query: Tensor, key: Tensor, value: Tensor) -> States:
    """Queries, keys and values in the type in which autocast has SDPA compute; without autocast as they are.

    Rotary positions give float32 queries under autocast, and it knows nothing of `varlen_attn`.
    """
    kind = query.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (query.dtype, key.dtype, value.dtype):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def attend_at_once(states: States, row: PackedRow, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of every sequence to itself and, where it continues a shared prompt, to that before it.

    The keys and values of a response lie gathered behind its prompt's. With fewer queries than keys the kernel takes
    the queries for the last ones, so that windows count on through the prompt.

    Args:
        states: queries, keys and values `(1, heads, tokens, width)` in half precision.
        row: of the tokens.
        scaling: of the scores; by default `1 / sqrt(width)`.
        window: tokens that a token sees, itself included; None for all before it.

    Returns:
        `(1, tokens, heads, width)`.
    """
    bounds = row.bounds(states[0].device)
    query, key, value = (part[0].transpose(0, 1) for part in states)
    if bounds.key_index is not None:
        key, value = (part.index_select(0, bounds.key_index) for part in (key, value))
    takes, group, options = _parameters(varlen_attn), query.shape[1] // key.shape[1], dict[str, Any]()
    if "enable_gqa" in takes:  # from torch 2.12
        options["enable_gqa"] = group > 1
    elif group > 1:
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    if "window_size" in takes:  # from torch 2.11; the kernel counts the tokens before a token
        options |= {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    else:
        options["is_causal"] = True
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    ends = bounds.query_ends, bounds.key_ends, bounds.most_queries, bounds.most_keys
    output = varlen_attn(query, key, value, *ends, **options)
    assert isinstance(output, Tensor)  # a pair where the logarithms of the sums are asked for too
    return output[None]


@lru_cache
def _parameters(kernel: Callable[..., Any]) -> frozenset[str]:
    """What a torch's `varlen_attn` takes."""
    return frozenset(inspect.signature(kernel).parameters)
