"""Four networks of one of three sizes on one GPU: memory, tokens a second, and the share of the GPU's peak FLOP/s.

    python -m benchmarks.gpu --scale 160m|1b|7b [--layouts NAME ...] [--micro-batches 1 2 4] [--output F]

Beside each peak stands what `trl-apa memory` predicts of it, without its allowance for what it does not predict.

Random weights of the shapes of Pythia-160M, Pythia-1B and LLaMA-7B, prompts of 896 tokens, responses of 128, gradient
checkpointing, bfloat16. `full` trains all weights of the policy and of a value network as large, in float32 under
autocast; the other layouts train LoRA of rank 16. Without `--layouts` a size takes those that suit it. One iteration
warms up; the next ones are measured: `generate`, `score` and `step` on `--rollouts` rows. The checkpoints are made in
a folder that needs 27 GB at 7B, 14 GB if all layouts are on one base. `--scale tiny` runs the same code with a small
shape, on a CPU too.

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
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
from trl_apa.memory import Setup, predict
from trl_apa.memory.shapes import config_of
from trl_apa.models.loaders import load_policy, load_reward_model, load_value_model


LORA_RANK = 16
LORA_LAYOUTS = ("separate-bf16", "separate-8bit", "one-base", "one-base-bf16")
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

    `predicted_generate` and `predicted_step` are of the planner. `reserved` is what the allocator took from the GPU,
    beside the CUDA context. On a CPU the separate reward model is
    in none of the sizes, and the profiler that measures them is in the times.
    """

    layout: str
    micro_batch: int
    device: str
    loaded: float
    generate_peak: float
    score_peak: float
    step_peak: float
    predicted_generate: float
    predicted_step: float
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


def make_checkpoints(config: PretrainedConfig, folder: Path, device: torch.device, with_reward: bool) -> None:
    """Random weights of a language model, if asked for of a classifier with one label, and of such a one's adapter."""
    config.pad_token_id, config.num_labels = 0, 1
    made = {"model": AutoModelForCausalLM} | ({"reward": AutoModelForSequenceClassification} if with_reward else {})
    for name, auto_class in made.items():
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
    """The trainer with its four networks laid out in one of the ways."""
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
    options = {**whole, "quantization": _quantization(layout)}
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


def _quantization(layout: str) -> str | None:
    return None if layout == "full" or layout.endswith("bf16") else "8bit"


def predicted(scale: str, layout: str, micro_batch: int, rollouts: int) -> tuple[float, float]:
    """The planner's peaks of `generate` and of `step`, GiB."""
    shape, on_one_base = scale_of(scale), layout.startswith("one-base")
    networks = {"value": "adapter", "reference": "base", "reward": "adapter"}
    if not on_one_base:
        networks = {"value": "separate", "reference": "copy", "reward": "separate"}
    setup = Setup(
        shape.config,
        quantization=_quantization(layout),
        dtype=torch.float32 if layout == "full" else torch.bfloat16,
        lora_r=0 if layout == "full" else LORA_RANK,
        micro_batch_size=micro_batch,
        max_length=shape.prompt + shape.response,
        max_new_tokens=shape.response,
        generation_batch_size=rollouts,
        **networks,
    )
    prediction, sizes = predict(setup), []
    for parts in (prediction.generation, prediction.update):
        size = sum(parts.values())
        if layout == "full":  # the two that are frozen are bfloat16 here
            size -= (parts["weights: reference"] + parts["weights: reward"]) // 2
        sizes.append(size / 2**30)
    return sizes[0], sizes[1]


def _without_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def measure(
    layout: str, scale: Scale, micro_batch: int, rollouts: int, repeats: int, folder: Path
) -> Callable[[tuple[float, float]], Result]:
    """Peak memory, time and MFU of one layout; the mean of `repeats` iterations after one that warms up.

    Returns:
        A function that makes the result, given what the planner predicts.
    """
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
    reserved = torch.cuda.max_memory_reserved() if on_gpu else None
    return lambda plan: _result(layout, scale, micro_batch, rollouts, loaded, reserved, peaks, seconds, plan)


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
    reserved: int | None,
    peaks: dict[str, int],
    seconds: dict[str, float],
    plan: tuple[float, float],
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
        predicted_generate=plan[0],
        predicted_step=plan[1],
        reserved=None if reserved is None else reserved / 2**30,
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
    columns = ("layout", "micro-batch", "loaded", "generate, peak (predicted)", "score, peak")
    columns += ("step, peak (predicted)", "reserved", "generate", "step", "MFU")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for r in results:
        mfu = "-" if r.step_mfu is None else f"{r.generate_mfu:.1%}, {r.step_mfu:.1%}"
        speeds = f"{r.generate_seconds:.2f} s, {r.generated_tokens_per_second:.0f} tokens/s"
        speeds += f" | {r.step_seconds:.2f} s, {r.step_tokens_per_second:.0f} tokens/s"
        sizes = f"{r.loaded:.3f} GiB | {r.generate_peak:.3f} GiB ({r.predicted_generate:.3f}) | {r.score_peak:.3f} GiB"
        sizes += f" | {r.step_peak:.3f} GiB ({r.predicted_step:.3f})"
        sizes += " | -" if r.reserved is None else f" | {r.reserved:.3f} GiB"
        lines.append(f"| {r.layout} | {r.micro_batch} | {sizes} | {speeds} | {mfu} |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> Iterator[Result | Exception]:
    """Every layout with every micro-batch; one that fails is said so and left out.

    The planner takes some 20 seconds for a prediction at 7B: it works in processes of its own in the meantime.
    """
    scale, layouts = scale_of(options.scale), options.layouts or scale_of(options.scale).layouts
    cases = [(layout, rows) for layout in layouts for rows in options.micro_batches]
    spawn, workers = multiprocessing.get_context("spawn"), max(1, min(len(cases), (os.cpu_count() or 1) // 4))
    with (
        ProcessPoolExecutor(workers, mp_context=spawn, initializer=_without_gpu) as planner,
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
    ):
        plans = {case: planner.submit(predicted, options.scale, *case, options.rollouts) for case in cases}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with_reward = any(not layout.startswith("one-base") for layout in layouts)
        make_checkpoints(scale.config, Path(folder), device, with_reward)
        for layout, rows in cases:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                result = measure(layout, scale, rows, options.rollouts, options.repeats, Path(folder))
                yield result(plans[layout, rows].result())
            except torch.OutOfMemoryError as error:
                print(f"{layout} with micro-batches of {rows} does not fit: {error}", flush=True)
            except Exception as error:  # of one layout, which leaves the others to be measured
                traceback.print_exc()
                yield error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=["160m", "1b", "7b", "tiny"], default="7b")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: those that suit the scale")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rollouts", type=int, default=8, help="rows of an iteration, sampled together")
    parser.add_argument("--repeats", type=int, default=3, help="measured iterations")
    parser.add_argument("--folder", help="where the checkpoints are made (default: the system's temporary folder)")
    parser.add_argument("--output", help="a file for the results as JSON, written anew after each")
    options = parser.parse_args(argv)
    results, failed = [], False
    for result in run(options):
        if isinstance(result, Exception):
            failed = True
            continue
        results.append(result)
        if options.output:
            Path(options.output).write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    print(table(results))
    if failed:
        sys.exit("some layouts failed, see above")


if __name__ == "__main__":
    main()
