"""Methods of classic's `PPOTrainer` that subclasses override: which are called here, and what replaces the others."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


# Called by `step` and `train` if they are overridden, with these arguments.
CALLED: Mapping[str, tuple[str, ...]] = {
    "compute_rewards": ("scores", "logprobs", "ref_logprobs", "masks"),
    "_kl_penalty": ("logprob", "ref_logprob"),
    "compute_advantages": ("values", "rewards", "mask"),
    "loss": ("old_logprobs", "values", "logits", "vpreds", "logprobs", "mask", "advantages", "returns"),
    "record_step_stats": (),
}
# `record_step_stats` gets keyword arguments.
STEP_DATA = (
    "kl_coef",
    "scores",
    "logprobs",
    "ref_logprobs",
    "non_score_reward",
    "train_stats",
    "masks",
    "queries",
    "responses",
    "kls",
)
# Called for the classic loop, not in `train`.
NOT_IN_TRAIN = ("prepare_dataloader",)
# Never called here: an override would have no effect.
INSTEAD: Mapping[str, str] = {
    "train_minibatch": "override loss, which says what is minimised; optimizer= takes another optimizer, and "
    "max_grad_norm clips",
    "batched_forward_pass": "override compute_rewards, compute_advantages or loss, which get its results; networks of "
    "another kind are given as model=, ref_model= and value_model=",
    "prepare_model_inputs": "give step other queries and responses, or leave tokens out with its response_masks",
    "_step_safety_checker": "change queries, responses and scores before they are given to step",
    "_generate_batched": "override generate, or give an engine of your own as sampler=",
    "_early_stop": "set early_stopping and target_kl",
    "gather_stats": "override record_step_stats, whose numbers are averaged over the processes",
    "_remove_unused_columns": "set remove_unused_columns=False and give a data_collator, or override "
    "prepare_dataloader",
    "_set_signature_columns_if_needed": "set remove_unused_columns=False and give a data_collator, or override "
    "prepare_dataloader",
    "_prepare_deepspeed": "change the DeepSpeed configuration that the script is launched with",
    "_prepare_deepspeed_zero3": "change the DeepSpeed configuration that the script is launched with",
    "optional_peft_ctx": "give ref_model=, or name the reference's adapter in ref_adapter_name",
    "model_params": "freeze parameters with requires_grad_(False), or give an optimizer over some of them",
}


def methods_of(cls: type) -> dict[str, Any]:
    """What the class has under the names of all hooks, as it was defined; None where it has nothing."""
    return {name: inspect.getattr_static(cls, name, None) for name in (*CALLED, *NOT_IN_TRAIN, *INSTEAD)}


def check_class(cls: type, own: Mapping[str, Any]) -> None:
    """Raise TypeError if a class overrides what is never called, or takes other arguments than those it is given.

    Args:
        cls: a subclass of the trainer.
        own: `methods_of` the trainer.
    """
    for name, method in methods_of(cls).items():
        if method is not own[name]:
            is_static = isinstance(method, staticmethod)
            _check(cls.__name__, name, getattr(method, "__func__", method), not is_static)


@dataclass(frozen=True)
class Overrides:
    """The methods of classic that a subclass or a script has replaced: of a subclass, patched, or set on the instance.

    Args:
        trainer: whose methods they are.
        own: `methods_of` the class that defines them.
    """

    trainer: Any
    own: Mapping[str, Any]

    def include(self, *names: str) -> bool:
        """Whether one of these methods is replaced, so that `step` has to call it."""
        of_instance, cls = vars(self.trainer), type(self.trainer)
        return any(
            name in of_instance or inspect.getattr_static(cls, name, None) is not self.own[name] for name in names
        )

    def check(self, args: Any) -> None:
        """
        Args:
            args: the trainer's `APAConfig`.

        Raises:
            TypeError: for a method that is never called, or that takes other arguments than those it is given.
            ValueError: for one that these options never call.
        """
        check_class(type(self.trainer), self.own)
        for name in self.own.keys() & vars(self.trainer).keys():
            _check("trainer", name, vars(self.trainer)[name], False)
        if self.include("loss") and args.algorithm.compares_responses:
            raise ValueError(
                f"loss is overridden, and loss_type={args.loss_type!r} compares responses, which classic's arguments "
                "do not tell apart; give loss_type an Algorithm in place of the override"
            )
        if self.include("compute_advantages") and not args.estimator.needs_values:
            raise ValueError(
                f"compute_advantages is overridden, and advantage_estimator={args.advantage_estimator!r} has no values"
                " for it; leave the option out, or give the option an AdvantageEstimator in place of the override"
            )
        if self.include("_kl_penalty") and not self.include("compute_rewards") and not args.kl_in_reward:
            raise ValueError(
                f"_kl_penalty is overridden, but with loss_type={args.loss_type!r} no KL is in the reward, so that it "
                "would have no effect; override compute_rewards, or set loss_type='ppo'"
            )


def _check(owner: str, name: str, method: Any, takes_self: bool) -> None:
    if name in NOT_IN_TRAIN:
        return
    if name in INSTEAD:
        raise TypeError(
            f"{owner}.{name} is overridden, but trl_apa never calls it, so that it would have no effect. Instead, "
            f"{INSTEAD[name]}"
        )
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return  # without a signature there is nothing to compare
    given = [None] * (len(CALLED[name]) + takes_self)
    named = dict.fromkeys(STEP_DATA) if name == "record_step_stats" else {}
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        arguments = ", ".join(CALLED[name] or ("kl_coef", "**data"))
        raise TypeError(
            f"{owner}.{name}{signature} does not take what it is given ({error}); it should take ({arguments}), as in "
            "TRL 0.11"
        ) from error
