"""A sweep on SmolLM2-135M-Instruct: what APA, PPO and AWR gain for their KL when all three are tuned equally.

    python -m benchmarks.real_sweep --output_dir runs/smollm2-sweep tune
    python -m benchmarks.real_sweep --output_dir runs/smollm2-sweep compare

Each run is a file of its own; a sweep that was stopped goes on with the runs that are missing.
"""

import argparse
import copy
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from trl_apa.demo.smollm2.options import REWARD_NAMES, RealDemoOptions


METHODS = ("apa", "ppo", "awr")
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
COEFFICIENTS = {"apa": (0.1, 0.3, 1.0), "ppo": (0.01, 0.03, 0.1), "awr": (0.3, 1.0, 3.0)}
TUNING_SEED, SEEDS = 0, (1, 2, 3)
BASIC = RealDemoOptions(iterations=12, num_threads=1)

# One setting of APA changed at a time, the others as in BASIC.
FACTORS: dict[str, dict[str, Any]] = {
    "mini-batch 4": {"mini_batch_size": 4},
    "mini-batch 16": {"mini_batch_size": 16},
    "value rate x 0.3": {"value_learning_rate": 3e-4},
    "value rate x 3": {"value_learning_rate": 3e-3},
    "clip 0.1": {"max_grad_norm": 0.1},
    "clip 10": {"max_grad_norm": 10.0},
    "no clip": {"max_grad_norm": None},
}
FULL_LEARNING_RATES = (3e-6, 1e-5, 3e-5)


def runs_of(part: str, folder: Path) -> dict[str, RealDemoOptions]:
    """The runs of one part of the sweep, by name."""
    if part == "tune":
        return {
            f"tune-{method}-{rate:g}-{coefficient:g}": replace(
                BASIC, seed=TUNING_SEED, loss_type=method, learning_rate=rate, kl_coef=coefficient
            )
            for rate in sorted(LEARNING_RATES, key=lambda rate: abs(rate - 1e-3))
            for method in METHODS
            for coefficient in COEFFICIENTS[method]
        }
    if part == "factors":
        return {
            f"factor-{name.replace(' ', '-')}": replace(BASIC, seed=TUNING_SEED, kl_coef=0.3, overrides=changed)
            for name, changed in FACTORS.items()
        }
    if part == "all-weights":
        return {
            f"all-weights-{rate:g}": replace(BASIC, seed=TUNING_SEED, kl_coef=0.3, trains="all", learning_rate=rate)
            for rate in FULL_LEARNING_RATES
        }
    untrained = {
        f"before-{reward}-{seed}": replace(BASIC, reward=reward, seed=seed, iterations=0)
        for reward in REWARD_NAMES
        for seed in (TUNING_SEED, *SEEDS)
    }
    if part == "before":
        return untrained
    best = {method: best_settings(folder, method) for method in METHODS}
    return {
        f"compare-{reward}-{method}-{seed}": replace(BASIC, reward=reward, seed=seed, loss_type=method, **best[method])
        for seed in SEEDS
        for reward in REWARD_NAMES
        for method in METHODS
    }


def best_settings(folder: Path, method: str) -> dict[str, float]:
    """Rate and coefficient of the tuning run with the highest held-out reward whose English is still English.

    That is one at most 10 nats from the frozen model that passes the demo's fluency guard.

    Raises:
        FileNotFoundError: if a tuning run of the method is missing.
    """
    before = read(folder, f"before-sentiment-{TUNING_SEED}")["held_out"]
    runs = [read(folder, name) for name, options in runs_of("tune", folder).items() if options.loss_type == method]
    readable = [run for run in runs if is_readable(run["held_out"], before)]
    if not readable:
        raise ValueError(f"no tuning run of {method} is readable")
    best = max(readable, key=lambda run: run["held_out"]["reward"])
    return {name: best["options"][name] for name in ("learning_rate", "kl_coef")}


def is_readable(after: dict[str, float], before: dict[str, float]) -> bool:
    """Whether a policy passes the fluency guard and is at most 10 nats from the frozen model."""
    return after["kl"] <= 10 and after["perplexity"] <= 2 * before["perplexity"] and after["distinct_2"] >= 0.3


def read(folder: Path, name: str) -> dict[str, Any]:
    """One run's options, metrics of each iteration, and metrics and sentences on held-out prompts."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@cache
def _loaded(trains: str) -> tuple[Any, Any]:
    from trl_apa.demo.smollm2.model import load_base, load_smollm2_tokenizer

    return load_smollm2_tokenizer(), load_base(trains)


def run(name: str, options: RealDemoOptions, folder: Path) -> str:
    """Train once and write what came of it to `NAME.json`."""
    from rich.console import Console

    from trl_apa.demo.pipeline import quiet_libraries, torch_threads
    from trl_apa.demo.report import Report
    from trl_apa.demo.smollm2.measuring import METRICS
    from trl_apa.demo.smollm2.pipeline import align, assemble, measure
    from trl_apa.files import replace_text

    report = Report(Console(quiet=True), METRICS)
    options = replace(options, output_dir=folder / "trained" / name)
    began = time.process_time()
    with quiet_libraries(), torch_threads(options.num_threads):
        tokenizer, loaded = _loaded(options.trains)
        made = assemble(options, tokenizer, copy.deepcopy(loaded))
        history = align(options, made, report) if options.iterations else []
        held_out = measure("held-out sentences", options, made, report)
    row = {
        "options": {key: value for key, value in asdict(options).items() if key != "output_dir"},
        "history": history,
        "held_out": held_out.metrics,
        "sentences": [prompt + text for prompt, text in zip(held_out.prompts, held_out.responses, strict=True)][:16],
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    replace_text(folder / f"{name}.json", json.dumps(row, indent=1) + "\n")
    numbers = ", ".join(f"{key} {value:.3g}" for key, value in held_out.metrics.items())
    return f"{name}: {numbers}; {row['cpu_seconds']:.0f} CPU s"


def main() -> None:
    """Make the runs of one part that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("before", "tune", "factors", "all-weights", "compare"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2-sweep"))
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one thread (default: 2)")
    arguments = parser.parse_args()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    runs = runs_of(arguments.part, folder)
    missing = {name: options for name, options in runs.items() if not (folder / f"{name}.json").exists()}
    print(f"{arguments.part}: {len(runs)} runs, {len(missing)} to make", flush=True)
    with ProcessPoolExecutor(arguments.processes) as pool:
        pending = [pool.submit(run, name, options, folder) for name, options in missing.items()]
        for done in as_completed(pending):
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
