"""The parser of the commands that read no YAML. Imports nothing heavy, so that `--help` answers at once."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from trl_apa.redaction import without_secrets_in_error


# Set while a command runs with `--debug`, so that processes that it starts show their tracebacks too.
DEBUG = "TRL_APA_DEBUG"
# What stands for the value of an option, by the name of its type.
METAVARS = {
    **dict.fromkeys(("int", "natural", "positive_int", "_positive"), "INT"),
    **dict.fromkeys(("float", "positive_float"), "FLOAT"),
    "truth": "BOOL",
    "JSON object": "JSON",
}


class OnceFormatter(argparse.HelpFormatter):
    """Shows each option in one spelling, though `--output_dir` and `--output-dir` are both read, and its type."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = str if action.type is None else action.type
        return METAVARS.get(getattr(kind, "__name__", ""), "TEXT")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        strings = action.option_strings
        action.option_strings = once(strings)
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = strings


class DefaultsFormatter(OnceFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults too, where an option that is not given has a value; of `--no_x` no more than that x is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):
            return f"{action.dest} off."
        return action.help if action.default is None else super()._get_help_string(action)


def once(option_strings: Sequence[str]) -> list[str]:
    """The spellings of an option without those that only exchange `-` and `_` in one before them."""
    found: dict[str, str] = {}
    for text in option_strings:
        found.setdefault(text.replace("_", "-"), text)
    return list(found.values())


def add_debug(parser: argparse.ArgumentParser) -> None:
    """`--debug` for `--help` alone: `trl_apa.cli` reads it and takes it away."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


class BriefParser(argparse.ArgumentParser):
    """Reports an invalid argument in one line, without the usage, which can be a page long."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"{self.prog}: {without_secrets_in_error(message)}\n")


class OneLineParser(BriefParser):
    """The parser of a command that reads no YAML.

    Options with several words are read with `-` and with `_` between them.

    `--debug`, which `trl_apa.cli` reads and takes away, stands in its `--help` alone.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**{"formatter_class": OnceFormatter, **kwargs})
        add_debug(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, with the other spelling of each option read as the option."""
        return super().parse_known_args(None if args is None else self._spelled(args), namespace)

    def _spelled(self, arguments: Iterable[str]) -> list[str]:
        known = {text.replace("_", "-"): text for text in self._option_string_actions if text.startswith("--")}
        spelled, is_option = [], True
        for argument in arguments:
            is_option = is_option and argument != "--"
            name, sign, value = argument.partition("=")
            if is_option and argument.startswith("--") and name not in self._option_string_actions:
                argument = known.get(name.replace("_", "-"), name) + sign + value
            spelled.append(argument)
        return spelled
