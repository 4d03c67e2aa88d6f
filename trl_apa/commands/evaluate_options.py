"""Options of `trl-apa evaluate`, and its beginning. Imports nothing heavy, so that `--help` answers at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from trl_apa.commands.options import CommandParser, Part
from trl_apa.commands.reward_options import reward_part
from trl_apa.commands.sampling_options import SamplingOptions, loading_part, prompts_part, sampling_part
from trl_apa.config.fields import option


@dataclass
class EvaluateArguments:
    """What is compared, and with what."""

    checkpoints: list[str] | None = option(
        None, "Folders or hub names of language models or adapters, each a row of the table."
    )
    ref_model_name_or_path: str | None = option(
        None, "What KL and wins are measured against; the first checkpoint by default."
    )
    output: str | None = option(None, "File for the metrics as JSON.")


@dataclass
class EvaluateSampling(SamplingOptions):
    """How responses are sampled and scored: fields of `APAConfig`."""

    reward_weights: list[float] | None = option(None, "Weights of the reward models and functions; 1 each by default.")
    per_device_eval_batch_size: int = option(8, "Prompts of a process that are answered and scored together.")
    generation_batch_size: int | None = option(
        None, "Of them, rows that are sampled at a time; all of them by default."
    )


def make_parser() -> CommandParser:
    """The options of the command."""
    sampling = sampling_part(EvaluateSampling)
    return CommandParser(
        "evaluate",
        "Reward, KL (nats per response), entropy (nats per token), length (tokens), distinct n-grams of checkpoints "
        "on the same prompts, and how often each beats the reference.",
        Part(EvaluateArguments, lambda name: "checkpoints"),
        prompts_part(),
        reward_part(),
        loading_part(),
        sampling._replace(title_of=lambda name: "rewards" if name == "reward_weights" else sampling.title_of(name)),
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    values = parser.parse(argv)
    from trl_apa.commands.evaluate import run

    return run(parser, values)
