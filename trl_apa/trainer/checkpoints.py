"""Checkpoint files: written to a temporary folder and renamed, verified, listed, deleted.

A checkpoint is complete if it has a `MANIFEST`. That file is written last, with the size and the checksum of
every other one. All names below are relative to the output folder:

| name | what it is |
| --- | --- |
| `checkpoint-6` | a checkpoint |
| `_incomplete-checkpoint-6-<run>` | one that is being written |
| `_replaced-checkpoint-6-<run>` | its predecessor of the same run, until the new one has its name |
| `_deleted-checkpoint-6-<run>` | one that is being deleted |
| `_older-runs/<run>/checkpoint-6` | another run's, which had the name that a new one was to get |
| `_older-runs/unknown/value_model` | another run's, which was not to be pushed with this run's policy |
| `apa_run.json` | the run that began last |

What begins with an underscore is not uploaded to the hub.
"""

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from transformers import TrainerState
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from trl_apa.files import replace_text
from trl_apa.models import VALUE_MODEL_FOLDER
from trl_apa.models.classic_value_head import HEAD_WEIGHTS as CLASSIC_HEAD_WEIGHTS
from trl_apa.models.own_critic import is_own
from trl_apa.models.value_model import DESCRIPTION
from trl_apa.models.value_model import HEAD_WEIGHTS as VALUE_HEAD_WEIGHTS
from trl_apa.trainer.run_identity import Run


MANIFEST = "apa_checkpoint.json"
MANIFEST_FORMAT = 1
PROCESS_STATE = "apa_state_{process}.pt"
RANDOM_STATES = ("rng_state*.pth", "rng_state.pth")
OLDER_RUNS = "_older-runs"
RUN_RECORD = "apa_run.json"
NAME = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
UNFINISHED_NAME = re.compile(rf"^_(incomplete|replaced|deleted)-{PREFIX_CHECKPOINT_DIR}-(\d+)-(\w+)$")
CHUNK = 1 << 24
WORKERS = 8


class IncompleteCheckpoint(ValueError):
    """A checkpoint that cannot be resumed from; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a checkpoint.

    Args:
        path: its folder.
        step: optimizer steps, by the folder's name.
        run: the run that wrote it; None if its manifest is missing (0.1.0 wrote none) or cannot be read.
    """

    path: Path
    step: int
    run: Run | None


# ---- writing ----


