"""A figure's numbers as tables: at equal samples, over the run, at equal KL, and where the gold reward was highest."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from reproduction.logs import CPU_SECONDS, QUANTITIES, Row, quantities_of


EQUAL_KLS = (1.0, 2.0, 5.0)  # nats per response
Runs = Sequence[Sequence[Row]]


def tables(panels: Mapping[str, Mapping[str, Runs]]) -> str:
    """Markdown: mean over the seeds with the lowest and the highest in brackets, a row a curve."""
    last = max(rows[-1]["step"] for found in panels.values() for runs in found.values() for rows in runs)
    curves = {
        (label if len(panels) == 1 else f"{panel}, {label}") + _ended_early(runs, last): runs
        for panel, found in panels.items()
        for label, runs in found.items()
    }
    names = quantities_of([rows for runs in curves.values() for rows in runs])
    parts = ["At equal samples: the last evaluation.", at_the_end(curves, names)]
    rewards = [name for name in names if name in ("reward", "gold_reward")]
    parts += ["Over the run: the mean of all evaluations after the first update.", over_the_run(curves, rewards)]
    parts += ["At equal KL: where a run first gets so far.", at_equal_kl(curves, rewards)]
    if "gold_reward" in names:
        best = "At the evaluation with the highest gold reward of each run, which is above what that policy is worth: "
        parts += [best + "it is the best of many that chance moves.", at_the_best(curves, names)]
    if all(CPU_SECONDS in rows[-1] for runs in curves.values() for rows in runs):
        parts += ["CPU seconds of sampling, scoring and updates until the last evaluation.", cpu_seconds(curves)]
    return "\n\n".join(parts) + "\n"


def at_the_end(curves: Mapping[str, Runs], names: Sequence[str]) -> str:
    """Every quantity at the last evaluation."""
    ends = {label: [rows[-1] for rows in runs] for label, runs in curves.items()}
    return _table_of_spreads(ends, names)


def over_the_run(curves: Mapping[str, Runs], names: Sequence[str]) -> str:
    """Mean of the evaluations after the initial model's: high where a run learns fast and keeps what it learned."""

    def means(rows: Sequence[Row]) -> Row:
        later = [row for row in rows if row["step"] > 0] or rows
        return {name: sum(row[name] for row in later) / len(later) for name in names}

    found = {label: [means(rows) for rows in runs] for label, runs in curves.items()}
    return _table_of_spreads(found, names)


def at_the_best(curves: Mapping[str, Runs], names: Sequence[str]) -> str:
    """Every quantity, and the step, at the evaluation with the highest gold reward."""
    names = ["step", *names]
    best = {label: [max(rows, key=lambda row: row["gold_reward"]) for rows in runs] for label, runs in curves.items()}
    return _table_of_spreads(best, names)


def cpu_seconds(curves: Mapping[str, Runs]) -> str:
    """What sampling, scoring and updates took until the last evaluation."""
    body = [[label, _spread([rows[-1][CPU_SECONDS] for rows in runs], digits=0)] for label, runs in curves.items()]
    return markdown_table(["curve", "CPU seconds"], body)


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
    return markdown_table(["curve", *head], body)


def value_at_kl(rows: Sequence[Row], name: str, kl: float) -> float | None:
    """A quantity where the KL first reaches `kl`, linearly between two evaluations.

    Args:
        rows: evaluations in their order.
        name: of the quantity.
        kl: nats per response.

    Returns:
        None if it never does, or had done so before the first evaluation.
    """
    if rows[0]["kl"] > kl:
        return None
    for before, after in pairwise(rows):
        if before["kl"] < kl <= after["kl"]:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return before[name] + share * (after[name] - before[name])
    return None


def _ended_early(runs: Runs, last: float) -> str:
    """How many runs came to an end before the step `last`: a gradient or a weight was not finite."""
    count = sum(rows[-1]["step"] < last for rows in runs)
    return f" ({count} of {len(runs)} ended early)" if count else ""


def _table_of_spreads(curves: Mapping[str, Sequence[Row]], names: Sequence[str]) -> str:
    """A row a curve, a column a quantity; the rows of a curve are one a seed."""
    head = ["curve", *(QUANTITIES.get(name, name) for name in names)]
    digits = {"step": 0}
    return markdown_table(
        head,
        [
            [label, *(_spread([row[name] for row in rows], digits.get(name, 2)) for name in names)]
            for label, rows in curves.items()
        ],
    )


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the lowest and the highest in brackets."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Lines of a table in Markdown, without the last line's end."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
