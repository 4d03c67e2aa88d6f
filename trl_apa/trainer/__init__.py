"""The trainer: constructor, `generate` and `step` in `apa.py`, `train` in `training_loop.py`, one file a stage."""

from trl_apa.module_paths import lazy_names


__getattr__ = lazy_names(
    __name__,
    {
        "APATrainer": ".apa",
        "PPOConfig": "trl_apa.classic.ppo",
        "PPOTrainer": "trl_apa.classic.ppo",
    },
)
