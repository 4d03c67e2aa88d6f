"""Compare `step` and `generate` with TRL 0.11.4's: `make parity`, or `python -m parity.compare --help`."""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import logging

from parity.case import Case, Outcome, play_folders
from parity.cases import AGREEING, PARTING, RECIPES, make_case
from parity.findings import (
    GREEDY,
    PARAMETERS,
    Finding,
    compare,
    compare_greedy,
    compare_parameters,
    moved_by,
    stale_differences,
)
from parity.our_step import play_case


ROOT = Path(__file__).resolve().parents[1]
RECORDED = ("adaptive_kl", "lora")


def main() -> int:
    options = parse_options()
    if not options.classic_python.exists():
        sys.exit(f"--classic-python {options.classic_python} is not there; `make parity` makes it")
    torch.set_num_threads(1)  # in models this small threads only wait for each other
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        outcomes = play_both(root, options.case or list(RECIPES), options.classic_python)
        if options.record is not None:
            record(root, options.record)
    agreeing = [outcome for outcome in outcomes if outcome[0].name in AGREEING]
    parting = [outcome for outcome in outcomes if outcome[0].name in PARTING]
    findings = [finding for outcome in agreeing for finding in compare(*outcome)]
    if options.details:
        for outcome in outcomes:
            print_details(*outcome)
    print_quantities(findings)
    print_cases(findings, agreeing)
    wrong = problems(findings, complete=not options.case) + print_parting(parting)
    print("\n" + "\n".join([*wrong, f"{len(wrong)} problems" if wrong else "no problems"]))
    return 1 if wrong else 0


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
    options = parser.parse_args()
    if options.record is not None and options.case is not None and not set(RECORDED) <= set(options.case):
        parser.error(f"--record keeps {' and '.join(RECORDED)}; do not leave them out with --case")
    return options


def play_both(root: Path, names: Iterable[str], classic_python: Path) -> list[tuple[Case, Outcome, Outcome]]:
    """Write the cases under `root`, let both libraries play them, classic in its own process, and read what came."""
    for name in names:
        make_case(name).write(root / name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [str(classic_python), "-m", "parity.classic_step", str(root)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
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
    """One line for each quantity: where it was compared and the largest difference; then why some are left out."""
    print(f"\n{'must agree':<31} {'cases':>5}  largest difference")
    for name, found in by_quantity(finding for finding in findings if finding.reason is None).items():
        worst = max(found, key=lambda finding: (finding.failed, finding.distance))
        print(f"{name:<31} {len(found):>5}  {worst.distance:.1e} in {worst.case}{'  FAILED' if worst.failed else ''}")
    print(f"\n{'defined differently':<31} {'cases':>5}  why")
    for name, found in by_quantity(finding for finding in findings if finding.reason is not None).items():
        print(f"{name:<31} {len(found):>5}  {found[0].reason}")


def by_quantity(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.quantity, []).append(finding)
    return groups


def print_cases(findings: Sequence[Finding], outcomes: Sequence[tuple[Case, Outcome, Outcome]]) -> None:
    """One line for each case: steps, the statistics that must agree, the parameters, the greedy responses."""
    print(f"\n{'case':<16} steps  statistics apart   parameters moved  apart    greedy  about")
    for case, _, ours in outcomes:
        here = {finding.quantity: finding for finding in findings if finding.case == case.name}
        parameters, greedy = here.pop(PARAMETERS), here.pop(GREEDY)
        compared = [finding for finding in here.values() if finding.reason is None]
        worst = max(finding.distance for finding in compared)
        print(
            f"{case.name:<16} {len(case.rollouts):>5} {len(compared):>8}  {worst:<9.1e} {moved_by(case, ours):>14.1e}"
            f"  {parameters.distance:.1e}  {'differ' if greedy.failed else 'equal':<7} {case.about}"
        )


def print_parting(outcomes: Sequence[tuple[Case, Outcome, Outcome]]) -> list[str]:
    """One line for each case in which the libraries should part; what is wrong if they do not."""
    wrong = []
    print(f"\n{'the libraries part':<21} parameters apart  greedy  because")
    for case, classic, ours in outcomes:
        parameters, greedy = compare_parameters(case, classic, ours), compare_greedy(case, classic, ours)
        answer = "differ" if greedy.failed else "equal"
        print(f"{case.name:<21} {parameters.distance:>16.1e}  {answer:<7} {case.about}")
        if not (parameters.failed or greedy.failed):
            wrong.append(f"{case.name}: the libraries agree: move it to AGREEING")
    return wrong


def problems(findings: Sequence[Finding], complete: bool) -> list[str]:
    """What does not agree and should, and, if all cases were played, what agrees and is said not to."""
    wrong = [
        f"{finding.case}: {finding.quantity}: {finding.problem or f'differs by {finding.distance:.1e}'}"
        for finding in findings
        if finding.failed
    ]
    if complete:
        wrong += [f"{name} agrees everywhere: take it off DIFFERENCES" for name in stale_differences(findings)]
    return wrong


if __name__ == "__main__":
    sys.exit(main())
