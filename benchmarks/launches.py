"""Seconds of a forward and backward pass by how packed rows attend: `python -m benchmarks.launches`, on a GPU if any.

Eight responses to each prompt, in bfloat16: in one launch a layer or one a sequence, the prompt read once or with each
response, and padded. Median of passes that take turns, after one that warms up, and over the first line's. `--small`
rehearses on a CPU, where each sequence has a launch in all of them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.workload import PAD, Workload
from trl_apa.models import varlen
from trl_apa.models.logprobs import response_logprobs
from trl_apa.models.packing import let_pack, noting_launches
from trl_apa.rollout.batch import pack_tokens, pad_tokens
from trl_apa.rollout.shared_prompts import equal_queries


GROUP = 8
# Tokens of prompt and response, and rows of a pass.
SHAPES = ((128, 32, 8), (512, 128, 8), (128, 32, 32))
SMALL = ((12, 4, 8),)


@dataclass(frozen=True)
class Passes:
    """One line: how the rows of a pass were read, its seconds, and why attention took a launch a sequence, or None."""

    prompt: int
    response: int
    rows: int
    how: str
    seconds: float
    ratio: float
    why_per_sequence: str | None


def ways(workload: Workload, device: torch.device) -> dict[str, tuple[dict[str, Any], bool]]:
    """What the network reads, and whether the kernel for all sequences is used where it runs."""
    queries, responses, _ = ([tensor.to(device) for tensor in column] for column in workload.rollouts())
    shared, apart = pack_tokens(queries, responses, equal_queries(queries)), pack_tokens(queries, responses)
    return {
        "prompt once, one launch a layer": (shared, True),
        "prompt once, one launch a sequence": (shared, False),
        "prompt with each, one launch a layer": (apart, True),
        "prompt with each, one launch a sequence": (apart, False),
        "padded": (pad_tokens(queries, responses, PAD), True),
    }


def one_pass(model: nn.Module, tokens: dict[str, Any], width: int, at_once: bool) -> float:
    """Seconds of a forward and backward pass, until the device is done."""
    with nullcontext() if at_once else patch.object(varlen, "is_for_flash", lambda *states: False):
        _wait()
        start = time.perf_counter()
        logprobs_BR, _ = response_logprobs(model, tokens, width)
        logprobs_BR.square().sum().backward()
        _wait()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(model: nn.Module, workload: Workload, repeats: int) -> Iterator[Passes]:
    """A line for each way, once all are measured."""
    width, calls = workload.response or 0, dict[str, Callable[[], float]]()
    why: dict[str, str | None] = {}
    for how, (tokens, at_once) in ways(workload, next(model.parameters()).device).items():
        calls[how] = partial(one_pass, model, tokens, width, at_once)
        with noting_launches() as noted:
            calls[how]()
        why[how] = noted[0] if noted else None
    turns = [{how: call() for how, call in calls.items()} for _ in range(repeats)]
    seconds = {how: statistics.median(turn[how] for turn in turns) for how in calls}
    first = next(iter(seconds.values()))
    for how, of_pass in seconds.items():
        shape = workload.prompt or 0, width, workload.batch_size
        yield Passes(*shape, how, of_pass, of_pass / first, why[how])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few thousand weights and short rows, for a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="a file for the results as JSON, written anew after each shape")
    options = parser.parse_args(argv)
    size, vocabulary, shapes = ("32 x 2", 64, SMALL) if options.small else ("2048 x 16", 32000, SHAPES)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Workload(size=size, vocabulary=vocabulary, length=2.0).model().bfloat16().eval()
    let_pack(model)
    results = []
    for prompt, response, rows in shapes:
        given = {"prompt": prompt, "response": response, "batch_size": rows, "rows_per_prompt": GROUP}
        for line in measured(model, Workload(size=size, vocabulary=vocabulary, **given), options.repeats):
            results.append(asdict(line))
            print(
                f"{line.prompt:>5} {line.response:>5} {line.rows:>4} {line.how:<40} {line.seconds:>8.4f} s "
                f"{line.ratio:>6.2f}  {line.why_per_sequence or ''}",
                flush=True,
            )
        if options.output:
            Path(options.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
