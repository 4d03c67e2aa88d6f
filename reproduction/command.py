"""`trl-apa paper FIG`: run and plot the curves or win rates of a figure of the paper, at full or mini scale.

`trl_apa.commands.paper` calls it where this folder is.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from reproduction.figures import CONFIGS, read_entry, read_figure
from reproduction.logs import Row, read_rows
from reproduction.running import Job, full_jobs, mini_jobs, run_full, run_in_small
from reproduction.sizes import MiniSizes
from reproduction.tables import tables
from trl_apa.commands.outputs import check_output_folder
from trl_apa.commands.parsing import OneLineParser


def make_parser() -> OneLineParser:
    """The options of the command."""
    parser = OneLineParser(
        prog="trl-apa paper",
        description="Run the curves of a figure of the paper, except finished ones, and plot them.",
        epilog="With --scale full, what stands after `--` goes to the command of every curve; for fig1 to `generate` "
        "or `winrate`, or both, as they have the option.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("figure", metavar="FIG", help="fig1 to fig9, or another of figures.yaml")
    add("--scale", choices=("full", "mini"), required=True, help="the paper's models and data, or the demo's task")
    add("--seeds", type=int, nargs="+", help="the paper's by default, or those of figures.yaml")
    add("--configs", default=str(CONFIGS), help="folder of the curves' files (default: `configs` beside the code)")
    add("--output_dir", help="folder of runs and pictures (default: runs/paper/FIG-full, or runs/paper/mini)")
    add("--runs", help="fig1 with --scale full: folder of the runs that are compared (default: runs/paper/fig2-full)")
    mini = parser.add_argument_group("--scale mini")
    for field in dataclasses.fields(MiniSizes):
        meaning = f"{field.metadata['help']} (default: {field.default})"
        mini.add_argument(f"--{field.name}", type=_positive, help=meaning)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: that of the first process that failed."""
    parser = make_parser()
    own, of_the_curves = split_at_dashes(argv)
    options = parser.parse_args(own)
    missing = [name for name in ("matplotlib", "rich") if find_spec(name) is None]
    if missing:
        print(f"trl-apa paper needs {' and '.join(missing)}: pip install 'trl-apa[demo]'", file=sys.stderr)
        return 1
    default = "mini" if options.scale == "mini" else f"{options.figure}-full"
    folder = Path(options.output_dir or f"runs/paper/{default}")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(MiniSizes)}
    given = {name: size for name, size in given.items() if size is not None}
    compares = read_entry(options.configs, options.figure)[1].get("command") == "winrate"
    refuse_what_has_no_effect(options, of_the_curves, compares)
    check_output_folder("output_dir", folder)
    if compares:
        return run_win_rates(options, of_the_curves, folder, MiniSizes(**given))
    figure = read_figure(options.configs, options.figure)
    sizes = MiniSizes(**{**figure.sizes, **given})
    seeds = options.seeds or figure.seeds
    if options.scale == "mini":
        jobs = mini_jobs(figure, seeds, folder, sizes)
        run_in_small(figure, jobs, folder, sizes)
    else:
        jobs = full_jobs(figure, seeds, folder)
        if status := run_full(figure, jobs, of_the_curves):
            return status
    in_small = "" if options.scale == "full" or figure.only_mini else f"; here in small, task {figure.task}"
    draw(f"{figure.name}: {figure.title}{in_small}", jobs, folder / f"{figure.name}.png")
    print(folder / f"{figure.name}.png")
    return 0


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what after it."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def refuse_what_has_no_effect(options: argparse.Namespace, of_the_curves: Sequence[str], compares: bool) -> None:
    """
    Raises:
        ValueError: naming the option.
    """
    if options.scale == "mini" and of_the_curves:
        raise ValueError(f"{of_the_curves[0]!r} comes after --, but only --scale full passes options to its commands")
    if options.runs is not None and (options.scale == "mini" or not compares):
        raise ValueError("--runs needs fig1 with --scale full")
    sizes = [field.name for field in dataclasses.fields(MiniSizes) if getattr(options, field.name) is not None]
    if options.scale == "full" and sizes:
        raise ValueError(f"--{sizes[0]} needs --scale mini")


def draw(title: str, jobs: Sequence[Job], path: Path) -> None:
    """The picture and the tables of the runs that are there; what cannot be written is a warning."""
    from reproduction.drawing import draw_figure
    from trl_apa.trainer.tracker_failures import warn_if_report_fails

    panels: dict[str, dict[str, list[list[Row]]]] = {}
    for job in jobs:
        panels.setdefault(job.panel, {}).setdefault(job.label, []).append(read_rows(job.folder))
    draw_figure(title, panels, path)
    text, file = tables(panels), path.with_suffix(".md")
    with warn_if_report_fails(None, f"writing {file}"):
        file.write_text(text, encoding="utf-8")


def run_win_rates(options: argparse.Namespace, more: Sequence[str], folder: Path, sizes: MiniSizes) -> int:
    """The policies that another figure's runs leave, compared in pairs; returns the exit status."""
    from reproduction.drawing_win_rates import draw_win_rates, table
    from reproduction.tasks import DemoTask, demo_options, task_folder
    from reproduction.win_rates import read_comparison
    from reproduction.win_rates_full import common_start, compare_at_full_size
    from reproduction.win_rates_mini import compare_in_small

    comparison = read_comparison(options.configs, options.figure)
    trained, seeds = comparison.trained, options.seeds or comparison.seeds
    if options.scale == "mini":
        jobs = mini_jobs(trained, seeds, folder, sizes)
        run_in_small(trained, jobs, folder, sizes)
        start = DemoTask(task_folder(folder, sizes), sizes).start
        policies = _policies(comparison.start, start, jobs, "policy")
        found = compare_in_small(comparison, policies, folder / comparison.name, demo_options(sizes))
    else:
        jobs = full_jobs(trained, seeds, Path(options.runs or f"runs/paper/{trained.name}-full"))
        if unfinished := [str(job.folder) for job in jobs if not job.is_done]:
            first = f"trl-apa paper {trained.name} --scale full"
            raise ValueError(f"no run has finished in {', '.join(unfinished)}: `{first}` comes first")
        policies = _policies(comparison.start, Path(common_start(job.curve.options() for job in jobs)), jobs)
        try:
            found = compare_at_full_size(comparison, policies, more, folder)
        except subprocess.CalledProcessError as error:
            print(f"trl-apa ended with status {error.returncode}; run this again to continue", file=sys.stderr)
            return error.returncode
    path = folder / f"{comparison.name}.png"
    title = comparison.title if options.scale == "full" else f"{', '.join(comparison.labels)} in small"
    title = f"{comparison.name}: {title}"
    draw_win_rates(title, found, path)
    print(table(title, found), path, sep="\n")
    return 0


def _policies(start_label: str, start: Path, jobs: Sequence[Job], inside: str = "") -> dict[int, dict[str, Path]]:
    """Seed to label to where the policy is: what all start from, and what each run left, `inside` its folder."""
    found: dict[int, dict[str, Path]] = {job.seed: {start_label: start} for job in jobs}
    for job in jobs:
        found[job.seed][job.label] = job.folder / inside
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} should be at least 1")
    return value
