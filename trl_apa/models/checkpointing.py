"""Gradient checkpointing, whose methods transformers renamed in 5.20."""

from collections.abc import Callable
from typing import Any

from torch import nn


def renamed_method(network: nn.Module, new_name: str, old_name: str) -> Callable[..., Any]:
    """The method under its new name, or under the one that it had before."""
    method: Callable[..., Any] = getattr(network, new_name, None) or getattr(network, old_name)
    return method
