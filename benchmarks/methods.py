"""How much memory a `step` of each method needs, with a value model and without, each in a process of its own.

    python -m benchmarks.methods [--small] [--only METHOD]

A random Llama of 97 million weights in float32, all of them trained by AdamW: 8 rows of 96 tokens, 4 a micro-batch.
Of the second step, when the optimizer has its states: the most bytes that torch held at once, from its CPU allocator's
records, and the most that the process had in memory since its libraries were loaded (Linux). Beside them what
`trl-apa memory` predicts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.memory import FULL, MIB, measure
from trl_apa.memory import Setup, predict


SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_hidden_layers": 10}
SHAPE |= {"vocab_size": 17000, "max_position_embeddings": 512, "eos_token_id": None}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
ROWS = {"max_length": 96, "max_new_tokens": 48, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
# What differs in the planner's terms, and in the trainer's.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "APA, GAE, a value network": ({"value": "separate"}, {}),
    "APA, GAE, a head for values": ({"value": "head"}, {}),
    "APA, batch": ({"value": None}, {"advantage_estimator": "batch"}),
    "APA, batch, normalizer learned": ({"value": None, "learned_normalizer": True}, {"advantage_estimator": "batch"}),
    "PPO, GAE, a value network": ({"value": "separate"}, {"loss_type": "ppo"}),
    "GRPO, batch": ({"value": None}, {"loss_type": "grpo", "advantage_estimator": "batch", "kl_coef": 0.05}),
}


def setup_of(method: str, small: bool) -> Setup:
    """The run of a method in the planner's terms."""
    config = LlamaConfig(**{**SHAPE, **SMALL} if small else SHAPE)
    common = replace(Setup(config, **FULL), **ROWS, generation_batch_size=4)
    return replace(common, **METHODS[method][0])


def measured(method: str, small: bool) -> dict[str, int]:
    """Of a method, in this process: bytes that torch held, and that the process had."""
    torch.set_num_threads(1)
    setup, before = setup_of(method, small), _resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        held = measure(setup, folder, **METHODS[method][1]).update
    return {"held": held, "resident": _resident("VmHWM") - before}


def _resident(field: str) -> int:
    """A line of the kernel's account of this process, bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or with `--here` the numbers of one method in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that it runs")
    parser.add_argument("--only", choices=METHODS, help="the method of this name")
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args(argv)
    if options.here:
        print(json.dumps(measured(options.only, options.small)))
        return
    columns = ("method", "predicted, MiB", "held by torch, MiB", "of the process, MiB")
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
    for method in METHODS:
        if options.only not in (None, method):
            continue
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.methods", "--here", "--only", method]
        command += ["--small"] if options.small else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        predicted = sum(predict(setup_of(method, options.small)).update.values())
        sizes = " | ".join(f"{size / MIB:,.0f}" for size in (predicted, found["held"], found["resident"]))
        print(f"| {method} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
