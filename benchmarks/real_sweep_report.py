"""Tables and pictures of the sweep: `python -m benchmarks.real_sweep_report runs/smollm2-sweep docs/results`."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_sweep import (
    COEFFICIENTS,
    LEARNING_RATES,
    METHODS,
    SEEDS,
    TUNING_SEED,
    best_settings,
    is_readable,
    read,
    runs_of,
)
from trl_apa.demo.smollm2.options import REWARD_NAMES
from trl_apa.paper.drawing import draw_figure
from trl_apa.paper.tables import at_equal_kl, markdown_table


HEAD = ("reward", "KL, nats", "perplexity", "distinct-2", "entropy")
EQUAL_KLS = (1.0, 2.0, 5.0, 10.0)
# Rollouts of neighbouring iterations that are averaged: 32 responses alone say little.
SMOOTHED = 3


def cells(metrics: dict[str, float]) -> list[str]:
    """The held-out numbers of a run, in the order of `HEAD`."""
    return [
        f"{metrics['reward']:.2f}",
        f"{metrics['kl']:.1f}",
        f"{metrics['perplexity']:.0f}",
        f"{metrics['distinct_2']:.2f}",
        f"{metrics['entropy']:.2f}",
    ]


def tuning_table(folder: Path) -> str:
    """Every tuning run; the one that a method takes in bold, those that are not readable in italics."""
    before = read(folder, f"before-sentiment-{TUNING_SEED}")["held_out"]
    body = [["before training", "", "", *cells(before)]]
    for method in METHODS:
        best = best_settings(folder, method)
        for rate in LEARNING_RATES:
            for coefficient in COEFFICIENTS[method]:
                metrics = read(folder, f"tune-{method}-{rate:g}-{coefficient:g}")["held_out"]
                row = [method.upper(), f"{rate:g}", f"{coefficient:g}", *cells(metrics)]
                mark = "" if is_readable(metrics, before) else "*"
                mark = "**" if best == {"learning_rate": rate, "kl_coef": coefficient} else mark
                body.append([f"{mark}{cell}{mark}" for cell in row])
    return markdown_table(["method", "rate", "coefficient", *HEAD], body)


def named_table(folder: Path, part: str, base: str) -> str:
    """The runs of a part beside the one that they change."""
    body = [["as in the tuning", *cells(read(folder, base)["held_out"])]]
    body += [
        [name.partition("-")[2].replace("-", " "), *cells(read(folder, name)["held_out"])]
        for name in runs_of(part, folder)
    ]
    return markdown_table(["changed", *HEAD], body)


def comparison(folder: Path, reward: str) -> str:
    """The methods with their tuned settings at equal samples and at equal KL, over the seeds."""
    untrained = [read(folder, f"before-{reward}-{seed}")["held_out"] for seed in SEEDS]
    found = {method: [read(folder, f"compare-{reward}-{method}-{seed}") for seed in SEEDS] for method in METHODS}
    ends = {"before training": untrained} | {
        method.upper(): [run["held_out"] for run in runs] for method, runs in found.items()
    }
    at_the_end = markdown_table(["method", *HEAD], [[name, *spreads(rows)] for name, rows in ends.items()])
    curves = {method.upper(): [smoothed(run["history"]) for run in runs] for method, runs in found.items()}
    at_kl = at_equal_kl(curves, ["reward"], EQUAL_KLS)
    return f"At equal samples, on held-out beginnings:\n\n{at_the_end}\n\nAt equal KL, on the rollouts:\n\n{at_kl}"


def spreads(rows: Sequence[dict[str, float]]) -> list[str]:
    """Mean over the seeds, and the lowest and the highest in brackets, in the order of `HEAD`."""
    columns = zip(*(cells(row) for row in rows), strict=True)
    digits = (2, 1, 0, 2, 2)
    return [
        f"{sum(map(float, column)) / len(column):.{n}f} [{min(column, key=float)}, {max(column, key=float)}]"
        for column, n in zip(columns, digits, strict=True)
    ]


def smoothed(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Reward and KL against updates, each the mean of `SMOOTHED` iterations."""
    windows = (history[i : i + SMOOTHED] for i in range(len(history) - SMOOTHED + 1))
    return [
        {
            "step": window[SMOOTHED // 2]["iteration"] - 1,
            **{name: sum(row[name] for row in window) / SMOOTHED for name in ("reward", "kl", "entropy")},
        }
        for window in windows
    ]


def is_complete(folder: Path, names: Iterable[str]) -> bool:
    """Whether all these runs are there."""
    return all((folder / f"{name}.json").exists() for name in names)


def main() -> None:
    """Write the tables of the parts that are complete to `smollm2.md`, and the picture of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    folder: Path = arguments.runs
    parts: list[str] = []
    tuned = is_complete(folder, [*runs_of("before", folder), *runs_of("tune", folder)])
    if tuned:
        parts.append(f"## Tuning\n\n{tuning_table(folder)}")
        base = f"tune-apa-0.001-{0.3:g}"
        for part, title in (("factors", "One setting changed"), ("all-weights", "All weights trained")):
            if is_complete(folder, runs_of(part, folder)):
                parts.append(f"## {title}\n\n{named_table(folder, part, base)}")
    if tuned and is_complete(folder, runs_of("compare", folder)):
        panels: dict[str, Any] = {}
        for reward in REWARD_NAMES:
            parts.append(f"## {reward.capitalize()}\n\n{comparison(folder, reward)}")
            panels[reward] = {
                method.upper(): [smoothed(read(folder, f"compare-{reward}-{method}-{s}")["history"]) for s in SEEDS]
                for method in METHODS
            }
        draw_figure("SmolLM2-135M-Instruct, LoRA", panels, arguments.output / "smollm2.png")
    text = "\n\n".join(["# SmolLM2-135M-Instruct", *parts])
    (arguments.output / "smollm2.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
