"""Advantage estimators: what each one computes, and what the rest of the trainer has to do for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from trl_apa.algorithms.advantages import (
    batch_advantages,
    gae,
    group_advantages,
    leave_one_out_advantages,
    log_mean_exp_advantages,
    turn_gae,
)
from trl_apa.algorithms.named import named
from trl_apa.algorithms.reference_rewards import optimal_value_advantages, quantile_advantages


# Options that only some estimators read.
GAE_OPTIONS = ("gamma", "gae_lambda", "turn_discount", "gae_over")
ESTIMATOR_OPTIONS = (*GAE_OPTIONS, "group_normalization", "num_ref_samples", "value_kl_coef")
# What one step of GAE is.
GAE_STEPS = {"tokens": gae, "turns": turn_gae}


class RewardedRows(NamedTuple):
    """What an advantage estimator reads of an iteration.

    Args:
        rewards_BR: reward of each token, `(B, R)`, reward units: the score on the last counted token, or where reward
            functions gave it; with PPO less the KL penalty.
        response_mask_BR: bool `(B, R)`, `True` = a counted response token. A row without one was skipped.
        values_BR: V of the state in which each token was chosen, `(B, R)`, reward units; None unless the estimator
            asks for it with `needs_values`.
        prompts_B: int64 `(B,)`, the same number for rows with equal prompts; None unless the estimator asks for it
            with `needs_groups`.
        ref_rewards_BN: rewards of responses of pi_init to each row's prompt, `(B, N)`, in the unit of the scores in
            `rewards_BR`; NaN where a prompt has fewer than N. None unless the estimator asks for it with
            `needs_ref_rewards`.
    """

    rewards_BR: Tensor
    response_mask_BR: Tensor
    values_BR: Tensor | None = None
    prompts_B: Tensor | None = None
    ref_rewards_BN: Tensor | None = None


@dataclass(frozen=True)
class AdvantageEstimator:
    """How rewards become advantages, with or without a value model.

    Args:
        estimate: takes [`RewardedRows`] and the trainer's config; returns advantages `(B, R)`, and the returns that
            the value model learns, `(B, R)`, or None without one. `whiten_advantages` is applied afterwards.
        needs_values: whether it reads `values_BR`. Otherwise there is no value model.
        needs_groups: whether it reads `prompts_B`. Then each prompt of an iteration needs two rows or more.
        row_by_row: whether the advantages of a row depend on that row alone. Otherwise `estimate` gets the rows of all
            processes, so that its results do not depend on how many there are.
        options: those of `ESTIMATOR_OPTIONS` that it reads; setting another warns.
        needs_ref_rewards: whether it reads `ref_rewards_BN`. Then `step` needs `ref_rewards`, and `train` takes them
            from the data set or samples `num_ref_samples` responses of pi_init.
    """

    estimate: Callable[[RewardedRows, Any], tuple[Tensor, Tensor | None]]
    needs_values: bool = False
    needs_groups: bool = False
    row_by_row: bool = False
    options: tuple[str, ...] = ()
    needs_ref_rewards: bool = False


def _gae(rows: RewardedRows, args: Any) -> tuple[Tensor, Tensor]:
    assert rows.values_BR is not None  # needs_values
    read = rows.rewards_BR, rows.values_BR, rows.response_mask_BR
    return GAE_STEPS[args.gae_over](*read, args.gamma, args.gae_lambda, args.turn_discount)


def _group(rows: RewardedRows, args: Any) -> tuple[Tensor, None]:
    assert rows.prompts_B is not None  # needs_groups
    normalization = args.group_normalization
    return group_advantages(rows.rewards_BR, rows.response_mask_BR, rows.prompts_B, normalization), None


def _leave_one_out(rows: RewardedRows, args: Any) -> tuple[Tensor, None]:
    assert rows.prompts_B is not None  # needs_groups
    return leave_one_out_advantages(rows.rewards_BR, rows.response_mask_BR, rows.prompts_B), None


def _log_mean_exp(rows: RewardedRows, args: Any) -> tuple[Tensor, None]:
    assert rows.prompts_B is not None  # needs_groups
    return log_mean_exp_advantages(rows.rewards_BR, rows.response_mask_BR, rows.prompts_B, args.kl_coef), None


def _quantile(rows: RewardedRows, args: Any) -> tuple[Tensor, None]:
    assert rows.ref_rewards_BN is not None  # needs_ref_rewards
    return quantile_advantages(rows.rewards_BR, rows.response_mask_BR, rows.ref_rewards_BN, args.kl_coef), None


def _optimal_value(rows: RewardedRows, args: Any) -> tuple[Tensor, None]:
    assert rows.ref_rewards_BN is not None  # needs_ref_rewards
    kl_coef = args.kl_coef if args.value_kl_coef is None else args.value_kl_coef
    return optimal_value_advantages(rows.rewards_BR, rows.response_mask_BR, rows.ref_rewards_BN, kl_coef), None


def _batch(rows: RewardedRows, args: Any) -> tuple[Tensor, None]:
    return batch_advantages(rows.rewards_BR, rows.response_mask_BR), None


ESTIMATORS: dict[str, AdvantageEstimator] = {
    "gae": AdvantageEstimator(_gae, needs_values=True, row_by_row=True, options=GAE_OPTIONS),
    "group": AdvantageEstimator(_group, needs_groups=True, options=("group_normalization",)),
    "leave_one_out": AdvantageEstimator(_leave_one_out, needs_groups=True),
    "group_log_mean_exp": AdvantageEstimator(_log_mean_exp, needs_groups=True),
    "batch": AdvantageEstimator(_batch),
    "quantile": AdvantageEstimator(_quantile, row_by_row=True, options=("num_ref_samples",), needs_ref_rewards=True),
    "optimal_value": AdvantageEstimator(
        _optimal_value, row_by_row=True, options=("num_ref_samples", "value_kl_coef"), needs_ref_rewards=True
    ),
}


def estimator_of(name: str) -> AdvantageEstimator:
    """The estimator that `advantage_estimator` names: one of `ESTIMATORS`, or `"module:name"` of another.

    Raises:
        ValueError: naming `advantage_estimator`, if there is no such estimator.
    """
    return named("advantage_estimator", name, AdvantageEstimator, ESTIMATORS, ESTIMATOR_OPTIONS)


def check_estimates(
    name: str, estimator: AdvantageEstimator, estimates: Any, response_mask_BR: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What an estimator returned, unless it is not what it should return.

    Args:
        name: of the estimator.
        estimator: what returned it.
        estimates: advantages and returns.
        response_mask_BR: bool `(B, R)`, of the rows that the estimator was given.

    Raises:
        ValueError: naming `advantage_estimator`, if they are no pair, have another shape, or returns are missing.
    """
    shape = tuple(response_mask_BR.shape)
    if not isinstance(estimates, tuple | list) or len(estimates) != 2:
        raise ValueError(f"advantage_estimator={name!r} returned no pair; it should return advantages and returns")
    for what, tensor, required in zip(
        ("advantages", "returns"), estimates, (True, estimator.needs_values), strict=True
    ):
        if tensor is None and not required:
            continue
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if found != shape:
            raise ValueError(f"advantage_estimator={name!r} returned {what} {found}; they should be a tensor {shape}")
    return estimates[0], estimates[1] if estimator.needs_values else None
