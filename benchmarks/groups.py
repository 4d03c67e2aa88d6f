"""CPU seconds of `step` on several responses to a prompt, read once or with each: `python -m benchmarks.groups`.

Next to TRL 0.11.4's `step` on the same rows, with the critic of each and ours without one; and, without critics, our
GRPO next to the update of TRL's `GRPOTrainer` on the same tokens.

As `benchmarks.speed` measures: each side in a process of its own on one thread, asked in turn, ratios within a turn.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import classic_if_there, make_parser, measure, ratios, sides
from benchmarks.workload import Workload


GROUP = 8
# Tokens of prompt and responses; from the fourth on reading the prompt once hardly pays, or does not.
SHAPES = ((64, 32), (128, 32), (512, 128), (1, 32), (16, 32), (32, 128), (64, 512))
# Those of `make bench`.
FIRST = SHAPES[:3]
OURS = ("ours", "ours, not shared", "ours, no critic", "ours, GRPO", "TRL GRPO")
# Ratio of ours without a critic to TRL 0.11.4 that is to be reached, by tokens of prompt and response.
AIMS = {(128, 32): "0.20"}


def share_of_tokens(workload: Workload) -> float:
    """Tokens to read with each prompt once, over those with each response behind its own."""
    queries, responses, _ = workload.rollouts()
    prompts, answers = sum(map(len, queries)), sum(map(len, responses))
    return (prompts / workload.rows_per_prompt + answers) / (prompts + answers)


def workload_of(prompt: int, response: int, **options: object) -> Workload:
    """Rollouts of groups; of long rows fewer, so that all take similar time."""
    batch_size = 64 if prompt + response < 200 else 32
    given = {"rows_per_prompt": GROUP, "prompt": prompt, "response": response, "shuffle": "groups", "epochs": 1}
    return Workload(**{"batch_size": batch_size, "mini_batch_size": GROUP, **given, **options})


def print_table(workloads: Sequence[Workload], repeats: int, classic_python: Path | None) -> None:
    """A line for each workload."""
    print(
        f"{'model':<9} {'prompt':>6} {'response':>8} {'drawn':<6} {'tokens':>6}  {'shared / not shared':>19}"
        f" {'ours / TRL 0.11.4':>18} {'no critic / TRL':>18} {'aim':>5} {'GRPO / TRL GRPO':>18}"
        f" {'CPU s':>7} {'MiB':>6} {'not shared':>10}"
    )
    for workload in workloads:
        with sides(workload, OURS, classic_python) as running:
            costs = measure(running, "step", repeats)
        seconds = statistics.median(costs["ours"]["cpu"])
        print(
            f"{workload.size:<9} {workload.prompt:>6} {workload.response:>8} {workload.shuffle:<6}"
            f" {share_of_tokens(workload):>6.0%}  {ratios(costs, *OURS[:2]):>19}"
            f" {ratios(costs, 'ours', 'TRL 0.11.4'):>18} {ratios(costs, 'ours, no critic', 'TRL 0.11.4'):>18}"
            f" {AIMS.get((workload.prompt, workload.response), '-'):>5} {ratios(costs, 'ours, GRPO', 'TRL GRPO'):>18}"
            f" {seconds:>7.2f} {max(costs['ours']['peak']):>6.0f} {max(costs['ours, not shared']['peak']):>10.0f}",
            flush=True,
        )


def main() -> None:
    options = make_parser(__doc__, ["256 x 4"], "a few seconds: one small workload").parse_args()
    if options.quick:
        small = {"size": "32 x 2", "vocabulary": 64, "batch_size": 16}
        print_table([workload_of(128, 8, **small)], 1, None)
        return
    classic = classic_if_there(options.classic_python)
    workloads = [workload_of(*shape, size=size) for size in options.sizes for shape in SHAPES]
    workloads += [workload_of(128, 32, size=size, shuffle="rows") for size in options.sizes]
    print_table(workloads, options.repeats, classic)


if __name__ == "__main__":
    main()
