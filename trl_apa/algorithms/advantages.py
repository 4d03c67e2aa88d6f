"""Advantages and returns of sampled responses."""

import math

import torch
from torch import Tensor

from trl_apa.algorithms.masking import at_least_float32, check_positive, check_response_tensors, keep_counted


# Added to the standard deviation of a group, as TRL's GRPO does.
GROUP_EPSILON = 1e-4
GROUP_NORMALIZATIONS = ("none", "std")


def gae(
    rewards_BR: Tensor,
    values_BR: Tensor,
    response_mask_BR: Tensor,
    gamma: float,
    gae_lambda: float,
    turn_discount: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """
    Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16), Adv of the paper's losses.

        delta_t  = r_t + g_t V(s_t+1) - V(s_t)
        Adv_t    = delta_t + g_t gae_lambda Adv_t+1
        return_t = Adv_t + V(s_t)
        g_t      = gamma turn_discount where token t ends a turn, gamma elsewhere

    `t + 1` is the next *counted* token: a masked gap inside a response (the output of a tool) is skipped, not taken
    for actions without reward, and costs no discount of its own. V after the last counted token is 0: the episode ends
    there. A turn is a run of counted tokens; it ends where the next column is masked.

    `turn_discount` multiplies `gamma`, so that 1 is plain GAE whatever `gamma` is, and what a turn costs does not
    depend on how many tokens it has. It is the second discount of bi-level GAE (Wang et al. 2025, arXiv 2510.16907),
    there in place of `gamma`. For `gamma` = `gae_lambda` = 1 both are the same; otherwise that method's recursion over
    the last tokens of turns, from which it begins one in each turn, leaves out the tokens between them.

    Args:
        rewards_BR (`Tensor` `(B, R)`): reward of each token, reward units. Only counted tokens are read.
        values_BR (`Tensor` `(B, R)`): V of the state in which each token was chosen, reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        gamma (`float`): discount per counted token, in [0, 1]; the paper uses 1.
        gae_lambda (`float`): bias against variance, in [0, 1]; 1 gives return minus value, 0 the one-step TD error.
            Not the lambda of objective (2), which is `kl_coef`.
        turn_discount (`float`, *optional*, defaults to 1): discount from one turn to the next beside `gamma`, in
            [0, 1]. A response of one turn does not depend on it.

    Returns:
        `advantages_BR` and `returns_BR`, `(B, R)`, reward units, at least float32, detached, 0 behind the mask.

    Raises:
        ValueError: if shapes differ or are not 2-D, the mask is not bool, or `gamma`, `gae_lambda` or `turn_discount`
            is outside [0, 1].
    """
    check_response_tensors(response_mask_BR, rewards_BR=rewards_BR, values_BR=values_BR)
    _check_shares(gamma=gamma, gae_lambda=gae_lambda, turn_discount=turn_discount)
    rewards = keep_counted(rewards_BR.detach(), response_mask_BR)
    values = keep_counted(values_BR.detach(), response_mask_BR)
    advantages = torch.zeros_like(rewards + values)
    values = values.to(advantages.dtype)
    next_value_B = advantages.new_zeros(len(advantages))
    next_advantage_B = advantages.new_zeros(len(advantages))
    discounts_BR = torch.ones_like(advantages).masked_fill(ends_of_turns(response_mask_BR), turn_discount)
    for t in reversed(range(advantages.shape[1])):
        counted_B, discount_B = response_mask_BR[:, t], discounts_BR[:, t]
        delta_B = rewards[:, t] + gamma * (discount_B * next_value_B) - values[:, t]
        advantage_B = delta_B + gamma * gae_lambda * (discount_B * next_advantage_B)
        next_value_B = torch.where(counted_B, values[:, t], next_value_B)
        next_advantage_B = torch.where(counted_B, advantage_B, next_advantage_B)
        advantages[:, t] = torch.where(counted_B, advantage_B, torch.zeros_like(advantage_B))
    return advantages, advantages + values


def turn_gae(
    rewards_BR: Tensor,
    values_BR: Tensor,
    response_mask_BR: Tensor,
    gamma: float,
    gae_lambda: float,
    turn_discount: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """
    GAE with a turn as one action, its advantage on each of its tokens, as in turn-PPO (Li et al. 2025, arXiv
    2512.17008).

        delta_k = sum_i gamma^i r_k,i + gamma^n_k turn_discount V(s_k+1) - V(s_k)
        Adv_k   = delta_k + gamma^n_k turn_discount gae_lambda Adv_k+1

    `s_k` is the state before the first of the `n_k` tokens of turn `k`, `i` counts its tokens from 0. A turn is an
    action that takes `n_k` steps (an option, Sutton et al. 1999), so that V means what it means in `gae`, and with
    `gae_lambda` = 1 the advantage of a turn's first token is that of `gae`. `gae_lambda` counts turns: over tokens,
    0.95 leaves 0.6% of what comes a hundred tokens later, and credit passes from turn to turn by the critic alone.

    V is learned at every token: the return of a token is what is left of its turn's, and at the first token
    `Adv_k + V(s_k)`.

        return_k,i = r_k,i + gamma return_k,i+1,   at the last token of the turn
        return_k,i = r_k,i + gamma turn_discount (V(s_k+1) + gae_lambda Adv_k+1)

    Args:
        rewards_BR, values_BR, response_mask_BR: as for `gae`. A turn is a run of counted tokens.
        gamma (`float`): discount per counted token, in [0, 1].
        gae_lambda (`float`): bias against variance per turn, in [0, 1].
        turn_discount (`float`, *optional*, defaults to 1): discount from one turn to the next beside `gamma`, in
            [0, 1].

    Returns:
        `advantages_BR`, equal on all tokens of a turn, and `returns_BR`, `(B, R)`, reward units, at least float32,
        detached, 0 behind the mask.

    Raises:
        ValueError: as `gae`.
    """
    check_response_tensors(response_mask_BR, rewards_BR=rewards_BR, values_BR=values_BR)
    _check_shares(gamma=gamma, gae_lambda=gae_lambda, turn_discount=turn_discount)
    rewards = keep_counted(rewards_BR.detach(), response_mask_BR)
    values = keep_counted(values_BR.detach(), response_mask_BR)
    returns = torch.zeros_like(rewards + values)
    values = values.to(returns.dtype)
    next_value_B, next_return_B = returns.new_zeros(len(returns)), returns.new_zeros(len(returns))
    turn_ends_BR = ends_of_turns(response_mask_BR)
    for t in reversed(range(returns.shape[1])):
        counted_B = response_mask_BR[:, t]
        of_next_turn_B = turn_discount * (next_value_B + gae_lambda * (next_return_B - next_value_B))
        return_B = rewards[:, t] + gamma * torch.where(turn_ends_BR[:, t], of_next_turn_B, next_return_B)
        next_value_B = torch.where(counted_B, values[:, t], next_value_B)
        next_return_B = torch.where(counted_B, return_B, next_return_B)
        returns[:, t] = torch.where(counted_B, return_B, torch.zeros_like(return_B))
    advantages = (returns - values).gather(1, first_tokens_of_turns(response_mask_BR))
    return keep_counted(advantages, response_mask_BR), returns


def ends_of_turns(response_mask_BR: Tensor) -> Tensor:
    """Where a counted token is the last of its run of counted tokens, bool `(B, R)`."""
    following_BR = torch.nn.functional.pad(response_mask_BR[:, 1:], (0, min(1, response_mask_BR.shape[1])))
    return response_mask_BR & ~following_BR


def first_tokens_of_turns(response_mask_BR: Tensor) -> Tensor:
    """For each counted token the column of the first of its run of counted tokens, int64 `(B, R)`."""
    previous_BR = torch.nn.functional.pad(response_mask_BR, (1, 0))[:, : response_mask_BR.shape[1]]
    columns_R = torch.arange(response_mask_BR.shape[1], device=response_mask_BR.device)
    starts_BR = torch.where(response_mask_BR & ~previous_BR, columns_R, torch.zeros_like(columns_R))
    return starts_BR.cummax(dim=1).values


def _check_shares(**shares: float) -> None:
    for name, number in shares.items():
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} is {number}, it should be in [0, 1]")


def group_advantages(
    rewards_BR: Tensor, response_mask_BR: Tensor, prompts_B: Tensor, normalization: str = "none"
) -> Tensor:
    """
    A response's reward minus the mean reward of its prompt's responses, on each of its tokens: GRPO (Shao et al. 2024,
    arXiv 2402.03300, section 4.1.2), without its division as Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).

        R_i = sum over the tokens of response i of its rewards
        Adv_i = R_i - mean_j R_j,   with "std":  Adv_i / (std_j R_j + 1e-4)

    `j` runs over the responses to the prompt of `i` that have a counted token, `i` among them.

    Args:
        rewards_BR (`Tensor` `(B, R)`): reward of each token, reward units. Only counted tokens are read.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        prompts_B (`Tensor` `(B,)`): integers, the same for responses to one prompt.
        normalization (`str`, *optional*, defaults to `"none"`): "std" divides by the group's unbiased standard
            deviation, as TRL's `scale_rewards="group"` does.

    Returns:
        `(B, R)`, reward units, or without unit with "std"; at least float32, detached, 0 behind the mask and where a
        response is alone.

    Raises:
        ValueError: if shapes do not fit, the mask is not bool, or `normalization` is another text.
    """
    if normalization not in GROUP_NORMALIZATIONS:
        raise ValueError(f"normalization is {normalization!r}, it should be one of {', '.join(GROUP_NORMALIZATIONS)}")
    total_B, counted_B = sequence_rewards(rewards_BR, response_mask_BR)
    group_B, num_groups = group_numbers(prompts_B, response_mask_BR)
    count_B = sum_of_group(counted_B.to(total_B.dtype), group_B, num_groups)
    deviation_B = total_B - sum_of_group(total_B, group_B, num_groups) / count_B.clamp(min=1)
    deviation_B = torch.where(counted_B, deviation_B, torch.zeros_like(deviation_B))
    if normalization == "std":
        squares_B = sum_of_group(deviation_B.square(), group_B, num_groups)
        deviation_B = deviation_B / ((squares_B / (count_B - 1).clamp(min=1)).sqrt() + GROUP_EPSILON)
    return on_each_token(deviation_B, rewards_BR, response_mask_BR)


def leave_one_out_advantages(rewards_BR: Tensor, response_mask_BR: Tensor, prompts_B: Tensor) -> Tensor:
    """
    A response's reward minus the mean reward of the *other* responses to its prompt, on each of its tokens: RLOO
    (Ahmadian et al. 2024, arXiv 2402.14740, section 3; Kool et al. 2019).

        R_i = sum over the tokens of response i of its rewards
        Adv_i = R_i - 1 / (k - 1) sum_{j != i} R_j

    `k` counts the responses to the prompt that have a counted token.

    Args:
        rewards_BR, response_mask_BR, prompts_B: as for `group_advantages`.

    Returns:
        `(B, R)`, reward units, at least float32, detached, 0 behind the mask and where a response is alone.

    Raises:
        ValueError: if shapes do not fit, or the mask is not bool.
    """
    total_B, counted_B = sequence_rewards(rewards_BR, response_mask_BR)
    group_B, num_groups = group_numbers(prompts_B, response_mask_BR)
    count_B = sum_of_group(counted_B.to(total_B.dtype), group_B, num_groups)
    others_B = sum_of_group(total_B, group_B, num_groups) - total_B
    advantage_B = total_B - others_B / (count_B - 1).clamp(min=1)
    advantage_B = torch.where(counted_B & (count_B > 1), advantage_B, torch.zeros_like(advantage_B))
    return on_each_token(advantage_B, rewards_BR, response_mask_BR)


def log_mean_exp_advantages(rewards_BR: Tensor, response_mask_BR: Tensor, prompts_B: Tensor, kl_coef: float) -> Tensor:
    """
    A response's reward minus tau log Z of its prompt, estimated from the group, on each of its tokens.

        R_i = sum over the tokens of response i of its rewards
        Adv_i = R_i - tau log mean_j exp(R_j / tau)

    `tau log Z(x) = tau log E exp(R / tau)`, over the responses of the policy that sampled, is what a squared error
    with that policy as anchor has to subtract (Kimi k1.5, arXiv 2501.12599, section 2.3.2). With pi_init as anchor the
    expectation is over pi_init (V* of A*-PO, arXiv 2505.20686): once the policy has moved, this is too high for it.
    It lies between the group's mean (large tau) and its best response (small tau). From few responses it is estimated
    too low, by Jensen's inequality.

    Args:
        rewards_BR, response_mask_BR, prompts_B: as for `group_advantages`.
        kl_coef (`float`): tau, reward units per nat.

    Returns:
        `(B, R)`, reward units, at least float32, detached, 0 behind the mask and where a response is alone.

    Raises:
        ValueError: if shapes do not fit, the mask is not bool, or `kl_coef` is not positive and finite.
    """
    check_positive("kl_coef", kl_coef)
    total_B, counted_B = sequence_rewards(rewards_BR, response_mask_BR)
    group_B, num_groups = group_numbers(prompts_B, response_mask_BR)
    exponent_B = (total_B / kl_coef).masked_fill(~counted_B, -math.inf)
    largest_G = exponent_B.new_full((num_groups,), -math.inf).scatter_reduce(0, group_B, exponent_B, "amax")
    shift_B = largest_G[group_B].nan_to_num(neginf=0.0)
    count_B = sum_of_group(counted_B.to(total_B.dtype), group_B, num_groups).clamp(min=1)
    log_mean_B = shift_B + (sum_of_group((exponent_B - shift_B).exp(), group_B, num_groups) / count_B).log()
    advantage_B = torch.where(counted_B, total_B - kl_coef * log_mean_B, torch.zeros_like(total_B))
    return on_each_token(advantage_B, rewards_BR, response_mask_BR)


def batch_advantages(rewards_BR: Tensor, response_mask_BR: Tensor) -> Tensor:
    """
    A response's reward minus the mean reward of all responses, on each of its tokens: REINFORCE with the batch's mean
    as baseline, as in REINFORCE++ (Hu 2025, arXiv 2501.03262), which then whitens it over the batch.

        R_i = sum over the tokens of response i of its rewards,   Adv_i = R_i - mean_j R_j

    Args:
        rewards_BR, response_mask_BR: as for `group_advantages`.

    Returns:
        `(B, R)`, reward units, at least float32, detached, 0 behind the mask.

    Raises:
        ValueError: if shapes do not fit, or the mask is not bool.
    """
    return group_advantages(
        rewards_BR,
        response_mask_BR,
        torch.zeros(len(response_mask_BR), dtype=torch.long, device=response_mask_BR.device),
    )


def sequence_rewards(rewards_BR: Tensor, response_mask_BR: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of each response's rewards, in float64 where the device has it, and whether it has a counted token."""
    check_response_tensors(response_mask_BR, rewards_BR=rewards_BR)
    accumulator = torch.float32 if rewards_BR.device.type == "mps" else torch.float64
    counted = keep_counted(rewards_BR.detach(), response_mask_BR)
    return counted.to(accumulator).sum(dim=1), response_mask_BR.any(dim=1)


def group_numbers(prompts_B: Tensor, response_mask_BR: Tensor) -> tuple[Tensor, int]:
    """The prompts numbered from 0, and how many there are."""
    if prompts_B.shape != response_mask_BR.shape[:1]:
        raise ValueError(f"prompts_B has shape {tuple(prompts_B.shape)}, it should be ({len(response_mask_BR)},)")
    different, group_B = prompts_B.unique(return_inverse=True)
    return group_B, len(different)


def sum_of_group(x_B: Tensor, group_B: Tensor, num_groups: int) -> Tensor:
    """For each row the sum of `x_B` over the rows of its group."""
    sums_G = x_B.new_zeros(num_groups).index_add(0, group_B, x_B)
    return sums_G[group_B]


def on_each_token(advantage_B: Tensor, rewards_BR: Tensor, response_mask_BR: Tensor) -> Tensor:
    """A response's advantage at each of its counted tokens, in the dtype of the rewards, at least float32."""
    advantages_BR = keep_counted(advantage_B[:, None].expand_as(response_mask_BR), response_mask_BR)
    return advantages_BR.to(at_least_float32(rewards_BR[:0]).dtype)
