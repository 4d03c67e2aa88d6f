"""The learning rate of a config that was given none: a trainer chooses it by what is trained."""

from typing import Any

from trl_apa.config.fields import option


# For pretrained weights, and for new weights alone (adapters, value heads): docs/results.md, "A real language model".
PRETRAINED_RATE = 1.41e-5
NEW_WEIGHTS_RATE = 3e-4
_CHOSEN = "_chosen_learning_rate"


class DefaultRate(float):
    """A default that can be told from the same number given by a user."""


def learning_rate_option() -> Any:
    """The field of a config."""
    told = "Initial learning rate; unless given, 3e-4 for a network whose adapters alone learn."
    return option(DefaultRate(PRETRAINED_RATE), told)


def default_rate(new_weights_alone: bool) -> float:
    """1.41e-5 where pretrained weights are trained, 3e-4 where only weights are that training has added."""
    return NEW_WEIGHTS_RATE if new_weights_alone else PRETRAINED_RATE


def note_default_rate(config: Any) -> None:
    """Make the default a plain number, and note whether it was one."""
    if isinstance(config.learning_rate, DefaultRate):
        set_default_rate(config, float(config.learning_rate))


def set_default_rate(config: Any, rate: float) -> None:
    """Set a rate that the next trainer with this config may choose anew."""
    vars(config).update({"learning_rate": rate, _CHOSEN: rate})


def forget_default_rate(config: Any) -> None:
    """Take the rate for a user's own."""
    vars(config).pop(_CHOSEN, None)


def rate_is_default(config: Any) -> bool:
    """Whether no user has given the rate."""
    return bool(vars(config).get(_CHOSEN) == config.learning_rate)
