"""The parser of the commands that read no YAML. Imports nothing heavy, so that `--help` answers at once."""

import argparse
from typing import Any, NoReturn

from trl_apa.redaction import without_secrets_in_error


# Set while a command runs with `--debug`, so that processes that it starts show their tracebacks too.
DEBUG = "TRL_APA_DEBUG"


class OneLineParser(argparse.ArgumentParser):
    """Reports an invalid argument in one line, without the usage, which can be a page long.

    `--debug`, which `trl_apa.cli` reads and takes away, stands in its `--help` alone.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"{self.prog}: {without_secrets_in_error(message)}\n")
