"""What to change in a run that does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from trl_apa.memory.prediction import predict
from trl_apa.memory.setup import Setup


# A change that saves a smaller share of the peak is not worth a line.
WORTHWHILE = 0.01


@dataclass(frozen=True)
class Change:
    """One change, made alone.

    Args:
        text: what to do.
        peak: bytes after it.
        saved: bytes less than before.
    """

    text: str
    peak: int
    saved: int


def changes(setup: Setup, peak: int) -> list[Change]:
    """The changes that make `setup` smaller, each predicted alone, the largest saving first.

    Args:
        setup: the run.
        peak: its predicted peak, bytes.
    """
    found = []
    for text, changed in _candidates(setup):
        after = predict(changed).peak
        if peak - after > WORTHWHILE * peak:
            found.append(Change(text, after, peak - after))
    return sorted(found, key=lambda change: -change.saved)


def _candidates(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Changes that leave the algorithm as it is come first, those of what is trained last."""
    for text, entries in _options(setup):
        try:
            yield text, replace(setup, **entries)
        except ValueError:
            continue  # it does not go with the rest of the setup


def _options(setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    rows, sampled = setup.micro_batch_size, setup.generation_batch_size
    if not setup.gradient_checkpointing:
        yield "gradient checkpointing", {"gradient_checkpointing": True}
    tokens = setup.tokens_per_micro_batch
    if tokens is not None and tokens >= 2 * setup.max_length:
        yield f"tokens_per_micro_batch={tokens // 2}", {"tokens_per_micro_batch": tokens // 2}
    if rows > 1 and tokens is None:
        steps = setup.gradient_accumulation_steps * 2
        yield (
            f"micro-batches of {rows // 2}, with {steps} accumulation steps",
            {"micro_batch_size": rows // 2, "gradient_accumulation_steps": steps},
        )
    if sampled > 1:
        yield f"sample {sampled // 2} rows at a time", {"generation_batch_size": sampled // 2}
    if setup.attention == "eager":
        yield "attention: sdpa", {"attention": "sdpa"}
    if setup.optimizer.startswith("adamw") and "8bit" not in setup.optimizer:
        yield "optimizer: adamw_8bit", {"optimizer": "adamw_8bit"}
    if setup.world_size > 1 and setup.sharding == "ddp":
        yield "divide the weights: fsdp2", {"sharding": "fsdp2"}
    if setup.value is not None:
        yield "no value model: advantage_estimator='group', say", {"value": None}
    if setup.lora_r:
        yield from _on_one_base(setup)
    else:
        lora = {"lora_r": 16, "reference": "auto", "num_unfrozen_layers": None}
        yield "LoRA of rank 16 in place of full fine-tuning", lora


def _on_one_base(setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    if setup.value not in ("adapter", "head", None):
        yield "value model: an adapter on the policy's base", {"value": "adapter"}
    if setup.reward not in (None, "adapter"):
        yield "reward model: an adapter on the policy's base", {"reward": "adapter"}
    if setup.reference_kind == "copy":
        yield "reference: the base with its adapters off", {"reference": "base"}
    for quantization in ("8bit", "4bit"):
        if setup.quantization is None or (setup.quantization, quantization) == ("8bit", "4bit"):
            yield f"a {quantization[0]}-bit base", {"quantization": quantization}
