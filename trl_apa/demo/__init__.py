"""`trl-apa demo`: a complete RLHF in miniature on the CPU. See `docs/` for what each stage does."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from trl_apa.commands.outputs import check_output_folder

from .options import DemoOptions, parse_options


__all__ = ["DemoOptions", "main", "parse_options"]

# Read by the Hugging Face libraries when they are imported: the demo needs no network, and none is touched.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with `argv` (*optional*, defaults to the process's arguments); returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if "--real" in argv:
        from . import smollm2

        return smollm2.main([argument for argument in argv if argument != "--real"], OFFLINE)
    options = parse_options(argv)
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        print(f"trl-apa demo needs {' and '.join(missing)}: pip install 'trl-apa[demo]'", file=sys.stderr)
        return 1
    check_output_folder("output-dir", options.output_dir)
    os.environ.update(OFFLINE)

    from rich.console import Console

    console = Console()
    console.print("trl-apa demo: RLHF in miniature. Loading torch, transformers and TRL ...", highlight=False)
    from .pipeline import run_demo
    from .report import Report

    run_demo(options, Report(console))
    return 0
