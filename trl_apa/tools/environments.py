"""Environments by TRL's protocol: made once, reset for each rollout, their public methods tools, their own reward."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from trl import is_conversational

from trl_apa.rollout.reward_calls import private_copy
from trl_apa.rollout.reward_values import as_float
from trl_apa.tools.calling import as_text
from trl_apa.tools.functions import Tool, Toolbox, methods_of
from trl_apa.values import described_error, shown


Factory = Callable[[], Any]
# The column that names an environment, where there are several.
NAME_COLUMN = "environment"
TURN_REWARD = "turn_reward"
NO_PROMPT = [{"role": "user", "content": ""}]


class Environments:
    """The environments of a run, and instances of them, which are used again.

    Args:
        factories: one callable that makes an environment, for all rows; or several by the name in the row's column
            `environment`.
        tools: functions that the policy may call beside the methods of its environment.

    Raises:
        ValueError: naming `environment_factory`, if it makes what has no `reset`, or whose methods cannot be tools.
    """

    def __init__(self, factories: Factory | Mapping[str, Factory], tools: Sequence[Tool] = ()):
        self.named = isinstance(factories, Mapping)
        self.factories: dict[Any, Factory] = dict(factories) if isinstance(factories, Mapping) else {None: factories}
        self.tools = list(tools)
        self.schemas: dict[Any, list[dict[str, Any]]] = {}
        self._free: dict[Any, list[Any]] = {}
        if not self.factories:
            raise ValueError("environment_factory is empty; it should hold at least one factory")
        for name, factory in self.factories.items():
            if not callable(factory):
                raise ValueError(f"environment_factory is a {type(factory).__name__}; it should be callable")
            instance = self._made(name)
            if not callable(getattr(instance, "reset", None)):
                raise ValueError(f"environment_factory made a {type(instance).__name__}, which has no method reset")
            self.schemas[name] = Toolbox.of([*self.tools, *methods_of(instance)]).schemas
            self._free[name] = [instance]

    def toolbox(self, name: Any, instance: Any) -> Toolbox:
        """The tools of a rollout in an instance of the environment of that name."""
        return Toolbox.of([*self.tools, *methods_of(instance)], self.schemas[name])

    def take(self, names: Sequence[Any]) -> list[Any]:
        """An instance for each name, all different; `give_back` them at the end of their rollouts."""
        return [self._free[name].pop(0) if self._free[name] else self._made(name) for name in names]

    def give_back(self, names: Sequence[Any], instances: Sequence[Any]) -> None:
        """Instances that may be reset."""
        for name, instance in zip(names, instances, strict=True):
            self._free[name].append(instance)

    def name_of(self, row: Mapping[str, Any]) -> Any:
        """Which environment a row is for.

        Raises:
            ValueError: if there is none of that name.
        """
        if not self.named:
            return None
        name = row.get(NAME_COLUMN)
        if name not in self.factories:
            raise ValueError(
                f"a row has environment={name!r}; it should be one of environment_factory: {list(self.factories)}"
            )
        return name

    def reset(self, instance: Any, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Begin a rollout: reset the environment with the row's columns and put what it shows behind the prompt.

        Raises:
            RuntimeError: naming the environment, if its `reset` fails.
            ValueError: if the prompt is no list of chat messages, or the observation is no text.
        """
        kind = type(instance).__name__
        columns = {
            name: private_copy(value) for name, value in row.items() if not (self.named and name == NAME_COLUMN)
        }
        try:
            observation = instance.reset(**columns)
        except Exception as error:
            raise RuntimeError(f"environment {kind}: reset failed: {described_error(error)}") from error
        if hasattr(instance, TURN_REWARD):
            take_turn_reward(instance)
        given = NO_PROMPT if row.get("prompt") is None else row["prompt"]
        check_conversation(given)
        prompt = [dict(message) for message in given]
        if observation is None:
            return prompt
        if isinstance(observation, list):
            try:
                observation = as_text(observation)
            except ValueError as error:
                raise ValueError(f"environment {kind}: reset: {error}") from None
        if not isinstance(observation, str):
            raise ValueError(
                f"environment {kind}: reset gave a {type(observation).__name__}; it should give a text or None"
            )
        content = prompt[-1].get("content") or ""
        blocks = [{"type": "text", "text": observation}]
        prompt[-1]["content"] = content + observation if isinstance(content, str) else [*content, *blocks]
        return prompt

    def reward_functions(self) -> list["EnvironmentReward"]:
        """One for each class of environments that has a reward of its own."""
        made: list[EnvironmentReward] = []
        for kind, instance in {type(free[0]): free[0] for free in self._free.values()}.items():
            by_turn, total = hasattr(instance, TURN_REWARD), getattr(kind, "get_reward", None)
            if by_turn or total is not None:
                is_async = inspect.iscoroutinefunction(total)
                made.append((AsyncEnvironmentReward if is_async else EnvironmentReward)(kind, by_turn))
        return made

    def _made(self, name: Any) -> Any:
        return self.factories[name]()


