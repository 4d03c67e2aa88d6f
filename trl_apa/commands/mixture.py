"""Several data sets in place of one: the entries of TRL's `DatasetMixtureConfig`, and their rows."""

import heapq
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from trl_apa.commands.options import did_you_mean
from trl_apa.data.sources import Row, is_local, table_reader


Entry = dict[str, Any]
# Name of what an entry holds -> its types. `tests/test_mixtures.py` compares them with TRL's `DatasetConfig`.
KEYS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "name": (str,),
    "data_dir": (str,),
    "data_files": (str, list, dict),
    "split": (str,),
    "columns": (list,),
    "fraction": (int, float),
}
# Paths that name how files are read. `tests/test_mixtures.py` compares them with those of `datasets`.
READERS = ("arrow", "csv", "json", "parquet", "text", "xml")


def entries_of(datasets: Sequence[str]) -> list[Entry]:
    """The data sets of a mixture, each as keyword arguments of TRL's `DatasetConfig`.

    Args:
        datasets: names or files, or such arguments as JSON.

    Raises:
        ValueError: naming the data set, counted from 1, for what is no such argument.
    """
    return [_entry(number, text) for number, text in enumerate(datasets, start=1)]


def _entry(number: int, text: str) -> Entry:
    where = f"datasets, number {number}"
    if not text.lstrip().startswith("{"):
        return {"path": text}
    try:
        entry: Entry = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    entry = {key: value for key, value in entry.items() if value is not None}
    for key, value in entry.items():
        if key not in KEYS:
            raise ValueError(f"{where}: there is no {key!r}{did_you_mean(key, KEYS)}")
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            kinds = " or ".join(kind.__name__ for kind in KEYS[key])
            raise ValueError(f"{where}: {key}={value!r} should be a {kinds}")
    if "path" not in entry:
        raise ValueError(f"{where} has no path: the name of a data set, or a file")
    if not (0 <= entry.get("fraction", 1) < math.inf):
        raise ValueError(f"{where}: fraction={entry['fraction']}: it should be a number from 0 on")
    return entry


def mixture_rows(entries: Sequence[Entry], streaming: bool = False, in_turn: bool = False) -> Iterator[Row]:
    """The rows of the data sets, one data set after the other; each is read as TRL reads it.

    They are not joined to one table, which would refuse texts from a csv beside texts from JSON.

    Args:
        entries: see `entries_of`. `path` may be a file too.
        streaming: read rows as they are asked for, instead of whole data sets first.
        in_turn: mix the rows evenly, so that the first of them have the shares of all: those of the data sets' sizes,
            or equal ones of streams, whose sizes are not known.

    Raises:
        FileNotFoundError: if a `path` is one and nothing is there.
        ValueError: if a data set cannot be read, lacks one of its `columns`, or only some have a `fraction`.
    """
    if streaming and any("fraction" in entry for entry in entries):
        raise ValueError("fraction with streaming: how many rows a stream has is not known")
    tables = [_table(entry, streaming) for entry in entries]
    fractions = [entry["fraction"] for entry in entries if "fraction" in entry]
    if fractions and len(fractions) < len(entries):
        raise ValueError(f"{len(fractions)} of {len(entries)} datasets have a fraction: all should, or none")
    counts = _counts([len(table) for table in tables], fractions) if fractions else [None] * len(tables)
    parts = [_rows(*part) for part in zip(entries, tables, counts, strict=True)]
    if not in_turn:
        return chain.from_iterable(parts)
    weights = [
        1 if streaming else len(table) if count is None else count for table, count in zip(tables, counts, strict=True)
    ]
    return _mixed(parts, weights)


def _rows(entry: Entry, table: Any, count: int | None) -> Iterator[Row]:
    with _named(entry):
        for number, fields in enumerate(islice(table, count), start=1):
            yield Row(number, fields, source=shown_name(entry))


def _mixed(parts: Sequence[Iterable[Row]], weights: Sequence[int]) -> Iterator[Row]:
    """All rows, so that at each place every part has given about its weight's share."""

    def placed(part: int) -> Iterator[tuple[float, int, Row]]:
        return (((number + 0.5) / weights[part], part, row) for number, row in enumerate(parts[part]))

    merged = heapq.merge(*map(placed, range(len(parts))), key=lambda item: item[:2])
    return (row for _, _, row in merged)


def shown_name(entry: Entry) -> str:
    """What a data set is called: its path, or its files where the path is that of a reader of `datasets`."""
    files = entry.get("data_files")
    if entry["path"] not in READERS or not files:
        return str(entry["path"])
    of_splits = list(files.values()) if isinstance(files, dict) else [files]
    return ", ".join(str(name) for part in of_splits for name in (part if isinstance(part, list) else [part]))


def _counts(sizes: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """How many rows each data set gives to the largest mixture that has those shares and no row twice."""
    if not any(fractions):
        raise ValueError("every fraction is 0: at least one data set should have rows")
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True) if weight > 0)
    return [round(weight * total) for weight in weights]


def _table(entry: Entry, streaming: bool) -> Any:
    from trl import DatasetMixtureConfig, get_dataset

    alone = {key: value for key, value in _as_loaded(entry).items() if key != "fraction"}
    with _named(entry):
        return get_dataset(DatasetMixtureConfig(datasets=[alone], streaming=streaming))["train"]


@contextmanager
def _named(entry: Entry) -> Iterator[None]:
    """Inside, what libraries refuse becomes a ValueError that names the data set."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        # pandas, pyarrow and `datasets` have errors of their own, of which some say nothing without their cause.
        raise ValueError(f"datasets: {entry['path']} cannot be read: {error.__cause__ or error}") from error


def _as_loaded(entry: Entry) -> Entry:
    """As `datasets.load_dataset` takes it, which has no files for names."""
    path = Path(entry["path"]).expanduser()
    if not is_local(entry["path"]) or path.is_dir():
        return {**entry, "path": str(path) if path.is_dir() else entry["path"]}
    if not path.exists():
        raise FileNotFoundError(f"datasets: path={entry['path']!r}: there is no such file")
    return {"split": "train", **entry, "path": table_reader(path, entry["path"]), "data_files": str(path)}
