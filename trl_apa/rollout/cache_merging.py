"""Joins rows that are being sampled with rows that begin later: their tokens, their masks and their caches."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class Begun(NamedTuple):
    """Rows that `generate` can go on with.

    Args:
        tokens_AT: int64, left-padded prompts and what was generated, at least one token.
        mask_AT: int64, 1 = a token that is read.
        starts_A: column in which the response of each row begins.
        cache: of all tokens but the last.
        of_cache: the row of the cache that each row continues, int64; None where they are the rows of the cache.
    """

    tokens_AT: Tensor
    mask_AT: Tensor
    starts_A: Tensor
    cache: Any
    of_cache: Tensor | None


def joined(parts: list[Begun], pad_token_id: int, copies: bool = False) -> Begun:
    """All rows of several parts, aligned at their last column; columns that no row reads are left out.

    Args:
        parts: the cache of the first becomes that of all rows, layer by layer; the others stay as they are.
        pad_token_id: fills up tokens.
        copies: leave the cache of the first as it is, too.

    Raises:
        TypeError: for a cache, or a layer of one, that keeps anything but keys and values of the last tokens.
    """
    width = max(part.mask_AT.shape[1] - int(part.mask_AT.argmax(dim=1).min()) for part in parts)
    cache = parts[0].cache
    for part in parts:
        if type(part.cache) is not DynamicCache:
            raise TypeError(f"rows of a {type(part.cache).__name__} cannot be joined")
    if copies:
        cache = copy.copy(cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
    for number, layer in enumerate(cache.layers):
        _join_layer(layer, [(part.cache.layers[number], part.of_cache) for part in parts], width - 1)
    starts_A = torch.cat([part.starts_A + width - part.mask_AT.shape[1] for part in parts])
    return Begun(
        tokens_AT=torch.cat([fitted(part.tokens_AT, width, value=pad_token_id) for part in parts]),
        mask_AT=torch.cat([fitted(part.mask_AT, width) for part in parts]),
        starts_A=starts_A,
        cache=cache,
        of_cache=None,
    )


def _join_layer(layer: Any, parts: list[tuple[Any, Tensor | None]], num_columns: int) -> None:
    """Give a layer of a cache chosen rows of several, which it may be among."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise TypeError(f"rows of a {type(layer).__name__} cannot be joined")
    if not layer.is_initialized:  # it uses the keys and values of another layer
        return
    kept = num_columns
    if type(layer) is DynamicSlidingWindowLayer:
        kept = min(num_columns, layer.sliding_window - 1)
        layer.cumulative_length = num_columns
    for name in ("keys", "values"):
        of_parts = [(getattr(part, name), rows) for part, rows in parts]
        chosen = [states if rows is None else states[rows.to(states.device)] for states, rows in of_parts]
        setattr(layer, name, torch.cat([fitted(states, kept, dim=-2) for states in chosen]))


def fitted(rows: Tensor, num_columns: int, dim: int = -1, value: int = 0) -> Tensor:
    """Rows with so many columns: their last ones, or all of them behind columns of `value`."""
    missing = num_columns - rows.shape[dim]
    if missing <= 0:
        return rows.narrow(dim, -missing, num_columns)
    return torch.nn.functional.pad(rows, (0, 0) * (-1 - dim) + (missing, 0), value=value)
