"""Options of `trl-apa train`, and its beginning. Imports no more than they need, so that `--help` answers soon."""

from collections.abc import Sequence
from dataclasses import dataclass

from trl_apa.commands.data_options import DataArguments
from trl_apa.commands.groups import apa_part, model_part
from trl_apa.commands.launching import LAUNCH_PART
from trl_apa.commands.options import CommandParser, Part
from trl_apa.commands.reward_options import reward_part
from trl_apa.config.fields import option


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


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        "train",
        "Align a policy: sample, score, learn, by Advantage-Induced Policy Alignment (APA) or another loss_type.",
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
