"""Is the memory that `trl-apa memory` predicts the memory that the trainer needs?

    python -m benchmarks.memory [--only NAME]

Small models of several shapes are trained and sampled from on the CPU, while torch's profiler notes what the CPU's
allocator gives and takes back. The largest sum, with the weights and optimizer states that were there before, is what
is measured. A line says how much of it was there before, by the weights and states themselves.
"""

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

from tests.tiny import tiny_tokenizer
from trl_apa import APAConfig, APATrainer
from trl_apa.memory import Prediction, Setup, predict
from trl_apa.memory.measuring import peak_of
from trl_apa.models import load_language_model


MIB = 2**20
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 352}
SIZES |= {"vocab_size": 1000, "max_position_embeddings": 512, "eos_token_id": None}
LLAMA, NEOX = LlamaConfig(**SIZES), GPTNeoXConfig(**SIZES)
GPT2 = GPT2Config(vocab_size=1000, n_embd=128, n_layer=2, n_head=4, eos_token_id=None, bos_token_id=None)
LARGE_VOCABULARY = LlamaConfig(**{**SIZES, "vocab_size": 32000, "hidden_size": 64})
WIDE = LlamaConfig(**{**SIZES, "hidden_size": 192, "intermediate_size": 512, "num_key_value_heads": 2})
WIDEST = LlamaConfig(**{**SIZES, "hidden_size": 512, "num_hidden_layers": 1, "vocab_size": 100})
IN_FLOAT32 = {"dtype": torch.float32, "autocast": None, "max_length": 256, "max_new_tokens": 24}
IN_FLOAT32 |= {"micro_batch_size": 4, "generation_batch_size": 4, "lora_r": 8}
FULL, QUANTISED = {**IN_FLOAT32, "lora_r": 0}, {**IN_FLOAT32, "dtype": torch.bfloat16, "autocast": torch.bfloat16}
SHORT = {"max_length": 96, "gradient_checkpointing": False}
CASES = {
    "LoRA, a separate value model": Setup(LLAMA, **IN_FLOAT32),
    "LoRA, eager attention": Setup(NEOX, **{**IN_FLOAT32, **SHORT}, attention="eager"),
    "LoRA, autocast": Setup(WIDE, **{**IN_FLOAT32, "autocast": torch.bfloat16}),
    "value adapter, accumulation": Setup(
        WIDE, **IN_FLOAT32, value="adapter", gradient_accumulation_steps=2, gradient_checkpointing=False
    ),
    "LoRA, micro-batches by tokens": Setup(
        LLAMA, **{**IN_FLOAT32, "micro_batch_size": 6}, tokens_per_micro_batch=3 * 256
    ),
    "8-bit base, value adapter": Setup(LLAMA, **QUANTISED, quantization="8bit", value="adapter"),
    "4-bit base, value adapter": Setup(LLAMA, **QUANTISED, quantization="4bit", value="adapter"),
    "full": Setup(WIDE, **FULL, gradient_checkpointing=False),
    "full, autocast": Setup(WIDE, **{**FULL, "autocast": torch.bfloat16}),
    "full, logits in chunks": Setup(
        LARGE_VOCABULARY, **{**FULL, **SHORT, "micro_batch_size": 8, "max_new_tokens": 70}
    ),
    "full, a head for values": Setup(GPT2, **FULL, value="head", gradient_checkpointing=False),
    "full, no value model": Setup(GPT2, **FULL, value=None, gradient_checkpointing=False),
    "LoRA, no value model": Setup(LLAMA, **IN_FLOAT32, value=None),
    "LoRA, a learned log Z": Setup(
        WIDEST,
        **{**IN_FLOAT32, **SHORT, "micro_batch_size": 2, "generation_batch_size": 2},
        value=None,
        learned_normalizer=True,
    ),
    "one unfrozen layer": Setup(LLAMA, **FULL, num_unfrozen_layers=1, gradient_checkpointing=False),
}


@dataclass(frozen=True)
class Measured:
    """Peak bytes of each phase, and of them what was there before it."""

    generation: int
    update: int
    lasting: int


