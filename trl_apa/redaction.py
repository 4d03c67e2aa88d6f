"""Keys and tokens among a run's options: there for the run, left out of all that is written, logged or printed."""

import copy
import re
from typing import Any


# How the name ends under which a dict holds what nobody else should read.
SECRET_NAME = (
    "(?:key|api[-_]?keys|access[-_]?key[-_]?id|token|passwords?|passwd|pwd|passphrase|secrets?|credentials?"
    "|authorization)"
)
SECRET = re.compile(f"{SECRET_NAME}$", re.IGNORECASE)
# What a tokenizer calls its tokens: texts that everybody may read.
SPECIAL_TOKEN = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|start|stop|image)_token$")
# Options that are secrets themselves; others with such a name (`stop_token`) are not.
SECRET_OPTIONS = ("hub_token", "push_to_hub_token")
USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
SECRET_IN_URL = re.compile(rf"([?&][^?&=#\s]*{SECRET_NAME}=)[^&#\s]+", re.IGNORECASE)
HIDDEN = "<secret>"


def without_secrets(value: Any) -> Any:
    """A copy of an option's value in which no dict holds a key or a token, and no address user, password or key."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if element and _is_secret(str(name)) else without_secrets(element)
            for name, element in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(without_secrets(element) for element in value)
    if type(value) is not str:
        return value
    return SECRET_IN_URL.sub(rf"\1{HIDDEN}", USER_IN_URL.sub(f"{HIDDEN}@", value))


def _is_secret(name: str) -> bool:
    return bool(SECRET.search(name)) and not SPECIAL_TOKEN.search(name)


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
