"""What the demo measures before and after, on prompts that no stage has trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trl_apa.algorithms.kl import kl_full
from trl_apa.algorithms.masking import keep_counted, masked_mean
from trl_apa.rollout.batch import pad_tokens, response_mask

from .networks import decode, encode, sample
from .reward import RewardModel, gold_rewards


@dataclass(frozen=True)
class Evaluation:
    """Responses of a policy to fixed prompts as text, their gold rewards, and the means of `measure_responses`."""

    prompts: list[str]
    answers: list[str]
    golds: list[float]
    metrics: dict[str, float]


def evaluate(
    policy: PreTrainedModel,
    initial_policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    reward_model: RewardModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
) -> Evaluation:
    """Sample one response to each of `prompts` and measure it; the same seed draws the same random numbers."""
    responses = sample(policy, tokenizer, prompts, max_new_tokens, seed)
    scores = reward_model(prompts, responses)
    metrics = measure_responses(policy, initial_policy, tokenizer, prompts, responses, scores)
    golds = gold_rewards(tokenizer, prompts, responses)
    return Evaluation(list(prompts), decode(tokenizer, responses), golds, metrics)


def measure_responses(
    policy: PreTrainedModel,
    initial_policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    responses: Sequence[Tensor],
    scores: Sequence[Tensor],
) -> dict[str, float]:
    """Means over responses that `policy` has just sampled.

    Returns:
        `proxy_reward`, of `scores`; `gold_reward`, in gold units; `kl`, the exact KL to the initial model summed over
        each response's positions, nats per response; `entropy` of the next-token distribution, nats per token;
        `distinct`, different texts as a share of all; `length`, tokens; `eos_share`, the share that ended by itself.
    """
    golds = gold_rewards(tokenizer, prompts, responses)
    kl_B, entropy = divergence_and_entropy(policy, initial_policy, tokenizer, prompts, responses)
    count = len(responses)
    return {
        "proxy_reward": torch.stack(list(scores)).mean().item(),
        "gold_reward": sum(golds) / count,
        "kl": kl_B.mean().item(),
        "entropy": entropy.item(),
        "distinct": len(set(decode(tokenizer, responses))) / count,
        "length": sum(map(len, responses)) / count,
        "eos_share": sum(int(response[-1]) == tokenizer.eos_token_id for response in responses) / count,
    }


@torch.no_grad()
def divergence_and_entropy(
    policy: PreTrainedModel,
    initial_policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    responses: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """KL of each sequence `(B,)`, nats, and the mean entropy of a token, nats, over the whole vocabulary."""
    batch = pad_tokens(encode(tokenizer, prompts), responses, tokenizer.pad_token_id)
    mask_BR = response_mask(responses)
    width = mask_BR.shape[1]
    logprobs_BRV, initial_BRV = (
        model(**batch, use_cache=False).logits[:, -width - 1 : -1].float().log_softmax(dim=-1)
        for model in (policy, initial_policy)
    )
    kl_BR = keep_counted(kl_full(logprobs_BRV, initial_BRV), mask_BR)
    entropy_BR = -(logprobs_BRV.exp() * logprobs_BRV).sum(dim=-1)
    return kl_BR.sum(dim=1), masked_mean(entropy_BR, mask_BR)
