"""`trl-apa offline`: learn from fixed responses with APA, AWR, ILQL, QRPO or DRO."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import TrainingArguments
from trl import get_peft_config

from trl_apa.commands.data_options import DataArguments
from trl_apa.commands.groups import HELPS, SAMPLING, UNREAD, model_part, training_title
from trl_apa.commands.launching import LAUNCH_PART, launch
from trl_apa.commands.lengths import check_prompt_lengths, check_response_lengths, config_of
from trl_apa.commands.models import load_policy, load_rewards, load_tokenizer, loading
from trl_apa.commands.options import NO_EFFECT, CommandParser, Part
from trl_apa.commands.outputs import check_output_folder, checkpoint_to_resume, saved_in
from trl_apa.commands.progress import Column, print_lines
from trl_apa.commands.reward_options import reward_part
from trl_apa.commands.rows import load_rows, preference
from trl_apa.commands.train_options import OtherModelArguments
from trl_apa.data.pairs import Preference
from trl_apa.data.sources import Row
from trl_apa.offline import OfflineAPATrainer, OfflineConfig, label_pairs


COLUMNS: tuple[Column, ...] = (
    ("loss", "loss", "{:.4f}"),
    ("held-out reward", "eval_reward", "{:+.3f}"),
    ("held-out KL", "eval_kl", "{:.3f}"),
)


def offline_title(name: str) -> str:
    """The group of an option of `OfflineConfig`."""
    if name in UNREAD:
        return NO_EFFECT
    if name in SAMPLING:
        return "sampling"
    if name == "reward_weights":
        return "rewards"
    if name == "resume_anyway":
        return "saving and resuming"
    return training_title(name) if name in TrainingArguments.__dataclass_fields__ else "the algorithm"


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        "offline",
        "Train on fixed responses with APA, AWR, ILQL, QRPO or DRO. Both responses of a preference pair are scored "
        "first.",
        Part(DataArguments, lambda name: "data"),
        reward_part(),
        model_part(),
        Part(OtherModelArguments, lambda name: "model"),
        Part(OfflineConfig, offline_title, helps=HELPS),
        LAUNCH_PART,
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    values = parser.parse(argv)
    if launch("offline", argv, values):
        return 0
    data, rewards, model, others, config, _ = parser.build(values)
    name, trust = model.model_name_or_path, rewards.trust_remote_code
    if name is None:
        raise ValueError("model_name_or_path is not set: name the folder or the hub name of the policy")
    check_output_folder("output_dir", config.output_dir)
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, config.output_dir)
    functions = rewards.functions()
    rows, held_out = load_rows(data, response_with_reward)
    check_rows_for_qrpo(rows, config.loss_type)
    tokenizer, model_config = load_tokenizer(name, model, trust), config_of(name, model, trust)
    check_response_lengths(rows, tokenizer, model_config, config)
    check_prompt_lengths(held_out, tokenizer, model_config, config)
    scorers = load_rewards(rewards.reward_model_name_or_path, functions, trust)
    ref_name = others.ref_model_name_or_path
    policy = load_policy(name, model, trust)
    reference = None if ref_name is None else load_policy(ref_name, model, trust, is_trainable=False)
    responses = labelled(rows, scorers, tokenizer, config)
    with loading("value model", others.value_model):
        trainer = OfflineAPATrainer(
            config,
            policy,
            reference,
            tokenizer,
            responses,
            eval_dataset=None if held_out is None else prompts_of(held_out),
            reward_funcs=scorers,
            value_model=others.value_model,
            peft_config=get_peft_config(model),
        )
    print_lines(trainer, COLUMNS)
    trainer.accelerator.print(f"{config.loss_type}: {len(trainer.rollouts)} responses, kl_coef {config.kl_coef}")
    trainer.card_datasets = data.names
    trainer.train(resume_from_checkpoint=checkpoint)
    has_card = trainer.save_pretrained(config.output_dir)
    trainer.save_state()
    beside = trainer.accelerator.unwrap_model(trainer.model).parts_beside_policy
    names = ("policy", "tokenizer", *beside, has_card and "README.md", "trainer_state.json")
    trainer.accelerator.print(saved_in(config.output_dir, *names))
    if config.push_to_hub:
        trainer.push_to_hub()
    return 0


def response_with_reward(row: Row) -> dict[str, Any]:
    """A row with a completion and its reward as it is, or a preference pair, whose responses are labelled later."""
    if row.fields.get("completion") is not None and row.fields.get("reward") is not None:
        return row.fields
    if isinstance(row.fields.get("chosen"), list):
        raise ValueError("has chat messages; give rows with prompt, completion and reward")
    return preference(row)


def check_rows_for_qrpo(rows: Iterable[dict[str, Any]], loss_type: str) -> None:
    """
    Raises:
        ValueError: with the number of the row, from 1, if one has no `ref_rewards` and the loss reads them.
    """
    for number, row in enumerate(rows, start=1) if loss_type == "qrpo" else ():
        if row.get("ref_rewards") is None:
            kind = "is a preference pair and " if row.get("chosen") is not None else ""
            raise ValueError(
                f"row {number} {kind}has no ref_rewards, which loss_type='qrpo' compares its reward with: give rows "
                "with prompt, completion, reward and ref_rewards"
            )


def labelled(rows: Sequence[dict[str, Any]], scorers: list[Any], tokenizer: Any, config: OfflineConfig) -> list[Any]:
    """Every response with its reward: given, or from the reward functions."""
    rows = list(rows)
    pairs = [
        Preference(row["prompt"], row["chosen"], row["rejected"], number)
        for number, row in enumerate(rows, start=1)
        if row.get("chosen") is not None
    ]
    given = [row for row in rows if row.get("chosen") is None]
    return [*given, *(label_pairs(pairs, scorers, tokenizer, config.reward_weights) if pairs else ())]


def prompts_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The different prompts, with what else their first row holds for the reward functions."""
    responses = ("chosen", "rejected", "completion", "reward")
    first = {repr(row["prompt"]): row for row in reversed(list(rows))}
    return [{name: value for name, value in row.items() if name not in responses} for row in reversed(first.values())]
