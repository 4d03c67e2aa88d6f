"""The statistics of classic's `loss` and `record_step_stats`, from tensors in which a mask says what counts."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trl_apa.algorithms.losses import policy_shift
from trl_apa.algorithms.masking import keep_counted, masked_mean, masked_var
from trl_apa.classic.core import entropy_from_logits
from trl_apa.trainer.statistics import unbiased_std


@torch.no_grad()
def loss_statistics(
    mask_BR: Tensor,
    old_logprobs_BR: Tensor,
    logprobs_BR: Tensor,
    logits_BRV: Tensor | None,
    values_BR: Tensor | None,
    vpreds_BR: Tensor | None,
    advantages_BR: Tensor,
    returns_BR: Tensor | None,
) -> dict[str, Tensor]:
    """What classic's `loss` reports beside the losses: `policy/...`, and with a critic `returns/...`, `val/...`.

    Args:
        mask_BR: bool, True = a token that counts.
        logits_BRV: for the entropy, which is left out without them.
        old_logprobs_BR, logprobs_BR, values_BR, vpreds_BR, advantages_BR, returns_BR: as in `loss`.

    Returns:
        0-D tensors; `policy/advantages` and `policy/ratio` are `(B, R)`.
    """
    stats = {f"policy/{name}": value for name, value in policy_shift(logprobs_BR, old_logprobs_BR, mask_BR).items()}
    if logits_BRV is not None:
        entropy_BR = entropy_from_logits(logits_BRV).expand_as(mask_BR)  # of what a script gives, perhaps one a row
        stats["policy/entropy"] = masked_mean(entropy_BR, mask_BR)
    if values_BR is not None and vpreds_BR is not None and returns_BR is not None:
        stats |= {
            "returns/mean": masked_mean(returns_BR, mask_BR),
            "returns/var": masked_var(returns_BR, mask_BR),
            "val/vpred": masked_mean(vpreds_BR, mask_BR),
            "val/mean": masked_mean(values_BR, mask_BR),
            "val/var": masked_var(values_BR, mask_BR),
        }
    return {
        **stats,
        "policy/advantages": advantages_BR,
        "policy/advantages_mean": masked_mean(advantages_BR, mask_BR),
        "policy/ratio": torch.exp(logprobs_BR - old_logprobs_BR),
    }


def step_statistics(kl_coef: float, data: Mapping[str, Any]) -> dict[str, Any]:
    """What classic's `record_step_stats` returns for the keyword arguments that it gets.

    Args:
        kl_coef: the controller's coefficient.
        data: `scores` `(B,)`; `logprobs`, `ref_logprobs`, `non_score_reward`, `kls`, `masks` `(B, R)`; `queries` and
            `responses`, 1-D tensors; `train_stats`, each `(optimizer steps, ...)`.

    Returns:
        `objective/...`, `tokens/...`, `ppo/...`: tensors, numbers and NumPy arrays.
    """
    mask, scores = data["masks"].bool(), data["scores"].float()
    kl_B = keep_counted(data["kls"], mask).sum(dim=-1)
    if float(kl_B.mean()) < -1.0:
        warnings.warn(
            f"the KL to the reference is {float(kl_B.mean()):.2f} nats a response; it is only so negative if the "
            "responses are not samples of the policy: look at the options of generation",
            stacklevel=3,
        )
    stats = {
        "objective/kl": kl_B.mean(),
        "objective/kl_dist": kl_B,
        "objective/logprobs": data["logprobs"],
        "objective/ref_logprobs": data["ref_logprobs"],
        "objective/kl_coef": kl_coef,
        "objective/entropy": -keep_counted(data["logprobs"], mask).sum(dim=-1).mean(),
        "ppo/mean_non_score_reward": masked_mean(data["non_score_reward"], mask),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": unbiased_std(scores),
    }
    for name in ("queries", "responses"):
        lengths = torch.tensor([len(tokens) for tokens in data[name]], dtype=torch.float32)
        stats[f"tokens/{name}_len_mean"] = float(lengths.mean())
        stats[f"tokens/{name}_len_std"] = float(unbiased_std(lengths))
        stats[f"tokens/{name}_dist"] = lengths.numpy()
    stats |= {f"ppo/{name}": values.mean(dim=0) for name, values in data.get("train_stats", {}).items()}
    if {"ppo/val/error", "ppo/returns/var"} <= stats.keys():
        stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
    return stats
