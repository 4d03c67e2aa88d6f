"""Advantage-Induced Policy Alignment (arXiv 2306.02231) on current TRL.

Public names load on first use (PEP 562), so `import trl_apa` costs next to nothing: neither torch nor transformers nor
TRL is imported before one of them is needed.
"""

from typing import TYPE_CHECKING

from .module_paths import CLASSIC_NAMES, install, lazy_names


if TYPE_CHECKING:
    from .classic.names import (
        AdaptiveKLController,
        FixedKLController,
        LengthSampler,
        create_reference_model,
        respond_to_batch,
        set_seed,
    )
    from .classic.ppo import PPOConfig, PPOTrainer
    from .config.apa import APAConfig
    from .models import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PolicyAndValue,
        ValueModel,
    )
    from .offline import OfflineAPATrainer, OfflineConfig
    from .trainer.apa import APATrainer

    __version__: str

_MODULE_OF = {
    "APAConfig": "config.apa",
    "APATrainer": "trainer.apa",
    "AdaptiveKLController": "classic.names",
    "AutoModelForCausalLMWithValueHead": "models",
    "AutoModelForSeq2SeqLMWithValueHead": "models",
    "FixedKLController": "classic.names",
    "LengthSampler": "classic.names",
    "OfflineAPATrainer": "offline",
    "OfflineConfig": "offline",
    "PPOConfig": "classic.ppo",
    "PPOTrainer": "classic.ppo",
    "PolicyAndValue": "models",
    "ValueModel": "models",
    "create_reference_model": "classic.names",
    "respond_to_batch": "classic.names",
    "set_seed": "classic.names",
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


_lazy = lazy_names(__name__, CLASSIC_NAMES | {name: f".{module}" for name, module in _MODULE_OF.items()})
install()


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("trl-apa")
    return _lazy(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
