"""Scores of an iteration to token rewards, and its rollouts to a plan of optimizer steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_apa.algorithms.rewards import kl_penalized_rewards, shape_scores, shaped_token_rewards
from trl_apa.rollout.batch import Layout, Rollouts
from trl_apa.rollout.shared_prompts import groups_of_equal_size, meeting
from trl_apa.trainer.iteration import Iteration
from trl_apa.trainer.run_state import RunState


def rewards_of_tokens(rollouts: Rollouts, ended_B: Tensor, args: Any, run_state: RunState) -> Tensor:
    """Scores, shaped, on the last counted token or on those that they were given to; for PPO minus the KL penalty.

    Args:
        rollouts: with scores, and for PPO with the KL of each token.
        ended_B: bool, whether a response ended with EOS.
        args: the trainer's options.
        run_state: its running scores learn of these; its controller says what a nat costs.

    Returns:
        Reward units, `(B, R)`.
    """
    scores_B = learned_scores(rollouts, ended_B, args, run_state)
    std, mean = _scale(args, run_state)
    rewards_BR = shaped_token_rewards(
        scores_B, rollouts.response_mask_BR, rollouts.given_rewards_BR, std=std, mean=mean, clip=args.score_clip
    )
    if args.kl_in_reward:
        mask_BR = rollouts.response_mask_BR
        rewards_BR = kl_penalized_rewards(rewards_BR, rollouts.kl_penalty_BR, mask_BR, run_state.kl_ctl.value)
    return rewards_BR


def learned_scores(rollouts: Rollouts, ended_B: Tensor, args: Any, run_state: RunState) -> Tensor:
    """Scores less the penalty for a missing EOS, `(B,)`; where the options scale them, the running moments learn them.

    Args:
        rollouts, ended_B, args, run_state: as in `rewards_of_tokens`.
    """
    scores_B = _less_missing_eos(rollouts, ended_B, args)
    if args.scale_rewards:
        run_state.running_scores.update(scores_B[rollouts.response_mask_BR.any(dim=1)])
    return scores_B


def shaped_scores(rollouts: Rollouts, ended_B: Tensor, args: Any, run_state: RunState) -> Tensor:
    """Scores as they enter the rewards, `(B,)`: penalised, scaled and clipped, by the moments that were learned.

    Args:
        rollouts, ended_B, args, run_state: as in `rewards_of_tokens`.
    """
    std, mean = _scale(args, run_state)
    return shape_scores(_less_missing_eos(rollouts, ended_B, args), std=std, mean=mean, clip=args.score_clip)


def shaped_ref_rewards(rollouts: Rollouts, args: Any, run_state: RunState) -> Tensor | None:
    """Rewards of pi_init's responses, `(B, N)`, scaled and clipped as the scores of this iteration are.

    Args:
        rollouts, args, run_state: as in `rewards_of_tokens`.
    """
    if (given_BN := rollouts.ref_rewards_BN) is None:
        return None
    std, mean = _scale(args, run_state)
    known_BN = ~given_BN.isnan()
    shaped_BN = given_BN.clone()
    shaped_BN[known_BN] = shape_scores(given_BN[known_BN], std=std, mean=mean, clip=args.score_clip)
    return shaped_BN


def _less_missing_eos(rollouts: Rollouts, ended_B: Tensor, args: Any) -> Tensor:
    if args.missing_eos_penalty is None:
        return rollouts.scores_B
    scores_B: Tensor = rollouts.scores_B - args.missing_eos_penalty * ~ended_B
    return scores_B


def _scale(args: Any, run_state: RunState) -> tuple[float | None, float | None]:
    """What scores are divided by, and what is subtracted first."""
    if not args.scale_rewards:
        return None, None
    return run_state.running_scores.std, run_state.running_scores.mean if args.center_rewards else None


def plan_iteration(
    rollouts: Rollouts,
    ended_B: Tensor,
    args: Any,
    stream: tuple[int, ...],
    layout: Layout,
    reduce_sum: Callable[[Tensor], Tensor],
) -> Iteration:
    """The optimizer steps of one iteration: for each epoch a shuffle, split into mini-batches.

    Args:
        rollouts: with everything filled in.
        ended_B: bool, whether a response ended with EOS.
        args: the trainer's options, of which `shuffle` says what is drawn.
        stream: what the shuffles depend on beside the epoch: seed, process, iteration.
        layout: in which micro-batches of these rows are read, where they share prompts.
        reduce_sum: adds a tensor up over the processes.
    """
    mini_batch, micro_batch = args.backward_batch_size, args.per_device_train_batch_size
    compares = args.algorithm.compares_responses
    groups = rollouts.prompts if args.shuffles_groups else None
    if compares:
        # All are of one size that divides a micro-batch's, so that none is split.
        groups, _ = groups_of_equal_size(rollouts.prompts, micro_batch)
    epochs = [
        mini_batches(len(rollouts), mini_batch, (*stream, epoch), groups) for epoch in range(args.num_epochs_per_batch)
    ]
    if micro_batch < mini_batch and not compares:
        # Neighbours are read together; which rows share an optimizer step stays as drawn.
        epochs = [[in_reading_order(rollouts, rows, micro_batch, layout) for rows in epoch] for epoch in epochs]
    return Iteration.begin(rollouts, ended_B, epochs, micro_batch, reduce_sum, groups if compares else None)


def in_reading_order(rollouts: Rollouts, rows: list[int], size: int, layout: Layout) -> list[int]:
    """`rows` in the order in which micro-batches of `size` cost least: rows of one prompt, or of similar length, meet.

    Args:
        rollouts: whose rows they are.
        rows: which are read with the same weights.
        size: rows of a micro-batch.
        layout: of a micro-batch of rows that share prompts.
    """
    if layout is Layout.SHARED:
        return meeting(rows, rollouts.prompts, size)
    return rows if layout is Layout.PACKED else rollouts.by_length(rows)


def mini_batches(
    num_rows: int, size: int, stream: tuple[int, ...], groups: Sequence[int] | None = None
) -> list[list[int]]:
    """Rows of each optimizer step of an epoch, in an order that depends on `stream` and `groups` alone.

    Args:
        num_rows: of the iteration.
        size: rows of an optimizer step.
        stream: what the order depends on.
        groups: a number for each row; rows with the same number stay together, except where a step is full. By default
            each row is drawn by itself.
    """
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(hash(stream) % 2**63)).tolist()
    if groups is not None:
        first_place: dict[int, int] = {}
        for place, row in enumerate(order):
            first_place.setdefault(groups[row], place)
        order.sort(key=lambda row: first_place[groups[row]])
    return [order[start : start + size] for start in range(0, num_rows, size)]