def staging_folder(output_dir: str | os.PathLike[str], step: int, run: Run) -> Path:
    """Where a checkpoint is written until it is complete."""
    return Path(output_dir) / f"_incomplete-{PREFIX_CHECKPOINT_DIR}-{step}-{run.id}"


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Flush every file in `folder` to disk, then write what makes it a checkpoint.

    Args:
        folder: with every other file of the checkpoint.
        content: `version`, `step`, `run`, `resumable` and whatever else is to be read back; the sizes and checksums of
            the files join it.
    """
    paths = _files(folder)
    with ThreadPoolExecutor(WORKERS) as pool:
        records = list(pool.map(_flushed, paths))
    files = {path.relative_to(folder).as_posix(): record for path, record in zip(paths, records, strict=True)}
    content = {"format": MANIFEST_FORMAT, **content, "files": files}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"xxh3_128": _checksum_of(content), "content": content}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    for directory in {folder, *(path.parent for path in paths)}:
        flush_directory(directory)


def put_in_place(folder: Path, step: int, run: Run) -> Path:
    """Rename a complete checkpoint from `staging_folder` to its final name; one with that name is kept until then.

    A predecessor of the same run is deleted afterwards; anything else is moved to `OLDER_RUNS`.
    """
    output_dir = folder.parent
    place = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    replaced = None
    if place.exists():
        owner = run_of(place)
        if owner is not None and owner.id == run.id:
            replaced = output_dir / f"_replaced-{PREFIX_CHECKPOINT_DIR}-{step}-{run.id}"
            delete_folder(replaced)
            place.rename(replaced)
        else:
            _move_checkpoint(place, owner)
    folder.rename(place)
    flush_directory(output_dir)
    if replaced is not None:
        delete_folder(replaced)
    return place


def _move_checkpoint(place: Path, owner: Run | None) -> None:
    whose = "has no readable manifest" if owner is None else "is of another run"
    target = move_to_older_runs(place, owner)
    warnings.warn(f"{place} {whose}; it was moved to {target}", stacklevel=2)


def move_to_older_runs(place: Path, owner: Run | None = None) -> Path:
    """Move what another run left in an output folder to `OLDER_RUNS` there.

    Args:
        place: the file or folder.
        owner: the run that wrote it, if that is known.

    Returns:
        Where it is now.
    """
    shelf = place.parent / OLDER_RUNS / ("unknown" if owner is None else owner.id)
    shelf.mkdir(parents=True, exist_ok=True)
    target, number = shelf / place.name, 1
    while target.exists():
        target, number = shelf / f"{place.name}.{number}", number + 1
    return place.rename(target)


def delete_surplus(output_dir: str | os.PathLike[str], run: Run, limit: int | None, keep: str | None) -> None:
    """Delete the oldest checkpoints of `run` until `limit` are left; those of other runs neither count nor go.

    Args:
        limit: None or 0 deletes nothing.
        keep: the best checkpoint, which is kept in addition to the newest.
    """
    if not limit or limit < 0:
        return
    own = [checkpoint for checkpoint in checkpoints_in(output_dir) if checkpoint.run and checkpoint.run.id == run.id]
    own.sort(key=_age)
    kept = {own[-1].path} if own else set()
    kept |= {checkpoint.path for checkpoint in own if keep and Path(keep).name == checkpoint.path.name}
    surplus = max(0, len(own) - max(limit, len(kept)))
    for checkpoint in [checkpoint for checkpoint in own if checkpoint.path not in kept][:surplus]:
        doomed = checkpoint.path.parent / f"_deleted-{checkpoint.path.name}-{run.id}"
        delete_folder(doomed)
        checkpoint.path.rename(doomed)  # it is a checkpoint, or it is not: never a part of one under its name
        delete_folder(doomed)


def clean_up(output_dir: str | os.PathLike[str], run: Run | None = None) -> None:
    """Complete or delete what a killed process left while it wrote or replaced a checkpoint.

    Args:
        run: whose leftovers are deleted; None deletes none. A complete checkpoint without a name gets it in any case.
    """
    if not Path(output_dir).is_dir():
        return
    # "_incomplete-" before "_replaced-": a successor before its predecessor.
    for folder in sorted(Path(output_dir).iterdir()):
        name = UNFINISHED_NAME.match(folder.name)
        if name is None or not folder.is_dir():
            continue
        kind, step, owner = name.groups()
        place = folder.parent / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        # Without a manifest it may pass for a checkpoint of 0.1.0, and lack the end of a file.
        if kind != "deleted" and not place.exists() and (folder / MANIFEST).exists() and problem_with(folder) is None:
            folder.rename(place)
        elif run is not None and owner == run.id:
            delete_folder(folder)


def delete_folder(folder: Path) -> None:
    """Delete a folder and its contents, if it exists."""
    shutil.rmtree(folder, ignore_errors=True)


def flush_directory(directory: Path) -> None:
    """Flush a folder's entries to disk, so that they survive a power failure, if the file system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _flushed(path: Path) -> dict[str, Any]:
    """Size and checksum of a file that is on disk now."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _record(path)


def _record(path: Path) -> dict[str, Any]:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _checksum_of(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- reading ----


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `write_manifest` wrote; None if there is no such file, as in a checkpoint of 0.1.0.

    Raises:
        IncompleteCheckpoint: if the file is damaged, or of a later version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        outer = json.loads(path.read_text())
        content: dict[str, Any] = outer["content"]
        intact = outer["xxh3_128"] == _checksum_of(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IncompleteCheckpoint(f"{MANIFEST} cannot be read: {error}") from error
    if not intact:
        raise IncompleteCheckpoint(f"{MANIFEST} was changed after it was written")
    if content["format"] > MANIFEST_FORMAT:
        raise IncompleteCheckpoint(f"{MANIFEST} was written by a later version of trl_apa: {content['version']}")
    return content


def run_of(folder: str | os.PathLike[str]) -> Run | None:
    """The run of a checkpoint, if its manifest says so."""
    with suppress(IncompleteCheckpoint):
        manifest = read_manifest(folder)
        return None if manifest is None else Run(**manifest["run"])
    return None


def checkpoints_in(output_dir: str | os.PathLike[str]) -> list[Checkpoint]:
    """Every folder in `output_dir` that has a checkpoint's name."""
    if not Path(output_dir).is_dir():
        return []
    named = [(path, NAME.match(path.name)) for path in Path(output_dir).iterdir() if path.is_dir()]
    return [Checkpoint(path, int(name.group(1)), run_of(path)) for path, name in named if name is not None]


