"""`trl-apa plot RUN...`: reward, KL, and reward against KL of one or several runs, as PNG."""

import json
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_apa.commands.outputs import check_output_folder
from trl_apa.commands.parsing import OneLineParser


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the rollouts; of the held-out prompts.
REWARD, KL = ("apa/mean_scores", "eval_reward"), ("objective/kl", "eval_kl")
KL_NAME = "KL to the initial model, nats per response"
# Title, names of the axes.
FIGURES = {
    "reward": ("Reward", "optimizer step", "mean reward"),
    "kl": ("KL to the initial model", "optimizer step", KL_NAME),
    "reward_vs_kl": ("Reward against KL", KL_NAME, "mean reward"),
}
HELD_OUT = "held-out prompts"


class Run(NamedTuple):
    """One run's log.

    Args:
        name: for the legend.
        rollouts, held_out: rows `(step, reward, KL)` measured on the training rollouts and on held-out prompts.
    """

    name: str
    rollouts: list[tuple[float, float, float]]
    held_out: list[tuple[float, float, float]]


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = OneLineParser(prog="trl-apa plot", description="Plot reward, KL, and reward against KL of runs, as PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, or its trainer_state.json")
    parser.add_argument(
        "--output_dir", "--output-dir", help="where the plots are written (default: the first run's folder)"
    )
    options = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        print("trl-apa plot needs matplotlib: pip install 'trl-apa[demo]'", file=sys.stderr)
        return 1
    runs = with_different_names([read_run(path) for path in options.runs], options.runs)
    folder = Path(options.output_dir) if options.output_dir else state_file(options.runs[0]).parent
    check_output_folder("output_dir", folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        draw(name, runs, folder / f"{name}.png")
        print(folder / f"{name}.png")
    return 0


def state_file(path: str | Path) -> Path:
    """The log of a run: the file itself, that in the folder, or that of the folder's last checkpoint.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / "trainer_state.json").is_file():
        return path / "trainer_state.json"
    found = list(path.glob("checkpoint-*/trainer_state.json"))
    if not found:
        raise FileNotFoundError(f"{path} is not a trainer_state.json, and contains none")
    return max(found, key=lambda file: int(re.sub(r"\D", "", file.parent.name) or 0))


def read_run(path: str | Path) -> Run:
    """What the log says of reward and KL.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON, or has no reward and KL.
    """
    file = state_file(path)
    history = log_history(file)
    rollouts, held_out = (_rows(history, reward, kl) for reward, kl in zip(REWARD, KL, strict=True))
    if not rollouts and not held_out:
        raise ValueError(f"{file} has neither {REWARD[0]} and {KL[0]} nor {REWARD[1]} and {KL[1]}")
    return Run(Path(path).resolve().name if Path(path).is_dir() else file.parent.resolve().name, rollouts, held_out)


def log_history(file: Path) -> list[dict[str, Any]]:
    """The rows of a trainer's log.

    Raises:
        ValueError: if the file is not JSON, or no trainer's state.
    """
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    history = state.get("log_history", []) if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"{file} is no trainer_state.json: it has no log_history of rows")
    return history


def _rows(history: list[dict[str, Any]], reward: str, kl: str) -> list[tuple[float, float, float]]:
    names = ("step", reward, kl)
    complete = [row for row in history if all(isinstance(row.get(name), Real) for name in names)]
    return [(row["step"], row[reward], row[kl]) for row in complete]


def with_different_names(runs: Sequence[Run], paths: Sequence[str]) -> list[Run]:
    """Runs in folders of one name get as much of their paths as tells them apart: `apa/seed0`, `ppo/seed0`."""
    folders = [Path(path) if Path(path).is_dir() else Path(path).parent for path in paths]
    parts = [folder.resolve().parts for folder in folders]
    named = []
    for run, own in zip(runs, parts, strict=True):
        others = [other for other in parts if other != own]
        count = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        named.append(run._replace(name="/".join(own[-count:]).lstrip("/")) if count > 1 else run)
    return named


def draw(figure_name: str, runs: Sequence[Run], path: Path) -> None:
    """Write one picture: dots, joined in the order of the steps, of the rollouts; diamonds of held-out prompts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = make_figure(figure_name, runs)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def make_figure(figure_name: str, runs: Sequence[Run]) -> "Figure":
    """The picture of `draw`, on no canvas yet."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(6, 4.2 + 0.18 * len(runs)), dpi=120, layout="constrained")
    axes = figure.subplots()
    handles = []
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        # Rollouts are noisy: where they come back to a KL again and again, their path is a tangle that is not to hide
        # the diamonds.
        faint = 0.5 if figure_name == "reward_vs_kl" and run.held_out else 1.0
        axes.plot(*_columns(figure_name, run.rollouts), ".-", color=colour, linewidth=1, alpha=faint)
        axes.plot(*_columns(figure_name, run.held_out), "D--", color=colour, linewidth=1, markeredgecolor="white")
        handles.append(Line2D([], [], color=colour, marker="." if run.rollouts else "D", label=run.name))
    if any(run.held_out for run in runs):
        held_out = Line2D([], [], color="0.4", linestyle="--", linewidth=1, marker="D", label=HELD_OUT)
        held_out.set_markeredgecolor("white")
        handles.append(held_out)
    title, x, y = FIGURES[figure_name]
    axes.set_title(title, fontsize=11, loc="left")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # Below, where it covers no point.
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=9)
    return figure


def _columns(figure_name: str, rows: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """x and y of a figure."""
    x, y = {"reward": (0, 1), "kl": (0, 2), "reward_vs_kl": (2, 1)}[figure_name]
    return [row[x] for row in rows], [row[y] for row in rows]
