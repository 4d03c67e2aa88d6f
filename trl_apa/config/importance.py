"""Options of `importance_correction`: the default of its level, and which losses it goes with."""

from typing import TYPE_CHECKING

from trl_apa.algorithms import ALGORITHMS
from trl_apa.algorithms.importance import CORRECTIONS, LEVELS


if TYPE_CHECKING:
    from trl_apa.config.apa import APAConfig


def fill_importance_level(config: "APAConfig") -> None:
    """Fill in `importance_level` where it is not set, if the loss takes a correction."""
    levels = config.algorithm.importance_levels
    if config.importance_level is None and levels:
        config.importance_level = levels[0]


def check_importance_options(config: "APAConfig") -> None:
    """
    Raises:
        ValueError: naming the option, if it is none of those that there are, the loss takes no correction, or not at
            that level, no ratio lies between the bounds, or `rollouts_ahead` needs a correction or cannot have one.
    """
    correction, level = config.importance_correction, config.importance_level
    levels = config.algorithm.importance_levels
    if correction not in (None, *CORRECTIONS):
        raise ValueError(f"importance_correction={correction!r}: it should be 'truncate', 'mask' or None")
    if correction is not None and not levels:
        readers = ", ".join(name for name, algorithm in ALGORITHMS.items() if algorithm.importance_levels)
        raise ValueError(
            f"importance_correction={correction!r} with loss_type={config.loss_type!r}: this loss has no ratio to the "
            f"policy that sampled, whatever that was; leave it out, or use one of {readers}"
        )
    if level not in (None, *(levels or LEVELS)):
        known = " or ".join(map(repr, levels or LEVELS))
        raise ValueError(f"importance_level={level!r} with loss_type={config.loss_type!r}: it should be {known}")
    if config.rollouts_ahead and levels and correction is None:
        raise ValueError(
            f"rollouts_ahead=1 with loss_type={config.loss_type!r}: this loss has a ratio to the policy that sampled, "
            "which is then that of one update ago; set importance_correction='truncate' or 'mask', or leave it out"
        )
    if config.rollouts_ahead and config.normalizes_groups:
        raise ValueError(
            "rollouts_ahead=1 with normalizer='group': it weighs responses by the policy before the update, which has "
            "not sampled them; leave one of them out"
        )
    low, high = config.importance_min, config.importance_max
    if low is not None and high is not None and low >= high:
        raise ValueError(f"importance_min={low} should be less than importance_max={high}")
