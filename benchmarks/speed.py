"""CPU seconds of `step` and `generate` next to TRL 0.11.4's and to the bare network calls: `make bench`.

Every side runs in a process of its own on one thread and is asked in turn, so that what else the machine does meets
all of them alike. Ratios are taken within a turn; the table has their median and their range.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.workload import SIZES, SPREADS, Workload


ROOT = Path(__file__).resolve().parents[1]
# The trainer; on responses that it sampled; with padding; the bare network calls.
OURS = ("ours", "ours, sampled", "ours, padded", "plain")
# Ratios to be reached: by call and lengths, of a column.
AIMS = {("step", "ragged"): "sampled 0.38, TRL 0.42, plain 1.05"}
AIM = "plain 1.05"
# Sides that are modules of their own in this environment.
MODULES = {"TRL GRPO": "benchmarks.grpo_side"}
Costs = dict[str, dict[str, list[float]]]
# What one side of the workload costs when one thing about it grows.
GROWTHS: dict[str, Sequence] = {
    "batch_size": (32, 64, 128),
    "length": (0.5, 1.0, 2.0),
    "vocabulary": (4096, 8192, 32768),
    "epochs": (1, 2, 4),
}
# The same of groups, which are read with their prompt once.
GROWTHS_OF_GROUPS: dict[str, Sequence] = {"rows_per_prompt": (1, 2, 4, 8, 16), "prompt": (64, 128, 256, 512)}


class Side:
    """A process that carries out `step` and `generate` of a workload and says what they cost."""

    def __init__(self, python: str, module: str, *arguments: str):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready = False

    def __call__(self, action: str) -> dict[str, float]:
        if not self.ready:
            self.ready = bool(self._answer())
        self.process.stdin.write(f"{action}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        """The next line that is JSON; libraries print on standard output too."""
        while line := self.process.stdout.readline():
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(answer := json.loads(line), dict):
                    return answer
        raise SystemExit(f"{' '.join(self.process.args[3:5])} failed:\n{self.process.stderr.read()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


@contextlib.contextmanager
def sides(workload: Workload, ours: Sequence[str], classic_python: Path | None) -> Iterator[dict[str, Side]]:
    """Those of `OURS` that are named, and TRL 0.11.4 if its environment is."""
    text = workload.to_json()
    running = {name: Side(sys.executable, MODULES.get(name, "benchmarks.our_side"), name, text) for name in ours}
    if classic_python is not None:
        running["TRL 0.11.4"] = Side(str(classic_python), "benchmarks.classic_side", text)
    try:
        yield running
    finally:
        for side in running.values():
            side.close()


def measure(running: dict[str, Side], action: str, repeats: int) -> Costs:
    """What `action` costs each side: `repeats` turns, after one that is not counted."""
    costs: Costs = {name: {"cpu": [], "wall": [], "peak": []} for name in running}
    for turn in range(repeats + 1):
        for name, side in running.items():
            answer = side(action)
            if turn:
                for quantity, values in costs[name].items():
                    values.append(answer[quantity])
    return costs


def ratios(costs: Costs, over: str, under: str) -> str:
    """Median and range of the ratios of CPU seconds within a turn."""
    if over not in costs or under not in costs:
        return "-"
    values = [a / b for a, b in zip(costs[over]["cpu"], costs[under]["cpu"], strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def tokens_of(workload: Workload) -> tuple[int, float]:
    """Tokens of all rollouts, and their share of a batch padded to the longest."""
    queries, responses, _ = workload.rollouts()
    lengths = [len(query) + len(response) for query, response in zip(queries, responses, strict=True)]
    return sum(lengths), sum(lengths) / (len(lengths) * max(lengths))


def print_comparison(
    workloads: Sequence[Workload], repeats: int, classic_python: Path | None, ours: Sequence[str] = OURS
) -> None:
    """A line for each workload and call."""
    print(
        f"{'model':<9} {'lengths':<10} {'real':>5}  {'call':<9} {'ours / TRL 0.11.4':>18} {'sampled / TRL':>18}"
        f" {'padded / TRL':>18} {'ours / plain':>18} {'CPU s':>7} {'tokens/s':>9} {'MiB':>6} {'TRL MiB':>8}  aim"
    )
    for workload in workloads:
        tokens, share = tokens_of(workload)
        with sides(workload, ours, classic_python) as running:
            for action in ("step", "generate"):
                costs = measure(running, action, repeats)
                seconds = statistics.median(costs["ours"]["cpu"])
                # Each new token of `generate` counts, and in `step` each token of the rollouts.
                done = tokens if action == "step" else workload.new_tokens
                classic_peak = max(costs["TRL 0.11.4"]["peak"]) if classic_python else float("nan")
                print(
                    f"{workload.size:<9} {workload.spread:<10} {share:>5.0%}  {action:<9}"
                    f" {ratios(costs, 'ours', 'TRL 0.11.4'):>18} {ratios(costs, 'ours, sampled', 'TRL 0.11.4'):>18}"
                    f" {ratios(costs, 'ours, padded', 'TRL 0.11.4'):>18}"
                    f" {ratios(costs, 'ours', 'plain'):>18} {seconds:>7.2f} {done / seconds:>9.0f}"
                    f" {max(costs['ours']['peak']):>6.0f} {classic_peak:>8.0f}"
                    f"  {AIMS.get((action, workload.spread), AIM)}",
                    flush=True,
                )


def print_growth(base: Workload, growths: dict[str, Sequence]) -> None:
    """CPU seconds of one `step` of ours, and its memory, as one thing grows."""
    print(f"\n{'grows':<11} {'value':>7} {'tokens':>7} {'CPU s':>7} {'s / 1000 tokens / epoch':>24} {'MiB':>6}")
    for name, values in growths.items():
        for value in values:
            workload = replace(base, **{name: value})
            side = Side(sys.executable, "benchmarks.our_side", "ours", workload.to_json())
            side("step")
            answer = side("step")
            side.close()
            tokens, _ = tokens_of(workload)
            unit = answer["cpu"] / tokens * 1000 / workload.epochs
            print(f"{name:<11} {value:>7} {tokens:>7} {answer['cpu']:>7.2f} {unit:>24.3f} {answer['peak']:>6.0f}")


def make_parser(doc: str, sizes: Sequence[str], quick: str) -> argparse.ArgumentParser:
    """Options of the benchmarks that compare with TRL 0.11.4.

    Args:
        doc: of the module, which begins with what it does.
        sizes: of networks, by default.
        quick: what `--quick` does.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--classic-python", type=Path, default=ROOT / ".venv-parity/bin/python")
    parser.add_argument("--sizes", nargs="+", default=list(sizes), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def classic_if_there(classic_python: Path) -> Path | None:
    """The Python of TRL 0.11.4's environment, or None, and a line that says so."""
    if classic_python.exists():
        return classic_python
    print(f"without TRL 0.11.4: {classic_python} is not there; `make bench` makes it", file=sys.stderr)
    return None


def main() -> None:
    # They measure with what is above.
    from benchmarks import groups, sampled_lengths

    def print_groups(*given: Any) -> None:
        print(f"\n{groups.GROUP} responses to each prompt:")
        groups.print_table(*given)

    def print_sampling(*given: Any) -> None:
        print("\n`generate`, waiting prompts in the places of finished rows:")
        sampled_lengths.print_table(*given)

    parser = make_parser(__doc__, ["128 x 4", "256 x 4"], "a few seconds: one small workload, without TRL 0.11.4")
    parser.add_argument("--spreads", nargs="+", default=list(SPREADS), choices=list(SPREADS))
    parser.add_argument(
        "--no-growth", action="store_true", help="leave out the tables of what one step costs as something grows"
    )
    options = parser.parse_args()
    if options.quick:
        tiny = {"size": "32 x 2", "vocabulary": 64}
        small = Workload(**tiny, batch_size=8, mini_batch_size=4, epochs=1)
        print_comparison([small], 1, None, ours=("ours", "plain"))
        print_groups([groups.workload_of(128, 8, **tiny, batch_size=16)], 1, None)
        print_sampling(sampled_lengths.workloads_of(limit=8, batch_size=16, **tiny)[:1], 1, None)
        if not options.no_growth:
            print_growth(small, {"epochs": (2,)})
        return
    if not options.classic_python.exists():
        sys.exit(f"--classic-python {options.classic_python} is not there; `make bench` makes it")
    workloads = [Workload(size=size, spread=spread) for size in options.sizes for spread in options.spreads]
    print_comparison(workloads, options.repeats, options.classic_python)
    size = options.sizes[-1]
    in_groups = [groups.workload_of(*shape, size=size) for shape in groups.FIRST]
    print_groups(in_groups, options.repeats, options.classic_python)
    print_sampling(sampled_lengths.workloads_of(size), options.repeats, options.classic_python)
    if not options.no_growth:
        print_growth(Workload(size=options.sizes[0]), GROWTHS)
        print_growth(groups.workload_of(128, 32, size=options.sizes[0]), GROWTHS_OF_GROUPS)


if __name__ == "__main__":
    main()
