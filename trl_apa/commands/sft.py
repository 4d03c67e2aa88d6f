"""`trl-apa sft`: supervised fine-tuning with TRL's SFTTrainer, on demonstrations or on preferred responses."""

from collections.abc import Sequence

from trl import SFTConfig, get_peft_config

from trl_apa.commands.launching import launch
from trl_apa.commands.models import load_policy, load_tokenizer
from trl_apa.commands.options import CommandParser
from trl_apa.commands.progress import SFT_COLUMNS
from trl_apa.commands.rows import demonstration, load_rows
from trl_apa.commands.supervised import finish, needs_model, supervised_parser
from trl_apa.quiet_trainers import QuietSFTTrainer
from trl_apa.redaction import RedactedOptions


class SFTOptions(RedactedOptions, SFTConfig):
    """TRL's options, of which the Trainer writes none that is secret."""


def make_parser() -> CommandParser:
    """The options of the command."""
    return supervised_parser(
        "sft",
        "Supervised fine-tuning with TRL's SFTTrainer. Of preferences, the preferred responses are learned.",
        SFTOptions,
        "SFT",
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    with parser.errors_end_the_command():
        values = parser.parse(argv)
        if launch("sft", argv, values):
            return 0
        data, model, config, _ = parser.build(values)
        needs_model(model)
        rows, held_out = load_rows(data, demonstration)
        trainer = QuietSFTTrainer(
            model=load_policy(model.model_name_or_path, model, config.trust_remote_code),
            args=config,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=load_tokenizer(model.model_name_or_path, model, config.trust_remote_code),
            peft_config=get_peft_config(model),
        )
    return finish(trainer, SFT_COLUMNS)
