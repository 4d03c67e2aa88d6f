"""From scores of responses to rewards of tokens."""

import math

import torch
from torch import Tensor

from trl_apa.algorithms.masking import at_least_float32, check_response_tensors, keep_counted, masked_moments


# a spread below this share of the scores is rounding, not spread
NO_SPREAD = 1e-10


class RunningMoments:
    """
    Mean and standard deviation of all scores seen so far.

    Batches are merged by the parallel update of Chan, Golub and LeVeque (1979), in float64:

        delta   = batch_mean - mean;  n = count + batch_count
        mean    = mean + delta * batch_count / n
        squares = squares + batch_squares + delta^2 * count * batch_count / n

    so that the result is that of one pass over every score, however it was cut into batches and ranks.

    Args:
        distributed (`bool`, *optional*, defaults to `False`):
            Merge the scores of all ranks in `update`, which every rank must then call; all ranks hold the same
            moments. Without an initialised process group it has no effect.
    """

    def __init__(self, distributed: bool = False) -> None:
        self.distributed = distributed
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation, reward units; 0 (not NaN) before the second score."""
        return math.sqrt(self._squares / max(self.count - 1, 1))

    def update(self, scores_B: Tensor) -> tuple[float, float]:
        """
        Take in a batch.

        Args:
            scores_B (`Tensor` `(B,)`): one score a rollout, reward units; with `distributed`, on a device that the
                process group can reduce. Ranks may differ in B.

        Returns:
            Mean and unbiased standard deviation of this batch (of all ranks), reward units.

        Raises:
            ValueError: on every rank, if a score of any rank is not finite or no rank has one. Nothing is changed
                then.
        """
        scores_B = scores_B.detach().flatten()
        everything = torch.ones_like(scores_B, dtype=torch.bool)
        moments = torch.stack(masked_moments(scores_B, everything, self.distributed))
        batch_count_float, batch_mean, batch_squares = moments.tolist()
        # checked after the reduction, so that all ranks stop together
        if not (math.isfinite(batch_mean) and math.isfinite(batch_squares)):
            raise ValueError("scores_B has a score that is not finite, every score should be finite")
        batch_count = round(batch_count_float)
        if batch_count == 0:
            raise ValueError("scores_B is empty, it should hold one score a rollout")
        delta = batch_mean - self.mean
        count = self.count + batch_count
        self._squares += batch_squares + delta * delta * self.count * batch_count / count
        self.mean += delta * batch_count / count
        self.count = count
        return batch_mean, math.sqrt(batch_squares / max(batch_count - 1, 1))

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to continue from here."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a `state_dict`."""
        self.count = int(state_dict["count"])
        self.mean = float(state_dict["mean"])
        self._squares = float(state_dict["squares"])