def measure(setup: Setup, folder: str | Path, **options: Any) -> Measured:
    """Train and sample with the real trainer on the CPU, in an iteration in which the optimizer has its states."""
    trainer = build_trainer(setup, folder, **options)
    rows = setup.micro_batch_size * setup.gradient_accumulation_steps
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(2, 30, (length,), generator=generator)

    # One prompt is shorter, so that there is padding and with it a mask.
    queries = [tokens(setup.max_length - setup.max_new_tokens - (row == 0)) for row in range(rows)]
    responses = [tokens(setup.max_new_tokens) for _ in range(rows)]
    scores = [torch.tensor(float(row)) for row in range(rows)]
    trainer.step(queries, responses, scores)
    sampled, size = queries[: setup.generation_batch_size], setup.generation_batch_size
    lasting = lasting_bytes(trainer)
    update = peak_of(lambda: trainer.step(queries, responses, scores))
    generation = peak_of(lambda: trainer.generate(sampled, batch_size=size, min_new_tokens=setup.max_new_tokens))
    return Measured(lasting + generation, lasting + update, lasting)


def lasting_bytes(trainer: APATrainer) -> int:
    """Weights of policy, value model and reference, the optimizer's states, and a learned log Z."""
    networks = [trainer.model, *([] if trainer.ref_model is None else [trainer.ref_model])]
    states = [state for states in trainer.optimizer.state.values() for state in states.values()]
    states += trainer.run_state.normalizer.state_dict().values()
    return _storages(tensor for network in networks for tensor in _tensors(network)) + _storages(states)


def build_trainer(setup: Setup, folder: str | Path, **options: Any) -> APATrainer:
    """The trainer that `setup` and more options of the config describe, with random weights."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": setup.autocast is not None,
        "batch_size": setup.micro_batch_size * setup.gradient_accumulation_steps,
        "mini_batch_size": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "tokens_per_micro_batch": setup.tokens_per_micro_batch,
        "gradient_checkpointing": setup.gradient_checkpointing,
        "max_completion_length": setup.max_new_tokens,
        "num_unfrozen_layers": setup.num_unfrozen_layers,
        "optim": "adamw_torch_fused",
        "advantage_estimator": "batch" if setup.value is None else "gae",
        "normalizer": "learned" if setup.learned_normalizer else None,
    }
    config = APAConfig(**{**given, **options})
    lora = LoraConfig(r=setup.lora_r, target_modules=setup.lora_target_modules, task_type="CAUSAL_LM")
    return APATrainer(
        config,
        _random_model(setup, folder),
        tokenizer=tiny_tokenizer(),
        value_model=setup.value,
        peft_config=lora if setup.lora_r else None,
    )


def _random_model(setup: Setup, folder: str | Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(setup.config, dtype=setup.dtype, attn_implementation=setup.attention)
    if setup.quantization is None:
        return model
    model.save_pretrained(folder)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": setup.dtype}
    quantization = BitsAndBytesConfig(**{f"load_in_{setup.quantization}": True}, **options)
    return load_language_model(str(folder), quantization_config=quantization, dtype=setup.dtype)


def _tensors(network: torch.nn.Module) -> Iterable[torch.Tensor]:
    yield from network.parameters()
    yield from network.buffers()
    for layer in network.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None) or getattr(layer, "state", None)
        yield from (scale for name in ("absmax", "SCB") if (scale := getattr(state, name, None)) is not None)


def _storages(tensors: Iterable[torch.Tensor]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def compare(setup: Setup) -> tuple[Prediction, Measured]:
    """The prediction and the measurement of one case."""
    with tempfile.TemporaryDirectory() as folder:
        return predict(setup), measure(setup, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="the case of this name")
    options = parser.parse_args()
    columns = ("case", "phase", "there before, MiB", "predicted, MiB", "measured, MiB", "off by")
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
    for name, setup in CASES.items():
        if options.only in (None, name):
            predicted, measured = compare(setup)
            for phase in ("generation", "update"):
                guess, found = sum(getattr(predicted, phase).values()), getattr(measured, phase)
                sizes = f"{measured.lasting / MIB:.1f} | {guess / MIB:.1f} | {found / MIB:.1f}"
                print(f"| {name} | {phase} | {sizes} | {guess / found - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
