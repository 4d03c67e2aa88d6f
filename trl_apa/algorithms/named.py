"""Objects that an option names as `"module:name"`."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any, TypeVar


T = TypeVar("T")


def imported(option: str, value: Any, kind: type[T], known: Iterable[str]) -> T:
    """The object that `value`, `"module:name"`, names.

    Args:
        option: the option's name, for messages.
        value: what it was set to.
        kind: the class that the object should have.
        known: other values that the option takes, for messages.

    Raises:
        ValueError: naming the option, if it is no such name, cannot be imported, or is of another class.
    """
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    module, separator, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not separator:
        raise ValueError(
            f"{option}={value!r}: it should be one of {', '.join(known)}, or module:name of {article} {kind.__name__}"
        )
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option}={value!r} cannot be imported: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{option}={value!r} is a {type(found).__name__}: it should be {article} {kind.__name__}")
    return found
