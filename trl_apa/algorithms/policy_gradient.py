"""
Policy-gradient losses that need no critic: GRPO, CISPO and RLOO, as pure functions of tensors.

As in `losses`, each is a sum divided by a count of the *complete optimizer step*, so that the losses, statistics and
gradients of its micro-batches add up to those of the step: `num_tokens`, its counted tokens, or `num_responses`, its
responses with a counted token. Without them the counts are those of the given mask.
"""

from torch import Tensor

from trl_apa.algorithms.kl import kl_estimate
from trl_apa.algorithms.losses import Stats, clipped_surrogate, policy_shift, ratio_and_advantages
from trl_apa.algorithms.masking import check_positive, check_response_tensors, keep_counted, masked_mean


GRPO_AGGREGATIONS = ("dapo", "grpo", "dr_grpo")
AGGREGATIONS = (*GRPO_AGGREGATIONS, "sum")


def aggregated(
    per_token_BR: Tensor,
    response_mask_BR: Tensor,
    aggregation: str,
    num_tokens: float | Tensor | None = None,
    num_responses: float | Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """
    One number of a loss of each token. What differs is how much a token of a long response counts.

    - `"dapo"`: the mean over all tokens of the step (DAPO, arXiv 2503.14476): each token counts the same;
    - `"grpo"`: the mean over responses of each one's mean (GRPO, arXiv 2402.03300): each response counts the
      same, so that a token of a long one counts less;
    - `"dr_grpo"`: the sum over the tokens, divided by `max_length` for each response (Dr. GRPO, arXiv 2503.20783):
      each token counts the same, and a step with few tokens counts less than one with many;
    - `"sum"`: the mean over responses of each one's sum, as the log-prob of a response is that of its tokens.

    Args:
        per_token_BR (`Tensor` `(B, R)`): a loss of each token.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        aggregation (`str`): one of the four.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): tokens of the step.
        num_responses (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): responses of the step
            with a counted token.
        max_length (`int`, *optional*): most tokens of a response; read by `"dr_grpo"` alone.

    Returns:
        0-d `Tensor` in the unit of the loss.

    Raises:
        ValueError: if `aggregation` is none of these, or `max_length` is missing where it is read.
    """
    if aggregation == "dapo":
        return masked_mean(per_token_BR, response_mask_BR, num_tokens)
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}, it should be one of {', '.join(AGGREGATIONS)}")
    lengths_B = response_mask_BR.sum(dim=1)
    count = (lengths_B > 0).sum().clamp(min=1) if num_responses is None else num_responses
    if aggregation == "grpo":
        per_token_BR = per_token_BR / lengths_B.clamp(min=1)[:, None]
    elif aggregation == "dr_grpo":
        if max_length is None:
            raise ValueError("max_length is None, it should be given with aggregation='dr_grpo'")
        per_token_BR = per_token_BR / max_length
    return masked_mean(per_token_BR, response_mask_BR, count)


def grpo_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    cliprange: float,
    cliprange_high: float | None = None,
    aggregation: str = "dapo",
    num_tokens: float | Tensor | None = None,
    num_responses: float | Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, Stats]:
    """
    Clipped ratio of GRPO (arXiv 2402.03300; its KL term is `kl_loss`), with DAPO's own upper clip:

        - aggregated min(rho A, clip(rho, 1 - eps, 1 + eps_high) A),   rho = pi_theta(a|s) / pi_old(a|s)

    With `aggregation="dapo"` and one `eps` it is PPO's (`losses.ppo_loss`): what makes GRPO are its advantages.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        old_logprobs_BR (`Tensor` `(B, R)`): the same tokens under the rollout policy pi_old, nats.
        advantages_BR (`Tensor` `(B, R)`): A, reward units (or of variance 1 in each group).
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        cliprange (`float`): eps, a ratio.
        cliprange_high (`float`, *optional*, defaults to `cliprange`): eps_high, a ratio.
        aggregation, num_tokens, num_responses, max_length: see [`aggregated`].

    Returns:
        The loss (0-d, unit of the advantages) and, as means over tokens, `approxkl`, `policykl`, `ratio`
        (`losses.policy_shift`) and `clipfrac` (share of the tokens whose gradient is clipped away).

    Raises:
        ValueError: if a clip range is not positive and finite, a shape is not the mask's `(B, R)`, the mask is not
            bool, or see [`aggregated`].
    """
    cliprange_high = cliprange if cliprange_high is None else cliprange_high
    check_positive("cliprange", cliprange)
    check_positive("cliprange_high", cliprange_high)
    ratio, advantages = ratio_and_advantages(logprobs_BR, old_logprobs_BR, advantages_BR, response_mask_BR)
    worst, is_clipped = clipped_surrogate(ratio, advantages, cliprange, cliprange_high)
    loss = aggregated(worst, response_mask_BR, aggregation, num_tokens, num_responses, max_length)
    return loss, {
        **policy_shift(logprobs_BR, old_logprobs_BR, response_mask_BR, num_tokens),
        "clipfrac": masked_mean(is_clipped, response_mask_BR, num_tokens),
    }


