"""Where the classic loop's queries come from: shuffled batches of a data set's rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader


# Besides these, a column is of no use to the loop.
COLUMNS = frozenset({"input_ids", "attention_mask", "label", "query", "response"})


def prompt_dataloader(
    dataset: Any, batch_size: int, collator: Callable, keep_all_columns: bool, seed: int
) -> DataLoader:
    """Batches of `batch_size` rows in an order that `seed` decides; what does not fill the last batch is left out.

    Args:
        dataset: a `datasets.Dataset`, or anything with `__len__` and `__getitem__`.
        batch_size: rows a batch.
        collator: rows to a batch.
        keep_all_columns: keep columns that the loop does not read, too.
        seed: of the shuffling.
    """
    if not keep_all_columns and hasattr(dataset, "column_names"):
        dataset = dataset.remove_columns([name for name in dataset.column_names if name not in COLUMNS])
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, collate_fn=collator, drop_last=True, generator=generator)


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows to columns, each a list; lists of integers become 1-D tensors. The default collator."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: [torch.tensor(v) if isinstance(v, list) and v and isinstance(v[0], int) else v for v in values]
        for name, values in columns.items()
    }
