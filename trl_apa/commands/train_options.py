"""Options of `trl-apa train`, and its beginning. Imports no more than they need, so that `--help` answers soon."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_apa.commands.data_options import DataArguments
from trl_apa.commands.groups import apa_part, model_part
from trl_apa.commands.launching import LAUNCH_PART
from trl_apa.commands.options import CommandParser, Part
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
        None, "Reward functions by dotted name (my_rewards.politeness), found from the working directory."
    )
    trust_remote_code: bool = option(False, "Let code that comes with models and tokenizers run.")

    def functions(self) -> list[Callable[..., Any]]:
        """The functions, imported.

        Raises:
            ValueError: if one cannot be imported, or if there is neither a function nor a model.
        """
        if not self.reward_funcs and not self.reward_model_name_or_path:
            raise ValueError("no rewards: set reward_model_name_or_path, reward_funcs, or both")
        from trl_apa.commands.models import import_reward_function

        return [import_reward_function(name) for name in self.reward_funcs or ()]


@dataclass
class OtherModelArguments:
    """The networks beside the policy."""

    ref_model_name_or_path: str | None = option(None, "pi_init, the policy before training by default.")
    value_model: str = option(
        "separate",
        "'separate': a copy of the policy's trunk; 'adapter' or 'adapter:PATH': a second adapter on the "
        "policy's base; 'head': classic's head on the policy; or a folder or hub name of a reward model, a "
        "language model or a saved value model.",
    )


def reward_part() -> Part:
    """The options about scores."""
    return Part(RewardArguments, lambda name: "rewards" if name.startswith("reward") else "model")


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        "train",
        "Align a policy with Advantage-Induced Policy Alignment: sample, score, learn.",
        Part(DataArguments, lambda name: "data"),
        reward_part(),
        model_part(),
        Part(OtherModelArguments, lambda name: "model"),
        apa_part(),
        LAUNCH_PART,
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    values = parser.parse(argv)
    from trl_apa.commands.train import run

    return run(argv, parser, values)
