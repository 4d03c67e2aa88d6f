"""`trl-apa memory`: the peak memory of a training run on each GPU, by part, from the model's config alone."""

import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_apa.commands.options import CommandParser, Part
from trl_apa.config.fields import option
from trl_apa.memory.choices import ATTENTIONS, NETWORKS, REFERENCES, SHARDINGS
from trl_apa.memory.optimizers import STATES


# What computes is imported where it is used, so that `--help` answers at once.
if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from trl_apa.memory import Prediction, Setup
    from trl_apa.memory.advice import Change

GIB = 2**30
# What torch can use of cards that are sold by these sizes, GiB.
CARDS = {"24 GB": 22.0, "40 GB": 39.0, "80 GB": 79.0}


@dataclass
class MemoryArguments:
    """What the run is like."""

    model: str | None = option(
        None,
        "The policy: a folder with a config.json, a hub name (common ones need no hub), or a shape: "
        "family=llama,hidden_size=4096,...",
    )
    quantization: str | None = option(None, "Quantize the base below adapters.", choices=["8bit", "4bit"])
    dtype: str | None = option(
        None,
        "Type of unquantized weights; bfloat16 with quantization and float32 without by default.",
        choices=["float32", "bfloat16", "float16"],
    )
    bf16: bool = option(True, "Compute in bfloat16 (autocast), as the trainer does where it can.")
    lora_r: int = option(16, "Rank of the adapters; 0: no adapters, all weights are trained.")
    lora_target_modules: list[str] | None = option(["all-linear"], "Layers with adapters; 'default' is peft's choice.")
    num_unfrozen_layers: int | None = option(None, "Without adapters: train only so many of the highest layers.")
    value: str = option(
        "separate",
        "The value model: separate, adapter, head, none (advantages without one), or a model as for --model.",
    )
    reference: str = option(
        "auto",
        "pi_init: the base without adapters, a frozen copy of the adapter, or a copy; auto: as the trainer would.",
        choices=list(REFERENCES),
    )
    reward: str = option("none", "The reward model: none (a function), adapter, separate, or a model as for --model.")
    normalizer: str = option(
        "none", "Of APA; what 'group' needs is too little to be counted.", choices=["none", "group", "learned"]
    )
    batch: int = option(1, "Rows of a micro-batch (mini_batch_size).")
    gradient_accumulation_steps: int = option(1, "Micro-batches of an optimizer step.")
    tokens_per_micro_batch: int | None = option(None, "Most tokens of a micro-batch, in place of --batch.")
    seq: int = option(1024, "Longest prompt and response together, tokens.")
    new_tokens: int = option(128, "Longest response, tokens (max_completion_length).")
    generation_batch: int = option(8, "Rows that are sampled together (generation_batch_size).")
    gradient_checkpointing: bool = option(True, "Keep each layer's input only and compute the rest twice.")
    optim: str = option("adamw", "The optimizer.", choices=list(STATES))
    world_size: int = option(1, "Processes, one GPU each.")
    sharding: str = option("ddp", "How several processes share the work.", choices=list(SHARDINGS))
    attn_implementation: str = option("sdpa", "Attention.", choices=list(ATTENTIONS))
    overhead: float = option(
        0.75, "GiB assumed for the CUDA context, libraries' workspaces and what the allocator cannot use."
    )

    def setup(self) -> "Setup":
        """The same in the terms of the prediction.

        Raises:
            ValueError: if a model cannot be found, or an option does not go with another.
        """
        import torch

        from trl_apa.memory import Setup
        from trl_apa.memory.shapes import config_of

        if self.model is None:
            raise ValueError("model is not set: pass a folder, a hub name or a list of sizes")
        dtype = self.dtype or ("bfloat16" if self.quantization else "float32")
        targets = self.lora_target_modules or ["all-linear"]
        alone = {"all-linear": "all-linear", "default": None}
        return Setup(
            config=config_of(self.model),
            quantization=self.quantization,
            dtype=getattr(torch, dtype),
            autocast=torch.bfloat16 if self.bf16 else None,
            lora_r=self.lora_r,
            lora_target_modules=alone.get(targets[0], targets) if len(targets) == 1 else targets,
            num_unfrozen_layers=self.num_unfrozen_layers,
            value=None if self.value == "none" else _network(self.value, NETWORKS["value"]),
            reference=self.reference,
            reward=None if self.reward == "none" else _network(self.reward, NETWORKS["reward"]),
            learned_normalizer=self.normalizer == "learned",
            micro_batch_size=self.batch,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
            max_length=self.seq,
            max_new_tokens=self.new_tokens,
            generation_batch_size=self.generation_batch,
            gradient_checkpointing=self.gradient_checkpointing,
            optimizer=self.optim,
            world_size=self.world_size,
            sharding=self.sharding,
            attention=self.attn_implementation,
            overhead=int(self.overhead * GIB),
        )


