"""Four networks of one of three sizes on one GPU: memory, tokens a second, and the share of the GPU's peak FLOP/s.

    python -m benchmarks.gpu --scale 160m|1b|7b [--layouts NAME ...] [--micro-batches 1 2 4] [--output F]

Random weights of the shapes of Pythia-160M, Pythia-1B and LLaMA-7B, prompts of 896 tokens, responses of 128, gradient
checkpointing, bfloat16. `full` trains all weights of the policy and of a value network as large, in float32 under
autocast; the other layouts train LoRA of rank 16. Without `--layouts` a size takes those that suit it. One iteration
warms up; the next ones are measured: `generate`, `score` and `step` on `--rollouts` rows. The checkpoints are made in
a folder that needs 27 GB at 7B. `--scale tiny` runs the same code with a small shape, on a CPU too.

Model FLOPs of the trunk of a network, with N weights in linear layers and L layers of width H, for a row of T tokens:
`F = 2 N T + 2 L H T^2`, the second term for causal attention. The vocabulary's weights count where they are used:
`G = 2 H V R` for R response tokens. A network that is trained costs 3 times its forward pass, and one with a frozen
base 2 times, because it needs no gradient of the base's weights (the attention term's backward pass, which is 2 times
whatever is frozen, is counted once: a few percent at this length). Policy and value model are trained, after a forward
pass of the reference and of the value model: `step` is `8 F + 4 G` a row with `full` and `6 F + 3 G` with LoRA. What
checkpointing and the vocabulary head compute a second time is not counted. `generate` is `F + G` of prompt and
response. MFU is that over the seconds and over the GPU's peak.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
)

from benchmarks.memory import lasting_bytes, peak_of
from tests.tiny import tiny_tokenizer
from trl_apa import APAConfig, APATrainer
from trl_apa.memory.shapes import config_of
from trl_apa.models.loaders import load_policy, load_reward_model, load_value_model


LORA_RANK = 16
LORA_LAYOUTS = ("separate-bf16", "separate-8bit", "one-base")
LAYOUTS = ("full", *LORA_LAYOUTS)
# Dense bfloat16 FLOP/s by a part of the device's name, from the makers' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "A10G": 70e12, "4090": 165e12}


@dataclass(frozen=True)
class Scale:
    """The shape of the networks and of the rows, and the layouts that suit it."""

    config: PretrainedConfig
    layouts: tuple[str, ...]
    prompt: int = 896
    response: int = 128


@dataclass(frozen=True)
class Result:
    """One line of the table; memory in GiB, times in seconds, MFU as a share; None where a CPU has no such thing.

    `reserved` is what the allocator took from the GPU, beside the CUDA context. On a CPU the separate reward model is
    in none of the sizes, and the profiler that measures them is in the times.
    """

    layout: str
    micro_batch: int
    device: str
    loaded: float
    generate_peak: float
    score_peak: float
    step_peak: float
    reserved: float | None
    generate_seconds: float
    step_seconds: float
    generated_tokens_per_second: float
    step_tokens_per_second: float
    generate_mfu: float | None
    step_mfu: float | None


def scale_of(name: str) -> Scale:
    """One of the three sizes, or one that a CPU computes in a moment."""
    if name == "160m":
        return Scale(config_of("EleutherAI/pythia-160m"), layouts=("full",))
    if name == "1b":
        return Scale(config_of("EleutherAI/pythia-1b"), LAYOUTS)
    if name == "7b":
        return Scale(config_of("huggyllama/llama-7b"), LORA_LAYOUTS)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Scale(LlamaConfig(**sizes, vocab_size=256), LAYOUTS, prompt=24, response=8)


def make_checkpoints(config: PretrainedConfig, folder: Path, device: torch.device) -> None:
    """Random weights of a language model, of a classifier with one label, and of such a one's adapter."""
    config.pad_token_id, config.num_labels = 0, 1
    for name, auto_class in (("model", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        with device:
            auto_class.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
    with torch.device("meta"):
        lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="SEQ_CLS")
        adapted = get_peft_model(AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16), lora)
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
    adapted.peft_config["default"].save_pretrained(folder / "reward-adapter")
    weights = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    save_file(weights, folder / "reward-adapter" / "adapter_model.safetensors")


