"""
Losses of offline training: implicit language Q-learning, and APA's state normaliser.

As there, losses and statistics are sums over the counted tokens divided by `num_tokens`.
"""

import math

import torch
from torch import Tensor

from trl_apa.algorithms.advantages import gae
from trl_apa.algorithms.losses import Stats
from trl_apa.algorithms.masking import check_response_tensors, keep_counted, masked_mean


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
