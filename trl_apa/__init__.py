"""Advantage-Induced Policy Alignment (arXiv 2306.02231) on current TRL.

Public names load on first use (PEP 562), so `import trl_apa` costs next to nothing: neither torch nor transformers nor
TRL is imported before one of them is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import APAConfig
    from .models import PolicyAndValue, ValueModel
    from .trainer import APATrainer

    __version__: str

_MODULE_OF = {
    "APAConfig": "config",
    "APATrainer": "trainer",
    "PolicyAndValue": "models",
    "ValueModel": "models",
}

__all__ = ["APAConfig", "APATrainer", "PolicyAndValue", "ValueModel", "__version__"]


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        from importlib.metadata import version

        value = version("trl-apa")
    elif name in _MODULE_OF:
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
