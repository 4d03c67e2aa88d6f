"""log Z(s) by ridge regression on the policy's hidden states, fitted to the residuals of earlier iterations."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trl_apa.algorithms.masking import check_positive, check_response_tensors, keep_counted


# What one iteration's tokens (or responses) count for in the next one's fit.
KEPT = 0.9
# Penalties that are tried, see `ridge_coefficients`. Infinity leaves the mean residual, the same in every state.
PENALTIES = (math.inf, 1e4, 1e3, 1e2, 1e1, 1.0, 0.1)
# Errors that differ by less, as a share, are equal: of these the fit with the highest penalty is used.
EQUAL = 1e-3
# States that are in memory in float64 at a time.
AT_ONCE = 1024
# Of the mean square of an entry.
ROUNDING = 1e-10


def state_residuals(
    advantages_BR: Tensor,
    log_ratio_BR: Tensor,
    response_mask_BR: Tensor,
    kl_coef: float,
    of_responses: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    What the target of a squared error lacks in a state, of which -lambda log Z(s) is the mean at pi* of (3).

        y = lambda (log pi(a|s) - log pi_init(a|s)) - Adv

    With `of_responses` log-ratios are summed over the response, Adv is that of the response, and the state is the one
    before its first token.

    Args:
        advantages_BR (`Tensor` `(B, R)`): Adv as it would enter the loss, reward units (or whitened).
        log_ratio_BR (`Tensor` `(B, R)`): log pi - log pi_init of the sampled tokens, nats.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        kl_coef (`float`): lambda, units of the advantage per nat.
        of_responses (`bool`, *optional*, defaults to `False`): whether the loss is a squared error of responses.

    Returns:
        y `(B, R)`, in the unit of the advantages, detached; and bool `(B, R)`, `True` = a state that has one: with
        `of_responses` the first column of each row with a counted token.

    Raises:
        ValueError: if shapes do not fit, the mask is not bool, or `kl_coef` is not positive and finite.
    """
    check_positive("kl_coef", kl_coef)
    check_response_tensors(response_mask_BR, advantages_BR=advantages_BR, log_ratio_BR=log_ratio_BR)
    advantages_BR = keep_counted(advantages_BR.detach(), response_mask_BR)
    log_ratio_BR = keep_counted(log_ratio_BR.detach(), response_mask_BR)
    if not of_responses:
        return kl_coef * log_ratio_BR - advantages_BR, response_mask_BR
    lengths_B = response_mask_BR.sum(dim=1)
    residual_B = kl_coef * log_ratio_BR.sum(dim=1) - advantages_BR.sum(dim=1) / lengths_B.clamp(min=1)
    residual_BR, states_BR = torch.zeros_like(advantages_BR), torch.zeros_like(response_mask_BR)
    residual_BR[:, 0], states_BR[:, 0] = residual_B, lengths_B > 0
    return residual_BR, states_BR


def moments_of(states_NH: Tensor, residuals_N: Tensor) -> Tensor:
    """
    All that a least-squares fit reads of `N` states: the sum of z z' with z = (state, 1, residual).

    Moments of disjoint sets of states add up.

    Args:
        states_NH (`Tensor` `(N, H)`): hidden states; no gradient goes through them.
        residuals_N (`Tensor` `(N,)`): y.

    Returns:
        `(H + 2, H + 2)`, float64; on the device of the states, or on the CPU where that has no float64 (MPS).
    """
    device = _with_float64(states_NH.device)
    size, residuals_N = states_NH.shape[1] + 2, residuals_N.detach().to(device)
    moments_ZZ = torch.zeros(size, size, dtype=torch.float64, device=device)
    for states, residuals in zip(states_NH.detach().split(AT_ONCE), residuals_N.split(AT_ONCE), strict=True):
        columns = states.to(device), torch.ones_like(residuals)[:, None], residuals[:, None]
        rows_NZ = torch.cat([column.double() for column in columns], dim=1)
        moments_ZZ.addmm_(rows_NZ.T, rows_NZ)
    return moments_ZZ


