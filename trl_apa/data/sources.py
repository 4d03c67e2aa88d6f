"""Rows of a local file or of a data set on the Hugging Face hub, each with its number."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar


if TYPE_CHECKING:
    from datasets import Dataset


T = TypeVar("T")
NO_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
LINE_SUFFIXES = (".jsonl", ".jsonl.gz")
JSON_SUFFIXES = (".json", ".json.gz")
# Suffix -> what `datasets` calls the reader of such files.
TABLE_READERS = {
    **dict.fromkeys((*LINE_SUFFIXES, *JSON_SUFFIXES), "json"),
    **dict.fromkeys((".csv", ".csv.gz"), "csv"),
    ".parquet": "parquet",
}


class Row(NamedTuple):
    """One row as it was found.

    Args:
        number: its place in the source, from 1; the line number in a file of JSON lines.
        fields: its columns; empty if it could not be read.
        problem: why it could not be read, or None.
        source: what it was read from, where there are several sources.
    """

    number: int
    fields: dict[str, Any]
    problem: str | None = None
    source: str | None = None


class BadRow(NamedTuple):
    """A row that is not what was looked for: its number, from 1, and why."""

    row: int
    reason: str


def is_local(source: str | Path) -> bool:
    """Whether `source` is a path rather than the name of a data set on the hub."""
    return isinstance(source, Path) or Path(source).exists() or looks_like_path(source)


def looks_like_path(source: str) -> bool:
    """Whether `source` is spelled like a path: the hub's names have no such prefix or suffix."""
    return source.startswith(("/", "./", "../", "~")) or source.lower().endswith(tuple(TABLE_READERS))


def load_table(
    source: str | Path, name: str | None = None, data_dir: str | None = None, split: str = "train", **kwargs: Any
) -> "Dataset":
    """A file of rows, or a data set of the hub, as a `datasets.Dataset`. Unlike `iter_rows` it refuses odd rows.

    Args:
        source (`str` or `Path`): a `.jsonl`, `.json` (a list of objects), `.csv` or `.parquet` file, the texts among
            them also with `.gz` behind; a folder that `datasets` understands, or a data set on the hub.
        name, data_dir, split: as for `iter_rows`. A file is one split, whatever `split` says.
        kwargs: passed on to `datasets.load_dataset`.

    Raises:
        FileNotFoundError: `source` is a path and nothing is there.
        ValueError: a file of an unknown kind.
    """
    from datasets import load_dataset

    if not is_local(source):
        return load_dataset(str(source), name=name, data_dir=data_dir, split=split, **kwargs)
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"source={str(source)!r}: there is no such file")
    if path.is_dir():
        return load_dataset(str(path), name=name, data_dir=data_dir, split=split, **kwargs)
    return load_dataset(table_reader(path, source), data_files=str(path), split="train", **kwargs)


def table_reader(path: Path, source: str | Path) -> str:
    """What `datasets` calls the reader of a file, by its suffix; ValueError, naming `source`, for another suffix."""
    for suffix, reader in TABLE_READERS.items():
        if path.name.lower().endswith(suffix):
            return reader
    raise ValueError(f"source={str(source)!r}: expected one of {', '.join(TABLE_READERS)}, or a folder")


def iter_rows(
    source: str | Path,
    name: str | None = None,
    data_dir: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Iterator[Row]:
    """Read rows one after the other; a line that is not JSON is a row with a `problem`, not the end of the reading.

    JSON is read line by line because a table reader would refuse a whole file for one odd value; `.parquet`, `.csv`
    and the hub go through `datasets`.

    Args:
        source (`str` or `Path`): a `.jsonl`, `.jsonl.gz`, `.json` (a list of objects), `.parquet` or `.csv` file, a
            folder that `datasets` understands, or a data set on the hub.
        name (`str`, *optional*): configuration of a hub data set.
        data_dir (`str`, *optional*): folder inside a hub data set (`harmless-base` of `Anthropic/hh-rlhf`, say).
        split (`str`, *optional*, defaults to `"train"`): split of a hub data set or a folder.
        streaming (`bool`, *optional*, defaults to `False`): read a hub data set or a folder row by row, as files are
            always, instead of preparing all of it first.

    Raises:
        FileNotFoundError: `source` is a path and nothing is there.
        ValueError: a file of an unknown kind, or one that is broken as a whole.
    """
    if not is_local(source):
        yield from _table_rows(str(source), name=name, data_dir=data_dir, split=split, streaming=streaming)
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"source={str(source)!r}: there is no such file")
    lowered = path.name.lower()
    if path.is_dir():
        yield from _table_rows(str(path), name=name, data_dir=data_dir, split=split, streaming=streaming)
    elif lowered.endswith(LINE_SUFFIXES):
        yield from _json_lines(path)
    elif lowered.endswith(JSON_SUFFIXES):
        yield from _json_list(path)
    else:
        reader = table_reader(path, source)
        yield from _table_rows(reader, data_files=str(path), split="train", streaming=True)