def cispo_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    cliprange_high: float,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    CISPO (MiniMax-M1, arXiv 2506.13585): the importance weight is clipped, not the update.

        - mean over tokens of sg(min(rho, 1 + eps_high)) A log pi_theta(a|s),   rho = pi_theta(a|s) / pi_old(a|s)

    No token loses its gradient: one whose ratio is above the bound keeps a gradient of bounded weight. As in the
    paper's own runs there is no lower bound.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        old_logprobs_BR (`Tensor` `(B, R)`): the same tokens under the rollout policy pi_old, nats.
        advantages_BR (`Tensor` `(B, R)`): A, reward units (or of variance 1 in each group).
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        cliprange_high (`float`): eps_high, a ratio. TRL's `epsilon_high` of this loss is `1 + cliprange_high`.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator, tokens.

    Returns:
        The loss (0-d, advantage units times nats) and `approxkl`, `policykl`, `ratio` (`losses.policy_shift`),
        `clipfrac` (share of the tokens whose weight is clipped).

    Raises:
        ValueError: if `cliprange_high` is not positive and finite, a shape is not the mask's `(B, R)`, or the mask is
            not bool.
    """
    check_positive("cliprange_high", cliprange_high)
    ratio, advantages = ratio_and_advantages(logprobs_BR, old_logprobs_BR, advantages_BR, response_mask_BR)
    weight = ratio.detach()
    clipped = weight.clamp(max=1.0 + cliprange_high)
    per_token = -clipped * advantages * keep_counted(logprobs_BR, response_mask_BR)
    return masked_mean(per_token, response_mask_BR, num_tokens), {
        **policy_shift(logprobs_BR, old_logprobs_BR, response_mask_BR, num_tokens),
        "clipfrac": masked_mean((weight > clipped).to(clipped.dtype), response_mask_BR, num_tokens),
    }


def rloo_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    cliprange: float,
    cliprange_high: float | None = None,
    num_tokens: float | Tensor | None = None,
    num_responses: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """
    REINFORCE on complete responses (RLOO, arXiv 2402.14740), with a clipped ratio as in TRL:

        - mean over responses of min(rho A, clip(rho, 1 - eps, 1 + eps_high) A),   rho = pi_theta(y|x) / pi_old(y|x)

    On the policy that sampled, rho is 1 and the gradient is that of - A log pi_theta(y|x).

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        old_logprobs_BR (`Tensor` `(B, R)`): the same tokens under the rollout policy pi_old, nats.
        advantages_BR (`Tensor` `(B, R)`): A of a response is the mean over its counted tokens, reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        cliprange (`float`): eps, a ratio of complete responses.
        cliprange_high (`float`, *optional*, defaults to `cliprange`): eps_high, a ratio of complete responses.
        num_tokens (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): denominator of the
            statistics of tokens.
        num_responses (`float` or 0-d `Tensor`, *optional*, defaults to the count of the mask): responses of the step
            with a counted token, the denominator of the loss.

    Returns:
        The loss (0-d, unit of the advantages) and `approxkl`, `policykl`, `ratio` (`losses.policy_shift`, of tokens),
        `clipfrac` (share of the responses whose gradient is clipped away).

    Raises:
        ValueError: if a clip range is not positive and finite, a shape is not the mask's `(B, R)`, or the mask is not
            bool.
    """
    cliprange_high = cliprange if cliprange_high is None else cliprange_high
    check_positive("cliprange", cliprange)
    check_positive("cliprange_high", cliprange_high)
    log_ratio_B, advantages_B = response_sums(logprobs_BR, old_logprobs_BR, advantages_BR, response_mask_BR)
    counts_B = response_mask_BR.any(dim=1)
    # A ratio that overflows has no gradient that is a number, though it is clipped; exp(80) is still one.
    ratio_B = log_ratio_B.clamp(max=80.0).exp()
    worst_B, is_clipped_B = clipped_surrogate(ratio_B, advantages_B, cliprange, cliprange_high)
    return masked_mean(worst_B, counts_B, num_responses), {
        **policy_shift(logprobs_BR, old_logprobs_BR, response_mask_BR, num_tokens),
        "clipfrac": masked_mean(is_clipped_B, counts_B, num_responses),
    }


def kl_loss(
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    response_mask_BR: Tensor,
    kl_penalty: str,
    aggregation: str = "dapo",
    num_tokens: float | Tensor | None = None,
    num_responses: float | Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """
    An estimate of KL(pi_theta || pi_init) from the sampled tokens, as a term of a loss.

    What counts in a loss is the gradient, not the value. On the policy that sampled, the expected gradient of k1
    (`"kl"`) is 0: it does nothing. That of k2 (`"mse"`) is the gradient of KL(pi_theta || pi_init), as that of k1 in
    the reward is. That of k3, GRPO's, is the gradient of KL(pi_init || pi_theta).

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        ref_logprobs_BR (`Tensor` `(B, R)`): the same tokens under pi_init, nats.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        kl_penalty (`str`): `"kl"`, `"abs"`, `"mse"` or `"k3"`, see `kl.kl_estimate`.
        aggregation, num_tokens, num_responses, max_length: as in the loss that it is added to, see [`aggregated`].

    Returns:
        0-d `Tensor`, nats a token, or with `"sum"` nats a response.

    Raises:
        ValueError: if `kl_penalty` is none of these, a shape is not the mask's `(B, R)`, or the mask is not bool.
    """
    check_response_tensors(response_mask_BR, logprobs_BR=logprobs_BR, ref_logprobs_BR=ref_logprobs_BR)
    logprobs = keep_counted(logprobs_BR, response_mask_BR)
    ref_logprobs = keep_counted(ref_logprobs_BR.detach(), response_mask_BR)
    per_token_BR = kl_estimate(logprobs, ref_logprobs, kl_penalty)
    return aggregated(per_token_BR, response_mask_BR, aggregation, num_tokens, num_responses, max_length)


def response_sums(
    logprobs_BR: Tensor, anchor_logprobs_BR: Tensor, advantages_BR: Tensor, response_mask_BR: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Of each response the log-ratio to an anchor policy, and its advantage.

    Args:
        logprobs_BR (`Tensor` `(B, R)`): sampled tokens under pi_theta, nats; carries the gradient.
        anchor_logprobs_BR (`Tensor` `(B, R)`): the same tokens under the anchor, nats.
        advantages_BR (`Tensor` `(B, R)`): reward units.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.

    Returns:
        log pi_theta(y|x) - log pi_anchor(y|x), the sum over the counted tokens, nats `(B,)`; and the mean advantage
        over them, reward units `(B,)`. Both are 0 for a response without a counted token.

    Raises:
        ValueError: if a shape is not the mask's `(B, R)`, or the mask is not bool.
    """
    check_response_tensors(
        response_mask_BR, logprobs_BR=logprobs_BR, anchor_logprobs_BR=anchor_logprobs_BR, advantages_BR=advantages_BR
    )
    logprobs = keep_counted(logprobs_BR, response_mask_BR)
    anchor_logprobs = keep_counted(anchor_logprobs_BR.detach(), response_mask_BR)
    advantages = keep_counted(advantages_BR.detach(), response_mask_BR)
    return (logprobs - anchor_logprobs).sum(dim=1), advantages.sum(dim=1) / response_mask_BR.sum(dim=1).clamp(min=1)
