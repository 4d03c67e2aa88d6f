"""The constant that the target of a squared error lacks, estimated from the responses to a prompt."""

import torch
from torch import Tensor

from trl_apa.algorithms.advantages import group_numbers, sum_of_group
from trl_apa.algorithms.masking import check_positive, check_response_tensors, keep_counted


def group_normalized_advantages(
    advantages_BR: Tensor,
    log_ratio_BR: Tensor,
    response_mask_BR: Tensor,
    prompts_B: Tensor,
    kl_coef: float,
    of_responses: bool = False,
) -> Tensor:
    """
    Advantages less an estimate of lambda log Z for each prompt: the policy's own mean residual.

        Adv' = Adv + lambda mean over the tokens of the prompt's other responses of
               (log pi_old(a|s) - log pi_init(a|s) - Adv / lambda)

    At pi* of (3) a residual is -log Z(s): where log Z(s) is the same in all states of a prompt, pi* is a fixed point
    whoever sampled; where it is not, what remains is how far log Z(s) is from its mean over the prompt's tokens. The
    response's own tokens are left out of the mean, because a token's log pi correlates with the residuals of those
    that follow it. On the policy's own samples the constant is then independent of the response, has no expected
    gradient if the loss is divided by a fixed number of tokens, and takes only noise away. It is 0 where no other
    response of the prompt has a counted token.

    With `of_responses` log-ratios are summed over a response, Adv is that of the response, and the mean is over all of
    the prompt's responses: leaving one out would multiply the residuals of G responses by G / (G - 1). The state is
    then the prompt alone, and this is exact: pi_init exp(Adv / lambda) / Z is a fixed point, and the only one, for any
    behaviour policy that covers all responses.

    Args:
        advantages_BR (`Tensor` `(B, R)`): Adv as it would enter the loss, reward units (or whitened).
        log_ratio_BR (`Tensor` `(B, R)`): log pi_old - log pi_init of the sampled tokens, nats.
        response_mask_BR (`Tensor` `(B, R)`): bool, `True` = a counted response token.
        prompts_B (`Tensor` `(B,)`): integers, the same for responses to one prompt.
        kl_coef (`float`): lambda, units of the advantage per nat.
        of_responses (`bool`, *optional*, defaults to `False`): whether the loss is a squared error of responses.

    Returns:
        `(B, R)`, in the unit of the advantages, at least float32, detached, 0 behind the mask.

    Raises:
        ValueError: if shapes do not fit, the mask is not bool, or `kl_coef` is not positive and finite.
    """
    check_positive("kl_coef", kl_coef)
    check_response_tensors(response_mask_BR, advantages_BR=advantages_BR, log_ratio_BR=log_ratio_BR)
    advantages_BR = keep_counted(advantages_BR.detach(), response_mask_BR)
    log_ratio_BR = keep_counted(log_ratio_BR.detach(), response_mask_BR)
    lengths_B = response_mask_BR.sum(dim=1).to(advantages_BR.dtype)
    total_B = (kl_coef * log_ratio_BR - advantages_BR).sum(dim=1)
    count_B = lengths_B
    if of_responses:
        total_B = kl_coef * log_ratio_BR.sum(dim=1) - advantages_BR.sum(dim=1) / lengths_B.clamp(min=1)
        count_B = (lengths_B > 0).to(lengths_B.dtype)
    group_B, num_groups = group_numbers(prompts_B, response_mask_BR)
    sums_B, counts_B = (sum_of_group(x_B, group_B, num_groups) for x_B in (total_B, count_B))
    if not of_responses:
        sums_B, counts_B = sums_B - total_B, counts_B - count_B
    shift_B = torch.where(counts_B > 0, sums_B / counts_B.clamp(min=1), torch.zeros_like(sums_B))
    return torch.where(response_mask_BR, advantages_BR + shift_B[:, None], torch.zeros_like(advantages_BR))
