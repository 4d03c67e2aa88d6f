"""Advantages with a learned log Z(s) taken out, and what it learns of them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_apa.algorithms.learned_normalizers import LearnedNormalizer, moments_of, state_residuals
from trl_apa.distributed.processes import Processes
from trl_apa.rollout.batch import Rollouts


class StatesOfPass(NamedTuple):
    """What a forward pass of the policy says of some rows.

    Args:
        rows: int64 `(B,)`.
        logprobs_BR: of the sampled tokens, nats.
        hidden_BRH: last hidden states of the state before each token.
    """

    rows: Tensor
    logprobs_BR: Tensor
    hidden_BRH: Tensor


@torch.no_grad()
def subtract_learned_normalizer(
    rollouts: Rollouts,
    args: Any,
    normalizer: LearnedNormalizer,
    passes: Iterable[StatesOfPass],
    processes: Processes,
) -> None:
    """Take from the advantages what earlier iterations say of lambda log Z(s); then let these rollouts count too.

    Fills in log pi_old and the normaliser's statistics.

    Args:
        rollouts: with advantages and log pi_init.
        args: the trainer's options.
        normalizer: the same on every process.
        passes: of the policy over all rows of this process, each row once.
        processes: of the run.
    """
    normalizer.use(args.kl_coef)
    of_responses, mask_BR = args.algorithm.of_responses, rollouts.response_mask_BR
    rollouts.old_logprobs_BR = torch.zeros_like(mask_BR, dtype=torch.float32)
    shift_BR = torch.zeros_like(rollouts.advantages_BR)
    moments_ZZ: Tensor | None = None
    for rows, logprobs_BR, hidden_BRH in passes:
        width, hidden_BRH = logprobs_BR.shape[1], hidden_BRH.to(mask_BR.device)
        rollouts.old_logprobs_BR[rows, :width] = logprobs_BR.float()
        log_ratio_BR = logprobs_BR.float() - rollouts.ref_logprobs_BR[rows, :width]
        read = rollouts.advantages_BR[rows, :width], log_ratio_BR, mask_BR[rows, :width]
        residual_BR, states_BR = state_residuals(*read, args.kl_coef, of_responses)
        states_NH = hidden_BRH[states_BR]
        found_BR = torch.zeros_like(residual_BR)
        found_BR[states_BR] = normalizer(states_NH).to(found_BR)
        shift_BR[rows, :width] = found_BR[:, :1].expand_as(found_BR) if of_responses else found_BR
        of_pass_ZZ = moments_of(states_NH, residual_BR[states_BR])
        moments_ZZ = of_pass_ZZ if moments_ZZ is None else moments_ZZ + of_pass_ZZ
    assert moments_ZZ is not None  # an iteration has rows
    rollouts.advantages_BR = torch.where(mask_BR, rollouts.advantages_BR + shift_BR, rollouts.advantages_BR)
    rollouts.normalizer_statistics = normalizer.learn(processes.sum(moments_ZZ), args.kl_coef)
