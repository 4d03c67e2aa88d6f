"""Bytes of an optimizer's states for a parameter, as torch and bitsandbytes keep them."""

from collections.abc import Callable, Iterable
from math import prod
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


# bitsandbytes keeps the states of smaller tensors in float32, and of others one float32 scale for so many elements.
SMALLEST_8BIT = 4096
BLOCK_8BIT = 256

Shape = tuple[int, ...]


def adamw(shape: Shape, itemsize: int) -> int:
    """Two moments in the parameter's own type."""
    return 2 * prod(shape) * itemsize


def adamw_8bit(shape: Shape, itemsize: int) -> int:
    """Two moments of a byte an element, and their scales."""
    numel = prod(shape)
    return 8 * numel if numel < SMALLEST_8BIT else 2 * (numel + 4 * -(-numel // BLOCK_8BIT))


def paged(shape: Shape, itemsize: int) -> int:
    """States that wait in the CPU's memory when the GPU has none left."""
    return 0


def adafactor(shape: Shape, itemsize: int) -> int:
    """Second moments of rows and columns, float32; without momentum."""
    if len(shape) < 2:
        return 4 * prod(shape)
    return 4 * prod(shape[:-2]) * (shape[-2] + shape[-1])


def sgd(shape: Shape, itemsize: int) -> int:
    """None, without momentum."""
    return 0


# The Trainer's names, and short ones.
STATES: dict[str, Callable[[Shape, int], int]] = {
    "adamw": adamw,
    "adamw_torch": adamw,
    "adamw_torch_fused": adamw,
    "adamw_8bit": adamw_8bit,
    "adamw_bnb_8bit": adamw_8bit,
    "paged_adamw_8bit": paged,
    "paged_adamw_32bit": paged,
    "adafactor": adafactor,
    "sgd": sgd,
}


def state_bytes(optimizer: str, parameters: "Iterable[torch.Tensor]") -> int:
    """States of all of `parameters`."""
    return sum(STATES[optimizer](tuple(p.shape), p.element_size()) for p in parameters)


def step_bytes(optimizer: str, parameters: "Iterable[torch.Tensor]") -> int:
    """What `optimizer.step` needs for a moment: the unfused AdamW a copy of all parameters, the fused one nothing."""
    if optimizer != "adamw_torch":
        return 0
    return sum(p.numel() * p.element_size() for p in parameters)
