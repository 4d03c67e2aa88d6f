"""
Squared errors on complete responses: APA's relatives, which fit the policy to the closed form of the KL objective.

As in `policy_gradient`, each is a sum over responses divided by `num_responses`, those of the complete optimizer step.
"""

import torch
from torch import Tensor

from trl_apa.algorithms.losses import Stats
from trl_apa.algorithms.masking import check_positive, masked_mean
from trl_apa.algorithms.policy_gradient import response_sums


def response_regression_loss(
    logprobs_BR: Tensor,
    anchor_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    kl_coef: float,
    num_responses: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    The policy's log-ratio to an anchor, times tau, regressed onto the advantage of each response:

        mean over responses of (tau (log pi_theta(y|x) - log pi_anchor(y|x)) - A(x, y))^2

    With A = r - tau log Z it is 0 exactly at pi_anchor exp(r / tau) / Z, the maximiser of E[r] - tau KL(pi || anchor),
    whichever policy sampled the responses. What differs between methods are the anchor and the baseline in A:

    - policy mirror descent of Kimi k1.5 (arXiv 2501.12599, section 2.3.2): the anchor is the policy that sampled the
      iteration; tau log Z is `tau log mean exp(r / tau)` over the group, or just the group's mean score;
    - A*-PO, second stage (arXiv 2505.20686): the anchor is pi_init; tau log Z is V*(x), estimated once from samples of
      pi_init (`reference_rewards.optimal_values`);
    - QRPO (arXiv 2507.08068, eq. 11): the anchor is pi_init; r is the quantile of the reward among those of pi_init,
      whose log Z is known (`reference_rewards.log_quantile_partition`).

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        anchor_logprobs_BR (`Tensor` `(B, R)`): the same tokens under the anchor, nats.
        advantages_BR (`Tensor` `(B, R)`): A of a response is the mean over its counted tokens, reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        kl_coef (`float`): tau, reward units per nat.
        num_responses (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, responses
            with a counted token.

    Returns:
        The loss (0-d, reward units squared) and, as means over responses, `residual` (of tau log-ratio - A, reward
        units), `residual_sq` (of its square: the loss), `target_sq` (of A^2: the loss at the anchor), `log_ratio`
        (nats a response).

    Raises:
        ValueError: if `kl_coef` is not positive and finite, a shape is not the mask's `(B, R)`, or the mask is not
            bool.
    """
    check_positive("kl_coef", kl_coef)
    log_ratio_B, advantages_B = response_sums(logprobs_BR, anchor_logprobs_BR, advantages_BR, response_mask_BR)
    counts_B = response_mask_BR.any(dim=1)
    residual_B = kl_coef * log_ratio_B - advantages_B
    loss = masked_mean(residual_B.square(), counts_B, num_responses)
    return loss, {
        "residual": masked_mean(residual_B.detach(), counts_B, num_responses),
        "residual_sq": loss.detach(),
        "target_sq": masked_mean(advantages_B.square(), counts_B, num_responses),
        "log_ratio": masked_mean(log_ratio_B.detach(), counts_B, num_responses),
    }


def pairwise_regression_loss(
    logprobs_BR: Tensor,
    anchor_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    groups_B: Tensor,
    kl_coef: float,
    num_responses: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    REBEL (arXiv 2404.16767): differences of log-ratios regressed onto differences of rewards, over all pairs of a
    group.

        mean over pairs (i, j) of (tau (z_i - z_j) - (A_i - A_j))^2,   z = log pi_theta(y|x) - log pi_anchor(y|x)

    log Z(x), the same for both responses of a pair, drops out, and so does a baseline in A. The anchor is the policy
    that sampled the iteration. With two responses to a prompt it is the paper's loss, whose eta is 1 / tau. With
    u_i = tau z_i - A_i a group of g responses has mean squared difference 2 / (g - 1) sum_i (u_i - mean u)^2.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        anchor_logprobs_BR (`Tensor` `(B, R)`): the same tokens under the anchor, nats.
        advantages_BR (`Tensor` `(B, R)`): A of a response is the mean over its counted tokens, reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        groups_B (`Tensor` `(B,)`): integers, the same for responses that are compared. A group has to be complete.
        kl_coef (`float`): tau, reward units per nat.
        num_responses (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, responses
            with a counted token: each group counts by how many it has.

    Returns:
        The loss (0-d, reward units squared), 0 where no response has another one to be compared with; `residual_sq`
        (the loss), `target_sq` (that of the anchor), `log_ratio` (mean over responses, nats a response).

    Raises:
        ValueError: if `kl_coef` is not positive and finite, a shape does not fit, or the mask is not bool.
    """
    check_positive("kl_coef", kl_coef)
    if groups_B.shape != response_mask_BR.shape[:1]:
        raise ValueError(f"groups_B has shape {tuple(groups_B.shape)}, it should be ({len(response_mask_BR)},)")
    log_ratio_B, advantages_B = response_sums(logprobs_BR, anchor_logprobs_BR, advantages_BR, response_mask_BR)
    counts_B = response_mask_BR.any(dim=1)
    same_BB = (groups_B[:, None] == groups_B) & counts_B[:, None] & counts_B
    size_B = same_BB.sum(dim=1).to(advantages_B.dtype)

    def mean_squared_difference(u_B: Tensor) -> Tensor:
        deviation_B = u_B - (same_BB.to(u_B.dtype) @ u_B) / size_B.clamp(min=1)
        weight_B = torch.where(size_B > 1, 2 * size_B / (size_B - 1).clamp(min=1), torch.zeros_like(size_B))
        return masked_mean(weight_B * deviation_B.square(), counts_B, num_responses)

    loss = mean_squared_difference(kl_coef * log_ratio_B - advantages_B)
    return loss, {
        "residual_sq": loss.detach(),
        "target_sq": mean_squared_difference(advantages_B),
        "log_ratio": masked_mean(log_ratio_B.detach(), counts_B, num_responses),
    }
