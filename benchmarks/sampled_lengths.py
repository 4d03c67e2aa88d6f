"""CPU seconds of `generate` by lengths and rows at a time, over TRL 0.11.4's and transformers' own.

`python -m benchmarks.sampled_lengths`, measured as `benchmarks.speed` does. Each side draws its own random numbers, so
that the lengths of the responses are others of one distribution in each turn; the table has medians.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import classic_if_there, make_parser, measure, ratios, sides
from benchmarks.workload import ENDS, Workload


AT_A_TIME = (4, 16, 64)
LIMIT = 64
OURS = ("ours", "plain")
# Ratios to transformers' that are to be reached, by lengths and rows at a time.
AIMS = {("long tail", 64): "0.60", ("long tail", 4): "0.75", **{("equal", rows): "1.02" for rows in AT_A_TIME}}


def workloads_of(size: str, limit: int = LIMIT, **options: object) -> list[Workload]:
    """64 queries whose responses have lengths of each kind, for each number of rows at a time."""
    return [
        Workload(size=size, limit=limit, ends=ends, generation_batch_size=rows, **{"batch_size": 64, **options})
        for ends in ENDS.values()
        for rows in AT_A_TIME
    ]


def print_table(workloads: Sequence[Workload], repeats: int, classic_python: Path | None) -> None:
    """A line for each workload."""
    kinds = {ends: kind for kind, ends in ENDS.items()}
    print(
        f"{'model':<9} {'responses':<10} {'at a time':>9}  {'ours / transformers':>19} {'aim':>5}"
        f" {'ours / TRL 0.11.4':>18} {'CPU s':>7}"
    )
    for workload in workloads:
        kind, rows = kinds[workload.ends], workload.generation_batch_size
        with sides(workload, OURS, classic_python) as running:
            costs = measure(running, "generate", repeats)
        print(
            f"{workload.size:<9} {kind:<10} {rows:>9}  {ratios(costs, *OURS):>19} {AIMS.get((kind, rows), '-'):>5}"
            f" {ratios(costs, 'ours', 'TRL 0.11.4'):>18} {statistics.median(costs['ours']['cpu']):>7.2f}",
            flush=True,
        )


def main() -> None:
    options = make_parser(__doc__, ["256 x 4"], "half a minute: a small model, without TRL 0.11.4").parse_args()
    if options.quick:
        print_table(workloads_of("32 x 2", limit=8, vocabulary=64, batch_size=16)[:2], 1, None)
        return
    classic = classic_if_there(options.classic_python)
    print_table([each for size in options.sizes for each in workloads_of(size)], options.repeats, classic)


if __name__ == "__main__":
    main()