def _json_lines(path: Path) -> Iterator[Row]:
    open_file = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with open_file(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _decoded(number, line)
    except NO_GZIP as error:
        raise ValueError(f"{path} is not a complete gzip file: {error} (after line {number})") from error


def _decoded(number: int, line: bytes) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"not JSON: {error}")
    return _checked(number, value)


def _json_list(path: Path) -> Iterator[Row]:
    open_file = gzip.open if path.name.lower().endswith(".gz") else open
    with open_file(path, "rb") as file:
        try:
            values = json.loads(file.read())
        except NO_GZIP as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not one JSON document: {error} (JSON lines belong in a .jsonl file)"
            ) from error
    if not isinstance(values, list):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a list of objects")
    for number, value in enumerate(values, start=1):
        yield _checked(number, value)


def _checked(number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, value)
    return Row(number, {}, f"a {type(value).__name__}, expected an object with columns")


def _table_rows(path: str, **options: Any) -> Iterator[Row]:
    from datasets import load_dataset

    source, number = options.get("data_files", path), 0
    try:
        for number, fields in enumerate(load_dataset(path, **options), start=1):
            yield Row(number, fields)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        # pandas, pyarrow and `datasets` have errors of their own, of which some say nothing without their cause.
        after = f" after row {number}" if number else ""
        raise ValueError(f"{source} cannot be read{after}: {error.__cause__ or error}") from error


def parse_rows(
    rows: Iterable[Row],
    parse: Callable[[Row], Iterable[T]],
    source: str,
    limit: int | None = None,
    strict: bool = False,
) -> tuple[list[T], list[BadRow]]:
    """What the rows hold, in their order, and the rows that hold nothing.

    Args:
        rows: see `iter_rows`.
        parse: one row to what it holds; a ValueError is why it holds nothing. It is not called for a row that could
            not be read.
        source: where the rows come from, for messages.
        limit: stop after this many rows.
        strict: raise at the first bad row instead of listing it.

    Raises:
        ValueError: if `limit` is below 1 or, with `strict`, some row is bad.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1 row, or None for all of them")
    found: list[T] = []
    bad_rows: list[BadRow] = []
    for row in islice(rows, limit):
        try:
            if row.problem is not None:
                raise ValueError(row.problem)
            found.extend(parse(row))
        except ValueError as error:
            if strict:
                raise ValueError(f"{source}, row {row.number}: {error}") from error
            bad_rows.append(BadRow(row.number, str(error)))
    return found, bad_rows


def text_column(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        ValueError: if there is no such column, or no text in it.
    """
    value = row.fields.get(column)
    if value is None:
        raise ValueError(f"has no {column!r} column")
    return text_of(column, value)


def text_of(column: str, value: Any) -> str:
    """`value`, which should be a text; ValueError, naming the column, if it is none."""
    if not isinstance(value, str):
        raise ValueError(f"{column} is a {type(value).__name__}, expected a text")
    return value


def report(source: str, count: int, things: str, bad_rows: Sequence[BadRow], examples: int = 3) -> str:
    """How much was read and, for each kind of bad row, how many there are and where the first ones stand."""
    lines = [f"{source}: {count} {things}, {len(bad_rows)} bad rows"]
    for reason, number in Counter(bad.reason for bad in bad_rows).most_common():
        rows = [str(bad.row) for bad in bad_rows if bad.reason == reason][:examples]
        more = ", ..." if number > examples else ""
        lines.append(f"  {number} x {reason} (row {', '.join(rows)}{more})")
    return "\n".join(lines)