def build(layout: str, scale: Scale, micro_batch: int, rollouts: int, folder: Path) -> APATrainer:
    """The trainer with its four networks laid out in one of the four ways."""
    use_cpu = not torch.cuda.is_available()
    config = APAConfig(
        output_dir=str(folder / "output"),
        report_to="none",
        use_cpu=use_cpu,
        bf16=True,
        batch_size=rollouts,
        mini_batch_size=micro_batch,
        ppo_epochs=1,
        gradient_checkpointing=True,
        max_completion_length=scale.response,
        optim="adamw_torch_fused",
    )
    base, reward = str(folder / "model"), str(folder / "reward")
    whole: dict[str, Any] = {"dtype": torch.bfloat16}
    options = {**whole, "quantization": None if layout == "separate-bf16" else "8bit"}
    if layout == "full":
        policy = load_policy(base)
        networks = {
            "ref_model": load_policy(base, **whole),
            "value_model": load_value_model(base),
            "reward_funcs": load_reward_model(reward, **whole),
        }
    else:
        policy = load_policy(base, lora=LORA_RANK, **options)
        networks = {"value_model": "adapter", "reward_funcs": f"adapter:{folder / 'reward-adapter'}"}
    if layout.startswith("separate"):
        networks = {
            "ref_model": load_policy(base, **options),
            "value_model": load_value_model(base, lora=LORA_RANK, **options),
            "reward_funcs": load_reward_model(reward, **options),
        }
    return APATrainer(config, policy, tokenizer=tiny_tokenizer(), **networks)


def measure(layout: str, scale: Scale, micro_batch: int, rollouts: int, repeats: int, folder: Path) -> Result:
    """Peak memory, time and MFU of one layout; the mean of `repeats` iterations after one that warms up."""
    gauge = _cuda_peak if torch.cuda.is_available() else peak_of
    trainer = build(layout, scale, micro_batch, rollouts, folder)
    device = trainer.accelerator.device
    queries = [torch.randint(2, 30, (scale.prompt,), device=device) for _ in range(rollouts)]
    on_gpu = torch.cuda.is_available()
    loaded = torch.cuda.memory_allocated() if on_gpu else lasting_bytes(trainer)
    peaks, seconds = {}, dict.fromkeys(("generate", "score", "step"), 0.0)
    for iteration in range(repeats + 1):
        rows: dict[str, Any] = {}

        def generate(rows: dict[str, Any] = rows) -> None:
            rows["responses"] = trainer.generate(
                queries, batch_size=rollouts, return_prompt=False, min_new_tokens=scale.response
            )

        def score(rows: dict[str, Any] = rows) -> None:
            rows["scores"] = trainer.score(queries, rows["responses"])

        def step(rows: dict[str, Any] = rows) -> None:
            trainer.step(queries, rows["responses"], list(rows["scores"]))

        for work in (generate, score, step):
            before = 0 if on_gpu else lasting_bytes(trainer)
            taken, peak = _timed(work, gauge)
            peak += before
            if iteration:
                seconds[work.__name__] += taken / repeats
                peaks[work.__name__] = max(peaks.get(work.__name__, 0), peak)
    return _result(layout, scale, micro_batch, rollouts, loaded, peaks, seconds)


def _timed(work: Callable[[], object], gauge: Callable[[Callable[[], object]], int]) -> tuple[float, int]:
    start = time.perf_counter()
    peak = gauge(work)
    return time.perf_counter() - start, peak


