"""A figure's numbers as tables: at equal samples, over the run, at equal KL, and where the gold reward was highest."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from trl_apa.paper.logs import QUANTITIES, Row, quantities_of


EQUAL_KLS = (2.0, 5.0, 10.0)  # nats per response
Runs = Sequence[Sequence[Row]]


def tables(panels: Mapping[str, Mapping[str, Runs]]) -> str:
    """Markdown: mean over the seeds with the lowest and the highest in brackets, a row a curve."""
    curves = {
        label if len(panels) == 1 else f"{panel}, {label}": runs
        for panel, found in panels.items()
        for label, runs in found.items()
    }
    names = quantities_of([rows for runs in curves.values() for rows in runs])
    parts = ["At equal samples: the last evaluation.", at_the_end(curves, names)]
    rewards = [name for name in names if name in ("reward", "gold_reward")]
    parts += ["Over the run: the mean of all evaluations after the first update.", over_the_run(curves, rewards)]
    parts += ["At equal KL: where a run first gets so far.", at_equal_kl(curves, rewards)]
    if "gold_reward" in names:
        parts += ["At the evaluation with the highest gold reward of each run.", at_the_best(curves, names)]
    return "\n\n".join(parts) + "\n"


def at_the_end(curves: Mapping[str, Runs], names: Sequence[str]) -> str:
    """Every quantity at the last evaluation."""
    return _table(
        ["curve", *(QUANTITIES[name] for name in names)],
        [[label, *(_spread([rows[-1][name] for rows in runs]) for name in names)] for label, runs in curves.items()],
    )


def over_the_run(curves: Mapping[str, Runs], names: Sequence[str]) -> str:
    """Mean of the evaluations after the initial model's: high where a run learns fast and keeps what it learned."""
    return _table(
        ["curve", *(QUANTITIES[name] for name in names)],
        [
            [
                label,
                *(_spread([sum(row[name] for row in rows[1:]) / len(rows[1:]) for rows in runs]) for name in names),
            ]
            for label, runs in curves.items()
        ],
    )


def at_the_best(curves: Mapping[str, Runs], names: Sequence[str]) -> str:
    """Every quantity, and the step, at the evaluation with the highest gold reward."""
    names = ["step", *names]
    best = {label: [max(rows, key=lambda row: row["gold_reward"]) for rows in runs] for label, runs in curves.items()}
    return _table(
        ["curve", *(QUANTITIES.get(name, name) for name in names)],
        [[label, *(_spread([row[name] for row in rows]) for name in names)] for label, rows in best.items()],
    )


def at_equal_kl(curves: Mapping[str, Runs], names: Sequence[str], kls: Sequence[float] = EQUAL_KLS) -> str:
    """Rewards where the KL of a run first reaches each of `kls`; of the runs that reach it, with their number."""
    head = [f"{QUANTITIES[name]} at {kl:g} nats" for kl in kls for name in names]
    body = []
    for label, runs in curves.items():
        cells = []
        for kl in kls:
            for name in names:
                reached = [value for rows in runs if (value := value_at_kl(rows, name, kl)) is not None]
                part = "" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)})"
                cells.append(_spread(reached) + part if reached else "-")
        body.append([label, *cells])
    return _table(["curve", *head], body)


def value_at_kl(rows: Sequence[Row], name: str, kl: float) -> float | None:
    """A quantity where the KL first reaches `kl`, linearly between two evaluations; None if it never does.

    Args:
        rows: evaluations in their order, the first of the initial model.
        name: of the quantity.
        kl: nats per response.
    """
    for before, after in pairwise(rows):
        if before["kl"] < kl <= after["kl"]:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return before[name] + share * (after[name] - before[name])
    return None


def _spread(values: Sequence[float]) -> str:
    mean, digits = sum(values) / len(values), 0 if max(map(abs, values)) >= 100 else 2
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
