"""Estimators of KL(pi_theta || pi_init) from log-probabilities, and controllers of its coefficient."""

import math

import torch
from torch import Tensor

from trl_apa.algorithms.masking import at_least_float32


MAX_RELATIVE_ERROR = 0.2


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """
    `x = log pi - log pi_init` of each sampled token: unbiased, of either sign.

    k1 of Schulman, "Approximating KL divergence" (2020).

    Args:
        logprobs (`Tensor`): log-probabilities of the sampled tokens under the policy they were sampled from, nats.
        ref_logprobs (`Tensor`): the same tokens under the reference, nats, the same shape.

    Returns:
        `Tensor` of the same shape, nats, at least float32.
    """
    return at_least_float32(logprobs) - at_least_float32(ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`x^2 / 2` with `x = log pi - log pi_init`: biased, never negative (k2 of Schulman, 2020). Called as `kl_k1`."""
    return 0.5 * kl_k1(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """
    `exp(-x) - 1 + x` with `x = log pi - log pi_init`: unbiased and never negative (k3 of Schulman, 2020).

    The KL of the paper's figures. Called as `kl_k1`.
    """
    x = kl_k1(logprobs, ref_logprobs)
    return torch.expm1(-x) + x


def kl_full(logprobs_BRV: Tensor, ref_logprobs_BRV: Tensor) -> Tensor:
    """
    `sum_v pi(v) (log pi(v) - log pi_init(v))`, the exact KL of each token's distribution, as in the objective (2).

    Args:
        logprobs_BRV (`Tensor` `(B, R, V)`): log-softmax of the policy's logits, nats; `-inf` = a token
            of probability 0.
        ref_logprobs_BRV (`Tensor` `(B, R, V)`): log-softmax of the reference's logits, nats.

    Returns:
        `Tensor` `(B, R)`, nats, at least 0 up to rounding; infinite where the policy leaves the reference's support.

    Raises:
        ValueError: if the shapes differ.
    """
    if logprobs_BRV.shape != ref_logprobs_BRV.shape:
        shapes = f"{tuple(ref_logprobs_BRV.shape)}, it should be that of logprobs_BRV, {tuple(logprobs_BRV.shape)}"
        raise ValueError(f"ref_logprobs_BRV has shape {shapes}")
    # 0 log 0 = 0: a token that the policy never takes contributes neither value nor gradient
    excluded = logprobs_BRV == -math.inf
    logprobs = at_least_float32(logprobs_BRV).masked_fill(excluded, 0.0)
    ref_logprobs = at_least_float32(ref_logprobs_BRV).masked_fill(excluded, 0.0)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kl_penalty: str) -> Tensor:
    """
    The per-token estimate that classic TRL calls `kl_penalty`.

    Args:
        logprobs, ref_logprobs (`Tensor`): as in `kl_k1`.
        kl_penalty (`str`):
            `"kl"` is k1, `"abs"` its absolute value, `"mse"` is k2, `"k3"` is k3. Classic's `"full"` needs full
            distributions, not the log-probabilities of the sampled tokens: `kl_full`.

    Returns:
        `Tensor` of the same shape, nats.

    Raises:
        ValueError: if `kl_penalty` is none of these.
    """
    if kl_penalty == "kl":
        return kl_k1(logprobs, ref_logprobs)
    if kl_penalty == "abs":
        return kl_k1(logprobs, ref_logprobs).abs()
    if kl_penalty == "mse":
        return kl_k2(logprobs, ref_logprobs)
    if kl_penalty == "k3":
        return kl_k3(logprobs, ref_logprobs)
    raise ValueError(f"kl_penalty is {kl_penalty!r}, it should be one of 'kl', 'abs', 'mse', 'k3'")


def _check_coefficient(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}, it should be finite and at least 0")
    return float(value)


class FixedKLController:
    """
    A KL coefficient that stays where it is.

    Args:
        kl_coef (`float`): the coefficient, reward units per nat; 0 = no KL control.

    Raises:
        ValueError: if `kl_coef` is negative or not finite.
    """

    def __init__(self, kl_coef: float) -> None:
        self.value = _check_coefficient("kl_coef", kl_coef)

    def update(self, current: float, n_steps: int) -> None:
        """Nothing: the coefficient is fixed."""

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to continue from here."""
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a `state_dict`."""
        self.value = _check_coefficient("state_dict['value']", state_dict["value"])


class AdaptiveKLController:
    """
    A KL coefficient that follows a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

        error = clip(current / target - 1, -0.2, 0.2)
        value = value * (1 + error * n_steps / horizon)

    `n_steps / horizon` is their constant gain K_beta made independent of the batch size.

    The paper's PPO uses it with `target=6`, `horizon=10000` and an initial coefficient of 0.05 (HH) or 0.1
    (StackExchange).

    Args:
        init_kl_coef (`float`): first coefficient, reward units per nat.
        target (`float`): KL to hold, nats per sequence.
        horizon (`float`): rollouts over which an error of 20 % changes the coefficient by about 20 %.

    Raises:
        ValueError: if `init_kl_coef` is negative, or `target` or `horizon` not positive, or one of them not finite.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = _check_coefficient("init_kl_coef", init_kl_coef)
        for name, number in (("target", target), ("horizon", horizon)):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name} is {number}, it should be finite and positive")
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, current: float, n_steps: int) -> None:
        """
        Move the coefficient after a batch.

        Args:
            current (`float`): KL of the batch, nats per sequence.
            n_steps (`int`): rollouts of the batch, over all processes.

        Raises:
            ValueError: if `current` is NaN, or `n_steps` is so large that the coefficient could change its sign (5
                horizons). The coefficient stays as it was.
        """
        if math.isnan(current):
            raise ValueError(f"current is {current}, it should be a KL in nats per sequence")
        if not 0 <= n_steps * MAX_RELATIVE_ERROR < self.horizon:
            limit = f"it should be at least 0 and below 5 * horizon = {5 * self.horizon:g}"
            raise ValueError(f"n_steps is {n_steps}, {limit}")
        error = min(max(current / self.target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.value *= 1.0 + error * n_steps / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to continue from here; target and horizon belong to the configuration."""
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a `state_dict`."""
        self.value = _check_coefficient("state_dict['value']", state_dict["value"])
