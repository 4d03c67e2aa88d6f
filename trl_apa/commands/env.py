"""`trl-apa env`: versions and devices, for a bug report. Nothing of the environment's variables is printed."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from trl_apa.commands.parsing import OneLineParser


PACKAGES = ("trl-apa", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "bitsandbytes")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    OneLineParser(prog="trl-apa env", description="Print versions and devices, for a bug report.").parse_args(argv)
    for name, value in environment().items():
        print(f"{name:<14}{value}")
    return 0


def environment() -> dict[str, str]:
    """Name to version or description."""
    versions = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "platform": platform.platform(), **versions, "devices": _devices()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return "mps" if torch.backends.mps.is_available() else "cpu"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda}, bfloat16: {torch.cuda.is_bf16_supported()})"