def _network(name: str, kinds: Collection[str | None]) -> "str | PretrainedConfig":
    from trl_apa.memory.shapes import config_of

    return name if name in kinds else config_of(name)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(
        "memory",
        "Predict the peak memory of each GPU, by component, from the config alone: no weights, no GPU.",
        Part(MemoryArguments, lambda name: "the run"),
    )
    (arguments,) = parser.build(parser.parse(argv))
    from trl_apa.memory import Planner
    from trl_apa.memory.advice import changes

    setup = arguments.setup()
    with _quietly():
        planner = Planner(setup)
        prediction = planner.prediction
        print("\n".join(table(prediction)), flush=True)
        print(f"\n{proposal(planner.tokens_that_fit([int(size * GIB) for size in CARDS.values()]))}", flush=True)
        too_small = [card for card, size in CARDS.items() if prediction.peak > size * GIB]
        if too_small:
            print("\nwhat to change, each change alone:", flush=True)
            print("\n".join(advice(changes(setup, prediction.peak))) or "  nothing that this command knows of")
    return 0


@contextmanager
def _quietly() -> Iterator[None]:
    """What libraries have to say about passes that compute nothing is of no use here."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def table(prediction: "Prediction") -> list[str]:
    """Lines of a table of both phases, GiB, and which cards hold the larger one."""
    from trl_apa.memory.prediction import OVERHEAD, PARTS

    lines = [f"{'GiB at the peak':<22}{'generation':>12}{'update':>12}"]
    for name in PARTS:
        sizes = [phase.get(name, 0) for phase in (prediction.generation, prediction.update)]
        if any(sizes):
            lines.append(_line(name if name != OVERHEAD else f"{name} (assumed)", sizes))
    lines.append(_line("sum", [sum(prediction.generation.values()), sum(prediction.update.values())]))
    lines.append("")
    for card, size in CARDS.items():
        left = size - prediction.peak / GIB
        verdict = f"fits, {left:.1f} GiB left" if left >= 0 else f"does not fit, {-left:.1f} GiB too much"
        lines.append(f"{card} ({size:.0f} GiB usable): {verdict}")
    return lines


def proposal(fitting: Sequence[int | None]) -> str:
    """What each card lets `tokens_per_micro_batch` be."""
    pairs = [f"{card}: {tokens}" for card, tokens in zip(CARDS, fitting, strict=True) if tokens is not None]
    return f"largest tokens_per_micro_batch that fits: {', '.join(pairs) or 'none, with any card'}"


def _line(name: str, sizes: Sequence[int]) -> str:
    return f"{name:<22}" + "".join(f"{size / GIB:>12.2f}" for size in sizes)


def advice(found: "Sequence[Change]") -> list[str]:
    """A line a change: what it saves, and the smallest card that holds the rest."""
    lines = []
    for change in found:
        fits = next((card for card, size in CARDS.items() if change.peak <= size * GIB), None)
        then = f"{change.peak / GIB:.1f} GiB" + (f", fits {fits}" if fits else "")
        lines.append(f"  -{change.saved / GIB:>6.1f} GiB  {change.text} ({then})")
    return lines
