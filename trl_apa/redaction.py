"""Keys and tokens among a run's options: there for the run, left out of all that is written, logged or printed."""

import copy
import re
from typing import Any


# How the name ends under which a dict holds what nobody else should read.
SECRET = re.compile(r"(key|token|password|secret|credentials)$", re.IGNORECASE)
# Options that are secrets themselves; others with such a name (`stop_token`) are not.
SECRET_OPTIONS = ("hub_token", "push_to_hub_token")
USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "<secret>"


def without_secrets(value: Any) -> Any:
    """A copy of an option's value in which no dict holds a key or a token, and no address a user or a password."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if SECRET.search(str(name)) and element else without_secrets(element)
            for name, element in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(without_secrets(element) for element in value)
    return USER_IN_URL.sub(f"{HIDDEN}@", value) if type(value) is str else value


class RedactedOptions:
    """A mixin: what a dataclass of options shows of itself to trackers, on the terminal or in a pickle has no secret.

    The Trainer pickles its options into `training_args.bin` beside the weights, and uploads that. Copies keep
    everything; who takes the options out of a pickle, in another process say, logs in there.
    """

    def to_dict(self) -> dict[str, Any]:
        """As transformers' (which leaves `hub_token` out), without the secrets inside options that are dicts."""
        return {name: without_secrets(value) for name, value in super().to_dict().items()}

    def __str__(self) -> str:
        lines = [f"{name}={value},\n" for name, value in sorted(self.to_dict().items())]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        return {n: None if n in SECRET_OPTIONS else without_secrets(value) for n, value in vars(self).items()}

    def __copy__(self) -> Any:
        return _with_attributes(type(self), vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _with_attributes(type(self), copy.deepcopy(vars(self), memo))


def _with_attributes(cls: type, attributes: dict[str, Any]) -> Any:
    made = object.__new__(cls)
    vars(made).update(attributes)
    return made
