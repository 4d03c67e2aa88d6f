"""
Losses of offline training: implicit language Q-learning, APA's state normaliser, and direct reward optimisation.

As in `algorithms.losses`, losses and statistics are sums over the counted tokens divided by `num_tokens`, or over
responses divided by `num_responses`.
"""

import math

import torch
from torch import Tensor

from trl_apa.algorithms.advantages import gae
from trl_apa.algorithms.losses import Stats
from trl_apa.algorithms.masking import (
    at_least_float32,
    check_positive,
    check_response_tensors,
    keep_counted,
    masked_mean,
)
from trl_apa.algorithms.policy_gradient import response_sums


def expectile_loss(values_BR: Tensor, targets_BR: Tensor, expectile: float) -> Tensor:
    """
    |expectile - 1(target < V)| (target - V)^2, whose minimiser over draws of the target is their expectile.

    0.5 gives their mean, by half the squared error; near 1 it gives their maximum.

    Args:
        values_BR (`Tensor`): V, carries the gradient.
        targets_BR (`Tensor`): of the same shape and unit.
        expectile (`float`): tau, in (0, 1).

    Returns:
        One loss an element, in the squared unit of V.

    Raises:
        ValueError: if `expectile` is not between 0 and 1.
    """
    if not 0 < expectile < 1:
        raise ValueError(f"expectile is {expectile}, it should be between 0 and 1")
    above = targets_BR.detach() - values_BR
    return (expectile - (above < 0).to(above.dtype)).abs() * above.square()


