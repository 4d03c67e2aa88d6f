"""Compare `step` and `generate` with TRL 0.11.4's: `make parity`, or `python -m parity.compare --help`."""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from parity.case import Case, Outcome, play_folders
from parity.cases import RECIPES, make_case
from parity.findings import GREEDY, PARAMETERS, TOLERANCE, Finding, compare, moved_by, stale_differences
from parity.our_step import play_case


ROOT = Path(__file__).resolve().parents[1]
RECORDED = ("adaptive_kl", "lora")


def main() -> int:
    options = parse_options()
    if not options.classic_python.exists():
        sys.exit(f"--classic-python {options.classic_python} is not there; `make parity` makes it")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        outcomes = play_both(root, options.case or list(RECIPES), options.classic_python)
        if options.record is not None:
            record(root, options.record)
    findings = [finding for case, classic, ours in outcomes for finding in compare(case, classic, ours)]
    if options.details:
        for case, classic, ours in outcomes:
            print_details(case, classic, ours)
    print_quantities(findings)
    print_cases(findings, outcomes)
    return verdict(findings, complete=not options.case)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--classic-python", type=Path, default=ROOT / ".venv-parity/bin/python", help="Python that has TRL 0.11.4"
    )
    parser.add_argument("--case", action="append", choices=list(RECIPES), help="only this one; may be repeated")
    parser.add_argument("--details", action="store_true", help="also print both values of every statistic")
    parser.add_argument(
        "--record", type=Path, metavar="FOLDER", help=f"keep what TRL made of {' and '.join(RECORDED)} there"
    )
    return parser.parse_args()


def play_both(root: Path, names: Iterable[str], classic_python: Path) -> list[tuple[Case, Outcome, Outcome]]:
    """Write the cases under `root`, let both libraries play them, classic in its own process, and read what came."""
    for name in names:
        make_case(name).write(root / name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [str(classic_python), "-m", "parity.classic_step", str(root)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        play_folders(root, "ours", play_case)
    folders = [root / name for name in names]
    return [(Case.read(f), Outcome.read(f, "classic"), Outcome.read(f, "ours")) for f in folders]


def record(root: Path, target: Path) -> None:
    """Keep the recorded cases with TRL's numbers, without the parameters of steps before the last."""
    for name in RECORDED:
        case, classic = Case.read(root / name), Outcome.read(root / name, "classic")
        last = f"step{len(case.rollouts) - 1}."
        classic.parameters = {key: p for key, p in classic.parameters.items() if key.startswith(last)}
        classic.statistics = [without_timings(statistics) for statistics in classic.statistics]
        case.write(target / name)
        classic.write(target / name, "classic")


def without_timings(statistics: dict) -> dict:
    return {name: value for name, value in statistics.items() if not name.startswith("time/")}


def print_details(case: Case, classic: Outcome, ours: Outcome) -> None:
    """Both values of every number, step by step."""
    print(f"\n{case.name}: {case.about}")
    for number, (a, b) in enumerate(zip(classic.statistics, ours.statistics, strict=True)):
        print(f"  step {number:<36} {'TRL 0.11.4':>12} {'trl_apa':>12}")
        for name in without_timings(a):
            value = b.get(name)
            if isinstance(a[name], float) and isinstance(value, float):
                print(f"  {name:<41} {a[name]:>12.6f} {value:>12.6f}")


def print_quantities(findings: Sequence[Finding]) -> None:
    """One line for each quantity: where it was compared, the largest difference, and why it is allowed."""
    print(f"\n{'quantity':<31} {'cases':>5}  {'largest difference':<32}")
    reasons = {}
    for name in dict.fromkeys(finding.quantity for finding in findings):
        found = [finding for finding in findings if finding.quantity == name]
        compared = [finding for finding in found if finding.reason is None]
        reasons |= {name: (finding.reason, len(found) - len(compared)) for finding in found if finding.reason}
        if compared:
            worst = max(compared, key=lambda finding: (finding.failed, finding.distance))
            mark = "  FAILED" if any(finding.failed for finding in compared) else ""
            print(f"{name:<31} {len(compared):>5}  {worst.distance:.1e} in {worst.case}{mark}")
    print("\nwhat the libraries define differently, and in how many cases it shows")
    for name, (reason, count) in reasons.items():
        print(f"{name:<31} {count:>5}  {reason}")


def print_cases(findings: Sequence[Finding], outcomes: Sequence[tuple[Case, Outcome, Outcome]]) -> None:
    """One line for each case: steps, statistics, parameters, greedy responses."""
    print(f"\n{'case':<16} steps  statistics: most apart   parameters: moved, most apart   greedy")
    for case, _, ours in outcomes:
        here = [finding for finding in findings if finding.case == case.name]
        parameters, greedy = (next(f for f in here if f.quantity == name) for name in (PARAMETERS, GREEDY))
        statistics = [f for f in here if f.reason is None and f.quantity not in (PARAMETERS, GREEDY)]
        worst = max(finding.distance for finding in statistics)
        moved = moved_by(case, ours)
        print(
            f"{case.name:<16} {len(case.rollouts):>5}  {len(statistics):>10}: {worst:.1e}  {'':>12}"
            f"{moved:.1e}, {parameters.distance:.1e}  {'':>11}{'differ' if greedy.failed else 'equal'}"
        )
        print(f"    {case.about}")


def verdict(findings: Sequence[Finding], complete: bool) -> int:
    """Print what is wrong, if anything; the exit status."""
    wrong = [
        f"{finding.case}: {finding.quantity}: {finding.problem or f'differs by {finding.distance:.1e}'}"
        for finding in findings
        if finding.failed
    ]
    if complete:
        wrong += [f"{name} agrees everywhere: take it off DIFFERENCES" for name in stale_differences(findings)]
    if wrong:
        print("\n" + "\n".join(wrong) + f"\n{len(wrong)} of {len(findings)} comparisons FAILED")
        return 1
    compared = [finding for finding in findings if finding.reason is None]
    worst = max(compared, key=lambda finding: finding.distance)
    print(f"\nall {len(compared)} comparisons agree to {TOLERANCE:.0e}; the largest difference is {worst.distance:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
