"""Statistics that the two libraries define differently, each with its reason and the cases it shows in.

Everything else that classic's `step` returns must agree. What is listed here and agrees everywhere fails too, so that
the list stays true.
"""

from collections.abc import Callable
from dataclasses import dataclass

from parity.case import Case


def several_updates(case: Case) -> bool:
    return case.options["ppo_epochs"] > 1 or case.options["mini_batch_size"] < case.options["batch_size"]


def masked(case: Case) -> bool:
    return any(rollouts.masks is not None for rollouts in case.rollouts)


@dataclass(frozen=True)
class Difference:
    """Why a statistic is not the same number in both libraries.

    Args:
        reason: for the reader of the table.
        applies: whether it can be seen in a case; elsewhere the statistic must agree.
    """

    reason: str
    applies: Callable[[Case], bool]


COUNTED = Difference("classic counts every token (a decoder's start token too), ours those that count", masked)
PER_MICRO_BATCH = Difference(
    "classic averages what it takes of each micro-batch; ours is that of all counted tokens of the iteration",
    several_updates,
)
DIFFERENCES = {
    "ppo/policy/advantages_mean": PER_MICRO_BATCH,
    "ppo/returns/mean": PER_MICRO_BATCH,
    "ppo/returns/var": PER_MICRO_BATCH,
    "ppo/val/mean": PER_MICRO_BATCH,
    "ppo/val/var": PER_MICRO_BATCH,
    "ppo/val/var_explained": PER_MICRO_BATCH,
    "tokens/responses_len_mean": COUNTED,
    "tokens/responses_dist": COUNTED,
}
