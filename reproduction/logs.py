"""What the log of a run says, evaluation by evaluation."""

from collections.abc import Sequence
from pathlib import Path

from trl_apa.commands.plot import KL, REWARD, log_history, state_file


Row = dict[str, float]

# Names without `eval_`, of those that have a column in the tables or an axis in the pictures.
QUANTITIES = {
    "reward": "reward",
    "gold_reward": "gold reward",
    "kl": "KL, nats per response",
    "entropy": "entropy, nats per token",
    "distinct": "share of distinct responses",
}
CPU_SECONDS = "cpu_seconds"  # of sampling, scoring and updates until then


def read_rows(path: str | Path) -> list[Row]:
    """Step and quantities of each evaluation on held-out prompts; of the rollouts if there was none.

    Args:
        path: folder of a run.

    Returns:
        Rows with `step`, `reward` and `kl`, and with what was logged of the other `QUANTITIES`, `samples` and
        `cpu_seconds`.

    Raises:
        FileNotFoundError: if there is no log.
        ValueError: if it is not JSON, or has no reward and KL.
    """
    file = state_file(path)
    history = log_history(file)
    names = {f"eval_{name}": name for name in QUANTITIES} | {name: name for name in ("step", "samples", CPU_SECONDS)}
    held_out = [{names[key]: value for key, value in row.items() if key in names} for row in history]
    if rows := [row for row in held_out if {"reward", "kl"} <= row.keys()]:
        return rows
    rollouts = [row for row in history if REWARD[0] in row and KL[0] in row]
    if not rollouts:
        raise ValueError(f"{file} has neither {REWARD[1]} and {KL[1]} nor {REWARD[0]} and {KL[0]}")
    return [{"step": row["step"], "reward": row[REWARD[0]], "kl": row[KL[0]]} for row in rollouts]


def quantities_of(runs: Sequence[Sequence[Row]]) -> list[str]:
    """Those of `QUANTITIES` that every row of every run has."""
    return [name for name in QUANTITIES if all(name in row for rows in runs for row in rows)]
