"""Rows of a data set to rollouts with tools or in environments: prompts, turns, and what reward functions read."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_apa.distributed.processes import Processes
from trl_apa.rollout.episodes import Episodes
from trl_apa.rollout.prompts import prompt_of, query_of
from trl_apa.rollout.reward_calls import Shared
from trl_apa.tools.calling import ToolCaller
from trl_apa.tools.dialogue import Seat, ToolWorld
from trl_apa.tools.environments import Environments, check_conversation
from trl_apa.tools.functions import Tool, Toolbox
from trl_apa.tools.statistics import turn_statistics
from trl_apa.tools.template import ToolTemplate
from trl_apa.tools.turns import Episode, SampleTurn, play


class ToolPlayer:
    """Plays rollouts in which the policy may call tools.

    Args:
        tools: functions.
        environments: of the run, or None. They have the tools too.
        tokenizer: the policy's.
        end_token_ids: what ends a turn of the policy's.
        options: gives the trainer's options; they may change from one batch to the next.
        processes: of the run.

    Raises:
        ValueError: naming a tool that cannot be described, or what the tokenizer lacks.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        environments: Environments | None,
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: Sequence[int],
        options: Callable[[], Any],
        processes: Processes,
    ):
        self.toolbox, self.environments = Toolbox.of(tools), environments
        self.tokenizer, self.end_token_ids = tokenizer, end_token_ids
        self.options, self.processes, self.caller = options, processes, ToolCaller()
        self._last_template = self._make_template()

    @property
    def args(self) -> Any:
        """The trainer's options as they are."""
        return self.options()

    @property
    def names(self) -> list[str]:
        """Of all tools, and of the environments."""
        schemas = [self.toolbox.schemas] if self.environments is None else self.environments.schemas.values()
        return sorted({schema["function"]["name"] for of_one in schemas for schema in of_one})

    def __call__(self, rows: Sequence[Mapping[str, Any]], sample: SampleTurn) -> Episodes:
        """One rollout to each row; every process calls this with equally many rows.

        Args:
            rows: of the data set, with chat messages as `prompt`.
            sample: the policy's turns, see `turns.SampleTurn`.

        Raises:
            ValueError: for a prompt that is no list of chat messages, or an environment that there is not.
            RuntimeError: if an environment's `reset` fails.
        """
        names, begun = self.processes.together(lambda: self._begun(rows))
        prompts, episodes, seats = (list(column) for column in zip(*begun, strict=True))
        world = ToolWorld(self._template(), self.caller, self.args.tool_timeout)
        world.seats = {id(episode): seat for episode, seat in zip(episodes, seats, strict=True)}
        if self.environments is not None:
            world.turn_reward = self.environments.take_turn_reward
        play(episodes, sample, world, self.processes, self.args.max_tool_calling_iterations)
        columns: dict[str, list[Any]] = {}
        if self.environments is not None:
            columns["environments"] = Shared(seat.environment for seat in seats)
            columns["turn_rewards"] = [episode.token_rewards() for episode in episodes]
        return Episodes(
            queries=[torch.tensor(episode.query) for episode in episodes],
            responses=[torch.tensor(episode.ids) for episode in episodes],
            masks=[torch.tensor(episode.mask) for episode in episodes],
            prompts=prompts,
            completions=[episode.messages for episode in episodes],
            columns=columns,
            logprobs=[episode.logprobs() for episode in episodes],
            statistics=turn_statistics(episodes, seats, self._sum),
            release=partial(self._release, names, seats),
        )

    def _release(self, names: Sequence[Any], seats: Sequence[Seat]) -> None:
        """Environments may be reset; not one that a call that was abandoned may still change."""
        if self.environments is not None:
            free = [number for number, seat in enumerate(seats) if not seat.is_stuck]
            self.environments.give_back([names[n] for n in free], [seats[n].environment for n in free])

    def _template(self) -> ToolTemplate:
        """The template, made anew only if what it is made of has changed."""
        if self._made_of != self._parts_of_template():
            self._last_template = self._make_template()
        return self._last_template

    def _parts_of_template(self) -> tuple[Any, ...]:
        tokenizer = self.tokenizer
        templates = (getattr(tokenizer, name, None) for name in ("chat_template", "response_template"))
        return (deepcopy(self.args.chat_template_kwargs), *templates)

    def _make_template(self) -> ToolTemplate:
        template = ToolTemplate(self.tokenizer, self.end_token_ids, self.args.chat_template_kwargs)
        self._made_of = self._parts_of_template()  # it may set a response template
        return template

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.processes.sum(tensor.to(self.processes.accelerator.device))

    def _begun(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[tuple[Any, Episode, Seat]]]:
        """The names of the rows' environments, None where there are none, and what `_begin` gives for each row."""
        if self.environments is None:
            return [None] * len(rows), [self._begin(prompt_of(dict(row)), Seat(self.toolbox)) for row in rows]
        names = [self.environments.name_of(row) for row in rows]
        begun = []
        for row, name, instance in zip(rows, names, self.environments.take(names), strict=True):
            prompt = self.environments.reset(instance, row)
            begun.append(self._begin(prompt, Seat(self.environments.toolbox(name, instance), instance)))
        return names, begun

    def _begin(self, prompt: Any, seat: Seat) -> tuple[Any, Episode, Seat]:
        """The prompt as chat messages, and the episode that begins with it."""
        check_conversation(prompt)
        options = {**(self.args.chat_template_kwargs or {}), "tools": seat.toolbox.schemas or None}
        query = query_of({"prompt": prompt}, self.tokenizer, self.args.max_prompt_length, options)
        return prompt, Episode(query.tolist(), self.args.max_completion_length), seat
