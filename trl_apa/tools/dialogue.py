"""Rollouts with tools: chat prompts, the policy's calls, what the tools answer, and the statistics of all of it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_apa.tools.calling import Call, Outcome, ToolCaller
from trl_apa.tools.environments import take_turn_reward
from trl_apa.tools.functions import Toolbox
from trl_apa.tools.messages import asked_calls, with_dicts_of_arguments
from trl_apa.tools.template import UNKNOWN_TOOL, ToolTemplate
from trl_apa.tools.turns import Episode, Told


logger = logging.getLogger(__name__)


@dataclass
class Seat:
    """What belongs to one rollout beside its tokens.

    Args:
        toolbox: its tools.
        environment: its environment, if it is in one.
        asked: name and arguments of each call that the last turn asks for.
        calls, failures, timeouts: of its tools so far.
        is_stuck: whether a method of its environment did not answer in time and may still be at work in it.
    """

    toolbox: Toolbox
    environment: Any = None
    asked: list[tuple[str, Any]] = field(default_factory=list)
    calls: int = 0
    failures: int = 0
    timeouts: int = 0
    is_stuck: bool = False


@dataclass
class ToolWorld:
    """Answers the policy's turns with what the tools say that it calls: a `turns.World`.

    Args:
        template: of the policy's tokenizer.
        caller: calls the tools.
        timeout: seconds for a call; None for no limit.
        seats: of each rollout, by the `id` of its episode.
        turn_reward: takes the reward of the last turn from an environment.
    """

    template: ToolTemplate
    caller: ToolCaller
    timeout: float | None
    seats: dict[int, Seat] = field(default_factory=dict)
    turn_reward: Callable[[Any], float | None] = take_turn_reward

    def read(self, episodes: Sequence[Episode]) -> None:
        """Add the assistant's message of each rollout's last turn."""
        for episode in episodes:
            start, end = episode.turns[-1]
            context = [*episode.query, *episode.ids[:start]]
            seat = self.seats[id(episode)]
            message = self.template.read(episode.ids[start:end], context, seat.toolbox.schemas)
            seat.asked = asked_calls(message)
            episode.messages.append(with_dicts_of_arguments(message))

    def answer(self, episodes: Sequence[Episode]) -> list[Told | None]:
        """Call the tools that the last turns ask for; a rollout that asks for none is over."""
        lanes = [self._calls(episode) for episode in episodes]
        outcomes = self.caller(lanes, self.timeout)
        return [
            self._told(episode, calls, said) for episode, calls, said in zip(episodes, lanes, outcomes, strict=True)
        ]

    def _calls(self, episode: Episode) -> list[Call]:
        seat, calls = self.seats[id(episode)], []
        for name, arguments in seat.asked:
            function = seat.toolbox.functions.get(name)
            if seat.is_stuck and getattr(function, "__self__", None) is seat.environment is not None:
                function = _busy
            calls.append(Call(name, function, arguments))
        return calls

    def _told(self, episode: Episode, calls: list[Call], outcomes: list[Outcome]) -> Told | None:
        if not calls:
            return None
        seat = self.seats[id(episode)]
        seat.calls += len(calls)
        seat.failures += sum(outcome.failed for outcome in outcomes)
        for call, outcome in zip(calls, outcomes, strict=True):
            if outcome.timed_out:
                if not seat.timeouts:
                    logger.warning("tool %s did not answer within tool_timeout=%s seconds", call.name, self.timeout)
                seat.timeouts += 1
                seat.is_stuck |= getattr(call.function, "__self__", None) is seat.environment is not None
        if seat.environment is not None and (reward := self.turn_reward(seat.environment)) is not None:
            episode.add_reward(reward)
        messages = [
            {"role": "tool", "name": call.name, "content": outcome.text}
            for call, outcome in zip(calls, outcomes, strict=True)
        ]
        # A name that the policy made up could spell a token that ends a turn.
        known = [{**m, "name": m["name"] if m["name"] in seat.toolbox.functions else UNKNOWN_TOOL} for m in messages]
        return Told(self.template.told_ids(known, episode.ids[-1]), messages)


def _busy(**_: Any) -> None:
    raise RuntimeError("the environment is still busy with a call that exceeded its time")
