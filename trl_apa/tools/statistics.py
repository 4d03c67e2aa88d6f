"""What an iteration reports of its turns and tools: means over the rollouts of all processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trl_apa.tools.dialogue import Seat
from trl_apa.tools.turns import Episode


# Turns whose reward is reported, each with a name of its own.
REPORTED_TURNS = 8


def turn_statistics(
    episodes: Sequence[Episode], seats: Sequence[Seat], reduce_sum: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Statistics of turns and tools, see `docs/statistics.md`.

    Args:
        episodes: rollouts of this process, which are over.
        seats: of each.
        reduce_sum: adds a tensor up over the processes.
    """
    sums = {
        "rollouts": float(len(episodes)),
        "turns": float(sum(len(episode.turns) for episode in episodes)),
        "told": float(sum(episode.mask.count(False) for episode in episodes)),
        "calls": float(sum(seat.calls for seat in seats)),
        "failures": float(sum(seat.failures for seat in seats)),
        "timeouts": float(sum(seat.timeouts for seat in seats)),
        "callers": float(sum(seat.calls > 0 for seat in seats)),
        "dropped": float(sum(episode.dropped for episode in episodes)),
        "unanswered": float(sum(_is_unanswered(*pair) for pair in zip(episodes, seats, strict=True))),
    }
    for turn in range(REPORTED_TURNS):
        sums[f"rewarded_{turn}"] = float(sum(turn in episode.rewards for episode in episodes))
        sums[f"reward_{turn}"] = float(sum(episode.rewards.get(turn, 0.0) for episode in episodes))
    totals = dict(zip(sums, reduce_sum(torch.tensor(list(sums.values()))).tolist(), strict=True))
    rollouts, calls = totals["rollouts"], max(totals["calls"], 1.0)
    stats = {
        "turns/mean": totals["turns"] / rollouts,
        "turns/told_tokens_mean": totals["told"] / rollouts,
        "turns/dropped_share": totals["dropped"] / rollouts,
        "turns/unanswered_share": totals["unanswered"] / rollouts,
        "tools/call_frequency": totals["calls"] / rollouts,
        "tools/caller_share": totals["callers"] / rollouts,
        "tools/failure_frequency": totals["failures"] / calls,
        "tools/timeout_frequency": totals["timeouts"] / calls,
    }
    for turn in range(REPORTED_TURNS):
        if totals[f"rewarded_{turn}"]:
            stats[f"turns/reward_{turn + 1}"] = totals[f"reward_{turn}"] / totals[f"rewarded_{turn}"]
    return stats


def _is_unanswered(episode: Episode, seat: Seat) -> bool:
    """Whether a rollout ended with calls because it may not have more answers."""
    return bool(seat.asked) and not (episode.finished or episode.dropped)
