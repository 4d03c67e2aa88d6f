"""The trainer: constructor, `generate` and `step` in `apa.py`, `train` in `training_loop.py`, one file a stage."""

from typing import TYPE_CHECKING

from trl_apa.module_paths import CONTROLLERS, PPO_NAMES, lazy_names


if TYPE_CHECKING:
    from trl_apa.classic.ppo import PPOConfig as PPOConfig
    from trl_apa.classic.ppo import PPOTrainer as PPOTrainer

    from .apa import APATrainer as APATrainer


__getattr__ = lazy_names(
    __name__,
    {
        "APATrainer": ".apa",
        **PPO_NAMES,
        **CONTROLLERS,
        "ModelConfig": "trl",
        "disable_dropout_in_model": "trl.trainer.utils",
    },
)
