"""CPU seconds of sampling that does not carry on rows that have ended, nor reads a prompt twice.

`python -m benchmarks.finished_rows`, one thread, each way in turn, the best of three rounds. Two tables:

- for several numbers of rows that are sampled at a time, and kinds of lengths: batch after batch with every row to the
  longest, over the same without the rows that have ended (from the same random numbers), and with waiting prompts in
  their places (from streams of their own, so that the lengths are others of the same distribution);
- for prompts of several lengths that are asked eight times each: each read once, over each read eight times.

Ratios below 1 are saved time.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from benchmarks.workload import ENDS, EOS, PAD, Workload, end_with
from trl_apa.rollout import generation
from trl_apa.rollout.generation import generate_responses


BATCH_SIZES, PROMPTS, ASKED = (4, 16, 64), (16, 64, 128, 512), 8


def seconds(
    network: LlamaForCausalLM, rows: list[Tensor], batch_size: int, limit: int, without: Sequence[str] = ()
) -> tuple[float, list[Tensor]]:
    """CPU seconds, and the responses, where some of what `generate_responses` does is said to be impossible."""
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": EOS}
    config = GenerationConfig(**options, pad_token_id=PAD, max_new_tokens=limit)
    torch.manual_seed(0)
    with patch.multiple(generation, **dict.fromkeys(without, _impossible)) if without else nullcontext():
        start = time.process_time()
        responses = generate_responses(network, rows, config, None, batch_size=batch_size)
        return time.process_time() - start, responses


def _impossible(*given: Any) -> bool:
    return False


def best(rounds: int, *ways: Callable[[], tuple[float, list[Tensor]]]) -> list[tuple[float, list[Tensor]]]:
    """The fewest seconds of each way, and its responses; the ways take turns."""
    taken = [[way() for way in ways] for _ in range(rounds)]
    return [min(of_way, key=lambda result: result[0]) for of_way in zip(*taken, strict=True)]


def compare_lengths(workload: Workload, limit: int, rounds: int) -> None:
    network, rows = workload.model().eval(), workload.rollouts()[0]
    print("| responses | at a time | to the longest, CPU s | left out | refilled | tokens, mean | refilled |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, probability in ENDS.items():
        handle = end_with(probability, network)
        for size in BATCH_SIZES:
            given = (network, rows, size, limit)
            longest, left_out, refilled = best(
                rounds,
                lambda given=given: seconds(*given, without=["rows_can_be_joined", "rows_can_be_selected"]),
                lambda given=given: seconds(*given, without=["rows_can_be_joined"]),
                lambda given=given: seconds(*given),
            )
            assert all(map(torch.equal, longest[1], left_out[1])), "the two ways sampled different tokens"
            ratios = [
                f"{left_out[0] / longest[0]:.2f}",
                f"{refilled[0] / longest[0]:.2f}" if size < len(rows) else "-",
            ]
            means = [f"{sum(map(len, responses)) / len(rows):.0f}" for _, responses in (longest, refilled)]
            print("|", " | ".join([kind, str(size), f"{longest[0]:.2f}", *ratios, *means]), "|", flush=True)
        handle.remove()


def compare_prompts(limit: int, rounds: int, **sizes: Any) -> None:
    print(f"\n| prompt, asked {ASKED} times | read each time, CPU s | read once |")
    print("| --- | --- | --- |")
    for prompt in PROMPTS:
        workload = Workload(rows_per_prompt=ASKED, prompt=prompt, response=limit, **sizes)
        network, rows = workload.model().eval(), workload.rollouts()[0]
        given = (network, rows, len(rows), limit)
        each, once = best(
            rounds,
            lambda given=given: seconds(*given, without=["rows_can_be_selected"]),
            lambda given=given: seconds(*given),
        )
        print(f"| {prompt} | {each[0]:.2f} | {once[0] / each[0]:.2f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few thousand weights, to see that it runs")
    small = parser.parse_args(argv).small
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {"size": "32 x 2", "vocabulary": 64, "batch_size": 16} if small else {}
    rounds, limit = (1, 8) if small else (3, 64)
    compare_lengths(Workload(**sizes), limit, rounds)
    compare_prompts(limit // 2, rounds, **sizes)


if __name__ == "__main__":
    main()
