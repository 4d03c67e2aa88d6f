"""Fields of dataclasses as options: what transformers' `HfArgumentParser` makes of them, without importing it.

Its import takes longer than a `--help` should. `tests/test_start_up.py` compares the two for every command.
"""

import argparse
import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from trl_apa.commands.parsing import BriefParser


NOT_THERE = dataclasses.MISSING
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


class OptionField(NamedTuple):
    """A field that is an option.

    Args:
        name: of the field.
        hint: its type, resolved.
        field: its default and, as metadata, more arguments of `argparse.ArgumentParser.add_argument`.
    """

    name: str
    hint: Any
    field: "dataclasses.Field[Any]"


class FieldParser(BriefParser):
    """Options from fields, by groups.

    Args:
        groups: title of each group in `--help`, and its fields.
        kwargs: of `argparse.ArgumentParser`.
    """

    def __init__(self, groups: Mapping[str, Sequence[OptionField]], **kwargs: Any):
        super().__init__(**{"formatter_class": argparse.ArgumentDefaultsHelpFormatter, **kwargs})
        for title, fields in groups.items():
            group = self.add_argument_group(title)
            for option_field in fields:
                _add(group, option_field)

    def set_defaults_from(self, values: Mapping[str, Any]) -> None:
        """Values that an option has where it is not on the command line."""
        for action in self._actions:
            if action.dest in values:
                action.default, action.required = values[action.dest], False


def _add(group: "argparse._ArgumentGroup", option_field: OptionField) -> None:
    """Both spellings, `--a_b` and `--a-b`; of a bool that is True by default `--no_a_b` too."""
    name, field = option_field.name, option_field.field
    hint, given = _read_as(name, option_field.hint), dict(field.metadata)
    aliases = given.pop("aliases", [])
    names = [*_spellings(name), *([aliases] if isinstance(aliases, str) else aliases)]
    is_bool = hint in (bool, bool | None)
    group.add_argument(*names, **given | (_of_bool(hint, field) if is_bool else _of_value(hint, field)))
    if is_bool and field.default is True:
        group.add_argument(*_spellings(f"no_{name}"), action="store_false", dest=name, **given | {"default": False})


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _read_as(name: str, hint: Any) -> Any:
    """The type that an option's text is converted to: of `int | None` int, of `dict | str | None` str."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    members = get_args(hint)
    if str not in members and (len(members) != 2 or type(None) not in members):
        raise ValueError(f"{name}: a union of types is read as one of them, X | None, or with str among them")
    if type(None) not in members:
        return members[0] if members[1] is str else members[1]
    if bool in members:
        return hint
    return members[0] if members[1] is type(None) else members[1]


def _of_bool(hint: Any, field: "dataclasses.Field[Any]") -> dict[str, Any]:
    if hint is not bool and field.default in (None, NOT_THERE):
        return {"type": truth}
    default = False if field.default is NOT_THERE else field.default
    return {"type": truth, "default": default, "nargs": "?", "const": True}


def _of_value(hint: Any, field: "dataclasses.Field[Any]") -> dict[str, Any]:
    kind = get_origin(hint) or hint
    arguments: dict[str, Any] = {"type": hint}
    if kind is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        choices = list(get_args(hint)) if kind is Literal else [member.value for member in hint]
        arguments = {"choices": choices, "type": one_of(choices)}
    elif isinstance(kind, type) and issubclass(kind, list):
        arguments = {"type": get_args(hint)[0], "nargs": "+"}
        if field.default is not NOT_THERE:
            return arguments
    if field.default is not NOT_THERE:
        return {**arguments, "default": field.default}
    if field.default_factory is not NOT_THERE:
        return {**arguments, "default": field.default_factory()}
    return {**arguments, "required": True}


def truth(text: Any) -> bool:
    """True or False of a word.

    Raises:
        argparse.ArgumentTypeError: if it is neither.
    """
    if isinstance(text, bool):
        return text
    if (word := text.lower()) in (*TRUE, *FALSE):
        return word in TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true ({', '.join(TRUE)}) nor false ({', '.join(FALSE)})")


def one_of(choices: Iterable[Any]) -> Callable[[str], Any]:
    """A function from the text of one of the choices to the choice; another text stays, and is refused as such."""
    by_text = {str(choice): choice for choice in choices}
    return lambda text: by_text.get(text, text)
