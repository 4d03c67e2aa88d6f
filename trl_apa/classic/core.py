"""What scripts for TRL <= 0.11 import from `trl.core`, under the same names."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from accelerate.utils import release_memory
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TopKLogitsWarper, TopPLogitsWarper

from trl_apa._trl import entropy_from_logits as _entropy_from_logits
from trl_apa._trl import selective_log_softmax
from trl_apa.algorithms.masking import WHITEN_EPSILON, at_least_float32, keep_counted
from trl_apa.algorithms.masking import masked_var as _masked_var
from trl_apa.classic.names import LengthSampler, respond_to_batch, set_seed


__all__ = [
    "WANDB_PADDING",
    "LengthSampler",
    "PPODecorators",
    "add_suffix",
    "average_torch_dicts",
    "clip_by_value",
    "convert_to_scalar",
    "entropy_from_logits",
    "flatten_dict",
    "listify_batch",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "pad_to_size",
    "respond_to_batch",
    "set_seed",
    "stack_dicts",
    "stats_to_np",
    "top_k_top_p_filtering",
    "whiten",
]

WANDB_PADDING = -1


def logprobs_from_logits(logits: Tensor, labels: Tensor | None, gather: bool = True) -> Tensor:
    """Log-probabilities, nats, in at least float32.

    Args:
        logits (`Tensor` `(B, T, V)`): of any scale.
        labels (`Tensor` `(B, T)`): token ids; not read if `gather` is `False`.
        gather (`bool`, *optional*, defaults to `True`): of the labels only.

    Returns:
        `Tensor` `(B, T)`, or without `gather` `(B, T, V)`.
    """
    logits = at_least_float32(logits)
    return selective_log_softmax(logits, labels) if gather else logits.log_softmax(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each distribution over the last dimension, nats, in at least float32: `(..., V)` -> `(...)`."""
    entropy: Tensor = _entropy_from_logits(at_least_float32(logits))
    return entropy


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of the counted entries, over everything or along `axis`; 0 where nothing is counted (classic: NaN).

    Args:
        values (`Tensor`): any shape, any unit.
        mask (`Tensor`): the shape of `values`, bool or numbers; what is not 0 is counted.
        axis (`int`, *optional*): the dimension to reduce. Defaults to all.
    """
    mask = mask.bool()
    counted = keep_counted(values, mask)
    if axis is None:
        return counted.sum() / mask.sum().clamp(min=1)
    return counted.sum(axis) / mask.sum(axis).clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the counted entries, a 0-d tensor in the squared unit of `values`. `mask` as in `masked_mean`.

    Raises:
        ValueError: if nothing is counted, or, for the unbiased variance, one entry only.
    """
    count = int(mask.bool().sum())
    if count <= int(unbiased):
        raise ValueError(f"mask counts {count} entries; a variance needs at least {1 + int(unbiased)}")
    return _masked_var(values, mask.bool(), unbiased)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`(values - mean) / sqrt(var + 1e-8)` where counted, 0 elsewhere. With gradient, unlike `masking.masked_whiten`.

    Args:
        values (`Tensor`), mask (`Tensor`): as in `masked_mean`.
        shift_mean (`bool`, *optional*, defaults to `True`): if `False`, the mean is added back.

    Raises:
        ValueError: as `masked_var`.
    """
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    whitened = (keep_counted(values, mask.bool()) - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, torch.zeros_like(whitened))


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """`masked_whiten` with everything counted."""
    return masked_whiten(values, torch.ones_like(values, dtype=torch.bool), shift_mean)


def clip_by_value(x: Tensor, tensor_min: Tensor | float, tensor_max: Tensor | float) -> Tensor:
    """`x` between two bounds, each a number or a tensor that broadcasts with `x`; the lower one wins."""
    lower, upper = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (tensor_min, tensor_max))
    return torch.maximum(torch.minimum(x, upper), lower)


def pad_to_size(tensor: Tensor, size: int, dim: int = 1, padding: float = 50256) -> Tensor:
    """`tensor` with `padding` behind it along `dim`, up to `size` entries.

    Raises:
        ValueError: if there are more already.
    """
    missing = size - tensor.shape[dim]
    if missing < 0:
        raise ValueError(f"tensor has {tensor.shape[dim]} entries along dim={dim}, more than size={size}")
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, padding)], dim=dim)


def listify_batch(tensor: Tensor) -> list[Tensor]:
    """The rows of a tensor, each still with a first dimension, of 1."""
    return list(tensor.split(1))


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """Flatten nested dicts into one dict, its keys joined by `sep`.

    Raises:
        ValueError: if two keys become one.
    """
    flat: dict[str, Any] = {}

    def collect(prefix: str, branch: Mapping[str, Any]) -> None:
        for key, value in branch.items():
            if isinstance(value, Mapping):
                collect(f"{prefix}{key}{sep}", value)
            elif f"{prefix}{key}" in flat:
                raise ValueError(f"nested has two entries that become {prefix + key!r}")
            else:
                flat[f"{prefix}{key}"] = value

    collect("", nested)
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of each key, flattened and stacked `(dicts, longest)`, shorter ones padded with -1."""
    return {
        key: pad_sequence(
            [stats[key].flatten() for stats in stats_dicts], batch_first=True, padding_value=WANDB_PADDING
        )
        for key in stats_dicts[0]
    }


def average_torch_dicts(list_of_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the tensors of each key, entry by entry, in at least float32."""
    return {
        key: torch.stack([at_least_float32(stats[key]) for stats in list_of_dicts]).mean(0) for key in list_of_dicts[0]
    }


def add_suffix(input_dict: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """The same dict with `suffix` behind every key."""
    return {f"{key}{suffix}": value for key, value in input_dict.items()}


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The same dict with tensors and arrays of shape `()` or `(1,)` as numbers."""
    return {
        key: value.item() if hasattr(value, "item") and tuple(value.shape) in ((), (1,)) else value
        for key, value in stats.items()
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same dict with tensors as NumPy arrays (bfloat16, which NumPy lacks, as float32) and numbers as `float`."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return float(value) if isinstance(value, Real) else value

    return {key: convert(value) for key, value in stats_dict.items()}


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """The logits of the likeliest tokens; those of all others are `filter_value`.

    Args:
        logits (`Tensor` `(B, V)`): of any scale.
        top_k (`int`, *optional*, defaults to `0`): keep the `top_k` likeliest tokens; 0 = all.
        top_p (`float`, *optional*, defaults to `1.0`): keep the likeliest tokens of this total probability.
        filter_value (`float`, *optional*, defaults to minus infinity): the logit of the others.
        min_tokens_to_keep (`int`, *optional*, defaults to `1`): of each row.

    Returns:
        `Tensor` `(B, V)`.
    """
    if top_k > 0:
        logits = TopKLogitsWarper(top_k, filter_value, min_tokens_to_keep)(None, logits)
    if 0 <= top_p < 1:
        logits = TopPLogitsWarper(top_p, filter_value, min_tokens_to_keep)(None, logits)
    return logits


class PPODecorators:
    """`@PPODecorators.empty_device_cache()` gives the device's cached memory back after the function.

    TRL before 0.7 called it `empty_cuda_cache`, and the switch `optimize_cuda_cache`.
    """

    optimize_device_cache = False
    optimize_cuda_cache = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls) -> Iterator[None]:
        yield
        if cls.optimize_device_cache or cls.optimize_cuda_cache:
            release_memory()

    empty_cuda_cache = empty_device_cache
