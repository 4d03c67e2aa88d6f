"""`trl-apa reward`: a reward model from preference pairs with TRL's RewardTrainer."""

from collections.abc import Sequence

from peft.utils import ModulesToSaveWrapper
from torch import nn
from trl import RewardConfig, get_peft_config

from trl_apa.commands.launching import launch
from trl_apa.commands.lengths import check_row_lengths, config_of
from trl_apa.commands.models import load_tokenizer, loading, loading_options
from trl_apa.commands.options import CommandParser
from trl_apa.commands.progress import REWARD_COLUMNS
from trl_apa.commands.quiet import without_report_of_new_head
from trl_apa.commands.rows import load_rows, preference
from trl_apa.commands.supervised import check_options, finish, say_what_is_left_out, supervised_parser
from trl_apa.config.precision import Bf16WherePossible
from trl_apa.redaction import RedactedOptions
from trl_apa.trl_trainers import QuietRewardTrainer


class RewardOptions(RedactedOptions, Bf16WherePossible, RewardConfig):
    """TRL's options, of which the Trainer writes none that is secret, with bf16 on where there is a GPU for it."""


def make_parser() -> CommandParser:
    """The options of the command."""
    return supervised_parser(
        "reward",
        "Train a reward model on preference pairs with TRL's RewardTrainer.",
        RewardOptions,
        "reward model",
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    values = parser.parse(argv)
    if launch("reward", argv, values):
        return 0
    data, model, config, _ = parser.build(values)
    check_options(model, config)
    if model.use_peft:
        # Otherwise the adapter's checkpoint would leave out the new head.
        model.lora_task_type = "SEQ_CLS"
    rows, held_out = load_rows(data, preference)
    name, trust = model.model_name_or_path, config.trust_remote_code
    tokenizer, model_config = load_tokenizer(name, model, trust), config_of(name, model, trust)
    for part in (rows, held_out):
        check_row_lengths(part, tokenizer, model_config, config.max_length)
    options = {**loading_options(model, trust), "revision": model.model_revision}
    config.model_init_kwargs = {**options, **(config.model_init_kwargs or {})}
    with loading("model", name), without_report_of_new_head():
        trainer = QuietRewardTrainer(
            model=name,
            args=config,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=get_peft_config(model),
        )
    keep_precision_of_head(trainer.model)
    trainer.card_datasets = data.names
    say_what_is_left_out(trainer, rows, held_out, f"more than max_length={config.max_length} tokens")
    return finish(trainer, REWARD_COLUMNS)


def keep_precision_of_head(model: nn.Module) -> None:
    """Give the head that is trained beside adapters the dtype that it was loaded in.

    On a quantised base TRL casts all that is trained to bfloat16, as adapters take any input. A head takes its own
    dtype alone, which without autocast is that of the unquantised weights.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(next(module.original_module.parameters()).dtype)
