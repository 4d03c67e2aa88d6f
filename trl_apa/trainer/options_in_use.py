"""A trainer as its config sees it: which options are fixed by now, and what was computed from those that change."""

from typing import Any

from trl_apa.config.later import Moment
from trl_apa.config.sizes import SIZES


def steps_of_episodes(args: Any) -> int:
    """Optimizer steps that make `total_episodes` rollouts, the last iteration completed; -1 if that is not set."""
    if args.total_episodes is None:
        return -1
    iterations = -(-args.total_episodes // (args.batch_size * args.world_size))
    return int(iterations * args.steps_per_iteration)


class OptionsInUse:
    """Follows the config of a trainer.

    Args:
        trainer: an `APATrainer` that is made.
        counts_episodes: whether `max_steps` was computed from `total_episodes`.
    """

    def __init__(self, trainer: Any, counts_episodes: bool):
        self.trainer, self.counts_episodes = trainer, counts_episodes
        trainer.args.add_user(self)

    def moments(self) -> set[Moment]:
        """What has happened in the trainer, after which options are fixed."""
        reached = {
            Moment.TRAINER: True,
            Moment.SCHEDULE: self.trainer.lr_scheduler is not None,
            Moment.DEEPSPEED: bool(self.trainer.is_deepspeed_enabled),
            Moment.TRAINING: bool(self.trainer.is_in_train),
        }
        return {moment for moment, has_happened in reached.items() if has_happened}

    def follow_option(self, name: str) -> None:
        """Bring up to date what was computed from an option when the trainer was made."""
        trainer, args = self.trainer, self.trainer.args
        if name in SIZES:
            note_global_sizes(args, trainer.accelerator.num_processes)
            trainer.run_state.responses_per_iteration = args.global_batch_size
        elif name == "kl_coef":
            trainer.kl_ctl.value = float(args.kl_coef)
            trainer.drift.coefficient = f"kl_coef={args.kl_coef}"
        elif name in ("max_steps", "total_episodes"):
            self.counts_episodes = name == "total_episodes"
        if self.counts_episodes and name in (*SIZES, "num_epochs_per_batch", "total_episodes"):
            args.set_unchecked(max_steps=steps_of_episodes(args))


def note_global_sizes(args: Any, num_processes: int) -> None:
    """Fill in the sizes over all processes, which scripts read."""
    args.set_unchecked(
        global_batch_size=args.batch_size * num_processes,
        global_backward_batch_size=args.backward_batch_size * num_processes,
    )
