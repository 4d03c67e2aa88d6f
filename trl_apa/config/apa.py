"""Options of `APATrainer`: defaults, the names classic scripts use for them, and their validation."""

import json
import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_apa._trl import _BaseConfig
from trl_apa.algorithms import ALGORITHMS, SELECTIVE_OPTIONS, Algorithm, algorithm_of
from trl_apa.algorithms.estimators import ESTIMATORS, AdvantageEstimator, estimator_of
from trl_apa.algorithms.policy_gradient import GRPO_AGGREGATIONS
from trl_apa.config import trl_0_12
from trl_apa.config.by_estimator import (
    BY_ESTIMATOR,
    check_estimator_options,
    estimator_reads,
    fill_by_algorithm,
    fill_by_estimator,
)
from trl_apa.config.checks import check_finite_options, check_optimizer_options, check_reward_weights
from trl_apa.config.fields import Json, only_read_by, option, switch
from trl_apa.config.importance import check_importance_options, fill_importance_level
from trl_apa.config.later import OptionsSetLater, as_read_at_construction, check_not_none, fill_evaluation
from trl_apa.config.precision import default_bf16
from trl_apa.config.rates import learning_rate_option, note_default_rate
from trl_apa.config.sizes import SIZES, check_batch_sizes, check_horizon, fill_batch_sizes
from trl_apa.config.tools import ToolOptions
from trl_apa.config.trackers import check_project_kwargs, tracker_names, tracker_objects
from trl_apa.config.vllm import VLLMOptions
from trl_apa.redaction import RedactedOptions, errors_without_secrets, without_secrets


