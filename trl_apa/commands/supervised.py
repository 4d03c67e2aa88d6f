"""What `trl-apa sft` and `trl-apa reward` share."""

from collections.abc import Sequence

from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import ModelConfig

from trl_apa.commands.data_options import DataArguments
from trl_apa.commands.groups import HELPS, model_part, trl_title
from trl_apa.commands.launching import LAUNCH_PART
from trl_apa.commands.options import CommandParser, Part
from trl_apa.commands.outputs import check_output_folder, checkpoint_to_resume
from trl_apa.commands.progress import Column, print_lines
from trl_apa.redaction.trackers import hide_secrets_from


def supervised_parser(command: str, description: str, config: type, trained: str) -> CommandParser:
    """The options of such a command.

    Args:
        command: its name.
        description: what it does, for `--help`.
        config: TRL's config.
        trained: heading of the config's own options.
    """
    names = DataArguments.__dataclass_fields__.keys() - {"dataset_prompt_column"}
    data = Part(DataArguments, lambda name: "data", names)
    return CommandParser(
        command, description, data, model_part(), Part(config, trl_title(trained), helps=HELPS), LAUNCH_PART
    )


def check_options(model: ModelConfig, config: TrainingArguments) -> None:
    """Raise ValueError if no model is named, nothing can be written, or there is no checkpoint to resume from."""
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: name the folder or the hub name of the model to start from")
    check_output_folder("output_dir", config.output_dir)
    checkpoint_to_resume(config.resume_from_checkpoint, config.output_dir)


def say_what_is_left_out(trainer: Trainer, rows: Dataset, held_out: Dataset | None, why: str) -> None:
    """Count the rows that TRL's trainer has left out.

    Args:
        trainer: it has prepared its rows.
        rows, held_out: what it was given.
        why: the reason that it leaves out rows.

    Raises:
        ValueError: if it has left out every row.
    """
    for what, given, kept in (("train", rows, trainer.train_dataset), ("evaluate", held_out, trainer.eval_dataset)):
        if given is None:
            continue
        if len(kept) == 0:
            raise ValueError(f"no row is left to {what} on: all {why}")
        # Packed rows are fewer for another reason.
        if len(kept) < len(given) and not getattr(trainer.args, "packing", False):
            trainer.accelerator.print(
                f"{len(given) - len(kept)} of {len(given)} rows to {what} on are left out: {why}"
            )


def finish(trainer: Trainer, columns: Sequence[Column]) -> int:
    """Train, evaluate if rows are held out, save, upload if requested; returns the exit status."""
    config = trainer.args
    hide_secrets_from(trainer.callback_handler.callbacks)
    print_lines(trainer, columns)
    trainer.accelerator.print(f"{len(trainer.train_dataset)} rows to train on")
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config.resume_from_checkpoint, config.output_dir))
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model(config.output_dir)
    trainer.save_state()
    trainer.create_model_card()
    trainer.accelerator.print(f"model, tokenizer, README.md and trainer_state.json are in {config.output_dir}")
    if config.push_to_hub:
        trainer.push_to_hub()
    return 0
