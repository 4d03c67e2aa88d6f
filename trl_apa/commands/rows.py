"""Rows of a file or a hub data set as a command needs them: prompts, demonstrations, or preference pairs."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_apa.config.fields import option
from trl_apa.data import BadRow, Preference, preference_rows, sft_rows, split_by_prompt
from trl_apa.data.hh import parse_row, split_dialogue
from trl_apa.data.layouts import LAYOUTS, rows_in_layout
from trl_apa.data.sources import Row, iter_rows


if TYPE_CHECKING:
    from datasets import Dataset

Fields = dict[str, Any]


@dataclass
class DataArguments:
    """Which rows a command reads."""

    dataset_name: str | None = option(None, "A file (json, jsonl, both also .gz, csv, parquet) or a hub data set.")
    dataset_config: str | None = option(None, "Configuration of a hub data set.")
    dataset_data_dir: str | None = option(None, "Folder inside a hub data set.")
    dataset_layout: str | None = option(
        None, f"Columns of a data set that are not called prompt, chosen, ...: {', '.join(LAYOUTS)}."
    )
    dataset_train_split: str = option("train", "Split of a hub data set that is trained on.")
    dataset_test_split: str | None = option(None, "Split of a hub data set that is evaluated on.")
    eval_dataset_name: str | None = option(None, "Held-out rows that are not in dataset_name: a file or a data set.")
    eval_dataset_data_dir: str | None = option(
        None, "Folder inside the hub data set eval_dataset_name; dataset_data_dir by default."
    )
    eval_share: float | None = option(
        None, "Hold out this share of dataset_name's rows: the same in every command, a dialogue never in both parts."
    )
    max_train_rows: int | None = option(None, "Train on so many rows at most.")
    max_eval_rows: int | None = option(None, "Evaluate on so many rows at most.")
    dataset_prompt_column: str | None = option(
        None, "Column with the prompt. By default prompt, query, input_ids, or what comes before chosen's last turn."
    )

    def __post_init__(self) -> None:
        if self.dataset_layout not in (None, *LAYOUTS):
            raise ValueError(f"dataset_layout={self.dataset_layout!r}: it should be one of {', '.join(LAYOUTS)}")
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share}: it should be between 0 and 1")
        for name in ("max_train_rows", "max_eval_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it should be at least 1")
        given = [name for name in ("eval_dataset_name", "eval_share") if getattr(self, name) is not None]
        if self.dataset_test_split is not None and "eval_share" in given:
            given.append("dataset_test_split")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both set the held-out rows: set one of them")
        if self.eval_dataset_data_dir is not None and self.eval_dataset_name is None:
            raise ValueError(
                f"eval_dataset_data_dir={self.eval_dataset_data_dir!r} is read only with eval_dataset_name"
            )

    @property
    def names(self) -> list[str]:
        """Of the data sets, as they were given."""
        return [name for name in (self.dataset_name, self.eval_dataset_name) if name is not None]


# What the commands that do not train read.
PROMPT_NAMES = {"dataset_name", "dataset_config", "dataset_data_dir", "dataset_layout", "dataset_test_split"}
PROMPT_NAMES |= {"eval_share", "max_eval_rows", "dataset_prompt_column"}


class _Keyed(NamedTuple):
    prompt: str
    row: Row


def load_rows(arguments: DataArguments, convert: Callable[[Row], Fields]) -> "tuple[Dataset, Dataset | None]":
    """Rows to train on, and held-out rows if the arguments name any.

    Args:
        arguments: where they are.
        convert: a row to its columns; a ValueError is why it is left out.

    Raises:
        ValueError: without `dataset_name`, or if no row is usable.
        OSError: if there is no such file or data set.
    """
    if arguments.dataset_name is None:
        raise ValueError("dataset_name is not set: name a file or a data set of the hub")
    name, test_split = arguments.dataset_name, arguments.dataset_test_split
    rows: Iterable[Row] = _read(arguments, name, arguments.dataset_train_split)
    held_out: Iterable[Row] | None = None
    if arguments.eval_share is not None:
        rows, held_out = _split(rows, arguments.eval_share)
    elif arguments.eval_dataset_name is not None:
        folder = arguments.eval_dataset_data_dir
        held_out = _read(arguments, arguments.eval_dataset_name, test_split or "train", folder)
    elif test_split is not None:
        held_out = _read(arguments, name, test_split)
    train = _converted(name, rows, convert, arguments.max_train_rows)
    if held_out is None:
        return train, None
    return train, _converted(arguments.eval_dataset_name or name, held_out, convert, arguments.max_eval_rows)


def load_prompts(arguments: DataArguments) -> "Dataset":
    """The prompts of the commands that do not train: the held-out share, if there is one, else all.

    Raises:
        As `load_rows`.
    """
    if arguments.dataset_name is None:
        raise ValueError("dataset_name is not set: name a file or a data set of the hub")
    rows: Iterable[Row] = _read(arguments, arguments.dataset_name, arguments.dataset_test_split or "train")
    if arguments.eval_share is not None:
        _, rows = _split(rows, arguments.eval_share)
    return _converted(arguments.dataset_name, rows, prompts_by(arguments), arguments.max_eval_rows)


def _read(arguments: DataArguments, source: str, split: str, data_dir: str | None = None) -> Iterator[Row]:
    """Yield rows one by one, so that only the requested rows of a large data set are read."""
    data_dir = data_dir or arguments.dataset_data_dir
    for row in iter_rows(source, name=arguments.dataset_config, data_dir=data_dir, split=split):
        yield from [row] if arguments.dataset_layout is None else rows_in_layout(row, arguments.dataset_layout)


def _split(rows: Iterable[Row], share: float) -> tuple[list[Row], list[Row]]:
    """A function of the rows alone, so that what one command holds out no other trains on."""
    keyed = [_Keyed(_opening_text(row.fields), row) for row in rows if row.problem is None]
    if not keyed:
        raise ValueError("dataset_name has no row")
    parts = split_by_prompt(keyed, {"held out": share, "train": 1 - share})
    return [pair.row for pair in parts["train"]], [pair.row for pair in parts["held out"]]


def _opening_text(fields: Fields) -> str:
    names = ("prompt", "query", "messages", "chosen", "text", "input_ids")
    value = next((fields[name] for name in names if fields.get(name) is not None), fields)
    return str(value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value)


def _converted(source: str, rows: Iterable[Row], convert: Callable[[Row], Fields], limit: int | None) -> "Dataset":
    good: dict[str, Fields] = {}
    bad: list[BadRow] = []
    for place, row in enumerate(rows):
        if limit is not None and len(good) == limit:
            break
        try:
            if row.problem is not None:
                raise ValueError(row.problem)
            fields = convert(row)
        except ValueError as error:
            bad.append(BadRow(row.number, str(error)))
        else:
            # Several preferences have the same prompt, or the same preferred response.
            shortened = "rejected" in row.fields and "rejected" not in fields
            good.setdefault(repr(fields) if shortened else str(place), fields)
    if not good:
        reason = f"row {bad[0].row}: {bad[0].reason}" if bad else "it is empty"
        raise ValueError(f"{source} has no usable row: {reason}")
    if bad and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{source}: {len(bad)} rows are left out, the first of them row {bad[0].row}: {bad[0].reason}")
    names = dict.fromkeys(name for fields in good.values() for name in fields)
    try:
        from datasets import Dataset

        return Dataset.from_dict({name: [fields.get(name) for fields in good.values()] for name in names})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: a column holds values of different types: {error}") from error


def prompts_by(arguments: DataArguments) -> Callable[[Row], Fields]:
    """Rows to prompts, with what else they hold for the reward functions."""
    column = arguments.dataset_prompt_column

    def convert(row: Row) -> Fields:
        fields = {name: value for name, value in row.fields.items() if name not in ("chosen", "rejected")}
        if column is not None:
            if row.fields.get(column) is None:
                raise ValueError(f"has no column {column!r}, but {', '.join(row.fields)}")
            return {**{name: value for name, value in fields.items() if name != column}, "prompt": row.fields[column]}
        if any(fields.get(name) is not None for name in ("prompt", "query", "input_ids")):
            return fields
        chosen = row.fields.get("chosen")
        if chosen is None:
            raise ValueError(f"has the columns {', '.join(row.fields)}; set dataset_prompt_column")
        return {**fields, "prompt": chosen[:-1] if isinstance(chosen, list) else split_dialogue(chosen)[0]}

    return convert


def demonstration(row: Row) -> Fields:
    """A row as SFTTrainer reads it: preferences become prompt and preferred response, the rest is left as it is."""
    if "chosen" not in row.fields:
        return row.fields
    if isinstance(row.fields["chosen"], list):
        messages = _whole_conversation(row.fields)
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    (fields,) = sft_rows([parse_row(row)])
    return fields


def preference(row: Row) -> Fields:
    """A row as RewardTrainer reads it: prompt, chosen and rejected; chat messages are left as they are."""
    if isinstance(row.fields.get("chosen"), list):
        return {name: row.fields[name] for name in ("prompt", "chosen", "rejected") if name in row.fields}
    pair: Preference = parse_row(row)
    (fields,) = preference_rows([pair])
    return fields


def _whole_conversation(fields: Fields) -> list[Fields]:
    context = fields.get("prompt") or []
    if isinstance(context, str):
        context = [{"role": "user", "content": context}] if len(fields["chosen"]) == 1 else []
    return [*context, *fields["chosen"]]
