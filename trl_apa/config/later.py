"""Options that are set after the config was made: they take effect under all their names, or raise an error."""

import gc
import os
import weakref
from collections.abc import Iterator
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol

from transformers.integrations import get_available_reporting_integrations

from trl_apa.config.rates import forget_default_rate
from trl_apa.config.sizes import SIZES
from trl_apa.config.trackers import tracker_names, tracker_objects
from trl_apa.config.vllm import VLLMOptions
from trl_apa.redaction import errors_without_secrets, without_secrets


class Moment(Enum):
    """From when on an option is fixed."""

    CONFIG = "the config was made"
    TRAINER = "the trainer was made"
    SCHEDULE = "the learning rate schedule was made"
    DEEPSPEED = "DeepSpeed's engine was made"
    TRAINING = "train() began"


class Fixed(NamedTuple):
    """An option that cannot be changed at any time.

    Args:
        since: the moments after which an assignment raises.
        advice: what to do instead.
        of_kl_penalty: whether it is fixed only for algorithms with a KL penalty in the reward.
    """

    since: tuple[Moment, ...]
    advice: str
    of_kl_penalty: bool = False


def _fixed(since: Moment, advice: str, *names: str, of_kl_penalty: bool = False) -> dict[str, Fixed]:
    return {name: Fixed((since,), advice, of_kl_penalty) for name in names}


