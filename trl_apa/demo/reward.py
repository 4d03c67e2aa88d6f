"""Gold rewards, preference pairs labelled by a noisy judge, and the reward model that learns from them."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast
from trl import RewardConfig

from trl_apa.trl_trainers import QuietRewardTrainer

from .corpus import gold_quality
from .networks import decode, draw_prompts, sample
from .supervised import Tick, TickCallback, run_trainer


def gold_rewards(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], responses: Sequence[Tensor]
) -> list[float]:
    """The true quality of each response, in gold units."""
    return [
        gold_quality(prompt, text, finished=int(response[-1]) == tokenizer.eos_token_id)
        for prompt, text, response in zip(prompts, decode(tokenizer, responses), responses, strict=True)
    ]


@dataclass(frozen=True)
class PreferencePairs:
    """Pairs of responses to the same prompt, labelled.

    Args:
        prompts: `N` questions.
        chosen, rejected: `N` responses each, 1-D token ids.
        gold_agreement: share of the pairs in which the better one was chosen, counting pairs of equal quality half.
    """

    prompts: list[str]
    chosen: list[Tensor]
    rejected: list[Tensor]
    gold_agreement: float

    def __len__(self) -> int:
        return len(self.prompts)


def make_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    num_pairs: int,
    max_new_tokens: int,
    seed: int,
    sharpness: float = 4.0,
) -> PreferencePairs:
    """Pairs of the model's own responses, labelled by a judge who errs the more, the closer the two are.

    The judge is that of Bradley and Terry (1952): `P(a preferred to b) = sigmoid(sharpness * (gold_a - gold_b))`.

    Args:
        prompts: to draw the questions from.
        num_pairs: pairs to make.
        max_new_tokens: of a response.
        seed: of the questions, the responses and the judge's errors.
        sharpness (`float`, *optional*, defaults to `4.0`): per gold unit.
    """
    rng = random.Random(seed)
    questions = draw_prompts(rng, prompts, num_pairs)
    responses = sample(model, tokenizer, [*questions, *questions], max_new_tokens, seed)
    golds = gold_rewards(tokenizer, [*questions, *questions], responses)
    chosen, rejected, agreements = [], [], []
    for first in range(num_pairs):
        second = first + num_pairs
        gap = golds[first] - golds[second]
        prefers_first = rng.random() < 0.5 * (1 + math.tanh(sharpness * gap / 2))
        chosen.append(responses[first if prefers_first else second])
        rejected.append(responses[second if prefers_first else first])
        agreements.append(0.5 if gap == 0 else float(prefers_first == (gap > 0)))
    return PreferencePairs(questions, chosen, rejected, sum(agreements) / num_pairs)


class RewardModel:
    """The proxy reward: a learned score of prompt and response, standardised.

    Args:
        network (`PreTrainedModel`): sequence classifier with one label.
        tokenizer (`PreTrainedTokenizerFast`): of prompts and responses.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self.network = network
        self.tokenizer = tokenizer
        self.mean, self.std = 0.0, 1.0

    def __call__(self, prompts: Sequence[str], responses: Sequence[Tensor]) -> list[Tensor]:
        """One 0-D float32 tensor a response: the network's score, less `mean`, over `std`."""
        return list(((self._scores_B(prompts, responses) - self.mean) / self.std).unbind())

    def standardise_on(self, prompts: Sequence[str], responses: Sequence[Tensor]) -> None:
        """Choose `mean` and `std` so that these responses score 0 on average, with standard deviation 1."""
        scores_B = self._scores_B(prompts, responses)
        self.mean, self.std = scores_B.mean().item(), max(scores_B.std().item(), 1e-6)

    def accuracy(self, pairs: PreferencePairs) -> float:
        """Share of the pairs in which the chosen response scores higher."""
        chosen_B = self._scores_B(pairs.prompts, pairs.chosen)
        return (chosen_B > self._scores_B(pairs.prompts, pairs.rejected)).float().mean().item()

    @torch.no_grad()
    def _scores_B(self, prompts: Sequence[str], responses: Sequence[Tensor], batch_size: int = 512) -> Tensor:
        rows = joined_ids(self.tokenizer, prompts, responses)
        scores = []
        for start in range(0, len(rows), batch_size):
            batch = {"input_ids": rows[start : start + batch_size]}
            inputs = self.tokenizer.pad(batch, return_tensors="pt", padding_side="right")
            scores.append(self.network(**inputs).logits[:, 0].float())
        return torch.cat(scores)


def joined_ids(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], responses: Sequence[Tensor]
) -> list[list[int]]:
    """Token ids of each prompt followed by its response."""
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    return [ids + response.tolist() for ids, response in zip(prompt_ids, responses, strict=True)]


def train_reward_model(
    sft_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: PreferencePairs,
    options: dict[str, Any],
    tick: Tick,
) -> RewardModel:
    """Learn a score from `pairs`, starting from the trunk of `sft_model`, and standardise it on the same responses.

    Args:
        options: from `supervised.training_options`.
        tick: told of every step.
    """
    config = type(sft_model.config).from_dict({**sft_model.config.to_dict(), "num_labels": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    network.base_model.load_state_dict(sft_model.base_model.state_dict())
    # Token ids rather than text: from text the trainer would end every response with EOS, the unfinished ones too.
    rows = {
        "chosen_ids": joined_ids(tokenizer, pairs.prompts, pairs.chosen),
        "rejected_ids": joined_ids(tokenizer, pairs.prompts, pairs.rejected),
    }
    trainer = QuietRewardTrainer(
        model=network,
        args=RewardConfig(**options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[TickCallback(tick)],
    )
    run_trainer(trainer)
    reward_model = RewardModel(network, tokenizer)
    reward_model.standardise_on(pairs.prompts * 2, pairs.chosen + pairs.rejected)
    return reward_model
