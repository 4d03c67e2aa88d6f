"""The index of the figures: `figures.yaml` in a folder with one file of options a curve."""

import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reproduction.sizes import DEMO
from trl_apa.commands.options import did_you_mean, read_yaml


CONFIGS = Path(__file__).parent / "configs"
INDEX = "figures.yaml"
COMMANDS = ("train", "offline")
MINI = "mini"  # the index's own entry beside the figures


@dataclass(frozen=True)
class Curve:
    """The options of one curve.

    Args:
        file: of options, as the figure's command takes it; None where a figure has no full size.
        changed: options that win over the file's.
        mini: more options in small, which win over both.
    """

    file: Path | None
    changed: dict[str, Any] = field(default_factory=dict)
    mini: dict[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Those of the file and what is changed in them."""
        of_the_file = {} if self.file is None else read_yaml(str(self.file))
        return {**of_the_file, **self.changed}


@dataclass(frozen=True)
class Figure:
    """One figure of the paper, or one of our own about the task in small.

    Args:
        name: as in the index.
        title: what it compares.
        command: which command of `trl-apa` runs its curves.
        seeds: the paper's.
        panels: title of a panel to its curves by label.
        only_mini: whether there is nothing to run at full size.
        task: what the curves learn in small.
        sizes: in small, where they are not those of `MiniSizes`.
    """

    name: str
    title: str
    command: str
    seeds: list[int]
    panels: dict[str, dict[str, Curve]]
    only_mini: bool = False
    task: str = DEMO
    sizes: dict[str, int] = field(default_factory=dict)


def read_entry(folder: str | Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Path of the index of `folder`, and its entry of that name.

    Raises:
        OSError: if the index cannot be read.
        ValueError: if there is none, or it has no such entry.
    """
    path, index = _read_index(folder)
    return path, _entry(path, index, name)


def read_figure(folder: str | Path, name: str) -> Figure:
    """The figure of that name in the index of `folder`.

    A curve there is the name of its file, or `{file: NAME, set: {option: value}, mini: {option: value}}`; of a figure
    that is `only_mini`, `{mini: {option: value}}` will do. The entry `mini` of the index says, for each command and
    loss, which options a curve has in small.

    With `curves_of: FIGURE` an entry has all of that figure's but for what is its own. In small, `common` are options
    of all curves, `learning_rates` gives each label its rate, and with `rates`, a list, each label becomes a panel
    with a curve for each rate.

    Raises:
        OSError: if the index cannot be read.
        ValueError: if there is none, if it has no such figure, or if the entry lacks something or names a file that is
            not there.
    """
    path, index = _read_index(folder)
    entry, where = _entry(path, index, name), f"{path}: {name}"
    with of_the_right_types(where):
        entry = _complete(path, index, entry)
    missing = {"title", "command", "seeds", "panels"} - entry.keys()
    if missing:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    command = entry["command"]
    if command not in COMMANDS:
        raise ValueError(f"{where}: command is {command!r}; it should be {' or '.join(COMMANDS)}")
    only_mini = entry.get("only_mini", False)
    with of_the_right_types(where):
        in_small = index.get(MINI, {}).get(command, {})
        panels = {
            str(panel): {
                str(label): _curve(where, path.parent, curve, in_small, only_mini) for label, curve in curves.items()
            }
            for panel, curves in entry["panels"].items()
        }
        seeds = [operator.index(seed) for seed in entry["seeds"]]
    if not seeds or not any(panels.values()):
        raise ValueError(f"{where} has no {'curve' if seeds else 'seed'}")
    of_the_task = {key: entry[key] for key in ("task", "sizes") if key in entry}
    return Figure(name, entry["title"], command, seeds, panels, only_mini, **of_the_task)


def _complete(path: Path, index: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with what another one lends it, and with its common options and learning rates in its curves."""
    entry = dict(entry)
    while "curves_of" in entry:
        entry = {**_entry(path, index, entry.pop("curves_of")), **entry}
    common, chosen = entry.get("common", {}), entry.get("learning_rates", {})
    rates = {f"rate {rate:g}": {"learning_rate": rate} for rate in map(float, entry.get("rates", []))}
    panels: dict[str, dict[str, Any]] = {}
    for panel, curves in entry.get("panels", {}).items():
        for label, curve in curves.items():
            if rates:
                panels[label] = {name: _with(curve, common, rate) for name, rate in rates.items()}
            else:
                rate = {"learning_rate": float(chosen[label])} if chosen else {}
                panels.setdefault(panel, {})[label] = _with(curve, common, rate)
    return {**entry, "panels": panels} if panels else entry


def _with(curve: Any, common: Mapping[str, Any], rate: Mapping[str, Any]) -> Any:
    """A curve's entry with more options that it has in small: those of all curves, its own, and its rate."""
    if not common and not rate:
        return curve
    entry: Mapping[str, Any] = {"file": curve} if isinstance(curve, str) else curve
    return {**entry, "mini": {**common, **entry.get("mini", {}), **rate}}


@contextmanager
def of_the_right_types(where: str) -> Iterator[None]:
    """Inside, a list where there should be names and values, say, is a ValueError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is not laid out as it should be: {type(error).__name__}: {error}") from error


def file_name(text: str) -> str:
    """A label as part of the name of a file."""
    return re.sub(r"\W+", "-", text).strip("-").lower()


def _read_index(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"configs={str(folder)!r} has no {INDEX}; it should be a folder like {CONFIGS}")
    return path, read_yaml(str(path))


def _entry(path: Path, index: Mapping[str, Any], name: str) -> dict[str, Any]:
    names = [str(known) for known in index if known != MINI]
    if name not in names:
        raise ValueError(f"{path} has {', '.join(names)}, but not {name!r}{did_you_mean(name, names)}")
    entry = index[name]
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {name} is a {type(entry).__name__}; it should have title, command, ...")
    return entry


def _curve(
    where: str, folder: Path, entry: str | Mapping[str, Any], in_small: Mapping[str, Any], only_mini: bool
) -> Curve:
    """The curve of one label; `in_small` has the options of each loss in small."""
    entry = {"file": entry} if isinstance(entry, str) else entry
    if only_mini and entry.keys() == {"mini"}:
        return Curve(None, mini=dict(entry["mini"]))
    if "file" not in entry or entry.keys() - {"file", "set", "mini"}:
        raise ValueError(f"{where}: a curve has {', '.join(entry)}; it should have file, and may have set and mini")
    file = folder / entry["file"]
    if not file.is_file():
        raise ValueError(f"{where} names {file.name}, which is not there")
    curve = Curve(file, dict(entry.get("set", {})))
    mini = {**in_small.get(curve.options().get("loss_type", ""), {}), **entry.get("mini", {})}
    return Curve(file, curve.changed, mini)
