"""Rows of a data set to a batch, without a collator of the caller's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate


class Stacked(Tensor):
    """Tensors of equal shape, one a row, stacked as torch's default collator does.

    `generate` and `step` take it for the list of its rows, which batches of unequal rows are. What is computed from it
    is a plain tensor; moved or detached it stays what it is.
    """

    _KEPT = frozenset(
        getattr(Tensor, name) for name in ("to", "cpu", "cuda", "pin_memory", "detach", "long", "int", "contiguous")
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch has no annotations
        return result if func in cls._KEPT else _plain(result)


def _plain(result: Any) -> Any:
    if isinstance(result, Stacked):
        return result.as_subclass(Tensor)
    return type(result)(map(_plain, result)) if type(result) in (list, tuple) else result


def rows_of(batch: Any) -> Any:
    """The list of rows of what `collate` has stacked; anything else as it is."""
    return list(batch) if isinstance(batch, Stacked) and batch.dim() else batch


def collate(rows: Sequence[Any]) -> Any:
    """Rows to a batch as torch's `default_collate`, with lists where that cannot: the default collator.

    Dicts become a dict and tuples a tuple of columns. Of a column, tensors or arrays of equal shape are stacked,
    numbers become a tensor, and texts a list. Everything else is a list: tensors of unequal shape, arrays as tensors,
    lists of integers as 1-D tensors, also those of equal length, and other lists (chat messages) as they are.

    Args:
        rows: at least one.
    """
    first = rows[0]
    if isinstance(first, Mapping):
        if any(not isinstance(row, Mapping) or row.keys() != first.keys() for row in rows):
            return list(rows)
        return {name: collate([row[name] for row in rows]) for name in first}
    if isinstance(first, tuple) and first:
        if any(not isinstance(row, tuple) or len(row) != len(first) for row in rows):
            return list(rows)
        columns = [collate(column) for column in zip(*rows, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else tuple(columns)
    values = [_as_tensor(row) for row in rows]
    if isinstance(first, list):
        return values
    try:
        batch = default_collate(values)
    except (TypeError, ValueError, RuntimeError):
        return values
    return batch.as_subclass(Stacked) if type(batch) is Tensor else batch


def _as_tensor(value: Any) -> Any:
    """An array, or a list of integers, as a tensor that shares no memory with it; anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # torch computes with unsigned integers of 8 bits only.
        widened = value.dtype.kind == "u" and value.dtype.itemsize > 1
        return torch.from_numpy(value.astype(np.int64) if widened else value.copy())
    if isinstance(value, list) and value and all(type(element) is int for element in value):
        return torch.tensor(value)
    return value
