"""Tables and pictures of the sweep: `python -m benchmarks.real_sweep_report runs/smollm2-sweep docs/results`."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_sweep import (
    BASIC,
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
from reproduction.drawing import draw_figure
from reproduction.tables import at_equal_kl, markdown_table, value_at_kl
from trl_apa.demo.smollm2.options import REWARD_NAMES, RealDemoOptions


HEAD = ("reward", "KL, nats", "perplexity", "distinct-2", "entropy")
EQUAL_KLS = (1.0, 2.0, 5.0, 10.0)
# Rollouts of neighbouring iterations that are averaged: 32 responses alone say little.
SMOOTHED = 3
# Two epochs over the rollouts in mini-batches of 8.
STEPS_PER_ITERATION = 2 * BASIC.batch_size // 8
# What is kept of each run and each iteration.
OPTIONS = ("loss_type", "learning_rate", "kl_coef", "seed", "reward", "trains", "iterations", "overrides")
QUANTITIES = ("iteration", "reward", "kl", "entropy", "perplexity", "distinct_2")


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
    body = [["nothing: LoRA, rate 0.001, lambda 0.3", *cells(read(folder, base)["held_out"])]]
    body += [
        [changed_in(name, options), *cells(read(folder, name)["held_out"])]
        for name, options in runs_of(part, folder).items()
        if (folder / f"{name}.json").exists()
    ]
    return markdown_table(["changed", *HEAD], body)


def changed_in(name: str, options: RealDemoOptions) -> str:
    """What a run of `named_table` has otherwise than the one above it."""
    if options.trains == "all":
        return f"all weights, rate {options.learning_rate:g}"
    return name.removeprefix("factor-").replace("-", " ")


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
    return (
        f"At equal samples, on held-out beginnings:\n\n{at_the_end}\n\n"
        f"At equal KL, where each run first reaches it, on the rollouts:\n\n{at_kl}\n\n"
        f"At the KL that APA ends with, on the rollouts:\n\n{at_the_end_of_apa(curves)}"
    )


def at_the_end_of_apa(curves: Mapping[str, Sequence[Sequence[dict[str, float]]]]) -> str:
    """APA's last reward and KL, seed by seed, and PPO's reward where its KL first reaches the same."""
    body = []
    for seed, apa, ppo in zip(SEEDS, curves["APA"], curves["PPO"], strict=True):
        kl, reward = apa[-1]["kl"], apa[-1]["reward"]
        other = value_at_kl(ppo, "reward", kl)
        body.append([str(seed), f"{kl:.1f}", f"{reward:.2f}", "-" if other is None else f"{other:.2f}"])
    return markdown_table(["seed", "KL, nats", "reward of APA", "reward of PPO"], body)


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
            "step": STEPS_PER_ITERATION * (window[SMOOTHED // 2]["iteration"] - 1),
            **{name: sum(row[name] for row in window) / SMOOTHED for name in ("reward", "kl", "entropy")},
        }
        for window in windows
    ]


def is_complete(folder: Path, names: Iterable[str]) -> bool:
    """Whether all these runs are there."""
    return all((folder / f"{name}.json").exists() for name in names)


def numbers_of(folder: Path) -> dict[str, Any]:
    """What the tables and the picture are made of, of every run: options, each iteration, and held-out prompts."""
    numbers = {}
    for file in sorted(folder.glob("*-*.json")):
        run = read(folder, file.stem)
        options = {name: run["options"][name] for name in OPTIONS}
        history = [{name: round(row[name], 6) for name in QUANTITIES} for row in run["history"]]
        held_out = {name: round(value, 6) for name, value in run["held_out"].items()}
        numbers[file.stem] = {"options": options, "history": history, "held_out": held_out}
    return numbers


def main() -> None:
    """Write the tables of the runs that are there to `smollm2.md`, the picture of the comparison, and the numbers."""
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
            if any((folder / f"{name}.json").exists() for name in runs_of(part, folder)):
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
    rows = (f"{json.dumps(name)}: {json.dumps(run)}" for name, run in numbers_of(folder).items())
    (arguments.output / "smollm2.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    (arguments.output / "smollm2.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
