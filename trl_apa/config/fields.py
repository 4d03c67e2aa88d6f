"""Fields of dataclasses that are options: their default, and what a command line says of them."""

from collections.abc import Iterable
from dataclasses import field
from typing import TYPE_CHECKING, Any


# An object, which a command line writes as JSON: its parser wants `str` among the types. Text is read when the options
# are made.
if TYPE_CHECKING:
    Json = dict[str, Any] | None
else:
    Json = dict[str, Any] | str | None


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with a default.

    Args:
        default: of the option; a list is copied for each object.
        help: one line for `--help`.
        metadata: more arguments of `argparse.ArgumentParser.add_argument`, `choices` say.
    """
    told = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=told)
    return field(default=default, metadata=told)


def switch(help: str) -> Any:
    """An option that is True, False or not set; on a command line its name alone means True, as for any bool."""
    return option(None, help, nargs="?", const=True)


def only_read_by(names: Iterable[str]) -> str:
    """Of an option that has no effect: which values of another option let it have one, in words."""
    *first, last = map(repr, names)
    return f"only {', '.join(first)} and {last} read it" if first else f"only {last} reads it"
