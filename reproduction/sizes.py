"""Sizes of the mini-scale runs, and the task that they have unless a figure names another. Imports nothing heavy."""

from dataclasses import dataclass

from trl_apa.config.fields import option


DEMO = "demo"


@dataclass(frozen=True)
class MiniSizes:
    """How small: what each is, is in its `help`."""

    iterations: int = option(60, "of a curve that samples")
    batch_size: int = option(64, "rollouts an iteration")
    epochs: int = option(12, "passes over the fixed data, of a curve that does not sample")
    num_responses: int = option(2048, "in the fixed data")
    evaluations: int = option(20, "on held-out prompts beside the first; at most one an iteration or epoch")
    samples_per_prompt: int = option(8, "responses to each held-out prompt")
    sft_steps: int = option(300, "optimizer steps of supervised fine-tuning")
    num_pairs: int = option(1500, "preference pairs of the reward model")
    reward_steps: int = option(150, "optimizer steps of the reward model")


# Those that a command's runs do not depend on.
UNREAD = {"train": {"epochs", "num_responses"}, "offline": {"iterations", "batch_size"}}
