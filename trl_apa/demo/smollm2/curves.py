"""The picture of a run: what it gained and what it paid, and sentences before and after."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trl_apa.demo.curves import GOLD_COLOUR, OTHER_COLOUR, PROXY_COLOUR, label_axes


if TYPE_CHECKING:
    from .pipeline import Evaluation

PANELS = (
    ("Reward (VADER)", "reward", "mean, -1 to 1", GOLD_COLOUR),
    ("Exact KL to the frozen model", "kl", "nats per response", PROXY_COLOUR),
    ("Entropy", "entropy", "nats per token", OTHER_COLOUR),
    ("Distinct-2", "distinct_2", "share of pairs of tokens", OTHER_COLOUR),
    ("Perplexity under the frozen model", "perplexity", "perplexity", OTHER_COLOUR),
)
NUM_SENTENCES = 3


def plot_real_curves(
    path: Path, title: str, training: Sequence[dict[str, float]], before: "Evaluation", after: "Evaluation"
) -> None:
    """Save the figure as PNG.

    Args:
        path: file to write.
        title: of the figure.
        training: metrics of each iteration, measured on the rollouts of the policy before that iteration's update.
        before, after: evaluations on held-out prompts.
    """
    figure = Figure(figsize=(11, 6.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flat
    updates = [row["iteration"] - 1 for row in training]
    for axis, (name, key, unit, colour) in zip(axes, PANELS, strict=False):
        axis.plot(updates, [row[key] for row in training], color=colour)
        held_out = [before.metrics[key], after.metrics[key]]
        axis.plot([0, len(training)], held_out, "D", color=colour, markersize=6, markeredgecolor="white")
        label_axes(axis, name, "iteration", unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _write_sentences(axes[-1], before, after)
    figure.suptitle(f"{title}; diamonds: held-out sentences", fontsize=11)
    figure.savefig(path)


def _write_sentences(axis: Axes, before: "Evaluation", after: "Evaluation") -> None:
    """The first held-out sentences, each as it was and as it is."""
    axis.set_axis_off()
    lines = []
    for prompt, old, new in list(zip(before.prompts, before.responses, after.responses, strict=True))[:NUM_SENTENCES]:
        for moment, response in (("before", old), ("after", new)):
            text = " ".join(f"{prompt}{response}".split())
            lines.append(textwrap.fill(f"{moment}: {text}", 52, subsequent_indent="    "))
        lines.append("")
    written = axis.text(0, 1, "\n".join(lines), va="top", fontsize=7, family="DejaVu Sans", parse_math=False)
    written.set_in_layout(False)  # else a text that is longer than the panels are high would make them smaller
