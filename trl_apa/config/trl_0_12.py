"""Options of TRL 0.12 to 1.12's `PPOConfig`: their meaning here, or why they have no effect."""

import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from trl_apa.config.fields import option


if TYPE_CHECKING:
    from trl_apa.config.apa import APAConfig

# The name that such a script uses -> ours.
ALIASES = {
    "num_ppo_epochs": "num_epochs_per_batch",
    "response_length": "max_completion_length",
    "local_batch_size": "batch_size",
}
# Option -> why it has no effect.
WITHOUT_EFFECT = {
    "num_sample_generations": "set log_completions to see samples of every iteration",
    "num_total_batches": "it is computed: total_episodes over the rollouts of an iteration",
    "micro_batch_size": "it is computed: per_device_train_batch_size times the number of processes",
    "local_mini_batch_size": "it is computed: read backward_batch_size, set num_mini_batches",
}
# kl_estimator -> kl_penalty.
KL_ESTIMATORS = {"k1": "kl", "k3": "k3"}
KL_COEF = 0.05
# Options that scripts for train() set too, and that therefore do not tell which TRL a script was written for.
SHARED = {"total_episodes", "ds3_gather_for_generation", "world_size"}


@dataclass
class TRL012Options:
    """
    What `PPOConfig` of TRL 0.12 to 1.12 had and [`APAConfig`] does not call by that name. A value of None is an
    option that was not set.

    Parameters:
        num_ppo_epochs, response_length, local_batch_size (`int`, *optional*):
            Other names of `num_epochs_per_batch`, `max_completion_length` and `batch_size`.
        num_mini_batches (`int`, *optional*):
            Optimizer steps an epoch: `batch_size` is `num_mini_batches` times `backward_batch_size`.
        total_episodes (`int`, *optional*):
            Rollouts that `train()` makes, over all processes and iterations; the last iteration is completed.
            Defaults to `num_train_epochs` times the rows of the data set.
        local_rollout_forward_batch_size (`int`, *optional*):
            Rollouts of one forward pass without gradient: sampling in `train()`, where the default is all at once, and
            log pi_init, log pi_old and values, where it is `per_device_train_batch_size`.
        kl_estimator (`str`, *optional*):
            PPO only: `"k1"` is `kl_penalty="kl"`, `"k3"` is `kl_penalty="k3"`.
        stop_token (`str`, *optional*):
            `"eos"`. Responses end at EOS in any case.
        stop_token_id (`int`, *optional*):
            Responses end at this token instead of EOS, for `generate` and for `missing_eos_penalty`.
        model_adapter_name, ref_adapter_name (`str`, *optional*):
            Of a PEFT policy with several adapters, the one that is trained (the active one by default) and the one
            that is pi_init.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Under DeepSpeed ZeRO-3, gather the policy's weights before sampling.
        sft_model_path, reward_model_path (`str`, *optional*):
            Kept for the record; scripts load their models by them.
        world_size (`int`, *optional*):
            Read it, as in `TrainingArguments`; the launcher decides it.
        num_sample_generations, num_total_batches, micro_batch_size, local_mini_batch_size (`int`, *optional*):
            Without effect, with a warning that says why.
    """

    num_ppo_epochs: int | None = option(None, "TRL 0.12 - 1.12's name of num_epochs_per_batch.")
    response_length: int | None = option(None, "TRL 0.12 - 1.12's name of max_completion_length.")
    local_batch_size: int | None = option(None, "TRL 0.12 - 1.12's name of batch_size.")
    num_mini_batches: int | None = option(None, "Optimizer steps an epoch.")
    total_episodes: int | None = option(
        None, "Rollouts to train on, over all processes; num_train_epochs times the prompts by default."
    )
    local_rollout_forward_batch_size: int | None = option(None, "Rollouts of one forward pass without gradient.")
    kl_estimator: str | None = option(None, "PPO only: 'k1' or 'k3', another name of kl_penalty.")
    stop_token: str | None = option(None, "'eos', where responses end in any case.")
    stop_token_id: int | None = option(None, "Token at which responses end, instead of EOS.")
    model_adapter_name: str | None = option(None, "PEFT adapter that is trained; the active one by default.")
    ref_adapter_name: str | None = option(None, "PEFT adapter that is the reference.")
    ds3_gather_for_generation: bool = option(True, "Under ZeRO-3, gather the policy's weights before sampling.")
    sft_model_path: str | None = option(None, "Kept for the record; scripts load the model by it.")
    reward_model_path: str | None = option(None, "Kept for the record; scripts load the reward model by it.")
    world_size: int = option(None, "Read it; the launcher decides it.")
    num_sample_generations: int | None = option(None, "Without effect.")
    num_total_batches: int | None = option(None, "Without effect.")
    micro_batch_size: int | None = option(None, "Without effect.")
    local_mini_batch_size: int | None = option(None, "Without effect.")

    def _check_world_size(self) -> None:
        given = self.__dict__.pop("_given_world_size", None)
        if given not in (None, self.world_size):
            warnings.warn(
                f"world_size={given} has no effect: the launcher sets it to {self.world_size}",
                UserWarning,
                stacklevel=4,
            )


