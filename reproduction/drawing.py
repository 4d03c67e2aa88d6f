"""A figure as the paper draws it: reward and KL against steps, the mean of the seeds within a band from min to max."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reproduction.logs import QUANTITIES, Row, quantities_of
from trl_apa.trainer.tracker_failures import warn_if_report_fails


if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        seeds = max(len(runs) for found in panels.values() for runs in found.values())
        note = f"\nlines: mean of {seeds} seeds; bands: from the lowest to the highest" if seeds > 1 else ""
        figure = make_figure(title + note, curves)
        FigureCanvasAgg(figure)
        figure.savefig(path)


def make_figure(title: str, curves: Mapping[str, Mapping[str, Mapping[str, Band]]]) -> "Figure":
    """The picture of `draw_figure`, on no canvas yet.

    Args:
        title: above it.
        curves: title of a panel to label of a curve to its `bands`.
    """
    from matplotlib.figure import Figure

    pictures = [("step", "reward"), ("step", "kl")]
    if all("gold_reward" in found for panel in curves.values() for found in panel.values()):
        pictures += [("step", "gold_reward"), ("kl", "gold_reward")]
    figure = Figure(figsize=(1.5 + 4.5 * len(pictures), 0.6 + 3.2 * len(curves)), dpi=90, layout="constrained")
    grid = figure.subplots(len(curves), len(pictures), squeeze=False)
    for axes_of_panel, (panel, found) in zip(grid, curves.items(), strict=True):
        for axes, (x, y) in zip(axes_of_panel, pictures, strict=True):
            for number, (label, quantities) in enumerate(found.items()):
                # There are ten colours.
                style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
                _draw_curve(axes, quantities, x, y, label=label, **style)
            axes.set_title(_title(panel if len(curves) > 1 else "", x, y), fontsize=10, loc="left")
            axes.set(xlabel={"step": "optimizer steps"}.get(x, QUANTITIES.get(x)), ylabel=QUANTITIES[y])
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        # Beside the row, all of which it is for.
        axes_of_panel[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(title, fontsize=11)
    return figure


def _title(panel: str, x: str, y: str) -> str:
    """What is drawn, after the panel's name where there are several."""
    short = {"reward": "reward", "gold_reward": "gold reward", "kl": "KL"}
    drawn = short[y] if x == "step" else f"{short[y]} against {short[x]}"
    return f"{panel}: {drawn}" if panel else drawn[0].upper() + drawn[1:]


def _as_json(panels: Panels) -> str:
    """The rows of every run, an evaluation a line."""
    text = json.dumps(panels)
    return text.replace("}, {", "},\n {").replace("]], ", "]],\n ") + "\n"


def _draw_curve(axes: Any, quantities: Mapping[str, Band], x: str, y: str, **style: Any) -> None:
    """Against steps with the band; against another quantity mean against mean."""
    band = quantities[y]
    if x != "step":
        axes.plot(quantities[x].mean, band.mean, marker=".", **style)
        return
    axes.plot(band.steps, band.mean, **style)
    axes.fill_between(band.steps, band.low, band.high, alpha=0.2, linewidth=0, color=style["color"])
