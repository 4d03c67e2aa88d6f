"""What scripts for TRL <= 0.11 import."""

from typing import TYPE_CHECKING

from trl_apa.module_paths import lazy_names


if TYPE_CHECKING:
    from .environment import TextEnvironment as TextEnvironment
    from .environment import TextHistory as TextHistory
    from .names import AdaptiveKLController as AdaptiveKLController
    from .names import FixedKLController as FixedKLController
    from .names import LengthSampler as LengthSampler
    from .names import create_reference_model as create_reference_model
    from .names import respond_to_batch as respond_to_batch
    from .names import set_seed as set_seed
    from .ppo import PPOConfig as PPOConfig
    from .ppo import PPOTrainer as PPOTrainer


__getattr__ = lazy_names(
    __name__,
    {
        "AdaptiveKLController": ".names",
        "FixedKLController": ".names",
        "LengthSampler": ".names",
        "create_reference_model": ".names",
        "respond_to_batch": ".names",
        "set_seed": ".names",
        "PPOConfig": ".ppo",
        "PPOTrainer": ".ppo",
        "TextEnvironment": ".environment",
        "TextHistory": ".environment",
    },
)
