"""Options that follow from `advantage_estimator`: filled in where it reads them, and a warning where nothing does."""

import warnings
from typing import TYPE_CHECKING, Any

from trl_apa.algorithms.advantages import GROUP_NORMALIZATIONS
from trl_apa.algorithms.estimators import ESTIMATOR_OPTIONS, ESTIMATORS, GAE_STEPS
from trl_apa.config.fields import only_read_by


if TYPE_CHECKING:
    from trl_apa.config.apa import APAConfig

# Options that are read only where there is a value model.
VALUE_OPTIONS = ("vf_coef", "cliprange_value", "value_learning_rate", "value_max_grad_norm")
BY_ESTIMATOR = (*ESTIMATOR_OPTIONS, *VALUE_OPTIONS)


def estimator_reads(config: "APAConfig", option: str) -> bool:
    """Whether the estimator of a config, or the value model that it needs, reads one of `BY_ESTIMATOR`."""
    estimator = config.estimator
    return estimator.needs_values if option in VALUE_OPTIONS else option in estimator.options


def estimates_with_values(config: Any) -> bool:
    """Whether a run with these options, online or offline, has a value model."""
    return bool(config.estimator.needs_values if hasattr(config, "estimator") else config.needs_values)


def fill_by_estimator(config: "APAConfig", option: str) -> None:
    """Fill in one of `BY_ESTIMATOR` if it is read and not set; warn if it is not read and not at its default."""
    value = getattr(config, option)
    if estimator_reads(config, option):
        if option == "group_normalization" and value is None:
            config.group_normalization = config.algorithm.defaults[option]
    elif value != type(config).__dataclass_fields__[option].default:
        text = f"{option}={value!r} has no effect with advantage_estimator={config.advantage_estimator!r}"
        warnings.warn(f"{text}: {_who_reads(option)}", UserWarning, stacklevel=5)


def fill_by_algorithm(config: "APAConfig") -> None:
    """Fill in what is not set of the estimator and of whitening: by what the algorithm has as default."""
    for option in ("advantage_estimator", "whiten_advantages"):
        if getattr(config, option) is None:
            setattr(config, option, config.algorithm.defaults[option])


def check_estimator_options(config: "APAConfig") -> None:
    """
    Raises:
        ValueError: if `group_normalization` or `gae_over` is another text than it should be, `kl_coef` is 0 where a
            built-in estimator divides by it, or rewards are whitened that are compared with those of pi_init.
    """
    if config.advantage_estimator == "group_log_mean_exp" and config.kl_coef == 0:
        raise ValueError(
            "kl_coef=0.0 has no log mean exp(R / kl_coef): set it, or advantage_estimator='group', its limit for a "
            "large kl_coef"
        )
    if config.estimator.needs_ref_rewards:
        _check_ref_rewards_options(config)
    given = config.group_normalization
    if given not in (None, *GROUP_NORMALIZATIONS):
        raise ValueError(f"group_normalization={given!r}: it should be one of {', '.join(GROUP_NORMALIZATIONS)}")
    if config.gae_over not in GAE_STEPS:
        raise ValueError(f"gae_over={config.gae_over!r}: it should be {' or '.join(map(repr, GAE_STEPS))}")


def _check_ref_rewards_options(config: "APAConfig") -> None:
    setting = f"advantage_estimator={config.advantage_estimator!r}"
    divides = config.advantage_estimator in ("quantile", "optimal_value")
    if divides and config.kl_coef == 0 and not (config.reads("value_kl_coef") and config.value_kl_coef):
        raise ValueError(f"kl_coef=0.0 with {setting}, which divides by it: set it to more")
    if config.whiten_rewards:
        raise ValueError(
            f"whiten_rewards=True with {setting}: it divides the rewards of each iteration by another number, and not "
            "those of pi_init that they are compared with; leave it out, or set scale_rewards"
        )


def _who_reads(option: str) -> str:
    if option in VALUE_OPTIONS:
        return "there is no value model"
    return only_read_by(name for name, estimator in ESTIMATORS.items() if option in estimator.options)
