"""`trl-apa paper FIG`: the curves of one of the paper's figures, at full size or in small, and their picture."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from trl_apa.commands.options import read_yaml
from trl_apa.commands.plot import read_run
from trl_apa.paper.drawing import draw_figure
from trl_apa.paper.figures import Figure, read_figure


class Curve(NamedTuple):
    """One curve with one seed: where its options are, and where its run goes."""

    panel: str
    label: str
    file: Path
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
    add("figure", metavar="FIG", help="fig2 to fig9; what figures.yaml has")
    add("--scale", choices=("full", "mini"), required=True, help="the paper's models and data, or the demo's task")
    add("--seeds", type=int, nargs="+", help="the paper's by default")
    add("--configs", default="examples/paper", help="folder of the curves' files (default: %(default)s)")
    add("--output_dir", help="folder of runs and picture (default: runs/paper/FIG-SCALE)")
    mini = parser.add_argument_group("--scale mini")
    sizes = {"iterations": 30, "batch_size": 64, "num_responses": 2048, "sft_steps": 300, "num_pairs": 1500}
    for name, size in {**sizes, "reward_steps": 150}.items():
        mini.add_argument(f"--{name}", type=_positive, default=size, help="default: %(default)s")
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
    folder = Path(options.output_dir or f"runs/paper/{options.figure}-{options.scale}")
    try:
        figure = read_figure(options.configs, options.figure)
        curves = list(curves_of(figure, options.seeds or figure.seeds, folder, options.scale))
        if options.scale == "mini":
            run_mini(figure, curves, options)
        elif status := run_full(figure, curves, of_the_curves):
            return status
        draw(figure, curves, folder / f"{figure.name}.png")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(folder / f"{figure.name}.png")
    return 0


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what after it."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def curves_of(figure: Figure, seeds: Sequence[int], folder: Path, scale: str) -> Iterator[Curve]:
    """Every curve with every seed. In small the panels differ in nothing, and the first stands for all."""
    for panel, found in list(figure.panels.items())[: 1 if scale == "mini" else None]:
        for label, file in found.items():
            for seed in seeds:
                name = re.sub(r"\W+", "-", f"{panel} {label}").strip("-").lower()
                yield Curve(panel if scale == "full" else "in small", label, file, seed, folder / f"{name}-seed{seed}")


def run_full(figure: Figure, curves: Sequence[Curve], options: Sequence[str]) -> int:
    """Each curve in a process of its own, which gives its memory back; a run that was cut goes on where it stopped."""
    for curve in curves:
        if curve.is_done:
            continue
        command = [sys.executable, "-m", "trl_apa.cli", figure.command, "--config", str(curve.file)]
        command += ["--seed", str(curve.seed), "--output_dir", str(curve.folder), *options]
        if any(curve.folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "true"]
        print(f"{curve.panel}, {curve.label}, seed {curve.seed}: {' '.join(command[1:])}", flush=True)
        if status := subprocess.run(command, check=False).returncode:
            print(f"{curve.folder} ended with status {status}; run this again to go on", file=sys.stderr)
            return status
    return 0


def run_mini(figure: Figure, curves: Sequence[Curve], options: argparse.Namespace) -> None:
    """Each curve here, one after the other, on one fine-tuned policy and one reward model."""
    from trl_apa.paper import mini

    names = ("iterations", "batch_size", "num_responses", "sft_steps", "num_pairs", "reward_steps")
    sizes = mini.MiniSizes(**{name: getattr(options, name) for name in names})
    task = mini.MiniTask(curves[0].folder.parent / "task", sizes)
    for curve in curves:
        if not curve.is_done:
            print(f"{curve.label}, seed {curve.seed}", flush=True)
            mini.run_mini(task, figure.command, read_yaml(str(curve.file)), curve.seed, curve.folder)


def draw(figure: Figure, curves: Sequence[Curve], path: Path) -> None:
    """The picture of the runs that are there."""
    panels: dict[str, dict[str, list]] = {}
    for curve in curves:
        panels.setdefault(curve.panel, {}).setdefault(curve.label, []).append(read_run(curve.folder))
    draw_figure(f"{figure.name}: {figure.title}", panels, path)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} should be at least 1")
    return value
