"""TRL's trainers for SFT and reward models, which send nothing from here."""

from trl import RewardTrainer, SFTTrainer

from trl_apa.telemetry import NoTelemetry


class QuietSFTTrainer(NoTelemetry, SFTTrainer):
    """TRL's trainer, which sends nothing."""


class QuietRewardTrainer(NoTelemetry, RewardTrainer):
    """TRL's trainer, which sends nothing."""
