"""`trl-apa reward`: a reward model from preference pairs with TRL's RewardTrainer."""

from collections.abc import Sequence

from trl import RewardConfig, RewardTrainer, get_peft_config

from trl_apa.commands.groups import model_part, trl_title
from trl_apa.commands.launching import LAUNCH_PART, launch
from trl_apa.commands.models import load_tokenizer, loading_options
from trl_apa.commands.options import CommandParser, Part
from trl_apa.commands.progress import REWARD_COLUMNS
from trl_apa.commands.rows import DataArguments, load_rows, preference
from trl_apa.commands.supervised import finish, needs_model


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        "reward",
        "A reward model from preference pairs, with TRL's RewardTrainer.",
        Part(
            DataArguments, lambda name: "data", DataArguments.__dataclass_fields__.keys() - {"dataset_prompt_column"}
        ),
        model_part(),
        Part(RewardConfig, trl_title("reward model")),
        LAUNCH_PART,
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
        trainer = RewardTrainer(
            model=model.model_name_or_path,
            args=config,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=load_tokenizer(model.model_name_or_path, model, config.trust_remote_code),
            peft_config=get_peft_config(model),
        )
    return finish(trainer, REWARD_COLUMNS)