def shape_scores(
    scores_B: Tensor,
    *,
    std: float | Tensor | None = None,
    mean: float | Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """
    Normalise scores, then clip them: `clip((scores - mean) / std, -clip, clip)`.

    Classic's `use_score_scaling` is `std`, `use_score_norm` adds `mean`, `score_clip` is `clip`. The paper's public
    code divides by the running standard deviation (`RunningMoments.std`).

    Args:
        scores_B (`Tensor` `(B,)`): one score a rollout, reward units.
        std (`float` or 0-d `Tensor`, *optional*): divisor, reward units. A spread of 0 (a single score, all scores
            equal) leaves the scale as it is.
        mean (`float` or 0-d `Tensor`, *optional*): subtracted first, reward units.
        clip (`float`, *optional*): largest absolute value of the result.

    Returns:
        `Tensor` `(B,)`, at least float32; without unit if `std` is given.

    Raises:
        ValueError: if `clip` is not positive.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}, it should be positive")
    shaped_B = at_least_float32(scores_B)
    divisor = _divisor(shaped_B, std)
    if mean is not None:
        shaped_B = shaped_B - torch.as_tensor(mean, dtype=shaped_B.dtype, device=shaped_B.device)
    shaped_B = shaped_B / divisor
    return shaped_B if clip is None else shaped_B.clamp(-clip, clip)


def _divisor(scores_B: Tensor, std: float | Tensor | None) -> Tensor:
    """`std`, or 1 where it is not given or no more than rounding, 0-d."""
    one = torch.ones((), dtype=scores_B.dtype, device=scores_B.device)
    if std is None:
        return one
    divisor = torch.as_tensor(std, dtype=scores_B.dtype, device=scores_B.device)
    return torch.where(divisor > NO_SPREAD * scores_B.abs().amax(), divisor, one)


def shaped_token_rewards(
    scores_B: Tensor,
    response_mask_BR: Tensor,
    given_BR: Tensor | None = None,
    *,
    std: float | Tensor | None = None,
    mean: float | Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """
    Rewards of tokens that add up to `shape_scores` of each response's score.

    What was given token by token stays on its token, divided by `std`; the rest of the score, less `mean`, goes to the
    last counted token. Where `clip` binds, all rewards of that response are scaled down together, so that each token
    keeps its share.

    Args:
        scores_B (`Tensor` `(B,)`): the total score of each response, what was given token by token included, reward
            units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        given_BR (`Tensor` `(B, R)`, *optional*): the part of the scores that was given token by token, reward units.
        std, mean, clip: see `shape_scores`.

    Returns:
        `Tensor` `(B, R)`, at least float32, 0 behind the mask; without unit if `std` is given.

    Raises:
        ValueError: as `shape_scores` and `token_rewards`; if `given_BR` has not the mask's shape.
    """
    if given_BR is None:
        return token_rewards(shape_scores(scores_B, std=std, mean=mean, clip=clip), response_mask_BR)
    check_response_tensors(response_mask_BR, given_BR=given_BR)
    totals_B = shape_scores(scores_B, std=std, mean=mean)
    given_BR = keep_counted(given_BR, response_mask_BR) / _divisor(at_least_float32(scores_B), std)
    rewards_BR = given_BR + token_rewards(totals_B - given_BR.sum(dim=1), response_mask_BR)
    clipped_B = shape_scores(totals_B, clip=clip)
    share_B = torch.where(totals_B == clipped_B, 1.0, clipped_B / totals_B)
    return rewards_BR * share_B[:, None]


def token_rewards(scores_B: Tensor, response_mask_BR: Tensor) -> Tensor:
    """
    The score on the *last counted* token of each response, 0 on all others (section 2 of the paper: a terminal
    reward).

    Args:
        scores_B (`Tensor` `(B,)`): one score a rollout, reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.

    Returns:
        `Tensor` `(B, R)`, reward units, at least float32. A row without a counted token has nowhere to put its score:
        zeros.

    Raises:
        ValueError: if the mask is not bool and 2-D, or `scores_B` is not `(B,)`.
    """
    check_response_tensors(response_mask_BR)
    if scores_B.shape != response_mask_BR.shape[:1]:
        raise ValueError(f"scores_B has shape {tuple(scores_B.shape)}, it should be ({len(response_mask_BR)},)")
    counted_from_here_BR = response_mask_BR.flip(1).cumsum(1).flip(1)
    is_last_BR = response_mask_BR & (counted_from_here_BR == 1)
    return keep_counted(scores_B[:, None].expand_as(response_mask_BR), is_last_BR)


def kl_penalized_rewards(
    rewards_BR: Tensor, kl_penalty_BR: Tensor, response_mask_BR: Tensor, kl_coef: float
) -> Tensor:
    """
    `r_t - kl_coef * KL_t` on every counted token: the reward of PPO (section 3.1). APA and AWR have no KL in the
    reward.

    Args:
        rewards_BR (`Tensor` `(B, R)`): reward units.
        kl_penalty_BR (`Tensor` `(B, R)`): `kl.kl_estimate` or `kl.kl_full` between the rollout policy and pi_init,
            nats.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        kl_coef (`float`): the controller's coefficient, reward units per nat; 0 = no KL control.

    Returns:
        `Tensor` `(B, R)`, reward units, detached, 0 behind the mask.

    Raises:
        ValueError: if `kl_coef` is negative or not finite, or a shape is not the mask's.
    """
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef is {kl_coef}, it should be finite and at least 0")
    check_response_tensors(response_mask_BR, rewards_BR=rewards_BR, kl_penalty_BR=kl_penalty_BR)
    charged_BR = rewards_BR.detach() - kl_coef * kl_penalty_BR.detach()
    return keep_counted(charged_BR, response_mask_BR)
