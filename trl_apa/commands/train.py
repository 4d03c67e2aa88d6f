"""`trl-apa train`: align a policy with APA, AWR or PPO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import ModelConfig, get_peft_config

from trl_apa.commands.groups import apa_part, model_part
from trl_apa.commands.launching import LAUNCH_PART, launch
from trl_apa.commands.lengths import check_prompt_lengths, config_of
from trl_apa.commands.models import import_reward_function, load_policy, load_rewards, load_tokenizer, loading
from trl_apa.commands.options import CommandParser, Part
from trl_apa.commands.outputs import check_output_folder, checkpoint_to_resume
from trl_apa.commands.progress import APA_COLUMNS, print_lines
from trl_apa.commands.rows import DataArguments, load_rows, prompts_by
from trl_apa.config.apa import APAConfig
from trl_apa.config.fields import option
from trl_apa.models.critic import ADAPTER_PREFIX
from trl_apa.rollout.prompts import PromptSource
from trl_apa.trainer.apa import APATrainer


@dataclass
class RewardArguments:
    """What scores the responses."""

    reward_model_name_or_path: list[str] | None = option(
        None,
        "Reward models: folders or hub names of classifiers with one label, or 'adapter:PATH' for one "
        "that is an adapter on the policy's base.",
    )
    reward_funcs: list[str] | None = option(
        None, "Reward functions by dotted name (my_rewards.politeness), found from the working directory."
    )
    trust_remote_code: bool = option(False, "Let code that comes with models and tokenizers run.")

    def functions(self) -> list[Callable[..., Any]]:
        """The functions, imported.

        Raises:
            ValueError: if one cannot be imported, or if there is neither a function nor a model.
        """
        if not self.reward_funcs and not self.reward_model_name_or_path:
            raise ValueError("no rewards: set reward_model_name_or_path, reward_funcs, or both")
        return [import_reward_function(name) for name in self.reward_funcs or ()]


@dataclass
class OtherModelArguments:
    """The networks beside the policy."""

    ref_model_name_or_path: str | None = option(None, "pi_init, the policy before training by default.")
    value_model: str = option(
        "separate",
        "'separate': a copy of the policy's trunk; 'adapter' or 'adapter:PATH': a second adapter on the "
        "policy's base; 'head': classic's head on the policy; or a folder or hub name of a reward model, a "
        "language model or a saved value model.",
    )


def reward_part() -> Part:
    """The options about scores."""
    return Part(RewardArguments, lambda name: "rewards" if name.startswith("reward") else "model")


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        "train",
        "Align a policy with Advantage-Induced Policy Alignment: sample, score, learn.",
        Part(DataArguments, lambda name: "data"),
        reward_part(),
        model_part(),
        Part(OtherModelArguments, lambda name: "model"),
        apa_part(),
        LAUNCH_PART,
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = make_parser()
    values = parser.parse(argv)
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
    trainer.accelerator.print(f"policy, tokenizer{values} and trainer_state.json are in {config.output_dir}")
    if config.push_to_hub:
        trainer.push_to_hub()
