"""What the configs of online and offline learning refuse alike: options that are not finite, or out of range."""

import math
from collections.abc import Iterable
from dataclasses import fields
from numbers import Real
from typing import Any

import torch

from trl_apa.values import shown


# Where inf says that there is no limit. Everywhere else it would make nonsense of the weights.
LIMITS = (
    "max_grad_norm",
    "max_kl",
    "ratio_threshold",
    "reward_timeout",
    "score_clip",
    "target_kl",
    "tool_timeout",
    "value_max_grad_norm",
    "vllm_server_timeout",
)
FLOATS = (float, float | None)


def check_finite_options(config: Any) -> None:
    """
    Args:
        config: a dataclass of options, as its caller has filled it in.

    Raises:
        ValueError: naming the option that is NaN, infinite and not among `LIMITS`, or a text instead of a number.
    """
    given = vars(config)  # properties among the fields are computed later
    for field in fields(config):
        value = given.get(field.name)
        if isinstance(value, str) and field.type in FLOATS:
            raise ValueError(f"{field.name}={value!r}: it should be a number, not a text")
        if _is_not_finite(value) and not (field.name in LIMITS and value == math.inf):
            wanted = "a number, or inf for no limit" if field.name in LIMITS else "a finite number"
            raise ValueError(f"{field.name}={shown(value)}: it should be {wanted}")
    schedule = given.get("lr_scheduler_kwargs")
    for name, value in schedule.items() if isinstance(schedule, dict) else ():
        if _is_not_finite(value):
            raise ValueError(f"lr_scheduler_kwargs[{name!r}]={shown(value)}: it should be a finite number")


def check_optimizer_options(config: Any) -> None:
    """
    Raises:
        ValueError: naming the option of the optimizer that torch would refuse later, or make an ascent of the descent.
    """
    for name in ("learning_rate", "weight_decay", "adam_epsilon"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ValueError(f"{name}={value}: it should not be negative")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: it should be at least 0 and below 1")


def check_reward_weights(weights: Iterable[float] | None) -> list[float] | None:
    """The weights of the reward functions as floats; None if none are given.

    Raises:
        ValueError: naming the weight that is no finite number in float32.
    """
    if weights is None:
        return None
    if hasattr(weights, "tolist"):
        weights = weights.tolist()
    if not isinstance(weights, list | tuple):
        raise ValueError(
            f"reward_weights={shown(weights)}: it should be a list of numbers, one for each reward function"
        )
    for index, weight in enumerate(weights):
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not is_number or not abs(weight) <= torch.finfo(torch.float32).max:
            raise ValueError(f"reward_weights[{index}] is {shown(weight)}; it should be a finite number in float32")
    return [float(weight) for weight in weights]


def _is_not_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not math.isfinite(value)
    except OverflowError:  # an int beyond float64
        return True
