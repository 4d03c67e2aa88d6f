"""Trials are made once: for a network, and for others with the same code, options and weights in this process."""

from bisect import bisect_left
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trl_apa.models.network_identity import identity_of
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.models.packing import PER_SEQUENCE, attending_with
from trl_apa.models.trials import boundaries


_OF_NETWORKS: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()
_OF_EQUAL_NETWORKS: dict[Hashable, Any] = {}


def once(kind: str, network: Network, longest: int, work: Callable[[], Any]) -> Any:
    """What `work` gives, once for a network and rows that cross the same boundaries of its config.

    Args:
        kind: what is tried.
        network: any network, with or without PEFT adapters.
        longest: tokens of the longest row.
        work: the trial.

    Returns:
        The trial, or the exception that it raised: a kernel may not be for this device, say.

    Raises:
        torch.OutOfMemoryError: if there was no memory for it.
    """
    base = inner_model(network)
    learns = any(parameter.requires_grad for parameter in network.parameters())
    key = kind, bisect_left(boundaries(base.config), longest), learns, _precision(base)
    of_network = _OF_NETWORKS.setdefault(base, {})
    if key not in of_network:
        identity = identity_of(base)
        equal = None if identity is None else (*key, identity)
        if equal not in _OF_EQUAL_NETWORKS:
            made = _made(base, work)
            if equal is None or isinstance(made, Exception):
                of_network[key] = made
                return made
            _OF_EQUAL_NETWORKS[equal] = made
        of_network[key] = _OF_EQUAL_NETWORKS[equal]
    return of_network[key]


def _precision(base: Any) -> Hashable:
    """What else decides how a network rounds; attention for packed rows is SDPA for all others."""
    kind = base.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    attention = base.config._attn_implementation
    return kind, base.dtype, autocast, "sdpa" if attention == PER_SEQUENCE else attention


def _made(base: Any, work: Callable[[], Any]) -> Any:
    own = base.config._attn_implementation
    try:
        # Flex attention is compiled for each kind of shape, and for few of them.
        with attending_with(base, "sdpa" if own == "flex_attention" else own):
            return work()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Frames, also those of its causes, keep the network and its results alive.
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    finally:
        torch.clear_autocast_cache()  # older torch would keep using the copies of weights made without gradient
