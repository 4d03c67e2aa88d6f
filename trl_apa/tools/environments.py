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
        self.rewarding: set[type[Any]] = set()
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
        self.take_turn_reward(instance)
        given = NO_PROMPT if row.get("prompt") is None else row["prompt"]
        check_conversation(given)
        prompt = [dict(message) for message in given]
        if observation is None:
            return prompt
        if isinstance(observation, list | str):
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
        """One for each class of environments that has a reward of its own, or may have one at its turns."""
        made: list[EnvironmentReward] = []
        for kind, instance in {type(free[0]): free[0] for free in self._free.values()}.items():
            total = getattr(kind, "get_reward", None)
            if total is not None or may_reward_turns(instance):
                is_async = inspect.iscoroutinefunction(total)
                made.append((AsyncEnvironmentReward if is_async else EnvironmentReward)(kind))
        self.rewarding = {function.kind for function in made}
        return made

    def take_turn_reward(self, instance: Any) -> float | None:
        """See `take_turn_reward`.

        Raises:
            ValueError: naming the environment, if the value is not a number, or has no way into the reward.
        """
        reward = take_turn_reward(instance)
        if reward is not None and type(instance) not in self.rewarding:
            raise ValueError(
                f"environment {type(instance).__name__}: turn_reward appeared during a rollout and would not be part "
                "of the reward; give it in the class, turn_reward = 0.0"
            )
        return reward

    def _made(self, name: Any) -> Any:
        return self.factories[name]()


def may_reward_turns(instance: Any) -> bool:
    """Whether an environment that was never reset has `turn_reward` or a method that may set it.

    No property is computed, which may read what only `reset` sets.
    """
    kind = type(instance)
    if _has_turn_reward(instance) or hasattr(kind, "__getattr__"):
        return True
    members = [inspect.unwrap(member) for base in kind.__mro__ for member in vars(base).values() if callable(member)]
    codes = [member.__code__ for member in members if inspect.isfunction(member)]
    return any(TURN_REWARD in (*code.co_names, *code.co_consts) for code in codes)


def _has_turn_reward(instance: Any) -> bool:
    missing = object()
    return inspect.getattr_static(instance, TURN_REWARD, missing) is not missing


def take_turn_reward(instance: Any) -> float | None:
    """The reward of the turn that has just been answered, reward units; an attribute is set to 0 again.

    None if the environment has no `turn_reward`.

    Raises:
        ValueError: naming the environment, if it is not a number.
    """
    missing = object()
    value = getattr(instance, TURN_REWARD, missing)
    if value is missing:
        return None
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
    """

    def __init__(self, kind: type[Any]):
        self.kind = kind
        self.has_total = hasattr(kind, "get_reward")
        self.__name__ = kind.__name__

    def __call__(self, environments: list[Any], turn_rewards: list[list[float]], **_: Any) -> Any:
        totals = [
            instance.get_reward() if self.has_total and type(instance) is self.kind else None
            for instance in environments
        ]
        return self._values(environments, turn_rewards, totals)

    def _values(self, environments: list[Any], turn_rewards: list[list[float]], totals: list[Any]) -> list[Any]:
        rows = [(type(one) is self.kind, *row) for one, *row in zip(environments, turn_rewards, totals, strict=True)]
        own = zip(environments, rows, strict=True)
        by_turn = any(is_own and (any(rewards) or _has_turn_reward(one)) for one, (is_own, rewards, _) in own)
        return [self._value(by_turn, *row) for row in rows]

    def _value(self, by_turn: bool, is_own: bool, rewards: list[float], total: Any) -> Any:
        if not self.has_total:
            total = 0.0
        if not by_turn:
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
