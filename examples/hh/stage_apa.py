"""Policy alignment: generate -> score -> step."""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from options import UserError
from peft import LoraConfig, get_peft_model
from progress import say
from sampling import SAMPLING, encode_queries
from stage_reward import RewardModel
from texts import response_text
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_apa import APAConfig, APATrainer
from trl_apa.data import STOP_STRINGS


def run(
    options: argparse.Namespace, prompts: Sequence[str], reward_model: RewardModel, sft_dir: Path, output_dir: Path
) -> dict[str, Any]:
    """Align the SFT model with `options.loss_type`; writes `metrics.jsonl` and the policy to `output_dir`."""
    trainer = make_trainer(options, sft_dir, output_dir)
    say("apa", f"{options.loss_type} with kl_coef {trainer.config.kl_coef} on {len(prompts)} prompts")
    batches = prompt_batches(prompts, options.batch_size, options.seed)
    with open(output_dir / "metrics.jsonl", "w", encoding="utf-8") as metrics_file:
        for iteration in range(1, options.iterations + 1):
            start = time.monotonic()
            stats = train_iteration(trainer, reward_model, next(batches), options)
            stats = {"iteration": iteration, "seconds": time.monotonic() - start, **stats}
            metrics_file.write(json.dumps(stats) + "\n")
            metrics_file.flush()
            say("apa", progress_line(stats, options.iterations))
    trainer.save_pretrained(str(output_dir))
    return {"iterations": options.iterations, "last": stats}


def make_trainer(options: argparse.Namespace, sft_dir: Path, output_dir: Path) -> APATrainer:
    """The trainer with the settings of the paper's HH experiments.

    Scores arrive on a fixed scale of deviation 1, so `scale_rewards` (the authors' running deviation) stays off.
    """
    tokenizer = AutoTokenizer.from_pretrained(sft_dir, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(sft_dir, dtype=torch.float32)
    if options.peft:
        set_seed(options.seed)
        policy = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32))
    config = APAConfig(
        output_dir=str(output_dir),
        loss_type=options.loss_type,
        kl_coef=options.kl_coef,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=1e-6,
        batch_size=options.batch_size,
        mini_batch_size=options.mini_batch_size,
        ppo_epochs=options.ppo_epochs,
        gamma=1.0,
        gae_lambda=0.95,
        cliprange_value=0.2 if options.loss_type == "ppo" else None,
        temperature=SAMPLING["temperature"],
        seed=options.seed,
        report_to="none",
    )
    return APATrainer(config, policy, None, tokenizer)


def train_iteration(
    trainer: APATrainer, reward_model: RewardModel, prompts: Sequence[str], options: argparse.Namespace
) -> dict[str, float]:
    """One round: sample a response to each prompt, score the text, update on the tokens."""
    queries = encode_queries(trainer.tokenizer, prompts, options)
    responses = trainer.generate(
        queries,
        return_prompt=False,
        batch_size=options.generation_batch_size,
        max_new_tokens=options.max_new_tokens,
        stop_strings=list(STOP_STRINGS),
        **SAMPLING,
    )
    texts = [response_text(trainer.tokenizer, response) for response in responses]
    scores = reward_model.score(prompts, texts)
    stats = trainer.step(queries, responses, list(scores))
    return {name: float(value) for name, value in stats.items() if isinstance(value, (int, float))}


def prompt_batches(prompts: Sequence[str], batch_size: int, seed: int) -> Iterator[list[str]]:
    """Batches without end: every prompt once in each pass, in an order that follows from `seed`."""
    if len(prompts) < batch_size:
        raise UserError(f"{len(prompts)} prompts are too few for one iteration: --batch-size is {batch_size}")
    generator = random.Random(seed)
    while True:
        order = generator.sample(list(prompts), len(prompts))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def progress_line(stats: dict[str, float], iterations: int) -> str:
    """The figures that tell whether it works."""
    return (
        f"{stats['iteration']}/{iterations}"
        f"  reward {stats['apa/mean_scores']:+.3f}"
        f"  KL {stats['objective/kl_k3']:.3f} nats"
        f"  entropy {stats['apa/policy/entropy']:.2f}"
        f"  length {stats['tokens/responses_len_mean']:.1f}"
        f"  ({stats['seconds']:.1f} s)"
    )
