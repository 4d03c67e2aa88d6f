"""Held-out evaluation: the SFT model and the aligned policy answer the same prompts."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from progress import say
from sampling import encode_queries, load_policy, sample_responses
from stage_reward import RewardModel
from texts import response_text
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_apa.data import HUMAN_TURN
from trl_apa.models.logprobs import response_logprobs
from trl_apa.rollout.batch import pad_tokens, response_mask


@dataclass
class Answers:
    """What one model answered: `N` texts, their rewards and lengths (tokens), and the KL estimates of each (nats)."""

    texts: list[str]
    rewards_N: torch.Tensor
    lengths_N: torch.Tensor
    kl_k1_N: torch.Tensor
    kl_k3_N: torch.Tensor


def run(
    options: argparse.Namespace,
    prompts: Sequence[str],
    reward_model: RewardModel,
    sft_dir: Path,
    policy_dir: Path,
    output_dir: Path,
) -> dict[str, Any]:
    """Compare both models on `options.eval_prompts` held-out prompts; writes `samples.jsonl`."""
    prompts = list(prompts)[: options.eval_prompts]
    tokenizer = AutoTokenizer.from_pretrained(sft_dir)
    reference, policy = load_policy(sft_dir), load_policy(policy_dir)
    say("eval", f"two answers to each of {len(prompts)} held-out prompts")
    before = answer(reference, reference, tokenizer, prompts, reward_model, options)
    after = answer(policy, reference, tokenizer, prompts, reward_model, options)
    with open(output_dir / "samples.jsonl", "w", encoding="utf-8") as samples_file:
        for row, prompt in enumerate(prompts):
            sample = {"prompt": prompt, "before": before.texts[row], "after": after.texts[row]}
            sample |= {"reward_before": before.rewards_N[row].item(), "reward_after": after.rewards_N[row].item()}
            samples_file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    wins_N = (after.rewards_N > before.rewards_N).float() + 0.5 * (after.rewards_N == before.rewards_N).float()
    difference_N = after.rewards_N - before.rewards_N
    return {
        "prompts": len(prompts),
        "before": summary(before),
        "after": summary(after),
        "reward_difference": difference_N.mean().item(),
        "reward_difference_se": standard_error(difference_N),
        "win_rate": wins_N.mean().item(),
        "win_rate_se": standard_error(wins_N),
    }


def answer(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward_model: RewardModel,
    options: argparse.Namespace,
) -> Answers:
    """Sample answers of `policy`, score them, and measure how far they are from `reference`."""
    queries = encode_queries(tokenizer, prompts, options)
    responses = sample_responses(policy, tokenizer, queries, options, options.seed)
    texts = [response_text(tokenizer, response) for response in responses]
    kl_k1_N, kl_k3_N = sequence_kl(policy, reference, queries, responses, tokenizer.pad_token_id, options)
    lengths_N = torch.tensor([float(len(response)) for response in responses])
    return Answers(texts, reward_model.score(prompts, texts), lengths_N, kl_k1_N, kl_k3_N)


@torch.no_grad()
def sequence_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    queries: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    pad_token_id: int,
    options: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates of KL(policy || reference) from `N` sampled responses, nats a sequence, each `(N,)`.

    With `x = log pi - log pi_init` of a sampled token, k1 sums `x` (unbiased, may be negative) and k3 sums
    `exp(-x) - 1 + x` (never negative, the one in the paper's figures).
    """
    k1, k3 = [], []
    for start in range(0, len(queries), options.generation_batch_size):
        rows = slice(start, start + options.generation_batch_size)
        batch = pad_tokens(queries[rows], responses[rows], pad_token_id)
        mask_BR = response_mask(responses[rows]).to(policy.device)
        inputs = ({name: tensor.to(policy.device) for name, tensor in batch.items()}, mask_BR.shape[1])
        log_ratio_BR = response_logprobs(policy, *inputs)[0] - response_logprobs(reference, *inputs)[0]
        log_ratio_BR = log_ratio_BR.masked_fill(~mask_BR, 0.0)
        k1.append(log_ratio_BR.sum(dim=1).cpu())
        k3.append((torch.expm1(-log_ratio_BR) + log_ratio_BR).sum(dim=1).cpu())
    return torch.cat(k1), torch.cat(k3)


def summary(answers: Answers) -> dict[str, float]:
    """Means over the prompts; `se` is the standard error of the mean."""
    words = [text.split() for text in answers.texts]
    bigrams = [pair for text in words for pair in pairwise(text)]
    return {
        "reward": answers.rewards_N.mean().item(),
        "reward_se": standard_error(answers.rewards_N),
        "kl_k1": answers.kl_k1_N.mean().item(),
        "kl_k3": answers.kl_k3_N.mean().item(),
        "length": answers.lengths_N.mean().item(),
        "distinct_answers": len(set(answers.texts)) / len(answers.texts),
        "distinct_bigrams": len(set(bigrams)) / max(len(bigrams), 1),
    }


def standard_error(x_N: torch.Tensor) -> float:
    """Standard error of the mean of `N` independent numbers; 0 for a single one."""
    return x_N.std().item() / math.sqrt(len(x_N)) if len(x_N) > 1 else 0.0


ROWS = (
    ("proxy reward", "reward", "{:+.3f}"),
    ("  standard error", "reward_se", "{:.3f}"),
    ("KL to SFT, k1 (nats/sequence)", "kl_k1", "{:.3f}"),
    ("KL to SFT, k3 (nats/sequence)", "kl_k3", "{:.3f}"),
    ("response length (tokens)", "length", "{:.1f}"),
    ("distinct answers (share)", "distinct_answers", "{:.3f}"),
    ("distinct word pairs (share)", "distinct_bigrams", "{:.3f}"),
)


def table(result: dict[str, Any], loss_type: str) -> str:
    """The result as text."""
    lines = [f"{'':<32}{'SFT':>10}{loss_type.upper():>10}"]
    for title, name, form in ROWS:
        lines.append(f"{title:<32}{form.format(result['before'][name]):>10}{form.format(result['after'][name]):>10}")
    lines.append(
        f"reward gain on the same {result['prompts']} prompts: {result['reward_difference']:+.3f} "
        f"+- {result['reward_difference_se']:.3f}; wins {result['win_rate']:.3f} +- {result['win_rate_se']:.3f}"
    )
    return "\n".join(lines)


def sample_lines(samples_file: Path, count: int) -> str:
    """The first samples, with the last human turn of their prompts."""
    blocks = []
    with open(samples_file, encoding="utf-8") as lines:
        for line, _ in zip(lines, range(count), strict=False):
            sample = json.loads(line)
            question = sample["prompt"].rsplit(HUMAN_TURN, 1)[-1].split("\n\n")[0].strip()
            blocks.append(
                f"Human:  {question}\n"
                f"  SFT   ({sample['reward_before']:+.2f}): {sample['before'].strip()!r}\n"
                f"  after ({sample['reward_after']:+.2f}): {sample['after'].strip()!r}"
            )
    return "\n\n".join(blocks)
