"""A small policy learns to use a calculator: APA with a critic, over tokens and over turns, and without one.

    python examples/calculator/run.py --output_dir runs/calculator

See `README.md` beside this file.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from task import add, build_policy, build_tokenizer, draw_sums, fine_tune, is_right, num_calls, rows_of
from transformers import AutoModelForCausalLM, HfArgumentParser, PrinterCallback

from trl_apa import APAConfig, APATrainer
from trl_apa.demo.curves import label_axes
from trl_apa.demo.pipeline import quiet_libraries, torch_threads


# Options of each curve; everything else is the same for all.
METHODS: dict[str, dict[str, Any]] = {
    "critic": {"advantage_estimator": "gae"},
    "critic_turns": {"advantage_estimator": "gae", "gae_over": "turns"},
    "group": {"advantage_estimator": "group"},
}
LABELS = {
    "critic": "APA, critic, GAE over tokens",
    "critic_turns": "APA, critic, GAE over turns",
    "group": "APA, group estimator, no critic",
}
SAME = {
    "kl_coef": 0.3,
    "num_generations": 8,
    "ppo_epochs": 2,
    "max_completion_length": 48,
}
# Held-out sums, rollouts of one iteration, rows of a forward pass, iterations from one evaluation to the next.
FULL, QUICK = (256, 128, 32, 5), (16, 32, 32, 1)

Row = dict[str, float]


@dataclass
class ScriptArguments:
    output_dir: str = field(default="runs/calculator", metadata={"help": "Where logs and the picture go."})
    seeds: int = field(default=3, metadata={"help": "Runs of each method."})
    first_seed: int = field(default=0, metadata={"help": "Seed of the first of them."})
    iterations: int = field(default=30, metadata={"help": "Iterations of each run."})
    sft_steps: int = field(default=600, metadata={"help": "Steps of supervised fine-tuning, 64 sums each."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Of all methods."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Which of the three."})
    quick: bool = field(default=False, metadata={"help": "A few steps of everything: whether it works."})


def main(arguments: Sequence[str] | None = None) -> dict[str, list[list[Row]]]:
    """Fine-tune, train each method with each seed, write logs and picture; the numbers, by method and seed."""
    (script,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses(arguments)
    folder = Path(script.output_dir)
    sizes = QUICK if script.quick else FULL
    if script.quick:
        script.seeds, script.iterations, script.sft_steps = 1, 2, 10
    sums = draw_sums(random.Random(0), 20_000)
    held_out, training = sums[: sizes[0]], sums[sizes[0] :]
    curves: dict[str, list[list[Row]]] = {}
    # The order of additions, and so the numbers, depend on how many threads there are.
    with quiet_libraries(), torch_threads(1):
        sft = fine_tuned(folder / f"sft-{script.sft_steps}", training, script.sft_steps)
        for method in script.methods:
            for seed in range(script.first_seed, script.first_seed + script.seeds):
                rows = train(sft, method, seed, script, sizes, rows_of(training), rows_of(held_out))
                curves.setdefault(method, []).append(rows)
                print(describe(method, seed, rows), flush=True)
    (folder / "curves.json").write_text(json.dumps(curves, indent=1))
    draw(curves, folder / "calculator.png")
    return curves


def fine_tuned(path: Path, training: list[list[int]], steps: int) -> Path:
    """The folder of the policy that all runs begin with; one that is there already is used again."""
    if not (path / "config.json").is_file():
        started = time.process_time()
        tokenizer = build_tokenizer()
        policy = build_policy(tokenizer)
        fine_tune(policy, tokenizer, training, steps, path)
        policy.save_pretrained(path)
        print(f"fine-tuned in {time.process_time() - started:.0f} CPU seconds", flush=True)
    return path


def train(
    sft: Path,
    method: str,
    seed: int,
    script: ScriptArguments,
    sizes: tuple[int, int, int, int],
    training: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
) -> list[Row]:
    """One run from the fine-tuned policy; its evaluations on the held-out sums. The complete log goes to a file."""
    _, batch_size, mini_batch_size, every = sizes
    run = sft.parent / f"{method}-seed{seed}"
    steps = SAME["ppo_epochs"] * batch_size // mini_batch_size
    config = APAConfig(
        output_dir=str(run),
        seed=seed,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every * steps,
        max_steps=script.iterations * steps,
        batch_size=batch_size,
        mini_batch_size=mini_batch_size,
        per_device_eval_batch_size=len(held_out),
        reward_weights=[1.0, 0.0],
        learning_rate=script.learning_rate,
        **SAME,
        **METHODS[method],
    )
    trainer = APATrainer(
        config,
        AutoModelForCausalLM.from_pretrained(sft),
        processing_class=build_tokenizer(),
        train_dataset=training,
        eval_dataset=held_out,
        reward_funcs=[is_right, num_calls],
        tools=[add],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.process_time()
    before = {"step": 0, **trainer.evaluate()}
    trainer.train()
    log = [before, *trainer.state.log_history]
    seconds = time.process_time() - started
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return [
        {
            "rollouts": row["step"] / steps * batch_size,
            "solved": row["eval_rewards/is_right"],
            "calls": row["eval_rewards/num_calls"],
            "kl": row["eval_kl"],
            "cpu_seconds": seconds,
        }
        for row in log
        if "eval_kl" in row
    ]


def describe(method: str, seed: int, rows: list[Row]) -> str:
    """One line about a run."""
    before, after = rows[0], rows[-1]
    return (
        f"{LABELS[method]}, seed {seed}: solved {before['solved']:.2f} -> {after['solved']:.2f}, "
        f"calls a rollout {before['calls']:.2f} -> {after['calls']:.2f}, KL {after['kl']:.1f} nats, "
        f"{after['cpu_seconds']:.0f} CPU seconds"
    )


def draw(curves: dict[str, list[list[Row]]], path: Path) -> None:
    """Solve rate and tool calls against rollouts: the mean of the seeds within a band from their lowest to highest."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    pictures = (("solved", "Held-out sums solved", "share"), ("calls", "Tool calls", "calls a rollout"))
    for axes, (name, title, unit) in zip(panels, pictures, strict=True):
        for number, (method, runs) in enumerate(curves.items()):
            rollouts = [row["rollouts"] for row in runs[0]]
            values = list(zip(*([row[name] for row in rows] for rows in runs), strict=True))
            axes.plot(rollouts, [fmean(v) for v in values], color=f"C{number}", label=LABELS[method])
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(rollouts, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        label_axes(axes, title, "rollouts sampled", unit)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
