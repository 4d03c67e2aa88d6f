"""Objects that an option names: those of the package by their names, a user's own as `"module:name"`."""

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any, Protocol, TypeVar


class HasOptions(Protocol):
    """An entry that says which options it reads."""

    @property
    def options(self) -> Collection[str]: ...


T = TypeVar("T", bound=HasOptions)


def named(option: str, value: Any, kind: type[T], known: Mapping[str, T], may_read: Collection[str]) -> T:
    """The object that `value` names: one of `known`, or what `"module:name"` is in a module that can be imported.

    Args:
        option: the option's name, for messages.
        value: what it was set to.
        kind: the class that the object should have.
        known: the package's own, by name.
        may_read: the options that an object of this class may say that it reads.

    Raises:
        ValueError: naming the option, if it is no such name, cannot be imported, is of another class, or says that it
            reads another option.
    """
    if isinstance(value, str) and value in known:
        return known[value]
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
    unknown = [name for name in found.options if name not in may_read]
    if unknown:
        raise ValueError(f"{option}={value!r} has options {unknown}: it should have some of {', '.join(may_read)}")
    return found
