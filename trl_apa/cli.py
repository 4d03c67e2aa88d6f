"""The command line: `trl-apa --version` and `trl-apa <command> ...`.

A command is a module with `main(argv: list[str]) -> int | None`, imported only when it is called for.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import trl_apa


@dataclass(frozen=True)
class Command:
    """One subcommand: its module, what it does, the packages it needs and the extra that brings them."""

    module: str
    summary: str
    extra: str
    needs: tuple[str, ...]


COMMANDS = {
    "demo": Command(
        module="trl_apa.demo",
        summary="a complete RLHF in miniature on the CPU: SFT, reward model, APA",
        extra="demo",
        needs=("matplotlib", "rich", "torch"),
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The top-level parser; it leaves a command's own arguments untouched for that command."""
    lines = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl-apa",
        description="Align language models with Advantage-Induced Policy Alignment (APA).",
        epilog=f"commands:\n{lines}\n\n`trl-apa <command> --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {trl_apa.__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="command", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trl-apa` with `argv` (*optional*, defaults to the process's arguments); returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    command = COMMANDS[options.command]
    missing = [name for name in command.needs if find_spec(name) is None]
    if missing:
        parser.error(
            f"`{options.command}` needs {', '.join(missing)}, not installed: pip install 'trl-apa[{command.extra}]'"
        )
    return import_module(command.module).main(options.arguments) or 0


if __name__ == "__main__":
    raise SystemExit(main())
