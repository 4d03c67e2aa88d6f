"""A figure as the paper draws it: reward and KL against steps, the mean of the seeds within a band from min to max."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reproduction.logs import QUANTITIES, Row, quantities_of
from trl_apa.trainer.tracker_failures import warn_if_report_fails


Panels = Mapping[str, Mapping[str, Sequence[Sequence[Row]]]]


class Band(NamedTuple):
    """One quantity of one curve over its seeds, at the steps that all of them have logged."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def bands(runs: Sequence[Sequence[Row]]) -> dict[str, Band]:
    """The quantities of the runs of one curve by name.

    Raises:
        ValueError: if the runs have no step in common.
    """
    tables = [{row["step"]: row for row in rows} for rows in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    if not steps:
        raise ValueError(f"the {len(runs)} runs of a curve have no step in common")

    def band(name: str) -> Band:
        values = [[table[step][name] for table in tables] for step in steps]
        return Band(steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values])

    return {name: band(name) for name in quantities_of(runs)}


def draw_figure(title: str, panels: Panels, path: Path) -> None:
    """Write `panels` as JSON, and the plot next to it; a failed write is a warning.

    A row of pictures a panel: reward and KL against steps, and where the gold reward is known, that against steps and
    against KL.

    Args:
        title: of the figure.
        panels: title of a panel to label of a curve to the rows of its runs, one a seed.
        path: a PNG.

    Raises:
        ValueError: if the runs of a curve have no step in common.
    """
    curves = {panel: {label: bands(runs) for label, runs in found.items()} for panel, found in panels.items()}
    numbers = path.with_suffix(".json")
    with warn_if_report_fails(None, f"writing {numbers}"):
        numbers.write_text(_as_json(panels), encoding="utf-8")
    with warn_if_report_fails(None, f"drawing {path}"):
        _draw(title, curves, path)


def _draw(title: str, curves: Mapping[str, Mapping[str, Mapping[str, Band]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = [("step", "reward"), ("step", "kl")]
    if all("gold_reward" in found for panel in curves.values() for found in panel.values()):
        pictures += [("step", "gold_reward"), ("kl", "gold_reward")]
    figure = Figure(figsize=(4.5 * len(pictures), 0.5 + 3.2 * len(curves)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(curves), len(pictures), squeeze=False)
    for axes_of_panel, (panel, found) in zip(grid, curves.items(), strict=True):
        for axes, (x, y) in zip(axes_of_panel, pictures, strict=True):
            for number, (label, quantities) in enumerate(found.items()):
                _draw_curve(axes, quantities, x, y, label=label, color=f"C{number}")
            axes.set(title=panel, xlabel={"step": "optimizer steps"}.get(x, QUANTITIES.get(x)), ylabel=QUANTITIES[y])
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        axes_of_panel[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _as_json(panels: Panels) -> str:
    """The rows of every run, an evaluation a line."""
    text = json.dumps(panels)
    return text.replace("}, {", "},\n {").replace("]], ", "]],\n ") + "\n"


def _draw_curve(axes: Any, quantities: Mapping[str, Band], x: str, y: str, **style: Any) -> None:
    """Against steps with the band; against another quantity mean against mean."""
    band = quantities[y]
    if x != "step":
        axes.plot(quantities[x].mean, band.mean, ".-", **style)
        return
    axes.plot(band.steps, band.mean, **style)
    axes.fill_between(band.steps, band.low, band.high, alpha=0.2, linewidth=0, color=style["color"])