def _with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU in place of one without float64: in float32 rounding passes for variance."""
    return torch.device("cpu") if device.type == "mps" else device


def ridge_coefficients(moments_ZZ: Tensor, penalty: float) -> Tensor:
    """
    The minimiser of sum (y - w'x - b)^2 + penalty H |D w|^2, with D the standard deviations of the states' entries.

    Of entries in units of their deviation, a direction with a share q of the variance H is fitted by `N` states to
    N q / (N q + penalty) of what least squares would fit. b is not penalised: the mean prediction is the mean
    residual, and with an infinite penalty it is the prediction everywhere.

    Args:
        moments_ZZ (`Tensor` `(H + 2, H + 2)`): of [`moments_of`], of one state or more.
        penalty (`float`): positive, in states; may be infinite.

    Returns:
        w and b, `(H + 1,)`, in the precision of the moments. w is 0 where rounding leaves nothing to solve.
    """
    count = moments_ZZ[-2, -2]
    mean_H, mean = moments_ZZ[:-2, -2] / count, moments_ZZ[-1, -2] / count
    weights_H = torch.zeros_like(mean_H)
    squares_HH = moments_ZZ[:-2, :-2] - count * mean_H[:, None] * mean_H
    variance_H = squares_HH.diagonal() / count
    # What rounding leaves of an entry that is the same in all states is no variance.
    varies_H = variance_H > ROUNDING * moments_ZZ[:-2, :-2].diagonal() / count
    if math.isfinite(penalty) and bool(varies_H.any()):
        scale_H = torch.where(varies_H, variance_H.clamp(min=0).rsqrt(), torch.zeros_like(variance_H))
        squares_HH = squares_HH * scale_H[:, None] * scale_H
        squares_HH.diagonal().add_(penalty * varies_H.sum())
        products_H = scale_H * (moments_ZZ[:-2, -1] - count * mean_H * mean)
        factor_HH, failed = torch.linalg.cholesky_ex(squares_HH)
        if not bool(failed):  # otherwise the mean residual is what can be told
            weights_H = scale_H * torch.cholesky_solve(products_H[:, None], factor_HH)[:, 0]
    return torch.cat([weights_H, (mean - weights_H @ mean_H)[None]])


def squared_error(moments_ZZ: Tensor, coefficients_K: Tensor) -> Tensor:
    """The sum of (y - w'x - b)^2 over the states of the moments, 0-D; `coefficients_K` are w and b, `(H + 1,)`."""
    signed_Z = torch.cat([coefficients_K, -torch.ones_like(coefficients_K[:1])])
    return (signed_Z @ moments_ZZ @ signed_Z).clamp(min=0)


def moments_bytes(width: int) -> int:
    """Bytes of the moments of states of so many entries, in float64."""
    return 8 * (width + 2) ** 2


class LearnedNormalizer:
    """
    An estimate of -lambda log Z(s), h(s) = w'x(s) + b, from the policy's last hidden state x(s) alone.

    Added to Adv it takes the place of the log Z(s) that (9) leaves out, as that of
    [`~trl_apa.algorithms.normalizers.group_normalized_advantages`] does. w and b are fitted to the states of earlier
    iterations, of which older ones count for less. An iteration's own samples never enter its constants, so that these
    depend on the state and on nothing that was sampled in it. The penalty is the one of `PENALTIES` with which earlier
    fits had the least error on the states of the iteration after them. Before the first `learn` h is 0.

    There is no gradient: the policy's loss sees h as a constant, and the fit sees states and residuals as constants.
    """

    def __init__(self) -> None:
        self._moments: Tensor | None = None
        self._fits: Tensor | None = None
        self._errors: Tensor | None = None
        self._kl_coef: float | None = None

    @property
    def coefficients(self) -> Tensor | None:
        """w and b of the chosen fit, `(H + 1,)`, in the unit of Adv; None before the first `learn`."""
        if self._fits is None or self._errors is None:
            return None
        least = self._errors <= self._errors.min() * (1 + EQUAL)
        return self._fits[int(least.int().argmax())]

    def __call__(self, states_NH: Tensor) -> Tensor:
        """h of hidden states `(N, H)`, in the unit of Adv, float32 or float64 as they are, detached: `(N,)`."""
        states_NH = states_NH.detach()
        coefficients_K = self.coefficients
        if coefficients_K is None:
            return torch.zeros(len(states_NH), device=states_NH.device)
        found_N = states_NH.to(coefficients_K.device).double() @ coefficients_K[:-1] + coefficients_K[-1]
        return found_N.to(torch.promote_types(states_NH.dtype, torch.float32)).to(states_NH.device)

    def use(self, kl_coef: float) -> None:
        """Before h is read for an iteration: what was learned of residuals with another lambda is forgotten."""
        if self._kl_coef not in (None, kl_coef):
            self._moments = self._fits = self._errors = None
        self._kl_coef = kl_coef

    def learn(self, moments_ZZ: Tensor, kl_coef: float) -> dict[str, float]:
        """Take in the states of an iteration, once their h was read.

        Args:
            moments_ZZ: of [`moments_of`], of all processes. With an entry that is not finite, or of no state, nothing
                is learned.
            kl_coef: lambda, for the statistics.

        Returns:
            Of the h that was read: `log_normalizer`, the mean of -h / lambda, nats; `error`, the mean of
            (y - h)^2 / lambda^2, nats squared; `unexplained`, that over the variance of y / lambda, a share. Nothing
            where nothing was learned.
        """
        if not bool(moments_ZZ.isfinite().all()) or float(moments_ZZ[-2, -2]) == 0:
            return {}
        before = self.coefficients
        before = torch.zeros_like(moments_ZZ[:-1, 0]) if before is None else before.to(moments_ZZ)
        stats = _statistics(moments_ZZ, before, kl_coef)
        if self._moments is None or self._fits is None or self._errors is None:
            self._errors = torch.zeros(len(PENALTIES), dtype=moments_ZZ.dtype, device=moments_ZZ.device)
            self._moments = moments_ZZ
        else:
            errors = torch.stack([squared_error(moments_ZZ, fit) for fit in self._fits.to(moments_ZZ)])
            self._errors = KEPT * self._errors.to(errors) + errors
            self._moments = KEPT * self._moments.to(moments_ZZ) + moments_ZZ
        self._fits = torch.stack([ridge_coefficients(self._moments, penalty) for penalty in PENALTIES])
        return stats

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue from here."""
        return {"moments": self._moments, "fits": self._fits, "errors": self._errors, "kl_coef": self._kl_coef}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Continue from a `state_dict`, with its tensors on `device`, by default where they are."""
        device = _with_float64(device) if device is not None else None
        moved = (
            None if tensor is None else tensor.to(device) for tensor in map(state.get, ("moments", "fits", "errors"))
        )
        self._moments, self._fits, self._errors = moved
        self._kl_coef = state.get("kl_coef")


def _statistics(moments_ZZ: Tensor, coefficients_K: Tensor, kl_coef: float) -> dict[str, float]:
    count, mean = moments_ZZ[-2, -2], moments_ZZ[-1, -2] / moments_ZZ[-2, -2]
    predicted = coefficients_K @ moments_ZZ[:-1, -2] / count
    error = squared_error(moments_ZZ, coefficients_K) / count
    variance = (moments_ZZ[-1, -1] / count - mean.square()).clamp(min=1e-8)
    table = torch.stack([-predicted / kl_coef, error / kl_coef**2, error / variance]).tolist()
    return dict(zip(("log_normalizer", "error", "unexplained"), table, strict=True))
