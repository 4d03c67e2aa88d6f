"""`trl-apa reward`: a reward model from preference pairs with TRL's RewardTrainer."""

from collections.abc import Sequence

from trl import RewardConfig, get_peft_config

from trl_apa.commands.launching import launch
from trl_apa.commands.models import load_tokenizer, loading_options
from trl_apa.commands.options import CommandParser
from trl_apa.commands.progress import REWARD_COLUMNS
from trl_apa.commands.rows import load_rows, preference
from trl_apa.commands.supervised import finish, needs_model, supervised_parser
from trl_apa.quiet_trainers import QuietRewardTrainer
from trl_apa.redaction import RedactedOptions


class RewardOptions(RedactedOptions, RewardConfig):
    """TRL's options, of which the Trainer writes none that is secret."""


def make_parser() -> CommandParser:
    """The options of the command."""
    return supervised_parser(
        "reward",
        "A reward model from preference pairs, with TRL's RewardTrainer.",
        RewardOptions,
        "reward model",
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    with parser.errors_end_the_command():
        values = parser.parse(argv)
        if launch("reward", argv, values):
            return 0
        data, model, config, _ = parser.build(values)
        needs_model(model)
        if model.use_peft:
            # Otherwise the adapter's checkpoint would leave out the new head.
            model.lora_task_type = "SEQ_CLS"
        rows, held_out = load_rows(data, preference)
        options = {**loading_options(model, config.trust_remote_code), "revision": model.model_revision}
        config.model_init_kwargs = {**options, **(config.model_init_kwargs or {})}
        trainer = QuietRewardTrainer(
            model=model.model_name_or_path,
            args=config,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=load_tokenizer(model.model_name_or_path, model, config.trust_remote_code),
            peft_config=get_peft_config(model),
        )
    return finish(trainer, REWARD_COLUMNS)
