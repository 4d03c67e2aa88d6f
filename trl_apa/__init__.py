"""Advantage-Induced Policy Alignment (arXiv 2306.02231) on current TRL.

Public names load on first use (PEP 562), so `import trl_apa` costs next to nothing: neither torch nor transformers nor
TRL is imported before one of them is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .classic import (
        AdaptiveKLController,
        FixedKLController,
        LengthSampler,
        create_reference_model,
        respond_to_batch,
        set_seed,
    )
    from .config import APAConfig
    from .models import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PolicyAndValue,
        ValueModel,
    )
    from .offline import OfflineAPATrainer, OfflineConfig
    from .ppo import PPOConfig, PPOTrainer
    from .trainer import APATrainer

    __version__: str

_MODULE_OF = {
    "APAConfig": "config",
    "APATrainer": "trainer",
    "AdaptiveKLController": "classic",
    "AutoModelForCausalLMWithValueHead": "models",
    "AutoModelForSeq2SeqLMWithValueHead": "models",
    "FixedKLController": "classic",
    "LengthSampler": "classic",
    "OfflineAPATrainer": "offline",
    "OfflineConfig": "offline",
    "PPOConfig": "ppo",
    "PPOTrainer": "ppo",
    "PolicyAndValue": "models",
    "ValueModel": "models",
    "create_reference_model": "classic",
    "respond_to_batch": "classic",
    "set_seed": "classic",
}

__all__ = [
    "APAConfig",
    "APATrainer",
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "FixedKLController",
    "LengthSampler",
    "OfflineAPATrainer",
    "OfflineConfig",
    "PPOConfig",
    "PPOTrainer",
    "PolicyAndValue",
    "ValueModel",
    "__version__",
    "create_reference_model",
    "respond_to_batch",
    "set_seed",
]


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
