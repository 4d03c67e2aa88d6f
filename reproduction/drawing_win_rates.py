"""Win rates as the paper's figure 1 draws them: a bar of wins, ties and losses for each pair of policies."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from reproduction.tables import markdown_table
from reproduction.win_rates import WinRates
from trl_apa.trainer.tracker_failures import warn_if_report_fails


if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = {"wins": "C0", "ties": "0.8", "losses": "C1"}


def draw_win_rates(title: str, found: WinRates, path: Path) -> None:
    """Write the numbers as JSON and as a table in Markdown, and beside them the picture.

    What cannot be written is a warning.

    Args:
        title: of the figure.
        found: what is drawn: over all seeds, and the win rate of each if there are several.
        path: a PNG.
    """
    texts = {".json": json.dumps(found._asdict(), indent=1) + "\n", ".md": table(title, found)}
    for suffix, text in texts.items():
        with warn_if_report_fails(None, f"writing {path.with_suffix(suffix)}"):
            path.with_suffix(suffix).write_text(text, encoding="utf-8")
    with warn_if_report_fails(None, f"drawing {path}"):
        _draw(title, found, path)


def _draw(title: str, found: WinRates, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.6 * len(found.overall)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(found.overall)
    for row, name in enumerate(names):
        _draw_bar(axes, row, found.overall[name])
        _draw_rate(axes, row, found, name)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1), xlabel=f"share of the pairs, judged by {found.judge}", yticks=range(len(names)))
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(
        by_label.values(), by_label, loc="outside lower center", ncols=len(by_label), frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _draw_bar(axes: "Axes", row: int, rate: dict[str, float]) -> None:
    left = 0.0
    for part, colour in PARTS.items():
        share = rate[part] / rate["pairs"]
        axes.barh(row, share, left=left, height=0.6, color=colour, label=part)
        if share > 0.04:
            axes.text(left + share / 2, row + 0.19, f"{share:.0%}", ha="center", va="center", fontsize=8)
        left += share


def _draw_rate(axes: "Axes", row: int, found: WinRates, name: str) -> None:
    rate = found.overall[name]
    low, middle, high = (rate[key] for key in ("low", "win_rate", "high"))
    label = f"win rate (a tie is half), {found.confidence:.0%} interval"
    error = [[middle - low], [high - middle]]
    axes.errorbar(middle, row, xerr=error, fmt="D", color="black", markersize=4, capsize=4, label=label)
    if len(found.seeds[name]) > 1:
        rates = [of_seed["win_rate"] for of_seed in found.seeds[name].values()]
        axes.plot(rates, [row - 0.2] * len(rates), "|", color="black", label="each seed")


def table(title: str, found: WinRates) -> str:
    """A row for each pair and seed, and one over all seeds if there are several."""
    how = f"Judged by {found.judge}. A tie counts half. Intervals of {found.confidence:.0%} over the prompts."
    body = []
    for name, by_seed in found.seeds.items():
        rows = {str(seed): rate for seed, rate in by_seed.items()}
        rows |= {"all": found.overall[name]} if len(by_seed) > 1 else {}
        for seed, rate in rows.items():
            counts = [str(rate[key]) for key in ("wins", "ties", "losses", "unreadable")]
            interval = f"{rate['low']:.3f} to {rate['high']:.3f}"
            body.append([name, seed, f"{rate['win_rate']:.3f}", interval, *counts])
    head = ["pair", "seed", "win rate", "interval", "wins", "ties", "losses", "no verdict"]
    return f"# {title}\n\n{how}\n\n{markdown_table(head, body)}\n"
