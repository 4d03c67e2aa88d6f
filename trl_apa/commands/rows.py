"""Rows of a file or a hub data set as a command needs them: prompts, demonstrations, or preference pairs."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_apa.commands.data_options import DataArguments
from trl_apa.commands.mixture import entries_of, mixture_rows
from trl_apa.data import Preference, preference_rows, sft_rows, split_by_prompt
from trl_apa.data.hh import parse_row, split_dialogue
from trl_apa.data.layouts import rows_in_layout
from trl_apa.data.sources import Row, iter_rows


if TYPE_CHECKING:
    from datasets import Dataset

Fields = dict[str, Any]
MOST_REASONS = 3  # of rows that are left out, in one message


class _Keyed(NamedTuple):
    prompt: str
    row: Row


def load_rows(arguments: DataArguments, convert: Callable[[Row], Fields]) -> "tuple[Dataset, Dataset | None]":
    """Rows to train on, and held-out rows if the arguments name any.

    Args:
        arguments: where they are.
        convert: a row to its columns; a ValueError is why it is left out.

    Raises:
        ValueError: without `dataset_name` and `datasets`, if no row is usable, or if a stream has no end that is set.
        OSError: if there is no such file or data set.
    """
    name, test_split = arguments.source, arguments.dataset_test_split
    _check_stream(arguments)
    rows: Iterable[Row]
    if arguments.datasets is not None:
        entries, in_turn = entries_of(arguments.datasets), arguments.max_train_rows is not None
        rows = _in_layout(mixture_rows(entries, arguments.streaming, in_turn), arguments)
    else:
        rows = _read(arguments, name, arguments.dataset_train_split)
    held_out: Iterable[Row] | None = None
    if arguments.eval_share is not None:
        rows, held_out = _split(name, rows, arguments.eval_share)
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
    rows: Iterable[Row] = _read(arguments, arguments.source, arguments.dataset_test_split or "train")
    if arguments.eval_share is not None:
        _, rows = _split(arguments.source, rows, arguments.eval_share)
    return _converted(arguments.source, rows, prompts_by(arguments), arguments.max_eval_rows)


def _read(arguments: DataArguments, source: str, split: str, data_dir: str | None = None) -> Iterator[Row]:
    """Yield rows one by one, so that only the requested rows of a large data set are read."""
    data_dir, streaming = data_dir or arguments.dataset_data_dir, arguments.dataset_streaming or arguments.streaming
    rows = iter_rows(source, name=arguments.dataset_config, data_dir=data_dir, split=split, streaming=streaming)
    return _in_layout(rows, arguments)


def _in_layout(rows: Iterable[Row], arguments: DataArguments) -> Iterator[Row]:
    for row in rows:
        yield from [row] if arguments.dataset_layout is None else rows_in_layout(row, arguments.dataset_layout)


def _check_stream(arguments: DataArguments) -> None:
    """Raise ValueError for a stream that would be read to its end: a run keeps its rows, to be resumed exactly."""
    if not (arguments.dataset_streaming or arguments.streaming):
        return
    name = "streaming" if arguments.streaming else "dataset_streaming"
    if arguments.eval_share is not None:
        raise ValueError(
            f"{arguments.share_name} with {name}: a share can be told only of all rows; set eval_dataset_name instead"
        )
    has_held_out = arguments.eval_dataset_name is not None or arguments.dataset_test_split is not None
    for limit in ("max_train_rows", *(["max_eval_rows"] if has_held_out else [])):
        if getattr(arguments, limit) is None:
            raise ValueError(
                f"{name} without {limit}: the rows of a run are read before it begins, to check them and to resume it "
                f"exactly, and so would be the whole stream; set {limit}"
            )


def _split(source: str, rows: Iterable[Row], share: float) -> tuple[list[Row], list[Row]]:
    """A function of the rows alone, so that what one command holds out no other trains on."""
    found = list(rows)
    keyed = [_Keyed(_opening_text(row.fields), row) for row in found if row.problem is None]
    if not keyed:
        raise ValueError(f"{source} has no row")
    parts = split_by_prompt(keyed, {"held out": share, "train": 1 - share})
    # Rows that cannot be read go with those to train on, where they are counted.
    trained_on = [*(pair.row for pair in parts["train"]), *(row for row in found if row.problem is not None)]
    return trained_on, [pair.row for pair in parts["held out"]]


def _opening_text(fields: Fields) -> str:
    names = ("prompt", "query", "messages", "chosen", "text", "input_ids")
    value = next((fields[name] for name in names if fields.get(name) is not None), fields)
    return str(value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value)


def _converted(source: str, rows: Iterable[Row], convert: Callable[[Row], Fields], limit: int | None) -> "Dataset":
    good: dict[str, Fields] = {}
    bad: list[tuple[Row, str]] = []
    num_repeated = 0
    for place, row in enumerate(rows):
        if limit is not None and len(good) == limit:
            break
        try:
            if row.problem is not None:
                raise ValueError(row.problem)
            fields = convert(row)
        except ValueError as error:
            bad.append((row, str(error)))
        else:
            # Several preferences have the same prompt, or the same preferred response.
            shortened = "rejected" in row.fields and "rejected" not in fields
            key = repr(fields) if shortened else str(place)
            num_repeated += key in good
            good.setdefault(key, fields)
    if not good:
        reason = f"{_place(bad[0][0])}: {bad[0][1]}" if bad else "it is empty"
        raise ValueError(f"{source} has no usable row: {reason}")
    _say_what_is_left_out(source, bad, num_repeated)
    names = dict.fromkeys(name for fields in good.values() for name in fields)
    try:
        from datasets import Dataset

        return Dataset.from_dict({name: [fields.get(name) for fields in good.values()] for name in names})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: a column holds values of different types: {error}") from error


def _say_what_is_left_out(source: str, bad: Sequence[tuple[Row, str]], num_repeated: int) -> None:
    """On stderr, because some commands print rows; one process speaks."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if bad:
        reasons = Counter(reason for _, reason in bad)
        first = {reason: _place(row) for row, reason in reversed(bad)}
        told = [f"{count} x {reason} ({first[reason]})" for reason, count in reasons.most_common(MOST_REASONS)]
        told += ["..."] if len(reasons) > MOST_REASONS else []
        print(f"{source}: rows left out: {len(bad)}: {'; '.join(told)}", file=sys.stderr, flush=True)
    if num_repeated:
        print(f"{source}: rows that repeat another one: {num_repeated}, read once", file=sys.stderr, flush=True)


def _place(row: Row) -> str:
    return f"row {row.number}" if row.source is None else f"row {row.number} of {row.source}"


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
