"""What the commands' parsers share: options in groups, YAML whose keys and values are checked, and 'did you mean'."""

import argparse
import copy
import dataclasses
import json
import os
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from trl_apa.commands.field_parser import FieldParser, OptionField
from trl_apa.commands.parsing import DefaultsFormatter, OneLineParser, add_debug
from trl_apa.redaction import without_secrets


# The groups that only `--help-all` shows.
OLDER_NAMES = "names and options of older scripts"
NO_EFFECT = "options without effect in this command"
# Groups of `--help` in their order; those that are not here come last.
TITLES = (
    "checkpoints",
    "prompts",
    "data",
    "rewards",
    "model",
    "LoRA",
    "quantization",
    "the algorithm",
    "SFT",
    "reward model",
    "sampling",
    "sampling with vLLM",
    "training",
    "optimizer and schedule",
    "precision, memory and speed",
    "logging",
    "evaluation",
    "saving and resuming",
    "data loading",
    "several devices",
    "launching",
    "Hugging Face hub",
    NO_EFFECT,
    OLDER_NAMES,
)


class Part(NamedTuple):
    """A dataclass whose fields are options.

    Args:
        dataclass: the class that the options are for.
        title_of: name of a field to the title of its group in `--help`.
        names: the fields that are options; None means all of them.
        helps: what `--help` says of a field in this command, where its own text is about another one.
    """

    dataclass: type
    title_of: Callable[[str], str]
    names: Collection[str] | None = None
    helps: Mapping[str, str] = MappingProxyType({})


class CommandParser:
    """Options of one command, from the command line and from a YAML file.

    What is on the command line wins over the file. An option that there is not, in either, is an error before
    anything is loaded.

    Args:
        command: its name.
        description: what it does.
        parts: where its options come from. No two may have a field of the same name.
        positional: what may stand before the options, for the usage.
    """

    def __init__(self, command: str, description: str, *parts: Part, positional: str = ""):
        self.parts = parts
        self._hints = {name: hint for part in parts for name, hint in get_type_hints(part.dataclass).items()}
        program = f"trl-apa {command}"
        usage = " ".join(filter(None, (program, positional, "[--config FILE] [--option value ...]")))
        self.groups = _groups(parts)
        self._parser = _Parser(
            self.groups,
            prog=program,
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=DefaultsFormatter,
        )
        self._parser.add_argument("--config", metavar="FILE", help="YAML file with options; the command line wins")
        if self._parser.hidden:
            self._parser.add_argument(
                "--help-all", action=_HelpAll, help=f"show also {' and '.join(self._parser.hidden_titles)}, and exit"
            )
        self._actions = {action.dest: action for action in reversed(self._parser._actions)}
        self._names = sorted(self._actions.keys() - {"help", "help_all", "config"})
        if "debug" not in self._names:
            add_debug(self._parser)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Every option's value, by name.

        Raises:
            ValueError: for an option that there is not, or a value of the wrong type in the file.
            OSError: if there is no such file.
            SystemExit: after `--help`, or for a value of the wrong type on the command line.
        """
        config = OneLineParser(prog=self._parser.prog, add_help=False, allow_abbrev=False)
        config.add_argument("--config")
        path = config.parse_known_args(argv)[0].config
        if path is not None:
            self._parser.set_defaults_from(self._from_file(path))
        values, unknown = self._parser.parse_known_args(list(argv))
        for text in unknown:
            name = text.lstrip("-").partition("=")[0]
            raise ValueError(self._unknown(name, "--") if text.startswith("--") else f"unexpected argument {text!r}")
        return {name: value for name, value in vars(values).items() if name != "config"}

    def build(self, values: dict[str, Any]) -> list[Any]:
        """One object a part.

        Raises:
            ValueError: as the classes do.
        """
        return [part.dataclass(**{name: values[name] for name in _names(part)}) for part in self.parts]

    def _unknown(self, name: str, prefix: str = "") -> str:
        return f"unknown option {prefix + name!r}{did_you_mean(name.replace('-', '_'), self._names, prefix)}"

    def _from_file(self, path: str) -> dict[str, Any]:
        given = read_yaml(path)
        _set_environment(path, given.pop("env", None))
        values = {}
        for key, value in given.items():
            name = str(key).replace("-", "_")
            if name not in self._names:
                raise ValueError(f"{path}: {self._unknown(str(key))}")
            try:
                values[name] = self._checked(name, value)
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                shown, why = without_secrets({name: value})[name], without_secrets(str(error), {name: value})
                raise ValueError(f"{path}: {key}: {shown!r} is of the wrong type or not a choice ({why})") from error
        return values

    def _checked(self, name: str, value: Any) -> Any:
        """A value of the file as the command line would have read it; lists and objects as they are."""
        action = self._actions[name]
        if value is None:
            return None
        if action.nargs == "+":
            # What is an object here is JSON on the command line.
            texts = [json.dumps(element) if isinstance(element, dict) else element for element in _listed(value)]
            return [_converted(action, text) for text in texts]
        if isinstance(value, dict | list):
            if type(value) not in _types_in(self._hints[name]):
                raise ValueError(f"no {type(value).__name__} is expected")
            return value
        return _converted(action, value)


class _Parser(FieldParser):
    @property
    def hidden(self) -> list[argparse._ArgumentGroup]:
        """Groups that `--help` leaves out."""
        return [group for group in self._action_groups if group.title in (OLDER_NAMES, NO_EFFECT)]

    @property
    def hidden_titles(self) -> list[str]:
        """Of these groups."""
        return [str(group.title) for group in self.hidden]

    def format_help(self, everything: bool = False) -> str:
        """Without the secrets of a file, whose options are defaults."""
        defaults = {action: action.default for action in self._actions}
        groups = self._action_groups
        try:
            for action, default in defaults.items():
                action.default = without_secrets({action.dest: default})[action.dest]
            if not everything:
                self._action_groups = [group for group in groups if group not in self.hidden]
            return super().format_help()
        finally:
            self._action_groups = groups
            for action, default in defaults.items():
                action.default = default


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser._print_message(parser.format_help(everything=True), sys.stdout)
        parser.exit()


def _set_environment(path: str, variables: Any) -> None:
    """The variables that TRL's files hold under `env`.

    Raises:
        ValueError: if it is no mapping of names to texts and numbers.
    """
    if variables is None:
        return
    if not isinstance(variables, dict) or any(isinstance(value, dict | list) for value in variables.values()):
        raise ValueError(f"{path}: env should hold variables, one `NAME: value` per line")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """The end of a message about a name that is not known: which one it may have been, if any is close."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def read_yaml(path: str) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not YAML, no mapping, or has a key twice.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_LoaderThatSeesDoubles)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        # Values that look like dates or numbers and are none, and keys that are lists, are no error of YAML's own.
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content or {}, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; it should hold options, one `name: value` per line"
        )
    return content or {}


