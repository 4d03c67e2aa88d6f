"""`trl-apa train`: align a policy with APA or another loss."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from trl import ModelConfig, get_peft_config

from trl_apa.commands.launching import launch
from trl_apa.commands.lengths import check_prompt_lengths, config_of
from trl_apa.commands.models import load_policy, load_rewards, load_tokenizer, loading
from trl_apa.commands.options import CommandParser
from trl_apa.commands.outputs import check_output_folder, checkpoint_to_resume
from trl_apa.commands.progress import APA_COLUMNS, print_lines
from trl_apa.commands.reward_options import RewardArguments
from trl_apa.commands.rows import load_rows, prompts_by
from trl_apa.commands.train_options import OtherModelArguments
from trl_apa.config.apa import APAConfig
from trl_apa.models.critic import ADAPTER_PREFIX
from trl_apa.rollout.prompts import PromptSource
from trl_apa.trainer.apa import APATrainer


def run(argv: Sequence[str], parser: CommandParser, values: dict[str, Any]) -> int:
    """Run the command with its options, read; returns the exit status.

    Args:
        argv: the command line, for the processes of a launch.
        parser: that has read it.
        values: every option.
    """
    if launch("train", argv, values):
        return 0
    data, rewards, model, others, config, _ = parser.build(values)
    model.model_name_or_path = model.model_name_or_path or config.sft_model_path
    if rewards.reward_model_name_or_path is None and config.reward_model_path is not None:
        rewards.reward_model_name_or_path = [config.reward_model_path]
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: name the folder or the hub name of the policy")
    check_output_folder("output_dir", config.output_dir)
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, config.output_dir)
    functions = rewards.functions()
    rows, held_out = load_rows(data, prompts_by(data))
    trainer = _trainer(config, model, others, rewards, functions, rows, held_out)
    trainer.card_datasets = data.names
    trainer.train(resume_from_checkpoint=checkpoint)
    _save(trainer)
    return 0


def _trainer(
    config: APAConfig,
    model: ModelConfig,
    others: OtherModelArguments,
    rewards: RewardArguments,
    functions: list[Callable[..., Any]],
    rows: Dataset,
    held_out: Any,
) -> APATrainer:
    trust = rewards.trust_remote_code
    name, ref_name = model.model_name_or_path, others.ref_model_name_or_path
    tokenizer, model_config = load_tokenizer(name, model, trust), config_of(name, model, trust)
    # Whether there are enough for a batch.
    PromptSource(rows, config.batch_size // config.num_generations, num_processes=config.world_size)
    for part in (rows, held_out):
        check_prompt_lengths(part, tokenizer, model_config, config)
    policy = load_policy(name, model, trust)
    reference = None if ref_name is None else load_policy(ref_name, model, trust, is_trainable=False)
    scorers = load_rewards(rewards.reward_model_name_or_path, functions, trust)
    with loading("value model", others.value_model.removeprefix(ADAPTER_PREFIX)):
        trainer = APATrainer(
            config,
            policy,
            reference,
            tokenizer,
            rows,
            eval_dataset=held_out,
            reward_funcs=scorers,
            # The default as if it was not given: without values a value model that is given warns.
            value_model=None if others.value_model == "separate" else others.value_model,
            peft_config=get_peft_config(model),
        )
    print_lines(trainer, APA_COLUMNS)
    names = [] if trainer.scorer is None else trainer.scorer.names
    trainer.accelerator.print(
        f"{config.loss_type}: {len(rows)} prompts, {config.global_batch_size} rollouts an iteration, "
        f"kl_coef {config.kl_coef}; rewards: {', '.join(names)}"
    )
    return trainer


def _save(trainer: APATrainer) -> None:
    config = trainer.args
    trainer.save_pretrained(config.output_dir)
    trainer.save_state()
    values = "" if trainer.model.value_model is None else ", value_model/"
    trainer.accelerator.print(
        f"policy, tokenizer{values}, README.md and trainer_state.json are in {config.output_dir}"
    )
    if config.push_to_hub:
        trainer.push_to_hub()
