"""What a prediction of memory is about: the networks, how they are trained, and how many rows of which length."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from trl_apa.memory.choices import ATTENTIONS, NETWORKS, REFERENCES, SHARDINGS
from trl_apa.memory.optimizers import STATES


@dataclass(frozen=True)
class Setup:
    """One training run, as far as its memory depends on it.

    Args:
        config: of the policy.
        quantization: None, "8bit" or "4bit": the base of every network that carries adapters.
        dtype: of weights that are not quantised; adapters and heads are float32.
        autocast: what the forward passes compute in; None means in `dtype`.
        lora_r: rank of the adapters; 0 trains the weights themselves.
        lora_target_modules: which layers get adapters, "all-linear" or names; None means peft's choice for the family.
        value: "separate", "adapter" (on the policy's base), "head" (on the policy's hidden states), a config of
            another architecture, or None: advantages without a value model.
        reference: "base" (the policy's base, adapters off), "adapter" (a frozen copy of an SFT adapter), "copy" (a
            whole frozen copy); "auto" is "base" with adapters and "copy" without.
        reward: None (a function), "adapter" (on the policy's base), "separate" (a classifier of the policy's shape),
            or a config of another one.
        learned_normalizer: whether log Z(s) is learned (`normalizer="learned"`).
        num_unfrozen_layers: train only so many of the highest layers; without adapters.
        micro_batch_size: rows of one forward and backward pass.
        gradient_accumulation_steps: of those passes in one optimizer step.
        tokens_per_micro_batch: most tokens of such a pass, in place of `micro_batch_size`; None: as many rows.
        max_length: prompt and response, tokens.
        max_new_tokens: response, tokens.
        generation_batch_size: rows that are sampled together.
        gradient_checkpointing: keep each layer's input only, and compute the rest again.
        optimizer: a name in `optimizers.STATES`.
        world_size: processes, one GPU each.
        sharding: one of `SHARDINGS`; of no consequence for one process.
        attention: "eager", "sdpa" or "flash".
        overhead: bytes of the CUDA context, of libraries' workspaces and of what the allocator cannot use.
    """

    config: PretrainedConfig
    quantization: str | None = None
    dtype: torch.dtype = torch.bfloat16
    autocast: torch.dtype | None = torch.bfloat16
    lora_r: int = 16
    lora_target_modules: str | Sequence[str] | None = "all-linear"
    value: str | PretrainedConfig | None = "separate"
    reference: str = "auto"
    reward: str | PretrainedConfig | None = None
    learned_normalizer: bool = False
    num_unfrozen_layers: int | None = None
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    tokens_per_micro_batch: int | None = None
    max_length: int = 1024
    max_new_tokens: int = 128
    generation_batch_size: int = 8
    gradient_checkpointing: bool = True
    optimizer: str = "adamw"
    world_size: int = 1
    sharding: str = "ddp"
    attention: str = "sdpa"
    overhead: int = 0

    def __post_init__(self) -> None:
        positive = ("micro_batch_size", "gradient_accumulation_steps", "max_length", "max_new_tokens", "world_size")
        for name in (*positive, "generation_batch_size", "tokens_per_micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it should be at least 1")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} should be less than max_length={self.max_length}, which counts "
                "the prompt too"
            )
        self._check_choices()
        self._check_networks()
        self._check_sharding()

    def _check_choices(self) -> None:
        choices: dict[str, Collection[str | None]] = {
            "reference": REFERENCES,
            "sharding": SHARDINGS,
            "optimizer": STATES,
            "attention": ATTENTIONS,
            "quantization": (None, "8bit", "4bit"),
        }
        named = [name for name in NETWORKS if not isinstance(getattr(self, name), PretrainedConfig)]
        choices |= {name: NETWORKS[name] for name in named}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: it should be one of {', '.join(map(str, known))}")

    def _check_networks(self) -> None:
        if self.lora_r < 0:
            raise ValueError(f"lora_r={self.lora_r}: it should be 0 (no adapters) or more")
        if self.lora_r == 0:
            for name, value in (("quantization", self.quantization), ("value", self.value), ("reward", self.reward)):
                if value in ("8bit", "4bit", "adapter"):
                    raise ValueError(f"{name}={value!r} needs adapters: lora_r should be more than 0")
            if self.reference in ("base", "adapter"):
                raise ValueError(f"reference={self.reference!r} needs adapters: lora_r should be more than 0")
            if self.dtype == torch.float16:
                raise ValueError("dtype=float16 overflows in weights that are trained: it should be float32")
        elif self.num_unfrozen_layers is not None:
            raise ValueError("num_unfrozen_layers has no effect with adapters: lora_r should be 0")
        if self.config.is_encoder_decoder:
            raise ValueError("an encoder-decoder: only decoders are predicted")

    def _check_sharding(self) -> None:
        if self.quantization is not None and self.world_size > 1 and self.sharding in ("zero3", "fsdp2"):
            raise ValueError(
                f"sharding={self.sharding!r} with quantization={self.quantization!r}: quantised weights are not "
                "sharded here; each process keeps its own with ddp"
            )

    @property
    def reference_kind(self) -> str:
        """`reference` with "auto" resolved."""
        if self.reference != "auto":
            return self.reference
        return "base" if self.lora_r else "copy"

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients or optimizer states are divided among the processes."""
        return self.world_size > 1 and self.sharding != "ddp"
