"""`trl-apa paper FIG`: the curves of one of the paper's figures, at full size or in small, and their picture."""

import argparse
import dataclasses
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from trl_apa.paper.drawing import draw_figure
from trl_apa.paper.figures import Curve, Figure, read_figure
from trl_apa.paper.logs import Row, read_rows
from trl_apa.paper.sizes import MiniSizes
from trl_apa.paper.tables import tables


class Job(NamedTuple):
    """One curve with one seed, and where its run goes."""

    panel: str
    label: str
    curve: Curve
    seed: int
    folder: Path

    @property
    def is_done(self) -> bool:
        """Whether the run has come to its end: its log then lies in the folder itself."""
        return (self.folder / "trainer_state.json").is_file()


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-apa paper",
        description="Run the curves of one of the paper's figures, those that are not done yet, and draw it.",
        epilog="With --scale full, what stands after `--` goes to the command of every curve.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("figure", metavar="FIG", help="fig2 to fig9, or another of figures.yaml")
    add("--scale", choices=("full", "mini"), required=True, help="the paper's models and data, or the demo's task")
    add("--seeds", type=int, nargs="+", help="the paper's by default")
    add("--configs", default="examples/paper", help="folder of the curves' files (default: %(default)s)")
    add("--output_dir", help="folder of runs and pictures (default: runs/paper/mini, or runs/paper/FIG-full)")
    mini = parser.add_argument_group("--scale mini")
    for field in dataclasses.fields(MiniSizes):
        mini.add_argument(f"--{field.name}", type=_positive, default=field.default, help="default: %(default)s")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: that of the first curve that failed."""
    parser = make_parser()
    own, of_the_curves = split_at_dashes(argv)
    options = parser.parse_args(own)
    missing = [name for name in ("matplotlib", "rich") if find_spec(name) is None]
    if missing:
        print(f"trl-apa paper needs {' and '.join(missing)}: pip install 'trl-apa[demo]'", file=sys.stderr)
        return 1
    is_mini = options.scale == "mini"
    folder = Path(options.output_dir or ("runs/paper/mini" if is_mini else f"runs/paper/{options.figure}-full"))
    try:
        figure = read_figure(options.configs, options.figure)
        seeds = options.seeds or figure.seeds
        if is_mini:
            sizes = MiniSizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(MiniSizes)})
            jobs = run_mini(figure, seeds, folder, sizes)
        else:
            jobs = full_jobs(figure, seeds, folder)
            if status := run_full(figure, jobs, of_the_curves):
                return status
        draw(figure, jobs, folder / f"{figure.name}.png")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(folder / f"{figure.name}.png")
    return 0


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what after it."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def full_jobs(figure: Figure, seeds: Sequence[int], folder: Path) -> list[Job]:
    """Every curve with every seed.

    Raises:
        ValueError: if the figure is about the task in small.
    """
    if figure.only_mini:
        raise ValueError(f"{figure.name} is about the task in small; run it with --scale mini")
    return [
        Job(panel, label, curve, seed, folder / f"{_file_name(f'{panel} {label}')}-seed{seed}")
        for panel, found in figure.panels.items()
        for label, curve in found.items()
        for seed in seeds
    ]


def run_full(figure: Figure, jobs: Sequence[Job], options: Sequence[str]) -> int:
    """Each curve in a process of its own, which gives its memory back; a run that was cut goes on where it stopped."""
    for job in jobs:
        if job.is_done:
            continue
        command = [sys.executable, "-m", "trl_apa.cli", figure.command, "--config", str(job.curve.file)]
        for name, value in job.curve.changed.items():
            command += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
        command += ["--seed", str(job.seed), "--output_dir", str(job.folder), *options]
        if any(job.folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "true"]
        print(f"{job.panel}, {job.label}, seed {job.seed}: {' '.join(command[1:])}", flush=True)
        if status := subprocess.run(command, check=False).returncode:
            print(f"{job.folder} ended with status {status}; run this again to go on", file=sys.stderr)
            return status
    return 0


def run_mini(figure: Figure, seeds: Sequence[int], folder: Path, sizes: MiniSizes) -> list[Job]:
    """Each curve here, one after the other, on one fine-tuned policy and one reward model.

    A run is one that several figures may share. Panels that differ in models or data alone are the same in small, and
    the first stands for all.
    """
    from trl_apa.paper import mini

    panels: dict[str, list[Job]] = {}
    for panel, found in figure.panels.items():
        jobs = []
        for label, curve in found.items():
            options = mini.algorithm_options(figure.command, curve)
            names = {seed: mini.run_name(figure.command, options, seed, sizes) for seed in seeds}
            jobs += [Job(panel, label, curve, seed, folder / "runs" / name) for seed, name in names.items()]
        if [job.folder for job in jobs] not in ([job.folder for job in known] for known in panels.values()):
            panels[panel] = jobs
    task = mini.MiniTask(folder / mini.task_name(sizes), sizes)
    for job in (job for jobs in panels.values() for job in jobs):
        if not job.is_done:
            print(f"{job.panel}, {job.label}, seed {job.seed}: {job.folder}", flush=True)
            options = mini.algorithm_options(figure.command, job.curve)
            mini.run_mini(task, figure.command, options, job.seed, job.folder)
    if len(panels) == 1:
        return [job._replace(panel="in small") for jobs in panels.values() for job in jobs]
    return [job for jobs in panels.values() for job in jobs]


def draw(figure: Figure, jobs: Sequence[Job], path: Path) -> None:
    """The picture and the tables of the runs that are there."""
    panels: dict[str, dict[str, list[list[Row]]]] = {}
    for job in jobs:
        panels.setdefault(job.panel, {}).setdefault(job.label, []).append(read_rows(job.folder))
    draw_figure(f"{figure.name}: {figure.title}", panels, path)
    path.with_suffix(".md").write_text(tables(panels), encoding="utf-8")


def _file_name(text: str) -> str:
    return re.sub(r"\W+", "-", text).strip("-").lower()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} should be at least 1")
    return value
