"""Advantages and returns of sampled responses."""

import torch
from torch import Tensor

from trl_apa.algorithms.masking import check_response_tensors, keep_counted


def gae(
    rewards_BR: Tensor, values_BR: Tensor, response_mask_BR: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """
    Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16), Adv of the paper's losses.

        delta_t  = r_t + gamma V(s_t+1) - V(s_t)
        Adv_t    = delta_t + gamma gae_lambda Adv_t+1
        return_t = Adv_t + V(s_t)

    `t + 1` is the next *counted* token: a masked gap inside a response (the output of a tool) is skipped, not taken
    for actions without reward, and costs no discount. V after the last counted token is 0: the episode ends there.

    Args:
        rewards_BR (`Tensor` `(B, R)`): reward of each token, reward units. Only counted tokens are read.
        values_BR (`Tensor` `(B, R)`): V of the state in which each token was chosen, reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        gamma (`float`): discount per counted token, in [0, 1]; the paper uses 1.
        gae_lambda (`float`): bias against variance, in [0, 1]; 1 gives return minus value, 0 the one-step TD error.
            Not the lambda of objective (2), which is `kl_coef`.

    Returns:
        `advantages_BR` and `returns_BR`, `(B, R)`, reward units, at least float32, detached, 0 behind the mask.

    Raises:
        ValueError: if shapes differ or are not 2-D, the mask is not bool, or `gamma` or `gae_lambda` is outside
            [0, 1].
    """
    check_response_tensors(response_mask_BR, rewards_BR=rewards_BR, values_BR=values_BR)
    for name, number in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} is {number}, it should be in [0, 1]")
    rewards = keep_counted(rewards_BR.detach(), response_mask_BR)
    values = keep_counted(values_BR.detach(), response_mask_BR)
    advantages = torch.zeros_like(rewards + values)
    values = values.to(advantages.dtype)
    next_value_B = advantages.new_zeros(len(advantages))
    next_advantage_B = advantages.new_zeros(len(advantages))
    for t in reversed(range(advantages.shape[1])):
        counted_B = response_mask_BR[:, t]
        delta_B = rewards[:, t] + gamma * next_value_B - values[:, t]
        advantage_B = delta_B + gamma * gae_lambda * next_advantage_B
        next_value_B = torch.where(counted_B, values[:, t], next_value_B)
        next_advantage_B = torch.where(counted_B, advantage_B, next_advantage_B)
        advantages[:, t] = torch.where(counted_B, advantage_B, torch.zeros_like(advantage_B))
    return advantages, advantages + values