# Options that should be greater than 0 where they are set.
POSITIVE = (
    "batch_size",
    "cliprange",
    "cliprange_high",
    "cliprange_value",
    "compare_steps",
    "generation_batch_size",
    "gradient_accumulation_steps",
    "horizon",
    "importance_max",
    "importance_min",
    "local_rollout_forward_batch_size",
    "max_completion_length",
    "max_kl",
    "max_prompt_length",
    "num_completions_to_print",
    "num_epochs_per_batch",
    "num_generations",
    "num_mini_batches",
    "num_ref_samples",
    "num_unfrozen_layers",
    "per_device_train_batch_size",
    "ratio_threshold",
    "reward_timeout",
    "score_clip",
    "steps",
    "target",
    "target_kl",
    "temperature",
    "tokens_per_micro_batch",
    "total_episodes",
    "value_kl_coef",
    "value_learning_rate",
    "value_max_grad_norm",
)
# The name a classic script, or one for TRL's GRPO, uses -> ours.
ALIASES = {
    "lam": "gae_lambda",
    "ppo_epochs": "num_epochs_per_batch",
    "mini_batch_size": "per_device_train_batch_size",
    "log_with": "report_to",
    "use_score_scaling": "scale_rewards",
    "use_score_norm": "center_rewards",
    "optimize_cuda_cache": "optimize_device_cache",
    "beta": "kl_coef",
    "epsilon": "cliprange",
    "num_iterations": "num_epochs_per_batch",
    **trl_0_12.ALIASES,
}
# Those of them that are not given a value for scripts to read.
NOT_READ_BACK = ("log_with", "local_batch_size", "beta", "epsilon")
# Of the penalty in the reward alone.
OF_KL_CONTROL = ("adap_kl_ctrl", "target", "horizon")
TRACKER_OPTIONS = ("report_to", "tracker_kwargs", "tracker_project_name", "project_kwargs")
# Objects, which a command line and a config file write as JSON.
JSON = ("tracker_kwargs", "push_to_hub_if_best_kwargs", "project_kwargs")
# What a checkpoint's run must agree in with the run that resumes it.
DEFINES_RUN = (
    *("loss_type", "advantage_estimator", "group_normalization", "kl_coef", "gamma", "gae_lambda", "vf_coef"),
    *("turn_discount", "gae_over"),
    *("num_ref_samples", "value_kl_coef", "normalizer"),
    *("cliprange", "cliprange_high", "cliprange_value", "loss_aggregation", "kl_in", "adap_kl_ctrl", "target"),
    *("importance_correction", "importance_level", "importance_max", "importance_min", "rollouts_ahead"),
    *("horizon", "kl_penalty", "ratio_threshold", "early_stopping", "target_kl"),
    *("whiten_advantages", "whiten_rewards", "scale_rewards", "center_rewards", "score_clip", "missing_eos_penalty"),
    *("reward_weights", "num_unfrozen_layers", "seed"),
    *("batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "num_epochs_per_batch"),
    *("num_generations", "shuffle", "temperature", "top_p", "top_k", "max_prompt_length", "max_completion_length"),
    *("stop_strings", "stop_token", "stop_token_id", "chat_template_kwargs"),
)
# Classic options that only named things for its trackers, or steered what this trainer does otherwise: option -> why.
WITHOUT_EFFECT = {
    "accelerator_kwargs": "the Trainer creates the accelerator; set accelerator_config",
    "dataset_num_proc": "the trainer does not tokenize",
    **trl_0_12.WITHOUT_EFFECT,
}


@dataclass
class APAConfig(OptionsSetLater, trl_0_12.TRL012Options, VLLMOptions, ToolOptions, RedactedOptions, _BaseConfig):
    """
    Configuration of [`APATrainer`]. Everything of [`~transformers.TrainingArguments`] works too, and every option that
    PPO scripts set (`docs/migrating.md`); only the options that are new or have another default are listed here, and
    those of vLLM in `trl_apa.config.vllm.VLLMOptions` and of tools in `trl_apa.config.tools.ToolOptions`.

    An option may be set later too, under any of its names: it counts from the next `step`, `generate` or `train` on,
    or the assignment raises (`trl_apa/config/later.py` has the table).

    Parameters:
        loss_type (`str`, *optional*, defaults to `"apa"`):
            Policy loss: `"apa"`, equation (9) of the paper; `"awr"`, equation (6); `"ppo"`, the clipped ratio with a
            KL penalty in the reward; `"grpo"`, `"cispo"`, `"rloo"`, `"mirror_descent"`, `"rebel"`, `"response_apa"`,
            `"astar_po"` or `"qrpo"` (`docs/algorithm.md` compares them); or `"module:name"` of an algorithm of your
            own (`docs/extending.md`). The defaults below that depend on it change with it, and nothing else. Make a
            new config for another loss: `dataclasses.replace` keeps what the first one has filled in.
        kl_coef (`float`, *optional*):
            lambda of objective (2), in units of the advantage: how much advantage one nat of KL is worth. Defaults to
            `0.1` for APA, `1.0` for AWR, `0.2` for the squared errors on complete responses, `0.03` for QRPO, whose
            rewards are between 0 and 1. For PPO it is the initial coefficient of the KL penalty, `0.05`, in reward
            units per nat: small scores want a smaller one (`docs/rewards.md`). So it is for RLOO; for GRPO and CISPO,
            `0.0`, that of the KL in the loss.
        advantage_estimator (`str`, *optional*):
            How rewards become advantages: `"gae"`, with a value model; without one `"group"`, a response's reward
            minus the mean of its prompt's responses, `"leave_one_out"`, minus the mean of the others,
            `"group_log_mean_exp"`, minus `kl_coef` times log Z estimated from the group, `"batch"`, minus the mean
            of the iteration, or, compared with responses of pi_init, `"quantile"` and `"optimal_value"`; or
            `"module:name"` of an estimator of your own (`docs/extending.md`). Defaults to `"gae"` for APA, AWR, PPO
            and algorithms of your own, to `"leave_one_out"` for RLOO, to `"quantile"` for QRPO, to `"optimal_value"`
            for A*-PO, to `"group"` for the others.
        group_normalization (`str`, *optional*):
            With `advantage_estimator="group"`: `"none"`, or `"std"`, which divides by the standard deviation of the
            prompt's rewards. Defaults to `"std"` for GRPO and CISPO, else to `"none"`.
        normalizer (`str`, *optional*):
            APA and APA on responses: what stands for log Z(s) in the target (`docs/algorithm.md`). `"none"`, the
            default and the paper's 0; `"group"`, a constant for each prompt, estimated from its responses before each
            update, for APA from the prompt's other responses: it needs `num_generations` of 2 or more; `"learned"`, a
            ridge regression on the policy's last hidden states, fitted to earlier iterations, for APA of every state,
            for APA on responses of the prompt: one more forward pass of the policy, no third network.
        num_ref_samples (`int`, *optional*, defaults to `8`):
            With `advantage_estimator="quantile"` or `"optimal_value"`: in `train` and `reference_rewards`, responses
            of pi_init that are sampled and scored once for each prompt, unless its row has `ref_rewards`.
        value_kl_coef (`float`, *optional*):
            With `advantage_estimator="optimal_value"`: beta_1 of A*-PO, in reward units per nat, with which V* is
            estimated. Defaults to `kl_coef`.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount a token.
        gae_lambda (`float`, *optional*, defaults to `0.95`):
            The other lambda: that of generalised advantage estimation. Classic: `lam`.
        turn_discount (`float`, *optional*, defaults to `1.0`):
            Discount from one turn of a response to the next, beside `gamma`; a turn is what the policy writes between
            two answers of tools (`docs/tools.md`).
        gae_over (`str`, *optional*, defaults to `"tokens"`):
            What one step of GAE is: a token, or with `"turns"` a turn, all of whose tokens get its advantage, and
            `gae_lambda` counts turns.
        vf_coef (`float`, *optional*, defaults to `1.0`):
            eta, the weight of the value loss.
        whiten_advantages (`bool`, *optional*):
            Give the advantages of the complete iteration, over all processes, mean 0 and variance 1. Defaults to
            `True` for APA, AWR, PPO and algorithms of your own, to `False` for the others.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Divide token rewards by their standard deviation, keeping their mean.
        scale_rewards (`bool`, *optional*, defaults to `False`):
            Divide scores by their running standard deviation, as the authors did. Classic: `use_score_scaling`.
        center_rewards (`bool`, *optional*, defaults to `False`):
            With `scale_rewards`, subtract the running mean first. Classic: `use_score_norm`.
        score_clip (`float`, *optional*):
            Clip scores to `[-score_clip, score_clip]` after scaling; of a response with rewards for each token, their
            total.
        missing_eos_penalty (`float`, *optional*):
            Subtracted from the score of a response that did not end with EOS. Applied before scaling.
        batch_size (`int`, *optional*):
            Rollouts of one process in one iteration: what one `step` takes. Defaults to `64`, or to one mini-batch if
            that is larger; in a script for TRL 0.12 to 1.12 to what its other sizes imply.
        per_device_train_batch_size (`int`, *optional*):
            Rollouts a forward pass of the update. Defaults to the largest divisor of
            `batch_size // gradient_accumulation_steps` that is at most 8. Classic: `mini_batch_size`.
        tokens_per_micro_batch (`int`, *optional*):
            Most tokens of a forward pass, pads included: cuts the rows of an optimizer step, still
            `per_device_train_batch_size * gradient_accumulation_steps` on each process, into few passes of about
            equally many tokens, as many on every process. The update is the same but for rounding
            (`docs/training.md`). By default a pass has `per_device_train_batch_size` rows.
        num_epochs_per_batch (`int`, *optional*, defaults to `2`):
            Passes over the rollouts of an iteration. Classic: `ppo_epochs`.
        cliprange (`float`, *optional*):
            PPO, GRPO, RLOO: clip range of the ratio. Defaults to `0.2`.
        cliprange_high (`float`, *optional*):
            GRPO, RLOO, CISPO: clip range above 1, where it is another one. Defaults to `cliprange`, for CISPO, which
            has this one alone, to `4.0`.
        loss_aggregation (`str`, *optional*):
            GRPO only: `"dapo"`, the mean over tokens, `"grpo"`, over responses of each one's mean, or `"dr_grpo"`,
            over responses of the sum divided by `max_completion_length`. Defaults to `"dapo"`.
        kl_in (`str`, *optional*):
            Policy gradients: whether `"reward"` or `"loss"` is charged `kl_coef` for KL. Defaults to the reward for
            PPO and RLOO, to the loss for GRPO and CISPO.
        importance_correction (`str`, *optional*):
            PPO, GRPO, CISPO, RLOO: multiply advantages by the ratio of the policy before the update to the one that
            sampled, from the log-probs that an engine (vLLM, or a `sampler=` that gives them) or `generate` reports:
            `"truncate"`, ratios brought into the bounds below, or `"mask"`, 0 outside them. Off by default.
        importance_level (`str`, *optional*):
            `"token"`, each token by its own ratio, or `"sequence"`, all tokens of a response by that of the response.
            Defaults to `"token"`, for RLOO, which knows this one alone, to `"sequence"`.
        importance_max (`float`, *optional*, defaults to `3.0`), importance_min (`float`, *optional*):
            Bounds of that ratio; None: no bound.
        cliprange_value (`float`, *optional*):
            If set, values are clipped to within it of their old selves in the value loss, as PPO2 does.
        init_kl_coef (`float`, *optional*):
            PPO only, classic's name for `kl_coef` there.
        adap_kl_ctrl (`bool`, *optional*):
            With KL in the reward: adapt the coefficient so that KL stays near `target`. Defaults to `True` for PPO,
            in a script for TRL 0.12 to 1.12, which had no controller, and for the others to `False`.
        target (`float`, *optional*):
            With KL in the reward: KL in nats per sequence that the controller aims at. Defaults to `6.0`.
        horizon (`float`, *optional*):
            With KL in the reward: responses over which the controller reacts. Defaults to `10000`.
        kl_penalty (`str`, *optional*):
            Policy gradients: the KL that is charged: an estimate from the sampled token, `"kl"`, `"abs"`, `"mse"` or
            `"k3"`, or, in the reward, `"full"`, the exact sum over the vocabulary. Defaults to `"kl"` in the reward,
            to `"k3"` in the loss.
        max_prompt_length (`int`, *optional*):
            In `train`, only the last tokens of a longer prompt are kept; of chat messages the last complete turns, and
            the system message. Defaults to all.
        num_generations (`int`, *optional*, defaults to `1`):
            In `train`, responses to each prompt; an iteration asks `batch_size / num_generations` prompts a process.
        shuffle (`str`, *optional*):
            How the rollouts of an iteration are drawn into optimizer steps: `"rows"`, each by itself, or `"groups"`,
            those with the same prompt together, which is then read once for all of them. Defaults to `"groups"` if
            `num_generations` is above 1, else to `"rows"`.
        generation_batch_size (`int`, *optional*):
            In `train` and `evaluate`, rows that the model samples at a time. Defaults to all of an iteration.
        stop_strings (`list[str]`, *optional*):
            In `train` and `evaluate`, texts that end a response; they belong to it.
        log_completions (`bool`, *optional*, defaults to `False`):
            In `train`, prompts, completions and rewards of each iteration go to `completions/` in `output_dir` as
            parquet, to trackers that have tables, and some rows to the terminal (this needs rich).
        num_completions_to_print (`int`, *optional*, defaults to `4`):
            How many rows go to the terminal.
        skip_unscored (`bool`, *optional*, defaults to `False`):
            In `train`, a response to which a reward function gives None or NaN is left out of the update. Otherwise it
            is an error.
        reward_timeout (`float`, *optional*):
            Seconds that the reward functions may take for the responses of an iteration, reward models not counted. No
            limit by default.
        exact_kl (`bool`, *optional*, defaults to `True`):
            Report the KL of the policy that sampled. `generate` notes its log-probs; for responses from elsewhere the
            policy reads the rollouts once more before the update. With `False` their KL is taken while the update
            moves the policy, and is also reported as `objective/kl_at_first_visits`.
        max_kl (`float`, *optional*):
            `train` stops after an iteration whose KL to pi_init was above it, nats a response.
        reward_weights (`list[float]`, *optional*):
            Of the trainer's reward functions, whose weighted sum is the score. Defaults to 1 each.
        chat_template_kwargs (`dict`, *optional*):
            More arguments of the tokenizer's chat template, for prompts that are chat messages.
        max_completion_length (`int`, *optional*, defaults to `128`):
            `max_new_tokens` of `generate` unless the call says otherwise.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of sampling, and of the log-probs in the update.
        top_p (`float`, *optional*, defaults to `1.0`), top_k (`int`, *optional*, defaults to `0`):
            Of sampling. The losses assume the full distribution: leave both off unless you know why not.
        padding_free (`bool`, *optional*):
            Run the networks on the tokens of a micro-batch in one row, without padding. By default wherever they are
            seen to compute the same from it; `True` raises elsewhere, `False` never does.
        value_learning_rate (`float`, *optional*):
            Learning rate of the value model. Defaults to `learning_rate`; if that is not given either, to its default
            for what the value model trains.
        value_max_grad_norm (`float`, *optional*):
            Clip the value model's gradient by itself, at this norm; `max_grad_norm` then clips the policy's alone. By
            default `max_grad_norm` clips the gradient of both together, so that the larger one scales the other down.
        num_unfrozen_layers (`int`, *optional*):
            Train only so many of the highest layers of the policy and of its separate value model; the paper's HH
            experiments trained two. The reference shares what is frozen of the policy. Defaults to all layers.
        early_stopping (`bool`, *optional*, defaults to `False`):
            After an epoch over the rollouts whose last mini-batch has moved by more than `1.5 * target_kl` from the
            policy that sampled them, leave out the epochs that remain.
        target_kl (`float`, *optional*, defaults to `1.0`):
            Size of the mean of log pi_old - log pi over the tokens of that mini-batch, nats.
        ratio_threshold (`float`, *optional*):
            PPO only: a mini-batch whose mean ratio exceeds it is skipped, with a warning. Defaults to `10.0`.
        push_to_hub_if_best_kwargs (`dict`, *optional*), compare_steps (`int`, *optional*, defaults to `1`):
            Every `compare_steps` calls of `step`: if the mean of the scores is the highest yet, the policy that earned
            them is uploaded by `push_to_hub` with these arguments, of which `repo_id` is one, before it is updated.
        optimize_device_cache (`bool`, *optional*, defaults to `False`):
            Empty the device's cache after every backward pass: `torch_empty_cache_steps=1`.
        steps (`int`, *optional*, defaults to `20000`):
            Total rollouts per process in the classic loop: `ceil(steps / batch_size)` calls of `step` are what a
            decaying `lr_scheduler_type` stretches over.
        resume_anyway (`list[str]`, *optional*):
            `train(resume_from_checkpoint=...)` refuses a checkpoint of a run with another loss, other data, rewards,
            batch sizes, ... (`docs/resuming.md` lists them), except for the options that are named here.
        tracker_project_name (`str`, *optional*):
            Project in W&B, Trackio and Comet. Defaults to the tracker's own setting; classic's default was "trl".
        tracker_kwargs (`dict` or JSON, *optional*):
            For each tracker what its run is opened with, over what the Trainer's reporter gives:
            `{"wandb": {"entity": "team"}}`. They go to `wandb.init`, `trackio.init`, `comet_ml.start` (with
            `experiment_config` as a dict) or TensorBoard's `SummaryWriter`; other trackers take none.
        log_with (*optional*):
            Classic's name of `report_to`. It also takes tracker objects of accelerate's, alone or in a list: they get
            every number that is logged.
        project_kwargs (`dict` or JSON, *optional*):
            Of accelerate's `ProjectConfiguration`: TensorBoard writes to its `logging_dir`.
        learning_rate (`float`, *optional*):
            By default 1.41e-5, and 3e-4 for a policy whose adapters alone are trained: the trainer chooses, and sets
            it here. [`PPOConfig`] keeps classic's 1.41e-5 for both.
        lr_scheduler_type (*optional*, defaults to `"constant"`):
            As in `TrainingArguments`, with another default.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            As in `TrainingArguments`; TRL's configs have another default. `logging_nan_inf_filter`, which waits for
            the device at each loss, is on by default with fp16 only: elsewhere a gradient that is not finite ends the
            run. `bf16` is on by default where a GPU supports it and off elsewhere.

    Raises:
        ValueError: naming the option, when one is out of range or not finite (inf is taken where it says that there
            is no limit), when an option and its alias disagree, or when `batch_size` does not divide into
            mini-batches, or not into `num_mini_batches`.
        ImportError: if a tracker in `report_to` (classic: `log_with`) is not installed.
    """

    defines_run: ClassVar[tuple[str, ...]] = DEFINES_RUN
    aliases: ClassVar[dict[str, str]] = {**ALIASES, "init_kl_coef": "kl_coef"}
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*_BaseConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]
    # Instead of the algorithm's own default.
    _default_kl_coef: ClassVar[dict[str, float]] = {}
    _default_batch_size: ClassVar[int] = 64
    _largest_mini_batch: ClassVar[int] = 8

    loss_type: str = option("apa", f"Policy loss: {', '.join(ALGORITHMS)}, or module:name of an Algorithm.")
    kl_coef: float | None = option(
        None,
        "lambda of the paper's objective (2); PPO, RLOO: the initial KL coefficient. By default loss_type's: apa 0.1, "
        "awr 1, ppo and rloo 0.05, qrpo 0.03, grpo and cispo 0, the others 0.2.",
    )
    advantage_estimator: str = option(
        None,
        f"How rewards become advantages: {', '.join(ESTIMATORS)}, or module:name; only gae needs a value model. "
        "By default loss_type's: gae for apa, awr and ppo.",
    )
    group_normalization: str | None = option(
        None,
        "With advantage_estimator='group': 'none', or divide by the group's 'std', by default for grpo and cispo.",
    )
    normalizer: str | None = option(
        None, "apa, response_apa: 'none' (by default), 'group' or 'learned' for log Z(s) in the target."
    )
    num_ref_samples: int = option(
        8, "With quantile and optimal_value: responses of pi_init to each prompt, with which rewards are compared."
    )
    value_kl_coef: float | None = option(None, "With optimal_value: beta_1 of A*-PO; kl_coef by default.")
    gamma: float = option(1.0, "Discount from one token to the next.")
    gae_lambda: float = option(0.95, "lambda of generalised advantage estimation.")
    turn_discount: float = option(1.0, "Discount from one turn of a response to the next, beside gamma.")
    gae_over: str = option("tokens", "What one step of GAE is: 'tokens', or 'turns' of rollouts with tools.")
    vf_coef: float = option(1.0, "Weight of the value loss.")
    whiten_advantages: bool | None = switch(
        "Give the iteration's advantages mean 0 and variance 1; by default for apa, awr and ppo."
    )
    whiten_rewards: bool = option(False, "Divide token rewards by their standard deviation.")
    scale_rewards: bool = option(False, "Divide scores by their running standard deviation.")
    center_rewards: bool = option(False, "With scale_rewards, subtract the running mean first.")
    score_clip: float | None = option(None, "Clip scores to [-score_clip, score_clip] after scaling.")
    missing_eos_penalty: float | None = option(None, "Subtracted from the score of a response without EOS.")
    batch_size: int = option(
        None, "Rollouts of one process in one iteration; 64 by default, or one mini-batch if that is more."
    )
    per_device_train_batch_size: int = option(
        None, "Rollouts in one forward pass of the update; by default the most up to 8 that divide batch_size."
    )
    tokens_per_micro_batch: int | None = option(
        None, "Most tokens in one forward pass of the update, in place of a number of rows."
    )
    num_epochs_per_batch: int = option(2, "Passes over the rollouts of an iteration.")
    cliprange: float | None = option(None, "ppo, grpo, rloo: clip range of the ratio; 0.2 by default.")
    cliprange_high: float | None = option(
        None, "grpo, rloo, cispo: clip range above 1; cliprange by default, for cispo 4."
    )
    loss_aggregation: str | None = option(None, "grpo: 'dapo' (by default), 'grpo' or 'dr_grpo'.")
    kl_in: str | None = option(
        None, "Policy gradients: charge 'reward' or 'loss' for KL; the reward by default for ppo and rloo."
    )
    importance_correction: str | None = option(None, "Policy gradients: 'truncate' or 'mask' ratios to the sampler.")
    importance_level: str | None = option(
        None, "With importance_correction: ratios of a 'token' (by default) or a 'sequence' (for rloo)."
    )
    importance_max: float | None = option(3.0, "With importance_correction: largest ratio.")
    importance_min: float | None = option(None, "With importance_correction: smallest ratio; no bound by default.")
    cliprange_value: float | None = option(None, "Clip range of the values in the value loss; none by default.")
    init_kl_coef: float | None = option(None, "ppo only: classic's name of kl_coef.")
    adap_kl_ctrl: bool | None = switch("With KL in the reward: adapt the coefficient; by default for ppo.")
    target: float | None = option(
        None, "With KL in the reward: what the controller aims at, nats per sequence; 6 by default."
    )
    horizon: float | None = option(
        None, "With KL in the reward: responses over which the controller reacts; 10000 by default."
    )
    kl_penalty: str | None = option(
        None,
        "Policy gradients: the KL charged: 'kl', 'abs', 'mse', 'k3', 'full'; 'kl' in the reward, 'k3' in the loss.",
    )
    max_prompt_length: int | None = option(None, "train(): keep the last tokens of a prompt; all by default.")
    num_generations: int = option(1, "train(): responses to each prompt of an iteration.")
    shuffle: str | None = option(
        None,
        "Draw 'rows' or 'groups' of a prompt into optimizer steps; groups if num_generations is above 1.",
    )
    generation_batch_size: int | None = option(None, "train(): rows that are sampled at a time; all by default.")
    stop_strings: list[str] | None = option(None, "train(): texts that end a response.")
    log_completions: bool = option(False, "train(): show, save and track the completions of each iteration.")
    num_completions_to_print: int = option(4, "With log_completions: rows on the terminal, chosen at random.")
    skip_unscored: bool = option(False, "train(): leave out responses that a reward function gives None or NaN.")
    reward_timeout: float | None = option(
        None, "Seconds that reward functions may take for one iteration; no limit by default."
    )
    exact_kl: bool = option(True, "Report the KL of the policy that sampled, with a forward pass where it is unknown.")
    max_kl: float | None = option(None, "train(): stop when an iteration's KL is above it, nats a response.")
    reward_weights: list[float] | None = option(
        None, "A weight for each reward, models before functions; 1 each by default."
    )
    chat_template_kwargs: Json = option(None, "JSON; more arguments of the chat template.")
    max_completion_length: int = option(128, "Most tokens of a response, unless a call of generate says otherwise.")
    temperature: float = option(1.0, "Of sampling and of the log-probs in the update.")
    top_p: float = option(1.0, "Sample from the likeliest tokens with this share of the probability; 1 is off.")
    top_k: int = option(0, "Sample from so many likeliest tokens; 0 is off.")
    padding_free: bool | None = switch("No padding in the update; by default wherever that is exact.")
    value_learning_rate: float | None = option(None, "Learning rate of the value model; learning_rate by default.")
    value_max_grad_norm: float | None = option(
        None, "Clip the value model's gradient at this norm; by default max_grad_norm clips both networks' together."
    )
    num_unfrozen_layers: int | None = option(
        None, "Train only so many of the highest layers of each network; all by default."
    )
    steps: int = option(20000, "Rollouts a process will see in the classic loop.")
    early_stopping: bool = option(
        False, "Leave out an iteration's remaining epochs when the policy has moved by 1.5 times target_kl."
    )
    target_kl: float = option(1.0, "With early_stopping: KL to the policy that sampled, nats a token.")
    ratio_threshold: float | None = option(None, "ppo: skip a mini-batch whose mean ratio is above it; 10 by default.")
    optimize_device_cache: bool = option(False, "Empty the device's cache after every backward pass.")

    resume_anyway: list[str] | None = option(
        None, "Options in which a resumed checkpoint may differ although they define its run."
    )
    tracker_project_name: str | None = option(None, "Project in W&B, Trackio and Comet; the tracker's own if unset.")
    tracker_kwargs: Json = option(None, "JSON: for each tracker what opens its run.")

    learning_rate: float = learning_rate_option()
    lr_scheduler_type: str = option("constant", "Schedule of the learning rate.")
    logging_nan_inf_filter: bool | None = switch("Keep NaN out of the logged loss; by default with fp16 alone.")
    gradient_checkpointing: bool | None = switch("Trade compute for memory; off by default.")

    lam: float | None = option(None, "Classic's name of gae_lambda.")
    ppo_epochs: int | None = option(None, "Classic's name of num_epochs_per_batch.")
    mini_batch_size: int | None = option(None, "Classic's name of per_device_train_batch_size.")
    log_with: str | None = option(None, "Classic's name of report_to.")
    use_score_scaling: bool | None = switch("Classic's name of scale_rewards.")
    use_score_norm: bool | None = switch("Classic's name of center_rewards.")
    forward_batch_size: int | None = option(None, "Classic's old name of mini_batch_size.")
    optimize_cuda_cache: bool | None = switch("Classic's old name of optimize_device_cache.")
    beta: float | None = option(None, "GRPO's name of kl_coef.")
    epsilon: float | None = option(None, "GRPO's name of cliprange.")
    num_iterations: int | None = option(None, "GRPO's name of num_epochs_per_batch.")

    exp_name: str | None = option(None, "Name of the run for trackers; classic's name of run_name.")
    task_name: str | None = option(None, "Kept for the record.")
    model_name: str | None = option(None, "Kept for the record; scripts load the model by it.")
    query_dataset: str | None = option(None, "Kept for the record.")
    reward_model: str | None = option(None, "Kept for the record; scripts load the reward model by it.")
    compare_steps: int = option(1, "With push_to_hub_if_best_kwargs: every how many calls of step to look.")
    push_to_hub_if_best_kwargs: Json = option(
        None, "JSON; arguments of push_to_hub, called before a step with the best scores yet."
    )
    accelerator_kwargs: Json = option(None, "JSON; without effect.")
    project_kwargs: Json = option(
        None, "JSON; of accelerate's ProjectConfiguration: TensorBoard writes to logging_dir."
    )
    dataset_num_proc: int | None = option(None, "Without effect.")
    is_encoder_decoder: bool | None = option(None, "Read it; the trainer sets it.")
    is_peft_model: bool | None = option(None, "Read it; the trainer sets it.")
    backward_batch_size: int = option(None, "Read it: mini_batch_size times gradient_accumulation_steps.")
    global_batch_size: int | None = option(None, "Read it; the trainer sets it.")
    global_backward_batch_size: int | None = option(None, "Read it; the trainer sets it.")

    def __post_init__(self) -> None:
        with errors_without_secrets(vars(self), quoted=False):
            note_default_rate(self)
            check_finite_options(self)
            self._translate_classic_only()
            algorithm_of(self.loss_type)
            fill_by_algorithm(self)
            estimator_of(self.advantage_estimator)
            trl_0_12.translate(self)
            self._translate_aliases()
            self._fill_by_loss_type()
            fill_importance_level(self)
            for name in BY_ESTIMATOR:
                fill_by_estimator(self, name)
            self._check_ranges()
            self._check_hub_options()
            self._check_vllm()
            self._check_tool_options()
            fill_batch_sizes(self)
            self._fill_aliases()
            if self.optimize_device_cache and self.torch_empty_cache_steps is None:
                self.torch_empty_cache_steps: int | None = 1
            if self.logging_nan_inf_filter is None:
                self.logging_nan_inf_filter = bool(self.fp16)
            if self.bf16 is None:
                self.bf16: bool | None = default_bf16(self.fp16, self.use_cpu)
            super().__post_init__()
            self._check_world_size()
            check_horizon(self)
            self._check_trackers()
        self.mark_as_made()

    def check_sizes(self) -> None:
        """Look at options that have to fit each other, which are set one after the other.

        Raises:
            ValueError: naming the options, if sizes do not divide each other, or the KL controller's horizon is too
                short for them.
        """
        check_batch_sizes(self)
        check_horizon(self)

    @property
    def algorithm(self) -> Algorithm:
        """What `loss_type` names."""
        return algorithm_of(self.loss_type)

    @property
    def estimator(self) -> AdvantageEstimator:
        """What `advantage_estimator` names."""
        return estimator_of(self.advantage_estimator)

    def reads(self, option: str) -> bool:
        """Whether algorithm and estimator read an option that only some of them read."""
        return estimator_reads(self, option) if option in BY_ESTIMATOR else option in self.algorithm.options

    @property
    def kl_in_reward(self) -> bool:
        """Whether the reward of each token is charged `kl_coef` times its KL."""
        if not self.reads("kl_in"):
            return self.algorithm.kl_in_reward
        return (self.kl_in or self.algorithm.options["kl_in"]) == "reward"

    @property
    def needs_groups(self) -> bool:
        """Whether advantages are made of what differs between the responses to a prompt."""
        return self.estimator.needs_groups or self.normalizes_groups

    @property
    def normalizes_groups(self) -> bool:
        """Whether log Z of each prompt is estimated from its responses."""
        return self.reads("normalizer") and self.normalizer == "group"

    @property
    def learns_normalizer(self) -> bool:
        """Whether log Z(s) is learned from the policy's hidden states."""
        return self.reads("normalizer") and self.normalizer == "learned"

    @property
    def compares_by(self) -> str:
        """The option that lets `needs_groups` be True, in words."""
        by_estimator = self.estimator.needs_groups
        return f"advantage_estimator={self.advantage_estimator!r}" if by_estimator else "normalizer='group'"

    @property
    def shuffles_groups(self) -> bool:
        """Whether rollouts with the same prompt are drawn into optimizer steps together."""
        return self.shuffle == "groups" if self.shuffle is not None else self.num_generations > 1

    @property
    def total_ppo_epochs(self) -> int:
        """Calls of `step` that `steps` rollouts a process make."""
        return math.ceil(self.steps / self.batch_size)

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps over the rollouts of one iteration."""
        return self.num_epochs_per_batch * self.batch_size // self.backward_batch_size

    def to_dict(self) -> dict[str, Any]:
        """Every option and `total_ppo_epochs`, without dicts in it: `tracker_kwargs/wandb/entity`, say.

        Trackers get this: keys and tokens are left out of it.
        """
        from trl_apa.classic.core import flatten_dict

        named = [tracker.name for tracker in tracker_objects(self.log_with)]
        trackers = {"log_with": [*self.report_to, *named]} if named else {}
        return flatten_dict(super().to_dict() | {"total_ppo_epochs": self.total_ppo_epochs} | trackers)

    def __getstate__(self) -> dict[str, Any]:
        """As without tracker objects, which hold files and connections and cannot be pickled."""
        state = super().__getstate__()
        return state | {"log_with": tracker_names(self.log_with)} if tracker_objects(self.log_with) else state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that sends its numbers to the same tracker objects."""
        return super().__deepcopy__(memo | {id(tracker): tracker for tracker in tracker_objects(self.log_with)})

    def _translate_classic_only(self) -> None:
        """What only classic configs have: renamed with a warning, read, or without effect and told so."""
        if self.forward_batch_size is not None:
            warnings.warn("forward_batch_size is an old name: use mini_batch_size", FutureWarning, stacklevel=4)
            self.mini_batch_size = self.forward_batch_size
        if self.max_grad_norm is None:
            self.max_grad_norm: float | None = 0.0
        if self.report_to is None:
            self.report_to: str | list[str] = "none"
        if self.exp_name is not None and self.run_name is None:
            self.run_name: str | None = self.exp_name
        for name in WITHOUT_EFFECT:
            self._parse_json(name)
            self._warn_of_classic_only(name)

    def _warn_of_classic_only(self, name: str) -> None:
        value = getattr(self, name)
        if value:
            text = f"{name}={without_secrets(value, vars(self))!r} has no effect: {WITHOUT_EFFECT[name]}"
            warnings.warn(text, UserWarning, stacklevel=5)

    def _parse_json(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            try:
                setattr(self, name, json.loads(value))
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} is not JSON: {error}") from error

    def _settle_trackers(self) -> None:
        """Keep a script's own tracker objects in `log_with`, and in `report_to` the names alone."""
        if objects := tracker_objects(self.report_to):
            given = self.log_with if isinstance(self.log_with, list | tuple) else [self.log_with]
            self.log_with = [*(t for t in given if t is not None), *objects]  # type: ignore[assignment]  # a list
            self.report_to = tracker_names(self.report_to) or "none"

    def _check_trackers(self) -> None:
        from trl_apa.trainer.reporting import check_trackers  # which needs what a list of options does not

        self._parse_json("tracker_kwargs")
        self._parse_json("project_kwargs")
        check_project_kwargs(self.project_kwargs)
        self.tracker_kwargs = self.tracker_kwargs or {}
        project_name = without_secrets(self.tracker_project_name, vars(self))
        check_trackers(self.report_to, self.tracker_kwargs, project_name)
        if self.tracker_project_name is not None:
            self.project = self.tracker_project_name  # what Trackio's reporter goes by

    def _translate_aliases(self) -> None:
        self._settle_trackers()
        for alias, name in ALIASES.items():
            value, current = getattr(self, alias), getattr(self, name)
            value = tracker_names(value) if alias == "log_with" else value
            default = type(self).__dataclass_fields__[name].default
            if value is None:
                continue
            if current not in (default, value, [value]):
                if value == default:
                    continue
                raise ValueError(
                    f"{alias}={value!r} and {name}={current!r} are the same option: set one of them, the other to None"
                )
            setattr(self, name, value)

    def _fill_aliases(self) -> None:
        """Classic scripts read their own names back (`config.mini_batch_size`)."""
        for alias, name in ALIASES.items():
            if alias not in NOT_READ_BACK:
                setattr(self, alias, getattr(self, name))

    def _name_of_ours(self, name: str) -> str:
        if name == "init_kl_coef" and not self.kl_in_reward:
            return name  # lambda of APA and AWR has another meaning
        return super()._name_of_ours(name)

    def _take(self, name: str, value: Any) -> None:
        """Set an option after construction: under all its names, translated and checked as at construction."""
        ours = self._name_of_ours(name)
        self._set_all_names(name, as_read_at_construction(name, ours, getattr(self, ours), value))
        if isinstance(value, str) and (name in WITHOUT_EFFECT or name in self._VALID_DICT_FIELDS or name in JSON):
            self._parse_json(name)
        check_not_none(self, ours)
        self._set_what_follows_from(ours)
        fill_evaluation(self)
        check_finite_options(self)
        self._check_ranges()
        self._check_hub_options()
        self._check_vllm()
        self._check_tool_options()
        if ours in TRACKER_OPTIONS:
            self._check_trackers()

    def _set_what_follows_from(self, ours: str) -> None:
        """Set what construction computes from an option, and warn as it does."""
        if ours in WITHOUT_EFFECT:
            self._warn_of_classic_only(ours)
        elif ours in SELECTIVE_OPTIONS:
            self._fill_selective_option(ours)
        elif ours in BY_ESTIMATOR:
            fill_by_estimator(self, ours)
        elif ours == "importance_level":
            fill_importance_level(self)
        elif ours == "whiten_advantages":
            fill_by_algorithm(self)
        elif ours == "kl_coef":
            if self.kl_coef is None:
                self.kl_coef = self._default_kl_coef.get(self.loss_type, self.algorithm.kl_coef)
            if self.kl_in_reward:
                self.init_kl_coef = self.kl_coef
        elif ours == "init_kl_coef":
            self._warn_without_effect(ours)
        elif ours == "report_to":
            given = list(self.report_to)
            if self.log_with is not None or tracker_objects(given):
                self.log_with = given[0] if len(given) == 1 else given or None  # type: ignore[assignment]  # a list
            self.report_to = tracker_names(given) or []
        elif ours == "exp_name":
            self.run_name = self.exp_name
        elif ours == "optimize_device_cache":
            self.torch_empty_cache_steps = 1 if self.optimize_device_cache else None
        elif ours in SIZES:
            self.num_mini_batches = None

    def _fill_by_loss_type(self) -> None:
        for name in SELECTIVE_OPTIONS:
            self._fill_selective_option(name)
        default = self._default_kl_coef.get(self.loss_type, self.algorithm.kl_coef)
        if not self.kl_in_reward:
            self._warn_without_effect("init_kl_coef")
            self._warn_without_effect("kl_estimator")
        elif self.init_kl_coef is not None and self.kl_coef in (None, default):
            self.kl_coef = self.init_kl_coef
        elif self.init_kl_coef not in (None, default, self.kl_coef):
            raise ValueError(f"init_kl_coef={self.init_kl_coef} and kl_coef={self.kl_coef}: set one of them")
        if self.kl_coef is None:
            self.kl_coef = default
        if self.kl_in_reward:
            self.init_kl_coef = self.kl_coef

    def _fill_selective_option(self, name: str) -> None:
        if not self.reads(name):
            self._warn_without_effect(name)
        elif name in OF_KL_CONTROL and not self.kl_in_reward:
            self._warn_without_effect(name)
        elif getattr(self, name) is None:
            in_the_loss = name == "kl_penalty" and not self.kl_in_reward
            setattr(self, name, "k3" if in_the_loss else self.algorithm.options[name])

    def _warn_without_effect(self, name: str) -> None:
        if getattr(self, name) is None:
            return
        setting, readers = f"loss_type={self.loss_type!r}", readers_of(name)
        if name in OF_KL_CONTROL and self.reads(name):
            setting, readers = "kl_in='loss'", "only kl_in='reward' reads it"
        text = f"{name}={getattr(self, name)!r} has no effect with {setting}: {readers}"
        warnings.warn(text, UserWarning, stacklevel=5)

    def _check_ranges(self) -> None:
        positive = POSITIVE if self.algorithm.prices_kl else [*POSITIVE, "kl_coef"]
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: it should be greater than 0")
        if self.shuffle not in (None, "rows", "groups"):
            raise ValueError(f"shuffle={self.shuffle!r}: it should be 'rows' or 'groups'")
        if self.shuffle == "rows" and self.algorithm.compares_responses:
            raise ValueError(
                f"shuffle='rows' draws each response by itself, but loss_type={self.loss_type!r} compares those to "
                "one prompt: leave it out"
            )
        check_optimizer_options(self)
        if self.value_max_grad_norm is not None and self.reads("value_max_grad_norm") and not self.max_grad_norm:
            raise ValueError(
                f"value_max_grad_norm={self.value_max_grad_norm} needs max_grad_norm for the policy: set that to inf "
                "to leave the policy unclipped"
            )
        check_reward_weights(self.reward_weights)
        for name in ("kl_coef", "vf_coef", "top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: it should not be negative")
        for name in ("gamma", "gae_lambda", "turn_discount", "top_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: it should be between 0 and 1")
        if not isinstance(self.scale_rewards, bool):
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r}: it should be True or False. GRPO's 'group' and 'none' are "
                "group_normalization='std' and 'none', with advantage_estimator='group'"
            )
        check_estimator_options(self)
        check_importance_options(self)
        if self.kl_penalty not in (None, "kl", "abs", "mse", "k3", "full"):
            raise ValueError(f"kl_penalty={self.kl_penalty!r}: it should be one of kl, abs, mse, k3, full")
        if self.kl_in not in (None, "reward", "loss"):
            raise ValueError(f"kl_in={self.kl_in!r}: it should be 'reward' or 'loss'")
        in_loss = self.reads("kl_in") and not self.kl_in_reward
        if in_loss and self.kl_penalty == "full":
            raise ValueError("kl_penalty='full' needs kl_in='reward': in the loss only sampled tokens are known")
        if in_loss and self.kl_penalty == "kl" and self.kl_coef != 0:
            raise ValueError(
                "kl_penalty='kl' with kl_in='loss' charges nothing: the expected gradient of log pi - log pi_init is "
                "0. Set kl_penalty to 'mse' or 'k3', or kl_in='reward'"
            )
        if self.normalizer not in (None, "none", "group", "learned"):
            raise ValueError(f"normalizer={self.normalizer!r}: it should be 'none', 'group' or 'learned'")
        if self.loss_aggregation not in (None, *GRPO_AGGREGATIONS):
            names = ", ".join(GRPO_AGGREGATIONS)
            raise ValueError(f"loss_aggregation={self.loss_aggregation!r}: it should be one of {names}")

    def _check_hub_options(self) -> None:
        self._parse_json("push_to_hub_if_best_kwargs")
        given = self.push_to_hub_if_best_kwargs
        if given and not isinstance(given, dict):
            raise ValueError(f"push_to_hub_if_best_kwargs is a {type(given).__name__}: it should be a dict")
        if given and "repo_id" not in given:
            names = ", ".join(without_secrets(list(map(str, given))))
            raise ValueError(f"push_to_hub_if_best_kwargs has {names}: it should have a repo_id")


def readers_of(name: str) -> str:
    """Which losses read an option, in words."""
    if name in ("init_kl_coef", "kl_estimator"):
        return "only kl_in='reward' reads it"
    return only_read_by(loss for loss, algorithm in ALGORITHMS.items() if name in algorithm.options)


def _backward_batch_size(config: APAConfig) -> int:
    """Rollouts of one process in one optimizer step."""
    size: int = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return size


# A property, so that it follows the options that it is computed from; what is given for the field is not kept.
APAConfig.backward_batch_size = property(  # type: ignore[assignment]  # in place of the field
    _backward_batch_size, lambda config, given: None
)
