"""The proxy reward: a model of human preference, its held-out accuracy, and the scale that its scores are read on."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from options import UserError
from progress import say, use_progress_lines
from sampling import encode_queries, load_policy, sample_responses
from stage_sft import common_arguments
from texts import encode_prompt, encode_response, response_text
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import RewardConfig

from trl_apa.data import Preference
from trl_apa.trl_trainers import QuietRewardTrainer


SCALE_PROMPTS = 256


class RewardModel:
    """A sequence classifier with one output that scores a response to a prompt at the EOS after it.

    The reward is on a scale of its own: `(output - mean) / std`. A reward model is only defined up to a constant, so
    it is common to set its mean to 0 and its standard deviation to 1 on responses of the SFT model.

    Args:
        source: path or hub name of the classifier, its tokenizer beside it.
        options: lengths.
    """

    def __init__(self, source: str | Path, options: argparse.Namespace):
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model, loading = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"]))
            raise UserError(f"{source} is no trained reward model: it has no weights for {missing}")
        if self.model.config.num_labels != 1:
            raise UserError(f"{source} has {self.model.config.num_labels} outputs, expected a reward model with one")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
        self.options = options
        self.mean, self.std = 0.0, 1.0

    @torch.no_grad()
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """Rewards of whole texts, float32 `(B,)`, on the scale of `mean` and `std`."""
        rows = [
            pair_ids(self.tokenizer, prompt, response, self.options)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        raw = torch.empty(len(rows))
        by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(rows), self.options.generation_batch_size):
            chunk = by_length[start : start + self.options.generation_batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [rows[row] for row in chunk]}, padding_side="right", return_tensors="pt"
            )
            raw[chunk] = self.model(**batch.to(self.model.device)).logits[:, 0].float().cpu()
        return (raw - self.mean) / self.std

    def set_scale(self, rewards: torch.Tensor) -> None:
        """Make `rewards`, measured on the scale so far, have mean 0 and standard deviation 1."""
        mean, std = rewards.mean().item(), rewards.std().item()
        self.mean, self.std = self.mean + self.std * mean, self.std * max(std, 1e-6)


def pair_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, options: argparse.Namespace) -> list[int]:
    """What the reward model reads: the last turns of the prompt, the response, EOS."""
    prompt_ids = encode_prompt(tokenizer, prompt, options.max_prompt_length)
    return prompt_ids + encode_response(tokenizer, response, options.max_target_length, end=True)


def train(options: argparse.Namespace, pairs: Sequence[Preference], sft_dir: Path, output_dir: Path) -> None:
    """Fit the Bradley-Terry model of `pairs`, starting from the SFT model, and save it in `output_dir`."""
    tokenizer = AutoTokenizer.from_pretrained(sft_dir)
    # The new score head is random, whichever stages ran before in this process.
    set_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(sft_dir, num_labels=1, dtype=torch.float32)
    rows = [
        {
            "chosen_ids": pair_ids(tokenizer, pair.prompt, pair.chosen, options),
            "rejected_ids": pair_ids(tokenizer, pair.prompt, pair.rejected, options),
        }
        for pair in pairs
    ]
    say("reward", f"training on {len(rows)} pairs")
    trainer = QuietRewardTrainer(
        model=model,
        args=RewardConfig(
            learning_rate=options.reward_learning_rate,
            num_train_epochs=options.reward_epochs,
            per_device_train_batch_size=options.reward_batch_size,
            max_length=None,
            **common_arguments(options, output_dir),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    use_progress_lines(trainer, "reward", "loss", "accuracy", "margin")
    trainer.train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def held_out_accuracy(reward_model: RewardModel, pairs: Sequence[Preference]) -> dict[str, Any]:
    """How often the reward model prefers what people preferred, on pairs that it did not see; a tie counts half."""
    prompts = [pair.prompt for pair in pairs]
    chosen = reward_model.score(prompts, [pair.chosen for pair in pairs])
    rejected = reward_model.score(prompts, [pair.rejected for pair in pairs])
    accuracy = ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()
    error = math.sqrt(accuracy * (1 - accuracy) / len(pairs))
    say("reward", f"accuracy on {len(pairs)} held-out pairs: {accuracy:.3f} +- {error:.3f} (chance: 0.5)")
    return {"held_out_pairs": len(pairs), "held_out_accuracy": accuracy, "held_out_accuracy_se": error}


def run(
    options: argparse.Namespace,
    pairs: Sequence[Preference],
    held_out: Sequence[Preference],
    rl_prompts: Sequence[str],
    sft_dir: Path,
    output_dir: Path,
) -> dict[str, Any]:
    """Train a reward model, or take `--reward-model`; measure it and set its scale on responses of the SFT model."""
    if options.reward_model is None:
        train(options, pairs, sft_dir, output_dir)
    source = str(options.reward_model or output_dir)
    reward_model = RewardModel(source, options)
    result = held_out_accuracy(reward_model, held_out)
    prompts = list(rl_prompts)[:SCALE_PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(sft_dir)
    queries = encode_queries(tokenizer, prompts, options)
    responses = sample_responses(load_policy(sft_dir), tokenizer, queries, options, options.seed)
    texts = [response_text(tokenizer, response) for response in responses]
    reward_model.set_scale(reward_model.score(prompts, texts))
    say(
        "reward", f"SFT responses score {reward_model.mean:.3f} +- {reward_model.std:.3f}; from here on that is 0 +- 1"
    )
    return {"trained": options.reward_model is None, "mean": reward_model.mean, "std": reward_model.std, **result}


def load(options: argparse.Namespace, output_dir: Path, result: dict[str, Any]) -> RewardModel:
    """The reward model that [`run`] left, on its scale."""
    reward_model = RewardModel(options.reward_model or output_dir, options)
    reward_model.mean, reward_model.std = result["mean"], result["std"]
    return reward_model
