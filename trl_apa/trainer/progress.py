"""The progress bar of `train()`, with reward and KL; the other numbers go to the trackers."""

from typing import Any

from transformers import ProgressCallback


# What is shown -> where it comes from.
SHOWN = {
    "reward": "apa/mean_scores",
    "KL": "objective/kl",
    "loss": "loss",
    "eval reward": "eval_reward",
    "eval KL": "eval_kl",
}


class RewardAndKL(ProgressCallback):
    """The Trainer's bar with the last mean score (reward units) and KL (nats a response) behind it.

    The Trainer's own prints every number of every log, some fifty of them here.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.last: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        logs = logs or {}
        self.last |= {name: f"{logs[source]:.3g}" for name, source in SHOWN.items() if source in logs}
        self.training_bar.set_postfix(self.last)
