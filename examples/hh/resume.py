"""A stage whose result is on disk is not repeated; a result that does not fit the rest of the run is refused."""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from options import DATA_OPTIONS, STAGE_OPTIONS, UserError
from progress import say


def run_stage(
    stage: str, options: argparse.Namespace, earlier: dict[str, dict[str, Any]], work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The record of `stage`: the one on disk if it is finished and not to be redone, otherwise a new one from `work`.

    Args:
        stage: name of the stage and of its folder.
        options: those of the command line.
        earlier: the records of the stages before it.
        work: does the stage and returns its result.

    Returns:
        What the stage's `stage.json` holds: its `id`, `options`, the ids of the records it was `made_from`, `result`.

    Raises:
        UserError: the stage is not chosen and has no result, or has one from other options or from an earlier stage
            that has been repeated since.
    """
    folder = options.output_dir / stage
    made_from = {name: record["id"] for name, record in earlier.items()}
    record = read_record(folder)
    chosen = stage in options.stages
    if record is not None and record["result"] is not None and not (chosen and options.overwrite):
        refuse_misfit(stage, record, options, made_from, DATA_OPTIONS if not chosen else tuple(record["options"]))
        say(stage, f"already in {folder}")
        return record
    if not chosen:
        raise UserError(f"the stage {stage!r} has no result in {options.output_dir}: add it to --stages")
    if record is not None:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved_options = {name: getattr(options, name) for name in (*DATA_OPTIONS, *STAGE_OPTIONS[stage])}
    record = {"id": time.time_ns(), "options": saved_options, "made_from": made_from, "result": None}
    write_record(folder, record)
    start = time.monotonic()
    record["result"] = work() | {"seconds": round(time.monotonic() - start, 1)}
    write_record(folder, record)
    say(stage, f"done in {record['result']['seconds']:.0f} s, saved in {folder}")
    return record


def read_record(folder: Path) -> dict[str, Any] | None:
    """`stage.json` of a folder, if there is one; its `result` is None where the stage was interrupted."""
    path = folder / "stage.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / "stage.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


def refuse_misfit(
    stage: str,
    record: dict[str, Any],
    options: argparse.Namespace,
    made_from: dict[str, int],
    names: tuple[str, ...],
) -> None:
    """Raise if a finished stage does not fit the rest: its held-out data, say, would not be held out any more."""
    saved = record["options"]
    wanted = {name: getattr(options, name) for name in names}
    reasons = [f"{name} {saved[name]!r} -> {value!r}" for name, value in wanted.items() if saved[name] != value]
    reasons += [
        f"{name} has been repeated since" for name in made_from if record["made_from"][name] != made_from[name]
    ]
    if reasons:
        raise UserError(
            f"the stage {stage!r} in {options.output_dir} is of another run ({', '.join(reasons)}): repeat it with "
            "--overwrite, or use another --output-dir"
        )
