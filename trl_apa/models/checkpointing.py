"""Gradient checkpointing: off while a network samples, and its methods, which transformers renamed in 5.20."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_checkpointing(network: Any, kwargs: dict[str, Any] | None) -> Iterator[None]:
    """Inside, layers keep a cache; afterwards gradient checkpointing is on again if it was, also after an error.

    Args:
        network: with transformers' methods for gradient checkpointing.
        kwargs: the options to switch it on again with; by default those of the Trainer.
    """
    checkpointing = is_checkpointing(network)
    if checkpointing:
        network.gradient_checkpointing_disable()
    try:
        yield
    finally:
        if checkpointing:
            network.gradient_checkpointing_enable(kwargs or {"use_reentrant": False})


def is_checkpointing(network: Any) -> bool:
    """Whether layers of a network are checkpointed."""
    new = getattr(network, "is_activation_checkpointing", None)
    return bool(network.is_gradient_checkpointing if new is None else new)


def renamed_method(network: nn.Module, new_name: str, old_name: str) -> Callable[..., Any]:
    """The method under its new name, or under the one that it had before."""
    method: Callable[..., Any] = getattr(network, new_name, None) or getattr(network, old_name)
    return method
