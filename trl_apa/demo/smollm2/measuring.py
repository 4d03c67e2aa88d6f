"""What is measured of responses: reward, exact KL, entropy, variety, and how fluent the frozen model finds them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_apa.algorithms.kl import kl_full
from trl_apa.algorithms.masking import keep_counted
from trl_apa.evaluation.held_out import distinct_ngrams
from trl_apa.models.network_parts import Network
from trl_apa.models.reference import reference_policy
from trl_apa.rollout.batch import pad_tokens, response_mask


# Name in the metrics, heading in the live table, meaning in the final one, format.
METRICS = (
    ("reward", "reward", "reward (VADER, -1 to 1)", "{:+.2f}"),
    ("kl", "KL", "exact KL to the frozen model, nats/response", "{:.2f}"),
    ("entropy", "entropy", "entropy, nats/token", "{:.2f}"),
    ("perplexity", "perplexity", "perplexity under the frozen model", "{:.1f}"),
    ("distinct_1", "distinct-1", "distinct-1 (different tokens)", "{:.0%}"),
    ("distinct_2", "distinct-2", "distinct-2 (different pairs of tokens)", "{:.0%}"),
    ("length", "tokens", "length, tokens", "{:.1f}"),
)


def measure_responses(
    policy: Network,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    rewards: Sequence[float],
    frozen: Network | None = None,
) -> dict[str, float]:
    """Means over responses that `policy` has just sampled.

    Args:
        policy: the model that is trained.
        tokenizer: its tokenizer.
        queries, responses: 1-D token ids.
        rewards: of the responses.
        frozen: the model before training; by default the policy without adapters.

    Returns:
        `reward`; `kl`, summed over each response's positions and the whole vocabulary at each, nats per response;
        `entropy`, nats per token; `perplexity`, exp of the mean negative log-prob of the tokens under the base without
        adapters; `distinct_1` and `distinct_2`, see `held_out.distinct_ngrams`; `length`, tokens.
    """
    kl, entropy, negative_logprob = token_sums(policy, tokenizer, queries, responses, frozen=frozen)
    count, tokens = len(responses), sum(map(len, responses))
    return {
        "reward": sum(rewards) / count,
        "kl": kl / count,
        "entropy": entropy / tokens,
        "perplexity": torch.tensor(negative_logprob / tokens).exp().item(),
        **{f"distinct_{n}": distinct_ngrams([response.tolist() for response in responses], n) for n in (1, 2)},
        "length": tokens / count,
    }


@torch.no_grad()
def token_sums(
    policy: Network,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    rows: int = 16,
    frozen: Network | None = None,
) -> tuple[float, float, float]:
    """Sums over all response tokens, nats: KL to the base, entropy of the policy, and -log p of the token in the base.

    Args:
        policy: the model that is trained.
        tokenizer: its tokenizer.
        queries, responses: 1-D token ids.
        rows: responses that are computed together: their logits take 200 kB a token.
        frozen: the model before training; by default the policy without adapters.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(responses), rows):
        part = slice(start, start + rows)
        batch = pad_tokens(queries[part], responses[part], tokenizer.pad_token_id)
        mask_BR = response_mask(responses[part])
        logprobs_BRV = _logprobs(policy, batch, mask_BR.shape[1])
        with reference_policy(policy, frozen) as reference:
            frozen_BRV = _logprobs(reference, batch, mask_BR.shape[1])
        tokens_BR = batch["input_ids"][:, -mask_BR.shape[1] :]
        chosen_BR = frozen_BRV.gather(-1, tokens_BR[..., None])[..., 0]
        entropy_BR = -(logprobs_BRV.exp() * logprobs_BRV).sum(dim=-1)
        of_tokens = (kl_full(logprobs_BRV, frozen_BRV), entropy_BR, -chosen_BR)
        sums += torch.stack([keep_counted(values_BR, mask_BR).double().sum() for values_BR in of_tokens])
    kl, entropy, negative_logprob = sums.tolist()
    return kl, entropy, negative_logprob


def _logprobs(policy: Network, batch: dict[str, Tensor], width: int) -> Tensor:
    logits_BRV: Tensor = policy(**batch, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    return logits_BRV.float().log_softmax(dim=-1)
