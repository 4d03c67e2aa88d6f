"""Importance weights of tokens that another policy sampled than the one that is trained, as pure functions."""

import torch
from torch import Tensor

from trl_apa.algorithms.masking import check_response_tensors, keep_counted


CORRECTIONS = ("truncate", "mask")
LEVELS = ("token", "sequence")
# exp of it is finite in float32; an infinite weight times an advantage of 0 would be NaN.
LARGEST_LOG_RATIO = 88.0


def importance_weights(
    logprobs_BR: Tensor,
    sampling_logprobs_BR: Tensor,
    response_mask_BR: Tensor,
    correction: str,
    level: str = "token",
    highest: float | None = 3.0,
    lowest: float | None = None,
) -> Tensor:
    """
    The ratio of the trainer's policy to the one that sampled, truncated or masked:

        token:     w_t = pi(a_t|s_t) / mu(a_t|s_t)
        sequence:  w_t = pi(y|x) / mu(y|x), the same for all tokens of a response

    `"truncate"` brings a ratio outside `[lowest, highest]` to the nearer bound, `"mask"` makes its weight 0. These are
    TRL's `vllm_importance_sampling_mode`s, `token_truncate`, `token_mask`, `sequence_truncate` and `sequence_mask`.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi, the policy before the update, nats.
        sampling_logprobs_BR (`Tensor` `(B, R)`): the same tokens under mu, as the sampler reports them, nats. A token
            of which it does not know it is NaN, and its ratio 1.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        correction (`str`): `"truncate"` or `"mask"`.
        level (`str`, *optional*, defaults to `"token"`): `"token"` or `"sequence"`.
        highest, lowest (`float`, *optional*): bounds of the ratio; None: no bound but that of float32.

    Returns:
        The weights `(B, R)`, finite, without gradient; 1 behind the mask at the level of tokens.

    Raises:
        ValueError: if `correction` or `level` is none of these, a shape is not the mask's `(B, R)`, or the mask is not
            bool.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction is {correction!r}, it should be one of {', '.join(CORRECTIONS)}")
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}, it should be one of {', '.join(LEVELS)}")
    check_response_tensors(response_mask_BR, logprobs_BR=logprobs_BR, sampling_logprobs_BR=sampling_logprobs_BR)
    difference_BR = (logprobs_BR.detach() - sampling_logprobs_BR.detach()).nan_to_num(nan=0.0)
    difference_BR = keep_counted(difference_BR, response_mask_BR)
    if level == "sequence":
        difference_BR = difference_BR.sum(dim=1, keepdim=True).expand_as(difference_BR)
    # A response of a few hundred tokens can differ by 100 nats: its ratio is then the largest that float32 holds.
    ratio_BR = difference_BR.clamp(max=LARGEST_LOG_RATIO).exp()
    if correction == "truncate":
        return ratio_BR if highest is None and lowest is None else ratio_BR.clamp(min=lowest, max=highest)
    outside_BR = torch.zeros_like(response_mask_BR)
    if highest is not None:
        outside_BR = outside_BR | (ratio_BR > highest)
    if lowest is not None:
        outside_BR = outside_BR | (ratio_BR < lowest)
    return ratio_BR.masked_fill(outside_BR, 0.0)
