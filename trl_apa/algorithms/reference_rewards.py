"""Advantages from rewards of pi_init's own responses to a prompt: quantile rewards, and the optimal value."""

import math

import torch
from torch import Tensor

from trl_apa.algorithms.advantages import on_each_token, sequence_rewards
from trl_apa.algorithms.masking import at_least_float32, check_positive


def quantile_advantages(
    rewards_BR: Tensor, response_mask_BR: Tensor, ref_rewards_BN: Tensor, kl_coef: float
) -> Tensor:
    """
    QRPO's quantile reward less the log partition function that goes with it, on each token of a response (Matrenok,
    Moalla and Gulcehre 2025, arXiv 2507.08068, eq. 11).

        q_i   = share of the N responses of pi_init to the prompt whose reward is at most R_i
        Adv_i = q_i - beta log Z,   Z = beta (exp(1 / beta) - 1)

    Over the responses of pi_init, and with a continuous reward, q is uniform on [0, 1] whatever the reward; therefore
    Z, the mean of exp(q / beta), is known and the same for every prompt. Where rewards are equal, or N is below
    1 / beta, this Z is too small: see `log_quantile_partition`.

    Args:
        rewards_BR (`Tensor` `(B, R)`): reward of each token, reward units; R_i is the sum over the counted ones.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        ref_rewards_BN (`Tensor` `(B, N)`): rewards of responses of pi_init to the prompt of each row, reward units;
            NaN where a prompt has fewer than N.
        kl_coef (`float`): beta, units of the quantile per nat.

    Returns:
        `(B, R)`, in [-1, 1], at least float32, detached, 0 behind the mask.

    Raises:
        ValueError: if shapes do not fit, the mask is not bool, or `kl_coef` is not positive and finite.
    """
    total_B, counted_B = sequence_rewards(rewards_BR, response_mask_BR)
    known_BN = _known(ref_rewards_BN, response_mask_BR)
    # As float32, in which scores come: the sum of a response's token rewards is its score only up to rounding.
    at_most_BN = (at_least_float32(ref_rewards_BN.detach()).float() <= total_B.float()[:, None]) & known_BN
    quantile_B = at_most_BN.sum(dim=1).to(total_B.dtype) / known_BN.sum(dim=1).clamp(min=1)
    advantage_B = quantile_B - kl_coef * log_quantile_partition(kl_coef)
    advantage_B = torch.where(counted_B, advantage_B, torch.zeros_like(advantage_B))
    return on_each_token(advantage_B, rewards_BR, response_mask_BR)


def log_quantile_partition(kl_coef: float) -> float:
    """
    log Z of a reward that is uniform on [0, 1] under pi_init: QRPO, eq. 11.

        log Z = log(beta (exp(1 / beta) - 1)) = log beta + 1 / beta + log(1 - exp(-1 / beta))

    The authors' code leaves out the last term, which is below 5e-5 in size for beta up to 0.1. With N reference
    rewards a response of pi_init is at least as good as k of them with probability 1 / (N + 1) for each k from 0 to N,
    so that the exact Z is the mean of exp(k / (N beta)), which is larger: 0.4 nats at N = 8, beta = 0.1, and 2.4 at
    beta = 0.01. What a wrong constant does is the same as in APA: nothing on the policy's own samples.

    Args:
        kl_coef (`float`): beta, units of the quantile per nat.

    Returns:
        Nats. It tends to 0.5 / beta for a large beta.

    Raises:
        ValueError: if `kl_coef` is not positive and finite.
    """
    check_positive("kl_coef", kl_coef)
    return math.log(kl_coef * -math.expm1(-1.0 / kl_coef)) + 1.0 / kl_coef


def optimal_value_advantages(
    rewards_BR: Tensor, response_mask_BR: Tensor, ref_rewards_BN: Tensor, kl_coef: float
) -> Tensor:
    """
    A response's reward minus the optimal value of its prompt, on each of its tokens: A* of A*-PO (Brantley et al.
    2025, arXiv 2505.20686).

        Adv_i = R_i - V*(x),   V*(x) = beta_1 log mean_n exp(r_n / beta_1)

    over rewards r_n of N responses of pi_init. See `optimal_values`.

    Args:
        rewards_BR, response_mask_BR, ref_rewards_BN: as for `quantile_advantages`.
        kl_coef (`float`): beta_1, reward units per nat.

    Returns:
        `(B, R)`, reward units, at least float32, detached, 0 behind the mask.

    Raises:
        ValueError: as `quantile_advantages`.
    """
    total_B, counted_B = sequence_rewards(rewards_BR, response_mask_BR)
    _known(ref_rewards_BN, response_mask_BR)
    advantage_B = total_B - optimal_values(ref_rewards_BN, kl_coef).to(total_B.dtype)
    advantage_B = torch.where(counted_B, advantage_B, torch.zeros_like(advantage_B))
    return on_each_token(advantage_B, rewards_BR, response_mask_BR)


def optimal_values(ref_rewards_BN: Tensor, kl_coef: float) -> Tensor:
    """
    The largest value of E[r] - beta_1 KL(pi || pi_init) for each prompt, estimated from responses of pi_init.

        V*(x) = beta_1 log E exp(r / beta_1), over pi_init;   estimated by the mean over N responses

    It lies between their mean (large beta_1) and the best of them (small beta_1). From few responses it is estimated
    too low, by Jensen's inequality.

    Args:
        ref_rewards_BN (`Tensor` `(B, N)`): reward units; NaN where a prompt has fewer than N.
        kl_coef (`float`): beta_1, reward units per nat.

    Returns:
        `(B,)`, reward units, at least float32, detached; NaN where a prompt has none.

    Raises:
        ValueError: if `kl_coef` is not positive and finite.
    """
    check_positive("kl_coef", kl_coef)
    rewards_BN = at_least_float32(ref_rewards_BN.detach())
    known_BN = ~rewards_BN.isnan()
    exponent_BN = (rewards_BN / kl_coef).masked_fill(~known_BN, -math.inf)
    return kl_coef * (exponent_BN.logsumexp(dim=1) - known_BN.sum(dim=1).to(rewards_BN.dtype).log())


def _known(ref_rewards_BN: Tensor, response_mask_BR: Tensor) -> Tensor:
    """Where there is a reference reward, bool `(B, N)`."""
    rows = len(response_mask_BR)
    if ref_rewards_BN.ndim != 2 or len(ref_rewards_BN) != rows:
        raise ValueError(f"ref_rewards_BN has shape {tuple(ref_rewards_BN.shape)}, it should be ({rows}, N)")
    return ~ref_rewards_BN.isnan()
