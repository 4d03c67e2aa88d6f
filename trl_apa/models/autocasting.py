"""Frozen weights that autocast casts once, as it does those that are trained, instead of at each forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trl_apa.models.logprobs import is_sharded
from trl_apa.models.network_parts import Network


@contextmanager
def frozen_weights_cast_once(model: Network) -> Iterator[None]:
    """Inside, without gradient, autocast keeps its copy of each float32 weight that it casts, until the end.

    Autocast keeps the copies of weights that require a gradient: so the frozen ones do, while none is computed. The
    numbers are the same. Nothing changes without autocast, nor where an engine has spread the weights.

    Args:
        model: whose weights nobody changes inside.
    """
    kind = next(model.parameters()).device.type
    keeps = torch.is_autocast_enabled(kind) and torch.is_autocast_cache_enabled() and not is_sharded(model)
    weights = model.parameters() if keeps else ()
    frozen = [p for p in weights if p.dtype == torch.float32 and not p.requires_grad and not p.is_inference()]
    with torch.no_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            if frozen:
                torch.clear_autocast_cache()
