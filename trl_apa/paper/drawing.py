"""A figure as the paper draws it: reward and KL against steps, the mean of the seeds within a band from min to max."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trl_apa.commands.plot import Run


class Band(NamedTuple):
    """One quantity of one curve over its seeds, at the steps that all of them have logged."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def bands(runs: Sequence[Run]) -> tuple[Band, Band]:
    """Reward and KL of the runs of one curve: on held-out prompts where they were measured, else of the rollouts.

    Raises:
        ValueError: if the runs have no step in common.
    """
    tables = [{row[0]: row[1:] for row in run.held_out or run.rollouts} for run in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    if not steps:
        raise ValueError(f"the runs {', '.join(run.name for run in runs)} have no step in common")

    def band(column: int) -> Band:
        values = [[table[step][column] for table in tables] for step in steps]
        return Band(steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values])

    return band(0), band(1)


def draw_figure(title: str, panels: Mapping[str, Mapping[str, Sequence[Run]]], path: Path) -> None:
    """Write the picture, and beside it the numbers as JSON.

    Args:
        title: of the figure.
        panels: title of a panel to label of a curve to its runs, one a seed.
        path: a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {panel: {label: bands(runs) for label, runs in found.items()} for panel, found in panels.items()}
    figure = Figure(figsize=(9, 0.5 + 3.2 * len(panels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for axes_of_panel, (panel, found) in zip(grid, curves.items(), strict=True):
        for axes, which, quantity in zip(axes_of_panel, (0, 1), ("reward", "KL, nats per response"), strict=True):
            for number, (label, both) in enumerate(found.items()):
                band = both[which]
                axes.plot(band.steps, band.mean, color=f"C{number}", label=label)
                axes.fill_between(band.steps, band.low, band.high, color=f"C{number}", alpha=0.2, linewidth=0)
            axes.set(title=panel, xlabel="optimizer steps", ylabel=quantity)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        axes_of_panel[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    numbers = {
        panel: {
            label: {name: band._asdict() for name, band in zip(("reward", "kl"), both, strict=True)}
            for label, both in found.items()
        }
        for panel, found in curves.items()
    }
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
