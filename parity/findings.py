"""What agrees and what does not between two outcomes of a case."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from parity.case import Case, Outcome
from parity.definitions import DIFFERENCES
from parity.layout import classic_value, our_value


TOLERANCE = 1e-4
# Parameters that hardly move would agree whatever the update did.
LEAST_MOVE = 100 * TOLERANCE
PARAMETERS = "parameters"
GREEDY = "greedy responses"


@dataclass
class Finding:
    """One quantity of one case.

    Args:
        case: its name.
        quantity: name of a statistic, `PARAMETERS` or `GREEDY`.
        distance: the largest over the steps; relative where the quantity is above 1. NaN if it cannot be taken.
        reason: why the libraries differ by definition, if they do; then the distance decides nothing.
        problem: what is wrong apart from the distance.
    """

    case: str
    quantity: str
    distance: float
    reason: str | None = None
    problem: str | None = None

    @property
    def failed(self) -> bool:
        return self.problem is not None or (self.reason is None and not self.distance <= TOLERANCE)


def distance(classic: Tensor, ours: Tensor) -> float:
    """Largest difference, relative to classic's number where that is above 1; NaN if the shapes differ."""
    if classic.shape != ours.shape:
        return math.nan
    return float(((classic - ours).abs() / classic.abs().clamp(min=1.0)).max())


def compare(case: Case, classic: Outcome, ours: Outcome) -> list[Finding]:
    """Every statistic of every step, the parameters, and the greedy responses."""
    names = [name for name in classic.statistics[0] if not name.startswith("time/")]
    findings = [compare_statistic(case, name, classic, ours) for name in names]
    return [*findings, compare_parameters(case, classic, ours), compare_greedy(case, classic, ours)]


def compare_statistic(case: Case, name: str, classic: Outcome, ours: Outcome) -> Finding:
    difference = DIFFERENCES.get(name)
    reason = difference.reason if difference is not None and difference.applies(case) else None
    if any(name not in statistics for statistics in ours.statistics):
        return Finding(case.name, name, math.nan, reason, "it is not among ours")
    steps = zip(case.rollouts, classic.statistics, ours.statistics, strict=True)
    distances = [
        distance(classic_value(case, r, name, a[name]), our_value(case, r, name, b[name])) for r, a, b in steps
    ]
    return Finding(case.name, name, max(distances, key=lambda value: (math.isnan(value), value)), reason)


def compare_parameters(case: Case, classic: Outcome, ours: Outcome) -> Finding:
    if classic.parameters.keys() != ours.parameters.keys():
        names = sorted(classic.parameters.keys() ^ ours.parameters.keys())
        return Finding(case.name, PARAMETERS, math.nan, problem=f"only one library trains {', '.join(names[:3])}, ...")
    largest = max(distance(parameter, ours.parameters[name]) for name, parameter in classic.parameters.items())
    moved = moved_by(case, ours)
    problem = None if moved >= LEAST_MOVE else f"they moved by {moved:.1e} only, which proves nothing"
    return Finding(case.name, PARAMETERS, largest, problem=problem)


def moved_by(case: Case, outcome: Outcome) -> float:
    """How far the parameter that moved most is from where it started."""
    starts = {name: case.weights[name.partition(".")[2]] for name in outcome.parameters}
    return max(float((outcome.parameters[name] - start).abs().max()) for name, start in starts.items())


def compare_greedy(case: Case, classic: Outcome, ours: Outcome) -> Finding:
    equal = classic.greedy == ours.greedy
    return Finding(case.name, GREEDY, 0.0 if equal else 1.0)


def stale_differences(findings: Sequence[Finding]) -> list[str]:
    """Statistics that are said to differ by definition and agree wherever they are."""
    distances: dict[str, list[float]] = {}
    for finding in findings:
        if finding.reason is not None:
            distances.setdefault(finding.quantity, []).append(finding.distance)
    return [name for name, values in distances.items() if all(value <= TOLERANCE for value in values)]
