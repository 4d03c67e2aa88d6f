"""For scripts whose imports stay as they are: `from trl import PPOTrainer` finds this package's.

from trl_apa.compat import install
install()
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import LengthSampler
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from trl_apa import module_paths


# What TRL <= 0.11 had and scripts of PPO import. TRL still has a `create_reference_model`, which does not know the
# wrappers.
NAMES = (
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BestOfNSampler",
    "PPOConfig",
    "PPOTrainer",
    "PPOv2Config",
    "PPOv2Trainer",
    "PreTrainedModelWrapper",
    "TextEnvironment",
    "TextHistory",
    "create_reference_model",
    "get_kbit_device_map",
    "set_seed",
)


def install() -> None:
    """Put classic's names into `trl`, and its modules that TRL does not have (`trl.core`, ...) below it.

    All other names stay TRL's. Call it before the script's imports from `trl`. It holds for this process; calling it
    twice changes nothing.
    """
    import trl

    import trl_apa

    for name in NAMES:
        setattr(trl, name, getattr(trl_apa, name))
    for path in module_paths.NAMES:
        if _trl_has(path):
            _complete(import_module(f"trl.{path}"), import_module(f"trl_apa.{path}"))
    module_paths.install("trl")


def _trl_has(path: str) -> bool:
    """Whether TRL has a module of its own at that path."""
    try:
        return find_spec(f"trl.{path}") is not None
    except ModuleNotFoundError:  # of a folder above it
        return False


def _complete(theirs: ModuleType, ours: ModuleType) -> None:
    """Put the names into TRL's module that it has no more."""
    for name in ours.__all__:
        if not hasattr(theirs, name):
            setattr(theirs, name, getattr(ours, name))
