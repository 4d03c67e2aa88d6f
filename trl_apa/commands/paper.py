"""`trl-apa paper FIG`: the figures of the paper, whose code and options lie beside the package in the repository."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


COMMAND = "reproduction.command"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        ValueError: if the folder `reproduction` is neither importable nor here; it is not in the wheel.
    """
    here = Path.cwd()
    if not _is_there() and (here / Path(*COMMAND.split("."))).with_suffix(".py").is_file():
        sys.path.append(str(here))
    if not _is_there():
        raise ValueError(
            "the paper's figures are not in the wheel: run this in the root of a clone of the repository, or of the "
            "unpacked source distribution (pip download --no-deps --no-binary trl-apa trl-apa), where the folder "
            "`reproduction` is"
        )
    status: int = import_module(COMMAND).main(argv)
    return status


def _is_there() -> bool:
    try:
        return find_spec(COMMAND) is not None
    except ModuleNotFoundError:
        return False
