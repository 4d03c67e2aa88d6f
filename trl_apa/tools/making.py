"""From the trainer's arguments `tools`, `environment_factory` and `rollout_func` to what plays its rollouts."""

from collections.abc import Callable, Sequence
from typing import Any

from trl_apa.tools.environments import NO_PROMPT, Environments
from trl_apa.tools.functions import check_tools
from trl_apa.tools.player import ToolPlayer
from trl_apa.tools.rollout_function import FunctionPlayer


Player = ToolPlayer | FunctionPlayer


def make_player(
    tools: Any, environment_factory: Any, rollout_func: Any, trainer: Any, end_token_ids: Sequence[int]
) -> Player | None:
    """None where the policy answers in one turn, as it does without all three.

    Args:
        tools, environment_factory, rollout_func: as the trainer's caller gave them.
        trainer: with options, tokenizer and processes.
        end_token_ids: what ends a turn of the policy's.

    Raises:
        ValueError: naming the argument that cannot be what it should, or that does not go with another.
    """
    functions = check_tools(tools)
    if rollout_func is not None:
        if functions or environment_factory is not None:
            raise ValueError(
                "rollout_func samples by itself; give tools or environment_factory without it, or call them in it"
            )
        return FunctionPlayer(rollout_func, trainer, trainer.processes)
    if not functions and environment_factory is None:
        return None
    if trainer.is_encoder_decoder:
        raise ValueError("tools and environment_factory need a decoder; model is an encoder-decoder")
    environments = None if environment_factory is None else Environments(environment_factory, functions)
    of_trainer = (trainer.processing_class, end_token_ids, lambda: trainer.args, trainer.processes)
    return ToolPlayer(functions, environments, *of_trainer)


def with_environment_rewards(
    player: Player | None, functions: Any, weights: Sequence[float] | None
) -> tuple[Any, Sequence[float] | None]:
    """The trainer's reward functions and their weights, with those of environments behind them, of weight 1.

    Args:
        player: what plays its rollouts.
        functions: one, or a list, or None.
        weights: of the functions; None for 1 each.
    """
    environments = getattr(player, "environments", None)
    own: list[Callable[..., Any]] = [] if environments is None else environments.reward_functions()
    if not own:
        return functions, weights
    given = [] if functions is None else list(functions) if isinstance(functions, list | tuple) else [functions]
    return [*given, *own], None if weights is None else [*weights, *[1.0] * len(own)]


def rows_without_data(player: Player | None, args: Any) -> list[dict[str, Any]] | None:
    """The rows of a run without data set, whose environment gives the prompts: one empty prompt for each.

    None where there is no such environment.

    Raises:
        ValueError: if `max_steps` does not say how long the run is.
    """
    environments = getattr(player, "environments", None)
    if environments is None or environments.named:
        return None
    if args.max_steps <= 0:
        raise ValueError("train() without train_dataset needs max_steps, since only the environment has the data")
    return [{"prompt": NO_PROMPT}] * (args.global_batch_size // args.num_generations)
