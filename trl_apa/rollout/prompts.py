"""Where queries come from: shuffled batches of a data set's rows, and a row's prompt as token ids."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from trl_apa.rollout.conversations import conversation_ids
from trl_apa.rollout.tokenizing import prompt_ids


# Besides these, a column is of no use to the classic loop.
COLUMNS = frozenset({"input_ids", "attention_mask", "label", "prompt", "query", "response"})
# What holds the prompt itself; every other column is handed to the reward functions.
PROMPT_COLUMNS = ("prompt", "query", "input_ids", "attention_mask")


def prompt_dataloader(
    dataset: Any, batch_size: int, collator: Callable[..., Any], keep_all_columns: bool, seed: int
) -> DataLoader[Any]:
    """Batches of `batch_size` rows in an order that `seed` decides; what does not fill the last batch is left out.

    Args:
        dataset: a `datasets.Dataset`, or anything with `__len__` and `__getitem__`.
        batch_size: rows a batch.
        collator: rows to a batch.
        keep_all_columns: keep columns that the loop does not read, too; so it does if it would read none.
        seed: of the shuffling.
    """
    dataset = dataset if keep_all_columns else without_unused_columns(dataset)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, collate_fn=collator, drop_last=True, generator=generator)


def without_unused_columns(dataset: Any) -> Any:
    """`dataset` without the columns that the classic loop does not read; as it is if it would read none."""
    if not COLUMNS.intersection(getattr(dataset, "column_names", None) or ()):
        return dataset
    return dataset.remove_columns([name for name in dataset.column_names if name not in COLUMNS])


class PromptSource:
    """The rows of each iteration: the same after a restart, and for any number of processes.

    Rows of a data set with a length come in a shuffled order that is a function of the seed and the number of the pass
    over the data alone; rows that do not fill an iteration are left out of that pass. Rows of a stream come as it
    gives them, from the beginning again when it ends.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, or a list of rows or of prompts.
        rows_per_process: rows per process and iteration.
        seed: of the shuffling.
        process_index, num_processes: process `k` takes the `k`-th part of an iteration's rows.

    Raises:
        ValueError: if there are fewer rows than one iteration needs.
    """

    def __init__(
        self, dataset: Any, rows_per_process: int, seed: int = 0, process_index: int = 0, num_processes: int = 1
    ):
        self.dataset, self.seed = dataset, seed
        self.rows_per_iteration = rows_per_process * num_processes
        self.own = slice(process_index * rows_per_process, (process_index + 1) * rows_per_process)
        self.is_stream = not hasattr(dataset, "__len__")
        self._stream: Iterator[Any] | None = None
        self._next_in_stream = 0
        if not self.is_stream and len(dataset) < self.rows_per_iteration:
            raise ValueError(
                f"train_dataset has {len(dataset)} rows; one iteration needs {self.rows_per_iteration} of them "
                "(batch_size rollouts per process): lower batch_size or pass more rows"
            )

    @property
    def iterations_per_pass(self) -> int | None:
        """Iterations in one pass over the data; None for a stream, which does not tell its length."""
        return None if self.is_stream else len(self.dataset) // self.rows_per_iteration

    def rows(self, iteration: int) -> list[dict[str, Any]]:
        """This process's rows of an iteration, numbered from 0."""
        rows = self._rows_of_stream(iteration) if self.is_stream else self._rows_of_pass(iteration)
        return as_rows(rows[self.own])

    def _rows_of_pass(self, iteration: int) -> list[Any]:
        number, place = divmod(iteration, len(self.dataset) // self.rows_per_iteration)
        generator = torch.Generator().manual_seed(hash((self.seed, number)) % 2**63)
        order = torch.randperm(len(self.dataset), generator=generator)
        chosen = order[place * self.rows_per_iteration : (place + 1) * self.rows_per_iteration]
        return [self.dataset[index] for index in chosen.tolist()]

    def _rows_of_stream(self, iteration: int) -> list[Any]:
        if self._stream is None or iteration != self._next_in_stream:
            self._stream = islice(self._endless(), iteration * self.rows_per_iteration, None)
        self._next_in_stream = iteration + 1
        return list(islice(self._stream, self.rows_per_iteration))

    def _endless(self) -> Iterator[Any]:
        while True:
            empty = True
            for row in self.dataset:
                empty = False
                yield row
            if empty:
                raise ValueError("train_dataset gives no rows")


def as_rows(prompts: Iterable[Any]) -> list[dict[str, Any]]:
    """Rows of a data set; a prompt that stands by itself becomes a row with a `prompt`."""
    return [row if isinstance(row, dict) else {"prompt": row} for row in prompts]


def reward_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The rows' columns besides the prompt, which reward functions read: one value per row.

    None where a row lacks a column that another has, as in a `datasets.Dataset`.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in PROMPT_COLUMNS)
    return {name: [row.get(name) for row in rows] for name in names}


def prompt_of(row: dict[str, Any]) -> Any:
    """The prompt of a row as text or chat messages; None if it only has token ids.

    Raises:
        ValueError: if the row has none of these.
    """
    prompt = row.get("query") if row.get("prompt") is None else row["prompt"]
    if prompt is None and row.get("input_ids") is None:
        filled = sorted(name for name in row if row[name] is not None)
        raise ValueError(
            f"a row has the columns {filled}; it should have prompt (text or chat messages), query, or input_ids"
        )
    return prompt


def query_of(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    for_encoder: bool = False,
) -> Tensor:
    """A row's prompt as 1-D token ids, at most `max_prompt_length` of them.

    Ids that the row holds are taken as they are; a text becomes what `tokenizing.prompt_ids` says, `for_encoder` or
    for a decoder; the last ones are kept of both. Of chat messages the last turns are kept, in a complete chat
    template: see `conversations.conversation_ids`.

    Raises:
        ValueError: if the prompt has no token, or chat messages cannot be made that short.
    """
    prompt = prompt_of(row)
    if row.get("input_ids") is not None:
        ids = row["input_ids"]
    elif is_conversational({"prompt": prompt}):
        ids = conversation_ids(prompt, tokenizer, max_prompt_length, chat_template_kwargs)
    else:
        ids = prompt_ids(prompt, tokenizer, chat_template_kwargs, for_encoder)
    query = torch.as_tensor(ids, dtype=torch.long)
    if len(query) == 0:
        raise ValueError(f"the prompt {prompt!r} has no token")
    return query if max_prompt_length is None else query[-max_prompt_length:]
