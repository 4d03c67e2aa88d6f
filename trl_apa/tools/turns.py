"""Rollouts of several turns: the policy samples, something answers, the policy samples on; token ids are kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trl_apa.distributed.processes import Processes


class Told(NamedTuple):
    """What a rollout is told between two of the policy's turns.

    Args:
        ids: its token ids, as they follow what was sampled; at least one.
        messages: the same as chat messages.
    """

    ids: list[int]
    messages: list[dict[str, Any]]


class Sampled(NamedTuple):
    """What the policy sampled in a turn.

    Args:
        ids: token ids, at least one, the one that ended the turn included.
        logprobs: their log-probs, nats, float32 1-D; None if they were not noted.
    """

    ids: list[int]
    logprobs: Tensor | None = None


@dataclass
class Episode:
    """One rollout, turn by turn. What was sampled stays as it was sampled; nothing is tokenised again.

    Args:
        query: the prompt, token ids.
        max_length: most tokens after the prompt, all turns and everything told between them together.
        ids: token ids after the prompt.
        mask: for each of them whether the policy sampled it.
        turns: where in `ids` each of the policy's turns begins and ends.
        messages: the response as chat messages, where it is known as such.
        rewards: of turns that were given one, by the number of the turn, reward units.
        dropped: whether the last answer did not fit into `max_length` and was left out.
        finished: whether nothing answers the last turn.
    """

    query: list[int]
    max_length: int
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    rewards: dict[int, float] = field(default_factory=dict)
    dropped: bool = False
    finished: bool = False
    _logprobs: list[Tensor | None] = field(default_factory=list)

    @property
    def context(self) -> list[int]:
        """Prompt and response so far, which the next turn continues."""
        return [*self.query, *self.ids]

    @property
    def room(self) -> int:
        """Tokens that the response may still get."""
        return self.max_length - len(self.ids)

    def add_sampled(self, turn: Sampled) -> None:
        """Append a turn of the policy's; what exceeds the room is cut off."""
        ids = list(turn.ids[: self.room])
        self.turns.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.mask += [True] * len(ids)
        self._logprobs.append(None if turn.logprobs is None else turn.logprobs[: len(ids)])

    def add_told(self, told: Told) -> bool:
        """Append an answer if it leaves room for a token of the next turn; otherwise the rollout ends without it.

        Returns:
            Whether it was appended.
        """
        if len(told.ids) >= self.room:
            self.dropped = True
            return False
        self.ids += told.ids
        self.mask += [False] * len(told.ids)
        self.messages += told.messages
        return True

    def add_reward(self, reward: float) -> None:
        """Add to the reward of the last turn, reward units."""
        number = len(self.turns) - 1
        self.rewards[number] = self.rewards.get(number, 0.0) + reward

    def token_rewards(self) -> list[float]:
        """The rewards of the turns, each on the last token of its turn, 0 on all others, reward units."""
        rewards = [0.0] * len(self.ids)
        for number, reward in self.rewards.items():
            rewards[self.turns[number][1] - 1] += reward
        return rewards

    def logprobs(self) -> Tensor | None:
        """Log-probs of the response under the policy that sampled it, nats, float32 1-D, 0 where it was told.

        None unless those of every turn were noted.
        """
        joined = torch.zeros(len(self.ids))
        for (start, end), logprobs in zip(self.turns, self._logprobs, strict=True):
            if logprobs is None:
                return None
            joined[start:end] = logprobs.to(joined.device)
        return joined


class World(Protocol):
    """What answers the policy between its turns."""

    def read(self, episodes: Sequence[Episode]) -> None:
        """The last turn of each was just sampled: add to `messages` what it says."""

    def answer(self, episodes: Sequence[Episode]) -> Sequence[Told | None]:
        """What each rollout is told after its last turn, which was read; None where the rollout is over."""


# Contexts and most tokens of the next turn of each, to what is sampled.
SampleTurn = Callable[[list[Tensor], list[int]], list[Sampled]]


def play(
    episodes: Sequence[Episode],
    sample: SampleTurn,
    world: World,
    processes: Processes,
    max_answers: int | None = None,
) -> None:
    """Let all rollouts run to their end; those that are not over are sampled together, one turn after the other.

    Every process calls this, and in every turn all sample equally many rows, because some engines and sharded weights
    need that: a process with fewer samples one token more than once after its first prompt, and drops it.

    Args:
        episodes: of this process, at least one, without a turn. They are filled in.
        sample: the policy's turns. It is called by all processes together, and fails on all if it fails on one.
        world: what answers.
        processes: of the run.
        max_answers: most answers that a rollout gets; no limit by default.
    """
    living = list(episodes)
    answers = 0
    while count := processes.largest(len(living)):
        fill = [torch.tensor(episodes[0].query)] * (count - len(living))
        contexts = [torch.tensor(episode.context) for episode in living] + fill
        limits = [episode.room for episode in living] + [1] * len(fill)
        turns = sample(contexts, limits)
        for episode, turn in zip(living, turns, strict=False):
            episode.add_sampled(turn)
        over = max_answers is not None and answers >= max_answers
        living = processes.together(partial(_continuing, living, world, over))
        answers += 1


def _continuing(episodes: list[Episode], world: World, over: bool) -> list[Episode]:
    """Those that were answered; none if it is `over` anyway."""
    world.read(episodes)
    if over or not episodes:
        return []
    going_on = []
    for episode, told in zip(episodes, world.answer(episodes), strict=True):
        episode.finished = told is None
        if told is not None and episode.add_told(told):
            going_on.append(episode)
    return going_on
