"""The picture of a run: rewards, KL and entropy against iterations, and reward against KL."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


PROXY_COLOUR, GOLD_COLOUR, OTHER_COLOUR = "#1f77b4", "#d99a00", "#555555"


def plot_curves(
    path: Path, title: str, training: Sequence[dict[str, float]], evaluations: Sequence[dict[str, float]]
) -> None:
    """Save the figure of `make_figure` as PNG to `path`."""
    figure = make_figure(title, training, evaluations)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def make_figure(title: str, training: Sequence[dict[str, float]], evaluations: Sequence[dict[str, float]]) -> Figure:
    """Rewards, KL, rewards against KL in the order of the iterations, entropy.

    Args:
        title: of the figure.
        training: metrics of each iteration, measured on the rollouts of the policy *before* that iteration's update.
        evaluations: metrics on held-out questions, each with `iteration`, the updates made before it.
    """
    figure = Figure(figsize=(9, 6.4), dpi=120, layout="constrained")
    rewards, kl, trade, entropy = figure.subplots(2, 2).flat
    updates = [row["iteration"] - 1 for row in training]
    held_out = [row["iteration"] for row in evaluations]
    for name, label, colour in (
        ("proxy_reward", "proxy (learned)", PROXY_COLOUR),
        ("gold_reward", "gold (true)", GOLD_COLOUR),
    ):
        values, final = [row[name] for row in training], [row[f"eval/{name}"] for row in evaluations]
        rewards.plot(updates, values, color=colour, label=label)
        rewards.plot(held_out, final, "D", color=colour, markersize=6, markeredgecolor="white")
        kl_values = [row["eval/kl"] for row in evaluations]
        trade.plot([row["kl"] for row in training], values, ".-", color=colour, linewidth=0.6, label=label)
        trade.plot(kl_values, final, "D", color=colour, markersize=6, markeredgecolor="white")
    kl.plot(updates, [row["kl"] for row in training], color=OTHER_COLOUR)
    kl.plot(held_out, [row["eval/kl"] for row in evaluations], "D", color=OTHER_COLOUR, markeredgecolor="white")
    entropy.plot(updates, [row["entropy"] for row in training], color=OTHER_COLOUR)
    entropy.plot(
        held_out, [row["eval/entropy"] for row in evaluations], "D", color=OTHER_COLOUR, markeredgecolor="white"
    )
    label_axes(rewards, "Reward", "iteration", "mean reward")
    label_axes(kl, "KL to the initial model", "iteration", "nats per response")
    label_axes(trade, "Reward against KL", "KL, nats per response", "mean reward")
    label_axes(entropy, "Entropy", "iteration", "nats per token")
    handles, labels = rewards.get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="", marker="D", color=OTHER_COLOUR, markeredgecolor="white"))
    # Below all of them, where it covers no point.
    figure.legend(
        handles, [*labels, "diamonds: held-out questions"], loc="outside lower center", ncols=3, frameon=False
    )
    figure.suptitle(title, fontsize=11)
    return figure


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, names of the axes and a light grid."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