def ilql_loss(
    q_logits: tuple[Tensor, Tensor],
    target_q_BR: Tensor,
    values_BR: Tensor,
    actions_BR: Tensor,
    rewards_BR: Tensor,
    response_mask_BR: Tensor,
    gamma: float,
    expectile: float,
    cql_coef: float,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    Implicit language Q-learning (Snell et al. 2022, arXiv 2206.11871, section 5.2):

        mean over tokens of   sum_i (r + gamma V(s') - Q_i(s,a))^2
                            + |tau - 1(Q^ < V)| (Q^ - V(s))^2,        Q^ = the smaller of the two target heads
                            + cql_coef sum_i (log sum_b exp Q_i(s,b) - Q_i(s,a))

    V of the state after the last counted token is 0. No action is ever asked for that is not in the data: V is an
    expectile of Q over the data's actions, in place of a maximum over all of them. The last term, CQL's, takes Q for
    logits and holds down the values of tokens that the data do not take.

    Args:
        q_logits (pair of `Tensor` `(B, R, V)`): Q_1 and Q_2 of every token, reward units; carry gradient.
        target_q_BR (`Tensor` `(B, R)`): Q^ of the tokens in the data, reward units.
        values_BR (`Tensor` `(B, R)`): V, reward units; carries gradient, but not as V(s').
        actions_BR (`Tensor` `(B, R)`): the tokens in the data.
        rewards_BR (`Tensor` `(B, R)`): r, reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        gamma (`float`): discount a token.
        expectile (`float`): tau, in (0, 1).
        cql_coef (`float`): weight of the last term, not negative.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, tokens.

    Returns:
        The loss (0-d) and its three parts `q_error`, `value_error`, `cql`, and the means `q` (of Q^) and `value`.

    Raises:
        ValueError: for a shape that is not the mask's, or an option out of range.
    """
    if not (math.isfinite(cql_coef) and cql_coef >= 0):
        raise ValueError(f"cql_coef is {cql_coef}, it should be finite and not negative")
    check_response_tensors(
        response_mask_BR,
        target_q_BR=target_q_BR,
        values_BR=values_BR,
        actions_BR=actions_BR,
        rewards_BR=rewards_BR,
        **{f"q_logits[{i}] without its last axis": q_BRV[..., 0] for i, q_BRV in enumerate(q_logits)},
    )
    # Lambda-returns at lambda 0 are r + gamma V(s').
    _, q_targets_BR = gae(rewards_BR, values_BR, response_mask_BR, gamma, gae_lambda=0.0)
    index_BR1 = torch.where(response_mask_BR, actions_BR, 0)[..., None]
    taken = [keep_counted(q_BRV.gather(-1, index_BR1)[..., 0], response_mask_BR) for q_BRV in q_logits]
    totals = [keep_counted(q_BRV.logsumexp(-1), response_mask_BR) for q_BRV in q_logits]
    values, target_q = keep_counted(values_BR, response_mask_BR), keep_counted(target_q_BR.detach(), response_mask_BR)
    parts = {
        "q_error": torch.stack([(q_targets_BR - q_BR).square() for q_BR in taken]).sum(0),
        "value_error": expectile_loss(values, target_q, expectile),
        "cql": torch.stack([total_BR - q_BR for total_BR, q_BR in zip(totals, taken, strict=True)]).sum(0),
    }
    means = {name: masked_mean(part, response_mask_BR, num_tokens) for name, part in parts.items()}
    loss = means["q_error"] + means["value_error"] + cql_coef * means["cql"]
    return loss, {
        **{name: mean.detach() for name, mean in means.items()},
        "q": masked_mean(target_q, response_mask_BR, num_tokens),
        "value": masked_mean(values.detach(), response_mask_BR, num_tokens),
    }


def state_normaliser_loss(
    normaliser_BR: Tensor,
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    kl_coef: float,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    Fits h(s), with which APA's residual becomes log pi - log pi_init - Adv / lambda + h(s) / lambda:

        mean over tokens of (log pi_theta(a|s) - log pi_init(a|s) - (Adv(s,a) - h(s)) / lambda)^2

    Off-policy the log Z(s) that eq. (9) leaves out holds the policy back (`docs/algorithm.md`). The policy is fitted
    to `apa_loss` with Adv - h(s) in place of Adv, h to this. Both together vanish where pi is pi* of (3) and h(s) is
    lambda log Z(s), whatever policy the data come from. Not in the paper.

    Args:
        normaliser_BR (`Tensor` `(B, R)`): h of the state before each token, in the unit of Adv; carries the gradient.
        logprobs_BR, ref_logprobs_BR (`Tensor` `(B, R)`): the tokens under pi_theta and pi_init, nats.
        advantages_BR (`Tensor` `(B, R)`): Adv, reward units (or whitened), without h.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        kl_coef (`float`): lambda, reward units per nat.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, tokens.

    Returns:
        The loss (0-d, nats squared) and `log_normalizer` (mean of h / lambda, nats: an estimate of log Z).

    Raises:
        ValueError: if `kl_coef` is not positive and finite, a shape is not the mask's `(B, R)`, or the mask is not
            bool.
    """
    if not (math.isfinite(kl_coef) and kl_coef > 0):
        raise ValueError(f"kl_coef is {kl_coef}, it should be finite and positive")
    tensors = {"normaliser_BR": normaliser_BR, "logprobs_BR": logprobs_BR, "ref_logprobs_BR": ref_logprobs_BR}
    check_response_tensors(response_mask_BR, **tensors, advantages_BR=advantages_BR)
    logprobs, ref_logprobs, advantages = (
        keep_counted(x.detach(), response_mask_BR) for x in (logprobs_BR, ref_logprobs_BR, advantages_BR)
    )
    log_normalizer = keep_counted(normaliser_BR, response_mask_BR) / kl_coef
    residual = logprobs - ref_logprobs - advantages / kl_coef + log_normalizer
    loss = masked_mean(residual.square(), response_mask_BR, num_tokens)
    return loss, {"log_normalizer": masked_mean(log_normalizer.detach(), response_mask_BR, num_tokens)}


def dro_loss(
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    values_B: Tensor,
    rewards_B: Tensor,
    response_mask_BR: Tensor,
    kl_coef: float,
    num_responses: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """
    Direct reward optimisation, DRO-V (Richemond et al. 2024, arXiv 2405.19107, algorithm 1): policy and value fitted
    together to single responses.

        residual     = tau (log pi_theta(y|x) - log pi_init(y|x)) - (r(x, y) - V(x))
        policy loss  = mean over responses of residual^2 / (2 tau), for theta alone
        value loss   = mean over responses of residual^2 / 2, for V alone

    The value loss has the gradient of the objective, half the squared residual; the policy loss has that gradient
    divided by tau, the paper's rescaling, so that the policy's step does not shrink with tau:

        - (r - V) grad log pi_theta + tau / 2 grad (log pi_theta - log pi_init)^2

    Both are 0 exactly at pi* = pi_init exp(r / tau) / Z and V = tau log Z, whatever policy the responses come from.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): response tokens under pi_theta, nats; carries the policy's gradient.
        ref_logprobs_BR (`Tensor` `(B, R)`): the same tokens under pi_init, nats.
        values_B (`Tensor` `(B,)`): V of each row's prompt, reward units; carries the value's gradient.
        rewards_B (`Tensor` `(B,)`): r, reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        kl_coef (`float`): tau, reward units per nat.
        num_responses (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, responses
            with a counted token.

    Returns:
        Policy loss (0-d, reward units times nats) and value loss (0-d, reward units squared), and as means over
        responses `residual` (reward units), `residual_sq`, `target_sq` (of (r - V)^2: that of pi_init), `log_ratio`
        (nats a response), `value` (of V, reward units).

    Raises:
        ValueError: if `kl_coef` is not positive and finite, a shape does not fit, or the mask is not bool.
    """
    check_positive("kl_coef", kl_coef)
    for name, tensor in {"values_B": values_B, "rewards_B": rewards_B}.items():
        if tensor.shape != response_mask_BR.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, it should be ({len(response_mask_BR)},)")
    zeros_BR = torch.zeros_like(response_mask_BR, dtype=torch.float32)
    log_ratio_B, _ = response_sums(logprobs_BR, ref_logprobs_BR, zeros_BR, response_mask_BR)
    counts_B = response_mask_BR.any(dim=1)
    values_B = keep_counted(at_least_float32(values_B), counts_B)
    rewards_B = keep_counted(at_least_float32(rewards_B.detach()), counts_B)

    def mean_square(residual_B: Tensor) -> Tensor:
        return masked_mean(residual_B.square(), counts_B, num_responses)

    target_B = rewards_B - values_B.detach()
    residual_B = kl_coef * log_ratio_B - target_B
    policy_loss = mean_square(residual_B) / (2 * kl_coef)
    value_loss = 0.5 * mean_square(kl_coef * log_ratio_B.detach() - rewards_B + values_B)
    return (
        policy_loss,
        value_loss,
        {
            "residual": masked_mean(residual_B.detach(), counts_B, num_responses),
            "residual_sq": mean_square(residual_B.detach()),
            "target_sq": mean_square(target_B),
            "log_ratio": masked_mean(log_ratio_B.detach(), counts_B, num_responses),
            "value": masked_mean(values_B.detach(), counts_B, num_responses),
        },
    )
