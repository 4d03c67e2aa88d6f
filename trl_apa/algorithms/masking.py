"""Reductions over the counted entries of a tensor; every one names its denominator."""

import math

import torch
import torch.distributed as dist
from torch import Tensor


WHITEN_EPSILON = 1e-8


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged when it is float32 or float64 already: no sum is taken in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def keep_counted(x: Tensor, mask: Tensor) -> Tensor:
    """
    `x` on the mask and 0 elsewhere, in at least float32.

    Applied to an *input*, before any arithmetic, it keeps NaN and infinity behind the mask out of the value and out of
    the gradient (a product with a zero mask keeps neither: `0 * nan = nan`).

    Args:
        x (`Tensor`): any shape.
        mask (`Tensor`): bool, the shape of `x`, `True` = counted.

    Raises:
        ValueError: if `mask` is not bool or its shape is not that of `x`.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, it should be torch.bool (True = counted)")
    if mask.shape != x.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, it should be that of x, {tuple(x.shape)}")
    x = at_least_float32(x)
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def check_response_tensors(response_mask_BR: Tensor, **tensors_BR: Tensor) -> None:
    """
    Raise `ValueError`, by argument name, unless the mask is bool and `(B, R)` and all tensors have its shape.

    Args:
        response_mask_BR (`Tensor`): what should be a bool mask of shape `(B, R)`.
        tensors_BR (`Tensor`): what should have the same shape, each under the name that the message should give it.
    """
    if response_mask_BR.dtype != torch.bool:
        raise ValueError(f"response_mask_BR has dtype {response_mask_BR.dtype}, it should be torch.bool")
    if response_mask_BR.ndim != 2:
        raise ValueError(f"response_mask_BR has shape {tuple(response_mask_BR.shape)}, it should be (B, R)")
    for name, tensor in tensors_BR.items():
        if tensor.shape != response_mask_BR.shape:
            expected = f"it should be that of response_mask_BR, {tuple(response_mask_BR.shape)}"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {expected}")


def check_positive(name: str, number: float) -> None:
    """Raise `ValueError`, naming the argument, unless it is finite and above 0."""
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} is {number}, it should be finite and positive")


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` over the counted entries: a 0-d tensor in the unit of `x`, 0 when nothing is counted."""
    return keep_counted(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor, num_tokens: float | Tensor | None = None) -> Tensor:
    """
    Sum of `x` over the counted entries, divided by `num_tokens` or, without it, by the number of counted entries.

    With `num_tokens` = the count of a complete optimizer step, its micro-batches' results *add up* to the mean of
    the step, however it was split.

    Args:
        x (`Tensor`): any shape.
        mask (`Tensor`): bool, the shape of `x`, `True` = counted.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of `mask`, at least 1):
            Denominator. Never smaller than the count of `mask`; this is not checked, since it would wait for the
            device.

    Returns:
        0-d `Tensor` in the unit of `x`; 0 when nothing is counted.

    Raises:
        ValueError: if `num_tokens` is a number that is not positive or a tensor that is not 0-d; if `mask` is not bool
            or has another shape than `x`.
    """
    total = masked_sum(x, mask)
    if num_tokens is None:
        return total / mask.sum().clamp(min=1)
    if isinstance(num_tokens, Tensor):
        if num_tokens.ndim != 0:
            raise ValueError(f"num_tokens has shape {tuple(num_tokens.shape)}, it should be a number or a 0-d tensor")
        return total / num_tokens.detach().to(total.dtype)
    if not num_tokens > 0:
        raise ValueError(
            f"num_tokens is {num_tokens}, it should be positive: the number of counted tokens of the step"
        )
    return total / num_tokens


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """
    Variance of `x` over the counted entries, in two passes (mean first, then squared deviations).

    Args:
        x (`Tensor`): any shape.
        mask (`Tensor`): bool, the shape of `x`, `True` = counted.
        unbiased (`bool`, *optional*, defaults to `True`):
            Divide by `max(n - 1, 1)` instead of `max(n, 1)`, `n` = number of counted entries.

    Returns:
        0-d `Tensor` in the squared unit of `x`; 0 (not NaN) for one counted entry or none.
    """
    counted = keep_counted(x, mask)
    deviations = torch.where(mask, counted - masked_mean(counted, mask), torch.zeros_like(counted))
    return deviations.square().sum() / (mask.sum() - int(unbiased)).clamp(min=1)


def masked_moments(x: Tensor, mask: Tensor, distributed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """
    Count, mean and sum of squared deviations over the counted entries of this process, or of all processes.

    Args:
        x (`Tensor`): any shape, on a device that the process group can reduce. Ranks may differ in shape.
        mask (`Tensor`): bool, the shape of `x`, `True` = counted.
        distributed (`bool`, *optional*, defaults to `False`):
            Take them over the union of all ranks (two all-reduces). Without an initialised process group it has no
            effect.

    Returns:
        Three detached 0-d tensors in float64 (float32 on MPS, which has no float64), equal on every rank.
    """
    accumulator = torch.float32 if x.device.type == "mps" else torch.float64
    counted = keep_counted(x.detach(), mask).to(accumulator)
    merge = distributed and dist.is_available() and dist.is_initialized()
    count_and_sum = torch.stack([mask.sum().to(accumulator), counted.sum()])
    if merge:
        dist.all_reduce(count_and_sum)
    count, total = count_and_sum.unbind()
    mean = total / count.clamp(min=1)
    squares = torch.where(mask, counted - mean, torch.zeros_like(counted)).square().sum()
    if merge:
        dist.all_reduce(squares)
    return count, mean, squares


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, distributed: bool = False) -> Tensor:
    """
    `(x - mean) / sqrt(var + 1e-8)` on the counted entries, 0 elsewhere; `var` is the unbiased variance.

    The paper does not mention whitening; its public code whitens the advantages of a rollout batch before use. Do it
    once, over the complete batch, before any split into micro-batches.

    Args:
        x (`Tensor`): any shape; with `distributed`, on a device that the process group can reduce.
        mask (`Tensor`): bool, the shape of `x`, `True` = counted.
        shift_mean (`bool`, *optional*, defaults to `True`):
            Whether the result has mean 0. If `False` the mean of `x` is added back, so that only the scale changes.
        distributed (`bool`, *optional*, defaults to `False`):
            Whiten with the mean and variance of the union of all ranks. Every rank must then make the call.

    Returns:
        `Tensor` of the shape of `x`, without unit, detached: advantages are constants of the loss. The statistics are
        taken in float64. One counted entry, or entries that are all equal, give 0.
    """
    count, mean, squares = masked_moments(x, mask, distributed)
    scale = torch.rsqrt(squares / (count - 1).clamp(min=1) + WHITEN_EPSILON)
    counted = keep_counted(x.detach(), mask)
    whitened = (counted.to(mean.dtype) - mean) * scale
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened)).to(counted.dtype)
