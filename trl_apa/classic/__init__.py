"""What scripts for TRL <= 0.11 import."""

from trl_apa.module_paths import lazy_names


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
    },
)
