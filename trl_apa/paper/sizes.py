"""How small the curves in small are. Imports nothing heavy, so that `--help` answers at once."""

from dataclasses import dataclass, field


def _size(default: int, help: str) -> int:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MiniSizes:
    """How small: what each is, is in its `help`."""

    iterations: int = _size(60, "of a curve that samples")
    batch_size: int = _size(64, "rollouts an iteration")
    epochs: int = _size(12, "passes over the fixed data, of a curve that does not sample")
    num_responses: int = _size(2048, "in the fixed data")
    evaluations: int = _size(20, "on held-out prompts beside the first; at most one an iteration or epoch")
    samples_per_prompt: int = _size(8, "responses to each held-out prompt")
    sft_steps: int = _size(300, "optimizer steps of supervised fine-tuning")
    num_pairs: int = _size(1500, "preference pairs of the reward model")
    reward_steps: int = _size(150, "optimizer steps of the reward model")


# Those that a command's runs do not depend on.
UNREAD = {"train": {"epochs", "num_responses"}, "offline": {"iterations", "batch_size"}}
