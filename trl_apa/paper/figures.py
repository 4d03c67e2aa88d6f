"""The index of the figures: `figures.yaml` in a folder with one file of options a curve."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trl_apa.commands.options import read_yaml


INDEX = "figures.yaml"
COMMANDS = ("train", "offline")


@dataclass(frozen=True)
class Figure:
    """One figure of the paper.

    Args:
        name: as in the index.
        title: what it compares.
        command: which command of `trl-apa` runs its curves.
        seeds: the paper's.
        panels: title of a panel to its curves, label to file of options.
    """

    name: str
    title: str
    command: str
    seeds: list[int]
    panels: dict[str, dict[str, Path]]


def read_figure(folder: str | Path, name: str) -> Figure:
    """The figure of that name in the index of `folder`.

    Raises:
        OSError: if there is no index.
        ValueError: if it has no such figure, or the entry lacks something or names a file that is not there.
    """
    path = Path(folder) / INDEX
    index = read_yaml(str(path))
    if name not in index:
        close = get_close_matches(name, map(str, index), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{path} has {', '.join(map(str, index))}, but not {name!r}{hint}")
    entry: dict[str, Any] = index[name]
    missing = {"title", "command", "seeds", "panels"} - entry.keys()
    if missing:
        raise ValueError(f"{path}: {name} lacks {', '.join(sorted(missing))}")
    if entry["command"] not in COMMANDS:
        raise ValueError(f"{path}: {name}: command is {entry['command']!r}; it should be {' or '.join(COMMANDS)}")
    panels = {
        str(panel): {str(label): path.parent / file for label, file in curves.items()}
        for panel, curves in entry["panels"].items()
    }
    for file in (file for curves in panels.values() for file in curves.values()):
        if not file.is_file():
            raise ValueError(f"{path}: {name} names {file.name}, which is not there")
    return Figure(name, entry["title"], entry["command"], list(entry["seeds"]), panels)