def _is_trl_0_12(options: TRL012Options) -> bool:
    """Whether an option is set that only those scripts set; call it before aliases are filled in."""
    names = {f.name for f in fields(TRL012Options)} - SHARED
    return any(getattr(options, name) is not None for name in names)


def translate(config: "APAConfig") -> None:
    """Sampling and KL as those scripts meant them; sizes are `rollouts_by_mini_batches`."""
    if config.stop_token not in (None, "eos"):
        raise ValueError(f"stop_token={config.stop_token!r}: it should be 'eos' or None; use stop_token_id for others")
    if config.stop_token is not None and config.stop_token_id is not None:
        raise ValueError(
            f"stop_token and stop_token_id={config.stop_token_id} both set the end token: set one of them"
        )
    if config.kl_estimator is not None:
        if config.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator={config.kl_estimator!r}: it should be one of {', '.join(KL_ESTIMATORS)}")
        penalty = KL_ESTIMATORS[config.kl_estimator]
        if config.kl_penalty not in (None, penalty):
            raise ValueError(f"kl_estimator={config.kl_estimator!r} and kl_penalty={config.kl_penalty!r}: set one")
        if config.reads("kl_penalty") and config.kl_in_reward:
            config.kl_penalty = penalty
    if config.kl_in_reward and _is_trl_0_12(config):
        # Those trainers had no controller.
        if config.adap_kl_ctrl is None:
            config.adap_kl_ctrl = False
        if config.kl_coef is None and config.init_kl_coef is None and config.beta is None:
            config.kl_coef = KL_COEF


def rollouts_by_mini_batches(config: "APAConfig") -> int | None:
    """
    `batch_size` as those scripts imply it when they do not say it, or None:
    `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches`, as in TRL 0.12 to 0.16.
    """
    by_size = config.per_device_train_batch_size is not None and config.mini_batch_size is None
    if config.num_mini_batches is None and not (by_size and _is_trl_0_12(config)):
        return None
    size, mini_batches = config.per_device_train_batch_size or 8, config.num_mini_batches or 1
    mini_batch: int = size * config.gradient_accumulation_steps
    if mini_batches > 1:
        warnings.warn(
            f"num_mini_batches={mini_batches} makes batch_size {mini_batch * mini_batches} = {size} * "
            f"{config.gradient_accumulation_steps} * {mini_batches}, as in TRL 0.12 to 0.16; from 0.17 on it was "
            f"{mini_batch}, split into num_mini_batches. Set batch_size to choose",
            UserWarning,
            stacklevel=5,
        )
    return mini_batch * mini_batches


def _number_of_processes(args: TrainingArguments) -> int:
    number: int = TrainingArguments.world_size.fget(args)
    return number


def _note_world_size(args: TrainingArguments, given: int | None) -> None:
    args.__dict__["_given_world_size"] = given


# A property of TrainingArguments, which the field above would hide.
TRL012Options.world_size = property(  # type: ignore[assignment]  # in place of the field
    _number_of_processes, _note_world_size
)
