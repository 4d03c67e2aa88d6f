"""Options of the demo and its command line. Imports nothing heavy, so that `--help` answers at once."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_apa.commands.parsing import OneLineParser


LOSS_TYPES = ("apa", "awr", "ppo")


@dataclass(frozen=True)
class DemoOptions:
    """
    Options of [`run_demo`].

    Args:
        loss_type (`str`, *optional*, defaults to `"apa"`): `"apa"`, `"awr"` or `"ppo"`.
        seed (`int`, *optional*, defaults to `0`): of everything drawn at random.
        iterations (`int`, *optional*, defaults to `30`): rounds of generate, score, step.
        output_dir (`Path`, *optional*, defaults to `demo_output`): where everything is saved.
        kl_coef (`float`, *optional*): lambda of the paper's objective (2); for PPO the initial coefficient of the KL
            penalty. Defaults to 0.1 for APA, 1 for AWR, 0.05 for PPO.
        learning_rate (`float`, *optional*, defaults to `3e-4`): of policy and value model at the start of
            the loop; it falls linearly to 0.
        batch_size (`int`, *optional*, defaults to `64`): rollouts an iteration.
        sft_steps (`int`, *optional*, defaults to `300`): optimizer steps of supervised fine-tuning, on 32 rows each.
        num_pairs (`int`, *optional*, defaults to `1500`): preference pairs that the reward model learns from; a
            quarter as many more test it.
        reward_steps (`int`, *optional*, defaults to `150`): optimizer steps of the reward model, on 32 pairs each.
        num_eval_prompts (`int`, *optional*, defaults to `48`): prompts kept for evaluation.
        samples_per_prompt (`int`, *optional*, defaults to `8`): responses to each of them.
        max_new_tokens (`int`, *optional*, defaults to `24`): longest response.
        num_threads (`int`, *optional*, defaults to `1`): torch threads; another number rounds sums differently.
    """

    loss_type: str = "apa"
    seed: int = 0
    iterations: int = 30
    output_dir: Path = Path("demo_output")
    kl_coef: float | None = None
    learning_rate: float = 3e-4
    batch_size: int = 64
    sft_steps: int = 300
    num_pairs: int = 1500
    reward_steps: int = 150
    num_eval_prompts: int = 48
    samples_per_prompt: int = 8
    max_new_tokens: int = 24
    num_threads: int = 1


class OptionParser(OneLineParser):
    """A parser of options whose defaults are those of an object.

    Args:
        default: has an attribute for each option.
        kwargs: of `ArgumentParser`.
    """

    def __init__(self, default: object, **kwargs: Any):
        super().__init__(**kwargs)
        self.default = default

    def add(self, name: str, kind: Callable[[str], object], meaning: str, **kwargs: Any) -> None:
        """An option, whose default its help shows."""
        default = getattr(self.default, kwargs.get("dest", name.lstrip("-").replace("-", "_")))
        meaning = meaning if default is None else f"{meaning} (default: %(default)s)"
        self.add_argument(name, type=kind, default=default, help=meaning, **kwargs)


def parse_options(argv: Sequence[str]) -> DemoOptions:
    """Options from command-line arguments; exits with status 2 and a message where one is wrong."""
    parser = OptionParser(
        DemoOptions(),
        prog="trl-apa demo",
        description="A complete RLHF in miniature on the CPU: supervised fine-tuning, a learned reward model, APA. "
        "With --real a real language model is aligned instead: see trl-apa demo --real --help.",
    )
    add = parser.add
    add("--loss-type", str, "policy loss", choices=LOSS_TYPES)
    add("--seed", natural, "same seed, same numbers")
    add("--iterations", positive_int, "rounds of generate, score, step")
    add("--output-dir", Path, "where everything is saved")
    add(
        "--kl-coef",
        positive_float,
        "lambda of the objective; for ppo the initial KL coefficient (default: by loss type)",
    )
    add("--learning-rate", positive_float, "of policy and value model at the start; it falls linearly to 0")
    add("--sft-steps", positive_int, "optimizer steps of supervised fine-tuning")
    add("--pairs", positive_int, "preference pairs for the reward model", dest="num_pairs")
    add("--reward-steps", positive_int, "optimizer steps of the reward model")
    add("--threads", positive_int, "torch threads", dest="num_threads")
    return DemoOptions(**vars(parser.parse_args(argv)))


def natural(text: str) -> int:
    """A whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} should not be negative")
    return value


def positive_int(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} should be at least 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} should be a positive number")
    return value
