"""Options about rewards. Imports nothing heavy, so that `--help` answers at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trl_apa.commands.options import Part
from trl_apa.config.fields import option


@dataclass
class RewardArguments:
    """What scores the responses."""

    reward_model_name_or_path: list[str] | None = option(
        None,
        "Reward models: folders or hub names of classifiers with one label, or 'adapter:PATH' for one "
        "that is an adapter on the policy's base.",
    )
    reward_funcs: list[str] | None = option(
        None,
        "Reward functions by dotted name (my_rewards.politeness), found from the working directory; addresses of "
        "servers (https://host/path); judges with a rubric (judge:rubric.yaml).",
    )
    trust_remote_code: bool = option(False, "Let code that comes with models and tokenizers run.")

    def functions(self) -> list[Callable[..., Any]]:
        """The functions: imported, or asking a server or a judge.

        Raises:
            ValueError: if one cannot be imported, or if there is neither a function nor a model.
        """
        if not self.reward_funcs and not self.reward_model_name_or_path:
            raise ValueError("no rewards: set reward_model_name_or_path, reward_funcs, or both")
        from trl_apa.commands.models import reward_function

        return [reward_function(name) for name in self.reward_funcs or ()]


def reward_part() -> Part:
    """The options about scores."""
    return Part(RewardArguments, lambda name: "rewards" if name.startswith("reward") else "model")
