"""How small the curves in small are. Imports nothing heavy, so that `--help` answers at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MiniSizes:
    """How small.

    Args:
        iterations: of a curve that samples.
        batch_size: rollouts an iteration.
        epochs: passes over the fixed data, of a curve that does not sample.
        num_responses: of the fixed data.
        evaluations: on held-out prompts, evenly spaced, beside the one before the first update; at most one an
            iteration or epoch.
        samples_per_prompt: responses to each held-out prompt.
        sft_steps, num_pairs, reward_steps: of the task, see `DemoOptions`.
    """

    iterations: int = 60
    batch_size: int = 64
    epochs: int = 12
    num_responses: int = 2048
    evaluations: int = 20
    samples_per_prompt: int = 8
    sft_steps: int = 300
    num_pairs: int = 1500
    reward_steps: int = 150