def _age(checkpoint: Checkpoint) -> tuple[float, int]:
    """Order of writing within a run; one with a damaged manifest comes last, so that it is looked at, and named."""
    if checkpoint.run is None:
        return (math.inf if (checkpoint.path / MANIFEST).exists() else 0, checkpoint.step)
    return (checkpoint.run.attempt, checkpoint.step)


def problem_with(folder: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it can. Without a manifest only names of files are checked."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = read_manifest(folder)
    except IncompleteCheckpoint as error:
        return str(error)
    return next(_problems(folder, manifest), None)


def _problems(folder: Path, manifest: dict[str, Any] | None) -> Iterator[str]:
    """Cheap checks first: a missing file is found without reading the others."""
    records = {} if manifest is None else manifest["files"]
    for name, record in records.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif (size := (folder / name).stat().st_size) != record["bytes"]:
            yield f"{name} has {size:,} bytes; it was written with {record['bytes']:,}"
    if manifest is not None and not manifest["resumable"]:
        yield "it was written with save_only_model=True, without optimizer and random state"
        return
    # One of 0.1.0, without a manifest, always has a value model.
    yield from missing_files(folder, with_value_model=manifest is None or manifest.get("value_model", True))
    yield from _wrong_steps(folder, manifest)
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, record in zip(records, pool.map(lambda name: _record(folder / name), records), strict=True):
            if record != records[name]:
                yield f"{name} was changed after it was written: its checksum differs"


def _wrong_steps(folder: Path, manifest: dict[str, Any] | None) -> Iterator[str]:
    try:
        step = TrainerState.load_from_json(os.fspath(folder / TRAINER_STATE_NAME)).global_step
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        yield f"{TRAINER_STATE_NAME} cannot be read: {error}"
        return
    name = NAME.match(folder.name)
    if name is not None and int(name.group(1)) != step:
        yield f"{TRAINER_STATE_NAME} is of step {step}"
    if manifest is not None and manifest["step"] != step:
        yield f"{MANIFEST} is of step {manifest['step']}, {TRAINER_STATE_NAME} of step {step}"


def missing_files(folder: Path, with_value_model: bool = True) -> Iterator[str]:
    """Files that any checkpoint must have; with sharded weights, only the trainer's own files.

    Args:
        folder: of the checkpoint.
        with_value_model: whether the run has one.
    """
    # Each node has the files of its own processes: each process looks for its own.
    yield from _absent(folder, TRAINER_STATE_NAME)
    for pattern, name in ((PROCESS_STATE.format(process="*"), PROCESS_STATE.format(process=0)), RANDOM_STATES):
        if not any(folder.glob(pattern)):
            yield f"{name} is missing"
    sharded = (folder / "latest").is_file() or any(folder.glob("pytorch_model_fsdp*"))
    if sharded:
        return
    yield from _absent(folder, OPTIMIZER_NAME, SCHEDULER_NAME)
    yield from _absent_network(folder)
    value_model = folder / VALUE_MODEL_FOLDER
    if with_value_model and not (folder / CLASSIC_HEAD_WEIGHTS).is_file():
        if not value_model.is_dir():
            yield f"{VALUE_MODEL_FOLDER}/ is missing"
            return
        yield from _absent(value_model, DESCRIPTION, VALUE_HEAD_WEIGHTS, prefix=f"{VALUE_MODEL_FOLDER}/")
        if not is_own(value_model):
            yield from _absent_network(value_model, prefix=f"{VALUE_MODEL_FOLDER}/")


def _absent_network(folder: Path, prefix: str = "") -> Iterator[str]:
    if (folder / ADAPTER_CONFIG_NAME).is_file() or (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        yield from _absent(folder, ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, prefix=prefix)
        return
    yield from _absent(folder, CONFIG_NAME, prefix=prefix)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        yield from _absent(folder, SAFE_WEIGHTS_NAME, prefix=prefix)
        return
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{prefix}{SAFE_WEIGHTS_INDEX_NAME} cannot be read: {error}"
        return
    yield from _absent(folder, *sorted(shards), prefix=prefix)


def _absent(folder: Path, *names: str, prefix: str = "") -> Iterator[str]:
    yield from (f"{prefix}{name} is missing" for name in names if not (folder / name).is_file())


def record_run(output_dir: str | os.PathLike[str], run: Run) -> None:
    """Record in a folder the run that was started or resumed last, before it has a checkpoint there."""
    path = Path(output_dir) / RUN_RECORD
    recorded = recorded_run(output_dir)
    if recorded is not None and recorded.id == run.id:
        return  # its attempts are counted by its checkpoints
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(run.as_dict()) + "\n")
    flush_directory(path.parent)


def recorded_run(output_dir: str | os.PathLike[str]) -> Run | None:
    """What `record_run` noted; None if there is nothing that can be read."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        return Run(**json.loads((Path(output_dir) / RUN_RECORD).read_text()))
    return None


def newest_checkpoint(
    output_dir: str | os.PathLike[str], problem: Callable[[Path], str | None] = problem_with
) -> Path | None:
    """The newest complete checkpoint of the most recent run in `output_dir`; None if there are no checkpoints.

    `record_run` has recorded that run; otherwise the checkpoints say it. Those without a manifest are older
    than all others. Warns of each incomplete one that is skipped.

    Args:
        output_dir: where to look.
        problem: why a checkpoint cannot be resumed, or None.

    Raises:
        IncompleteCheckpoint: if that run has no complete checkpoint, while there are checkpoints.
    """
    found = checkpoints_in(output_dir)
    runs = {checkpoint.run.id: checkpoint.run for checkpoint in found if checkpoint.run is not None}
    newest_run = recorded_run(output_dir) or max(runs.values(), key=lambda run: run.started, default=None)
    if newest_run is not None:
        found += checkpoints_in(Path(output_dir) / OLDER_RUNS / newest_run.id)
    of_newest = [c for c in found if newest_run is None or c.run is None or c.run.id == newest_run.id]
    passed_over = []
    for checkpoint in sorted(of_newest, key=_age, reverse=True):
        if newest_run is not None and checkpoint.run is None and not (checkpoint.path / MANIFEST).exists():
            continue  # of a time before runs had names
        why = problem(checkpoint.path)
        if why is None:
            return checkpoint.path
        passed_over.append(f"{checkpoint.path.name}: {why}")
        warnings.warn(f"{checkpoint.path} is incomplete ({why}); trying the previous one", stacklevel=2)
    if not found:
        return None
    others = sorted(str(c.path) for c in found if newest_run is not None and c not in of_newest)
    others += [str(c.path) for c in of_newest if c.run is None and not (c.path / MANIFEST).exists() and newest_run]
    whose = "" if newest_run is None else f" of run {newest_run}"
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    advice = f"; to resume an older run, name one of its checkpoints: {', '.join(others)}" if others else ""
    raise IncompleteCheckpoint(f"{os.fspath(output_dir)!r} has no complete checkpoint{whose}{why}{advice}")