class _LoaderThatSeesDoubles(yaml.SafeLoader):
    """YAML's own types only. A key that stands twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _names(part: Part) -> list[str]:
    fields = dataclasses.fields(part.dataclass)
    return [field.name for field in fields if field.init and (part.names is None or field.name in part.names)]


def _groups(parts: Sequence[Part]) -> dict[str, list[OptionField]]:
    """The options by the titles of their groups, in the order of `TITLES`."""
    groups: dict[str, list[OptionField]] = {}
    for part in parts:
        hints = get_type_hints(part.dataclass)
        fields = {field.name: field for field in dataclasses.fields(part.dataclass)}
        for name in _names(part):
            field = _told(fields[name], hints[name], part.helps.get(name))
            groups.setdefault(part.title_of(name), []).append(OptionField(name, hints[name], field))
    return {title: groups[title] for title in sorted(groups, key=lambda title: (*TITLES, title).index(title))}


def _told(field: "dataclasses.Field[Any]", hint: Any, help: str | None) -> "dataclasses.Field[Any]":
    """The field with the help that is true of a command, and the name of any bool alone meaning True."""
    more: dict[str, Any] = {} if help is None else {"help": help}
    if hint == bool | None and field.default is None:
        more |= {"nargs": "?", "const": True}
    told = copy.copy(field)
    told.metadata = MappingProxyType({**field.metadata, **more})
    return told


def _converted(action: argparse.Action, value: Any) -> Any:
    # YAML reads a bare `no`, which is a value of several options of the Trainer, as False.
    text = ("true" if value else "no") if isinstance(value, bool) else str(value)
    converted = action.type(text) if callable(action.type) else text
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"choose from {', '.join(map(str, action.choices))}")
    return converted


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _types_in(hint: Any) -> set[type]:
    """The types that a type hint names, without what they hold: `dict | list[str]` to dict and list."""
    if get_origin(hint) in (Union, types.UnionType):
        return {kind for member in get_args(hint) for kind in _types_in(member)}
    return {get_origin(hint) or hint}
