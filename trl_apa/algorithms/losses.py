"""
The policy losses (APA, AWR, PPO) and the value loss: pure functions of tensors.

Every loss is a sum over the counted tokens divided by `num_tokens`, and so is every statistic that comes with it. With
`num_tokens` = the count of the *complete optimizer step* (over micro-batches and processes), losses, statistics and
gradients of its micro-batches therefore add up to those of the step, however it was split. Without it, the denominator
is the count of the given mask. It must never be smaller than that; this is not checked, since it would wait for the
device.

Half-precision inputs are raised to float32; float64 stays. Only the first argument carries gradient.
"""

import math

import torch
from torch import Tensor

from trl_apa.algorithms.masking import check_positive, check_response_tensors, keep_counted, masked_mean


Stats = dict[str, Tensor]


def apa_loss(
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    kl_coef: float,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    Advantage-induced policy alignment, eq. (9):

        mean over tokens of (log pi_theta(a|s) - Adv(s,a) / lambda - log pi_init(a|s))^2

    It draws the policy towards pi_init exp(Adv / lambda), the maximiser (3) of objective (2) with Z(s) taken for 1.
    The anchor is the initial policy pi_init, not the rollout policy: no importance ratio and no clipping.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        ref_logprobs_BR (`Tensor` `(B, R)`): the same tokens under pi_init, nats.
        advantages_BR (`Tensor` `(B, R)`): Adv, reward units (or whitened).
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        kl_coef (`float`): lambda of (2), reward units per nat; the paper uses 0.1.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, tokens.

    Returns:
        The loss (0-d, nats squared) and `residual` (mean of log pi_theta - log pi_init - Adv/lambda, nats),
        `residual_sq` (mean of its square: the loss), `target_sq` (mean of (Adv/lambda)^2: the loss at pi_init, nats
        squared), `log_ratio` (mean of log pi_theta - log pi_init, nats).

    Raises:
        ValueError: if `kl_coef` is not positive and finite, a shape is not the mask's `(B, R)`, or the mask is not
            bool.
    """
    check_positive("kl_coef", kl_coef)
    check_response_tensors(
        response_mask_BR, logprobs_BR=logprobs_BR, ref_logprobs_BR=ref_logprobs_BR, advantages_BR=advantages_BR
    )
    logprobs = keep_counted(logprobs_BR, response_mask_BR)
    ref_logprobs = keep_counted(ref_logprobs_BR.detach(), response_mask_BR)
    advantages = keep_counted(advantages_BR.detach(), response_mask_BR)
    log_ratio, target = logprobs - ref_logprobs, advantages / kl_coef
    residual = log_ratio - target
    loss = masked_mean(residual.square(), response_mask_BR, num_tokens)
    return loss, {
        "residual": masked_mean(residual.detach(), response_mask_BR, num_tokens),
        "residual_sq": loss.detach(),
        "target_sq": masked_mean(target.square(), response_mask_BR, num_tokens),
        "log_ratio": masked_mean(log_ratio.detach(), response_mask_BR, num_tokens),
    }


def awr_loss(
    logprobs_BR: Tensor,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    kl_coef: float,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    Advantage-weighted regression, eq. (6):

        - mean over tokens of exp(Adv(s,a) / lambda) log pi_theta(a|s)

    The weight is not clipped: with a small lambda it grows without bound, which the paper reports for lambda = 0.1.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        advantages_BR (`Tensor` `(B, R)`): Adv, reward units (or whitened).
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        kl_coef (`float`): lambda of (2), reward units per nat; the paper uses 1.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, tokens.

    Returns:
        The loss (0-d, nats) and `weight` (mean of exp(Adv/lambda)), `weight_sq` (mean of its square); weight^2 /
        weight_sq is the effective share of the tokens.

    Raises:
        ValueError: if `kl_coef` is not positive and finite, a shape is not the mask's `(B, R)`, or the mask is not
            bool.
    """
    check_positive("kl_coef", kl_coef)
    check_response_tensors(response_mask_BR, logprobs_BR=logprobs_BR, advantages_BR=advantages_BR)
    logprobs = keep_counted(logprobs_BR, response_mask_BR)
    weight = torch.exp(keep_counted(advantages_BR.detach(), response_mask_BR) / kl_coef)
    loss = -masked_mean(weight * logprobs, response_mask_BR, num_tokens)
    return loss, {
        "weight": masked_mean(weight, response_mask_BR, num_tokens),
        "weight_sq": masked_mean(weight.square(), response_mask_BR, num_tokens),
    }


def ppo_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    cliprange: float,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    Clipped ratio of PPO2 (section 3.1; Schulman et al. 2017, arXiv 1707.06347, eq. 7), as a loss:

        mean over tokens of max(-rho Adv, -clip(rho, 1 - eps, 1 + eps) Adv),   rho = pi_theta(a|s) / pi_old(a|s)

    The KL penalty of PPO is in the reward (`rewards.kl_penalized_rewards`), not here.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        old_logprobs_BR (`Tensor` `(B, R)`): the same tokens under the rollout policy pi_old, nats.
        advantages_BR (`Tensor` `(B, R)`): Adv, reward units (or whitened).
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        cliprange (`float`): eps, a ratio; the paper uses 0.2.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, tokens.

    Returns:
        The loss (0-d, unit of the advantages) and `approxkl`, `policykl`, `ratio` (see `policy_shift`), `clipfrac`
        (share of the tokens whose gradient is clipped away).

    Raises:
        ValueError: if `cliprange` is not positive and finite, a shape is not the mask's `(B, R)`, or the mask is not
            bool.
    """
    check_positive("cliprange", cliprange)
    ratio, advantages = ratio_and_advantages(logprobs_BR, old_logprobs_BR, advantages_BR, response_mask_BR)
    worst, is_clipped = clipped_surrogate(ratio, advantages, cliprange, cliprange)
    return masked_mean(worst, response_mask_BR, num_tokens), {
        **policy_shift(logprobs_BR, old_logprobs_BR, response_mask_BR, num_tokens),
        "clipfrac": masked_mean(is_clipped, response_mask_BR, num_tokens),
    }


def ratio_and_advantages(
    logprobs_BR: Tensor, old_logprobs_BR: Tensor, advantages_BR: Tensor, response_mask_BR: Tensor
) -> tuple[Tensor, Tensor]:
    """
    pi_theta / pi_old of each token, with gradient, and its advantage, both `(B, R)`: 1 and 0 behind the mask.

    Args:
        logprobs_BR, old_logprobs_BR, advantages_BR, response_mask_BR: as for `ppo_loss`.

    Raises:
        ValueError: if a shape is not the mask's `(B, R)`, or the mask is not bool.
    """
    check_response_tensors(
        response_mask_BR, logprobs_BR=logprobs_BR, old_logprobs_BR=old_logprobs_BR, advantages_BR=advantages_BR
    )
    logprobs = keep_counted(logprobs_BR, response_mask_BR)
    old_logprobs = keep_counted(old_logprobs_BR.detach(), response_mask_BR)
    return torch.exp(logprobs - old_logprobs), keep_counted(advantages_BR.detach(), response_mask_BR)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """
    `max(-rho Adv, -clip(rho, 1 - low, 1 + high) Adv)`, and 1 where its gradient is clipped away, else 0.

    Args:
        ratio: rho, of tokens or of responses, any shape.
        advantages: Adv, the same shape.
        low, high: clip ranges, ratios.
    """
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - low, 1.0 + high)
    return torch.maximum(unclipped, clipped), (clipped > unclipped).to(clipped.dtype)


def value_loss(
    values_BR: Tensor,
    returns_BR: Tensor,
    response_mask_BR: Tensor,
    old_values_BR: Tensor | None = None,
    cliprange: float | None = None,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    Squared error of the value network, the term that the paper's total loss multiplies by eta:

        mean over tokens of 0.5 (V(s) - return)^2,   return = Adv + V_old

    With `cliprange` it is PPO2's: the larger of this and the same with V held within `cliprange` of V_old.

    Args:
        values_BR (`Tensor` `(B, R)`): V, reward units; carries the gradient.
        returns_BR (`Tensor` `(B, R)`): from `advantages.gae`, reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        old_values_BR (`Tensor` `(B, R)`, *optional*): V at rollout time, reward units; read only with `cliprange`.
        cliprange (`float`, *optional*, defaults to no clipping): reward units; the paper uses 0.2 for PPO, none for
            APA.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, tokens.

    Returns:
        The loss (0-d, reward units squared) and `error` (mean of (V - return)^2), `clipfrac` (share of the tokens
        where the clipped error is the larger; 0 without clipping).

    Raises:
        ValueError: if `cliprange` is not positive and finite or comes without `old_values_BR`, a shape is not the
            mask's `(B, R)`, or the mask is not bool.
    """
    check_response_tensors(response_mask_BR, values_BR=values_BR, returns_BR=returns_BR)
    values = keep_counted(values_BR, response_mask_BR)
    returns = keep_counted(returns_BR.detach(), response_mask_BR)
    error = (values - returns).square()
    worst = error
    if cliprange is not None:
        check_positive("cliprange", cliprange)
        if old_values_BR is None:
            raise ValueError("old_values_BR is None, it should be given with cliprange: V is clipped around it")
        check_response_tensors(response_mask_BR, old_values_BR=old_values_BR)
        old_values = keep_counted(old_values_BR.detach(), response_mask_BR)
        clipped_values = torch.clamp(values, old_values - cliprange, old_values + cliprange)
        worst = torch.maximum(error, (clipped_values - returns).square())
    loss = 0.5 * masked_mean(worst, response_mask_BR, num_tokens)
    return loss, {
        "error": masked_mean(error.detach(), response_mask_BR, num_tokens),
        "clipfrac": masked_mean((worst > error).to(error.dtype), response_mask_BR, num_tokens),
    }


def policy_shift(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    response_mask_BR: Tensor,
    num_tokens: float | Tensor | None = None,
) -> Stats:
    """
    How far the policy has moved from an older self: two estimates of their KL on the sampled tokens, and the ratio.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats.
        old_logprobs_BR (`Tensor` `(B, R)`): the same tokens under the older policy pi_old, nats.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, tokens.

    Returns:
        `approxkl` (half the mean square of log pi_theta - log pi_old, nats), `policykl` (mean of log pi_old - log
        pi_theta, nats) and `ratio` (mean of pi_theta / pi_old), 0-d, detached.

    Raises:
        ValueError: if a shape is not the mask's `(B, R)`, or the mask is not bool.
    """
    check_response_tensors(response_mask_BR, logprobs_BR=logprobs_BR, old_logprobs_BR=old_logprobs_BR)
    shift = keep_counted(logprobs_BR.detach(), response_mask_BR) - keep_counted(
        old_logprobs_BR.detach(), response_mask_BR
    )
    return {
        "approxkl": masked_mean(0.5 * shift.square(), response_mask_BR, num_tokens),
        "policykl": masked_mean(-shift, response_mask_BR, num_tokens),
        "ratio": masked_mean(shift.exp(), response_mask_BR, num_tokens),
    }


def log_normalizer(advantages_BR: Tensor, response_mask_BR: Tensor, kl_coef: float) -> Tensor:
    """
    `log mean exp(Adv / lambda)` over the counted tokens: how far the batch is from the paper's `Z ~ 1`.

    Z(s) of (3) is the mean of exp(Adv(s,a) / lambda) over a ~ pi_init(.|s), and (9) takes it for 1 (Appendix A), which
    is 0 here. This is one number for the batch, with tokens sampled from the rollout policy in place of pi_init and
    states mixed: an estimate of log E_s[Z(s)] while the policy is near pi_init, not Z of any state.

    Args:
        advantages_BR (`Tensor` `(B, R)`): Adv as it enters the loss, reward units (or whitened).
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        kl_coef (`float`): lambda of (2), reward units per nat.

    Returns:
        0-d `Tensor`, nats, detached; 0 when nothing is counted. Not additive over micro-batches: take it over the
        batch.

    Raises:
        ValueError: if `kl_coef` is not positive and finite, the shape is not the mask's `(B, R)`, or the mask is not
            bool.
    """
    check_positive("kl_coef", kl_coef)
    check_response_tensors(response_mask_BR, advantages_BR=advantages_BR)
    exponent = keep_counted(advantages_BR.detach(), response_mask_BR) / kl_coef
    count = response_mask_BR.sum()
    log_sum = exponent.masked_fill(~response_mask_BR, -math.inf).flatten().logsumexp(0)
    log_mean = log_sum - count.clamp(min=1).to(log_sum.dtype).log()
    return torch.where(count > 0, log_mean, torch.zeros_like(log_mean))