def _cuda_peak(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _result(
    layout: str,
    scale: Scale,
    micro_batch: int,
    rollouts: int,
    loaded: int,
    peaks: dict[str, int],
    seconds: dict[str, float],
) -> Result:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    trunk, vocabulary = row_flops(scale.config, scale.prompt, scale.response)

    def mfu(work: float, taken: float) -> float | None:
        return None if peak_flops is None else rollouts * work / taken / peak_flops

    return Result(
        layout=layout,
        micro_batch=micro_batch,
        device=device,
        loaded=loaded / 2**30,
        **{f"{name}_peak": peak / 2**30 for name, peak in peaks.items()},
        reserved=torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None,
        generate_seconds=seconds["generate"],
        step_seconds=seconds["step"],
        generated_tokens_per_second=rollouts * scale.response / seconds["generate"],
        step_tokens_per_second=rollouts * (scale.prompt + scale.response) / seconds["step"],
        generate_mfu=mfu(trunk + vocabulary, seconds["generate"]),
        step_mfu=mfu(step_flops(layout, trunk, vocabulary), seconds["step"]),
    )


def row_flops(config: PretrainedConfig, prompt: int, response: int) -> tuple[int, int]:
    """F and G of the module's docstring: a forward pass of trunk and of vocabulary head over one row, FLOP."""
    with torch.device("meta"):
        trunk = AutoModel.from_config(config)
    weights = sum(layer.weight.numel() for layer in trunk.modules() if isinstance(layer, nn.Linear))
    width, tokens = config.hidden_size, prompt + response
    attention = 2 * config.num_hidden_layers * width * tokens**2
    return 2 * weights * tokens + attention, 2 * width * config.vocab_size * response


def step_flops(layout: str, trunk: int, vocabulary: int) -> int:
    """FLOP of `step` for one row: policy and value model trained, the reference and the value model beforehand."""
    trained = 3 if layout == "full" else 2
    return (2 * trained + 2) * trunk + (trained + 1) * vocabulary


def table(results: list[Result]) -> str:
    """The results as Markdown."""
    columns = ("layout", "micro-batch", "loaded", "generate, peak", "score, peak", "step, peak", "reserved")
    columns += ("generate", "step", "MFU")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for r in results:
        mfu = "-" if r.step_mfu is None else f"{r.generate_mfu:.1%}, {r.step_mfu:.1%}"
        speeds = f"{r.generate_seconds:.2f} s, {r.generated_tokens_per_second:.0f} tokens/s"
        speeds += f" | {r.step_seconds:.2f} s, {r.step_tokens_per_second:.0f} tokens/s"
        sizes = (r.loaded, r.generate_peak, r.score_peak, r.step_peak, r.reserved)
        sizes = " | ".join("-" if size is None else f"{size:.3f} GiB" for size in sizes)
        lines.append(f"| {r.layout} | {r.micro_batch} | {sizes} | {speeds} | {mfu} |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> list[Result]:
    """Every layout with every micro-batch; one that does not fit is said so and left out."""
    scale, results = scale_of(options.scale), []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        make_checkpoints(scale.config, Path(folder), device)
        for layout in options.layouts or scale.layouts:
            for rows in options.micro_batches:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                try:
                    results.append(measure(layout, scale, rows, options.rollouts, options.repeats, Path(folder)))
                except torch.cuda.OutOfMemoryError as error:
                    print(f"{layout} with micro-batches of {rows} does not fit: {error}", flush=True)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=["160m", "1b", "7b", "tiny"], default="7b")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: those that suit the scale")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rollouts", type=int, default=8, help="rows of an iteration, sampled together")
    parser.add_argument("--repeats", type=int, default=3, help="measured iterations")
    parser.add_argument("--folder", help="where the checkpoints are made (default: the system's temporary folder)")
    parser.add_argument("--output", help="a file for the results as JSON")
    options = parser.parse_args(argv)
    results = run(options)
    print(table(results))
    if options.output:
        Path(options.output).write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
