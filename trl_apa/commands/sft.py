"""`trl-apa sft`: supervised fine-tuning with TRL's SFTTrainer, on demonstrations or on preferred responses."""

from collections.abc import Sequence

from datasets import Dataset
from trl import SFTConfig, get_peft_config

from trl_apa.commands.launching import launch
from trl_apa.commands.lengths import check_row_lengths, config_of
from trl_apa.commands.models import load_policy, load_tokenizer
from trl_apa.commands.options import CommandParser
from trl_apa.commands.progress import SFT_COLUMNS
from trl_apa.commands.rows import demonstration, load_rows
from trl_apa.commands.supervised import check_options, finish, say_what_is_left_out, supervised_parser
from trl_apa.config.precision import Bf16WherePossible
from trl_apa.redaction import RedactedOptions
from trl_apa.trl_trainers import QuietSFTTrainer


class SFTOptions(RedactedOptions, Bf16WherePossible, SFTConfig):
    """TRL's options, of which the Trainer writes none that is secret, with bf16 on where there is a GPU for it."""


def make_parser() -> CommandParser:
    """The options of the command."""
    return supervised_parser(
        "sft",
        "Supervised fine-tuning with TRL's SFTTrainer. On preferences it trains on the preferred responses.",
        SFTOptions,
        "SFT",
    )


def check_columns(rows: Dataset, text_field: str) -> None:
    """Raise ValueError, naming what there is, if SFTTrainer knows none of the columns."""
    layouts = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"}, {text_field})
    if not any(layout <= set(rows.column_names) for layout in layouts):
        raise ValueError(
            f"dataset_name has the columns {', '.join(rows.column_names)}; it should have {text_field}, messages, or "
            "prompt and completion"
        )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    values = parser.parse(argv)
    if launch("sft", argv, values):
        return 0
    data, model, config, _ = parser.build(values)
    check_options(model, config)
    rows, held_out = load_rows(data, demonstration)
    check_columns(rows, config.dataset_text_field)
    name, trust = model.model_name_or_path, config.trust_remote_code
    tokenizer, model_config = load_tokenizer(name, model, trust), config_of(name, model, trust)
    for part in (rows, held_out):
        check_row_lengths(part, tokenizer, model_config, config.max_length, config.packing)
    trainer = QuietSFTTrainer(
        model=load_policy(name, model, trust),
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
    )
    trainer.card_datasets = data.names
    say_what_is_left_out(trainer, rows, held_out, f"no token to learn within max_length={config.max_length}")
    return finish(trainer, SFT_COLUMNS)
