"""Options of `trl-apa generate`, and its beginning. Imports nothing heavy, so that `--help` answers at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from trl_apa.commands.options import CommandParser, Part
from trl_apa.commands.sampling_options import (
    LoadingOptions,
    SamplingOptions,
    loading_part,
    prompts_part,
    sampling_part,
)
from trl_apa.config.fields import option
from trl_apa.data.sources import LINE_SUFFIXES, TABLE_READERS


BATCH_SIZE = 8


@dataclass
class GenerateArguments:
    """Prompts and output of the command."""

    prompt: list[str] | None = option(None, "Prompts, in place of those of a data set.")
    output: str | None = option(
        None,
        "File for the JSON lines; stdout by default. What this command wrote there before it was killed "
        "is not made again.",
    )
    overwrite: bool = option(False, "Begin anew, whatever the file holds.")
    trust_remote_code: bool = option(False, "Let code that comes with the model run.")

    def __post_init__(self) -> None:
        name = (self.output or "").lower()
        if name.endswith(tuple(TABLE_READERS)) and not name.endswith(LINE_SUFFIXES[0]):
            raise ValueError(f"output={self.output!r} will hold JSON lines: its name should end with .jsonl")


@dataclass
class NamedModel:
    """The model: fields of `ModelConfig`."""

    model_name_or_path: str | None = option(None, "Folder or hub name of a language model, or of an adapter.")
    model_revision: str = option("main", "Of a model of the hub: branch, tag or commit.")


@dataclass
class GenerateLoading(LoadingOptions, NamedModel):
    """The model, and how it is loaded. Fields of the last class stand first."""


@dataclass
class GenerateSampling(SamplingOptions):
    """How responses are sampled: fields of `APAConfig`."""

    num_generations: int = option(1, "Responses to each prompt.")
    generation_batch_size: int | None = option(None, f"Rows that are sampled at a time; {BATCH_SIZE} by default.")


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        "generate",
        "Responses of a model to prompts, as JSON lines with prompt and completion.",
        Part(GenerateArguments, lambda name: "model" if name == "trust_remote_code" else "prompts"),
        prompts_part(),
        loading_part(GenerateLoading),
        sampling_part(GenerateSampling),
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    values = parser.parse(argv)
    from trl_apa.commands.generate import run

    return run(parser, values)