def take_turn_reward(instance: Any) -> float:
    """The reward of the turn that has just been answered, reward units; an attribute is set to 0 again.

    Raises:
        ValueError: naming the environment, if it is not a number.
    """
    value = getattr(instance, TURN_REWARD, None)
    read = 0.0 if value is None else _as_number(value)
    if read is None:
        raise ValueError(
            f"environment {type(instance).__name__}: turn_reward is {shown(value)}; it should be a number"
        )
    with suppress(AttributeError):  # a property computes it anew
        setattr(instance, TURN_REWARD, 0.0)
    return read


def _as_number(value: Any) -> float | None:
    """A number of any type, a tensor of one element too; NaN for None, and None if it is no number."""
    try:
        return as_float(value.item() if hasattr(value, "item") else value)
    except (ValueError, RuntimeError):  # several elements
        return None


def check_conversation(prompt: Any) -> None:
    """Raise ValueError for a prompt that is no list of chat messages."""
    if not is_conversational({"prompt": prompt}):
        raise ValueError(f"with tools a prompt should be a list of chat messages; one is {shown(prompt)}")


class EnvironmentReward:
    """The reward of one class of environments, as a reward function; 0 for rollouts in others.

    What `get_reward` says is the reward of the complete rollout. With `turn_reward` the rewards of the turns are on
    their last tokens, and what is left of the complete one is on the last token of the response; without `get_reward`
    nothing is left.

    Args:
        kind: the class.
        by_turn: whether its instances have `turn_reward`.
    """

    def __init__(self, kind: type[Any], by_turn: bool):
        self.kind, self.by_turn = kind, by_turn
        self.has_total = hasattr(kind, "get_reward")
        self.__name__ = kind.__name__

    def __call__(self, environments: list[Any], turn_rewards: list[list[float]], **_: Any) -> Any:
        totals = [
            instance.get_reward() if self.has_total and type(instance) is self.kind else None
            for instance in environments
        ]
        return self._values(environments, turn_rewards, totals)

    def _values(self, environments: list[Any], turn_rewards: list[list[float]], totals: list[Any]) -> list[Any]:
        rows = zip(environments, turn_rewards, totals, strict=True)
        return [self._value(type(instance) is self.kind, rewards, total) for instance, rewards, total in rows]

    def _value(self, is_own: bool, rewards: list[float], total: Any) -> Any:
        if not self.by_turn:
            return total if is_own else 0.0
        if not is_own:
            return [0.0] * len(rewards)
        if not self.has_total:
            return rewards
        if (read := _as_number(total)) is None or math.isnan(read):
            return total
        return [*rewards[:-1], rewards[-1] + read - sum(rewards)]


class AsyncEnvironmentReward(EnvironmentReward):
    """The same where `get_reward` is a coroutine function: all run together."""

    async def __call__(self, environments: list[Any], turn_rewards: list[list[float]], **_: Any) -> Any:
        own = [number for number, instance in enumerate(environments) if type(instance) is self.kind]
        said = await asyncio.gather(*(environments[number].get_reward() for number in own))
        totals = dict(zip(own, said, strict=True))
        return self._values(environments, turn_rewards, [totals.get(n) for n in range(len(environments))])
