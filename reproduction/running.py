"""The runs of a figure: lists them and runs those that are not finished, at full or mini scale."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from reproduction.figures import Curve, Figure, file_name
from reproduction.sizes import MiniSizes
from trl_apa.redaction import without_secrets


class Job(NamedTuple):
    """One curve with one seed, and where its run goes."""

    panel: str
    label: str
    curve: Curve
    seed: int
    folder: Path

    @property
    def is_done(self) -> bool:
        """Whether the run is finished: its log is then in the folder itself."""
        return (self.folder / "trainer_state.json").is_file()


def full_jobs(figure: Figure, seeds: Sequence[int], folder: Path) -> list[Job]:
    """Every curve with every seed.

    Raises:
        ValueError: if the figure only exists at mini scale.
    """
    if figure.only_mini:
        raise ValueError(f"{figure.name} is about the task in small; run it with --scale mini")
    return [
        Job(panel, label, curve, seed, folder / f"{file_name(f'{panel} {label}')}-seed{seed}")
        for panel, found in figure.panels.items()
        for label, curve in found.items()
        for seed in seeds
    ]


def run_full(figure: Figure, jobs: Sequence[Job], options: Sequence[str]) -> int:
    """Each curve runs in a separate process, which frees its memory; an interrupted run is resumed.

    Returns:
        The exit status of the first process that failed, after which none is started; 0 if none did.
    """
    for job in jobs:
        if job.is_done:
            continue
        command = [sys.executable, "-m", "trl_apa.cli", figure.command, "--config", str(job.curve.file)]
        for name, value in job.curve.changed.items():
            command += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
        command += ["--seed", str(job.seed), "--output_dir", str(job.folder), *options]
        if any(job.folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "true"]
        print(f"{job.panel}, {job.label}, seed {job.seed}: {' '.join(without_secrets(command[1:]))}", flush=True)
        if status := subprocess.run(command, check=False).returncode:
            print(f"{job.folder} ended with status {status}; run this again to continue", file=sys.stderr)
            return status
    return 0


def mini_jobs(figure: Figure, seeds: Sequence[int], folder: Path, sizes: MiniSizes) -> list[Job]:
    """Every curve with every seed, each in the folder of a run that several figures may share.

    Panels that differ only in models or data are the same at mini scale; the first is used for all.
    """
    from reproduction.mini import algorithm_options, run_name

    panels: list[list[Job]] = []
    for panel, found in figure.panels.items():
        jobs = []
        for label, curve in found.items():
            options = algorithm_options(figure.command, curve)
            names = {seed: run_name(figure.command, options, seed, sizes, figure.task) for seed in seeds}
            jobs += [Job(panel, label, curve, seed, folder / "runs" / name) for seed, name in names.items()]
        if [job.folder for job in jobs] not in [[job.folder for job in known] for known in panels]:
            panels.append(jobs)
    return [job._replace(panel=job.panel if len(panels) > 1 else "in small") for jobs in panels for job in jobs]


def run_in_small(figure: Figure, jobs: Sequence[Job], folder: Path, sizes: MiniSizes) -> None:
    """Each curve here, one after the other, on one fine-tuned policy and one reward.

    Raises:
        ValueError: for options that a curve cannot have, before any is run.
    """
    from reproduction import mini
    from reproduction.tasks import make_task

    task = make_task(figure.task, folder, sizes)
    options = [mini.algorithm_options(figure.command, job.curve) for job in jobs]
    for job, given in zip(jobs, options, strict=True):
        mini.config_of(figure.command, given, job.seed, task, job.folder)  # refuses what it cannot run
    for job, given in zip(jobs, options, strict=True):
        if not job.is_done:
            print(f"{job.panel}, {job.label}, seed {job.seed}: {job.folder}", flush=True)
            mini.run_mini(task, figure.command, given, job.seed, job.folder)