BEFORE_TRAIN = "set it before train(), which has counted its steps by it"
# Option -> from when on it is fixed. Every other option is read where it is used, and counts from the next call of
# `step`, `generate` or `train` on.
FIXED: dict[str, Fixed] = {
    **_fixed(
        Moment.CONFIG,
        "give it when the config is made",
        *(
            "loss_type",
            "kl_in",
            "advantage_estimator",
            "bf16",
            "fp16",
            "tf32",
            "use_cpu",
            "torch_compile",
            "torch_compile_backend",
        ),
        *("torch_compile_mode", "accelerator_config", "deepspeed", "fsdp", "fsdp_config", "ddp_backend"),
        *("ddp_timeout", "world_size"),
    ),
    **_fixed(Moment.CONFIG, "set kl_penalty", "kl_estimator"),
    **_fixed(Moment.CONFIG, "set stop_token_id", "stop_token"),
    **_fixed(Moment.CONFIG, "set batch_size or mini_batch_size", "num_mini_batches"),
    **_fixed(
        Moment.CONFIG,
        "it is computed: set mini_batch_size or gradient_accumulation_steps",
        *("backward_batch_size", "global_backward_batch_size"),
    ),
    **_fixed(Moment.CONFIG, "it is computed: set batch_size", "global_batch_size"),
    **_fixed(Moment.TRAINER, "the trainer sets it", "is_encoder_decoder", "is_peft_model"),
    **_fixed(Moment.TRAINER, "set 'lr' in the groups of trainer.optimizer.param_groups", "learning_rate"),
    **_fixed(Moment.TRAINER, "set 'lr' in the value model's groups of trainer.optimizer", "value_learning_rate"),
    **_fixed(
        Moment.TRAINER,
        "set the option in the groups of trainer.optimizer.param_groups",
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
    **_fixed(Moment.TRAINER, "give the trainer another optimizer=", "optim", "optim_args", "optim_target_modules"),
    **_fixed(
        Moment.SCHEDULE,
        "set 'lr' in trainer.optimizer.param_groups, or give the trainer an lr_scheduler=",
        *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "steps"),
    ),
    **_fixed(Moment.TRAINER, "set trainer.kl_ctl.value", "kl_coef", "init_kl_coef", of_kl_penalty=True),
    **_fixed(Moment.TRAINER, "set trainer.kl_ctl.target", "target", of_kl_penalty=True),
    **_fixed(Moment.TRAINER, "set trainer.kl_ctl.horizon", "horizon", of_kl_penalty=True),
    **_fixed(
        Moment.TRAINER,
        "set trainer.kl_ctl to an AdaptiveKLController or a FixedKLController",
        *("adap_kl_ctrl",),
        of_kl_penalty=True,
    ),
    **_fixed(
        Moment.TRAINER,
        "set it before the trainer is made, or call trainer.add_callback with the tracker's callback",
        *("report_to", "log_with", "run_name", "exp_name", "project", "tracker_project_name", "tracker_kwargs"),
        *("project_kwargs",),
        *("trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
    ),
    **_fixed(
        Moment.TRAINER,
        "set it before the trainer is made, or call transformers.set_seed",
        *("seed", "data_seed", "full_determinism"),
    ),
    **_fixed(
        Moment.TRAINER,
        "set it before the trainer is made",
        *("num_unfrozen_layers", "model_adapter_name", "ref_adapter_name", "padding_free", "stop_token_id"),
        *("reward_weights", "skip_unscored", "reward_timeout", "remove_unused_columns", "num_ref_samples"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
        *("activation_checkpointing_kwargs", "use_liger_kernel", "liger_kernel_config", "parallelism_config"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("push_to_hub", "disable_tqdm", "skip_memory_metrics", "enable_jit_checkpoint", "use_cache"),
        *VLLMOptions.__dataclass_fields__,
    ),
    **_fixed(
        Moment.TRAINING,
        BEFORE_TRAIN,
        *("batch_size", "per_device_train_batch_size", "num_epochs_per_batch", "num_generations", "max_steps"),
        *("num_train_epochs", "total_episodes"),
    ),
    "gradient_accumulation_steps": Fixed((Moment.TRAINING, Moment.DEEPSPEED), BEFORE_TRAIN),
    **_fixed(Moment.DEEPSPEED, "set it before the trainer is made", "max_grad_norm"),
    **_fixed(Moment.TRAINER, "leave it out: it would add noise to the log-ratio to pi_init", "neftune_noise_alpha"),
}
# Other names of options, beside the config's `aliases`, that only count when they are set.
MORE_ALIASES = {
    "forward_batch_size": "per_device_train_batch_size",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
# Marks of a config that are no options: whether it is made, and the trainers that use it.
MADE, USERS = "_is_made", "_users"


class User(Protocol):
    """A trainer, to its config."""

    def moments(self) -> set[Moment]:
        """What has happened in the trainer, after which options are fixed."""

    def follow_option(self, name: str) -> None:
        """An option has another value: bring up to date what was computed from it."""


class OptionsSetLater:
    """A mixin of dataclasses of options, above those whose `__setattr__` it replaces.

    While the config is made, attributes are set as they are. `mark_as_made` ends that: then each assignment to an
    option sets all its names, is checked as at construction, and raises where it could have no effect.
    """

    aliases: ClassVar[dict[str, str]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """
        Raises:
            ValueError: naming the option, if it is out of range or cannot be changed any more. Nothing has changed
                then.
        """
        held = vars(self)
        if not held.get(MADE) or name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]  # of the config
            super().__setattr__(name, value)
            return
        if name == "learning_rate":
            forget_default_rate(self)  # also where it is set to the default's own number
        if _is_same(getattr(self, name), value):
            return
        self._check_not_fixed(name, value)
        before = dict(held)
        held[MADE] = False
        try:
            with errors_without_secrets({**before, name: value}, quoted=False):
                self._take(name, value)
        except BaseException:
            held.clear()
            held.update(before)
            raise
        held[MADE] = True
        for user in self._living_users():
            user.follow_option(self._name_of_ours(name))

    def _take(self, name: str, value: Any) -> None:
        raise NotImplementedError

    def _name_of_ours(self, name: str) -> str:
        return {**self.aliases, **MORE_ALIASES}.get(name, name)

    def _set_all_names(self, name: str, value: Any) -> None:
        """Set an option and those of its aliases that are read: all but those that were never set."""
        ours = self._name_of_ours(name)
        vars(self)[ours] = value
        for alias in (*self.aliases, *MORE_ALIASES):
            if self._name_of_ours(alias) == ours and (alias == name or vars(self).get(alias) is not None):
                vars(self)[alias] = value

    def mark_as_made(self) -> None:
        """From now on assignments are checked."""
        vars(self)[MADE] = True

    def add_user(self, user: User) -> None:
        """Note that a trainer uses these options; some are fixed while it lives."""
        vars(self)[USERS] = [*vars(self).get(USERS, []), weakref.ref(user)]

    def set_unchecked(self, **values: Any) -> None:
        """Set what a trainer computes."""
        vars(self).update(values)

    def _living_users(self) -> Iterator[User]:
        for reference in vars(self).get(USERS, []):
            user = reference()
            if user is not None:
                yield user

    def _check_not_fixed(self, name: str, value: Any) -> None:
        fixed = FIXED.get(name) or FIXED.get(self._name_of_ours(name))
        if fixed is None or (fixed.of_kl_penalty and not self.kl_in_reward):  # type: ignore[attr-defined]  # of the config
            return
        since = self._moment_reached(fixed)
        if since not in (None, Moment.CONFIG):
            gc.collect()  # a trainer that was deleted lives on in its cycles until then
            since = self._moment_reached(fixed)
        if since is None:
            return
        other_trainer = "" if since is Moment.CONFIG else "; for another trainer set it on copy.copy(config)"
        raise ValueError(
            f"{name}={without_secrets(value, vars(self))!r} is set after {since.value} and would have no effect: "
            f"{fixed.advice}{other_trainer}"
        )

    def _moment_reached(self, fixed: Fixed) -> Moment | None:
        reached = {Moment.CONFIG}.union(*(user.moments() for user in self._living_users()))
        return next((moment for moment in fixed.since if moment in reached), None)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]  # of the dataclass
        return {name: value for name, value in state.items() if name != USERS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.mark_as_made()

    def __copy__(self) -> Any:
        return _without_users(super().__copy__())  # type: ignore[misc]  # of `RedactedOptions`

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _without_users(super().__deepcopy__(memo))  # type: ignore[misc]  # of `RedactedOptions`


def _without_users(config: Any) -> Any:
    vars(config).pop(USERS, None)
    return config


def _is_same(old: Any, new: Any) -> bool:
    """Whether an assignment would change nothing: 1 is no True, and what cannot be compared is another value."""
    try:
        return old is new or (isinstance(old, bool) == isinstance(new, bool) and bool(old == new))
    except Exception:
        return False


def as_read_at_construction(name: str, ours: str, old: Any, value: Any) -> Any:
    """What `TrainingArguments` would hold, had an option been given to it.

    Args:
        name, ours: as it was set, and our name of it.
        old: what it holds.
        value: what is set.

    Raises:
        ValueError: naming the option, if its enum has no such member.
    """
    if ours == "report_to":
        return _list_of_trackers(value)
    if ours == "max_grad_norm" and value is None:
        return 0.0
    if ours == "output_dir" and value is not None:
        return os.path.expanduser(value)
    if not isinstance(old, Enum) or isinstance(value, Enum):
        return value
    try:
        return type(old)(value)
    except ValueError:
        known = ", ".join(str(member.value) for member in type(old))
        raise ValueError(f"{name}={value!r}: it should be one of {known}") from None


def _list_of_trackers(trackers: Any) -> list[Any]:
    names, objects = tracker_names(trackers), tracker_objects(trackers)
    if names in ("all", ["all"]):
        return [*get_available_reporting_integrations(), *objects]
    if names in (None, "none", ["none"]):
        return list(objects)
    return [*(names if isinstance(names, list) else [names]), *objects]


def fill_evaluation(config: Any) -> None:
    """What evaluating and keeping the best model need, where it is not set: as `TrainingArguments` does."""
    config.do_eval = config.do_eval or config.eval_strategy != "no"
    if config.eval_strategy == "steps" and not config.eval_steps:
        config.eval_steps = config.logging_steps
    if config.load_best_model_at_end and config.metric_for_best_model is None:
        config.metric_for_best_model = "loss"
    if config.metric_for_best_model is not None and config.greater_is_better is None:
        config.greater_is_better = not config.metric_for_best_model.endswith("loss")


def check_not_none(config: Any, name: str) -> None:
    """
    Raises:
        ValueError: naming the option, if it is None and has to be a number, a text or a bool.
    """
    if getattr(config, name) is not None:
        return
    # Not by the annotation: transformers' argument parser takes `None` out of those of the class that it has read.
    default = 0 if name in SIZES else type(config).__dataclass_fields__[name].default
    if isinstance(default, int | float | str):
        raise ValueError(f"{name}=None: it should be of type {type(default).__name__}")
