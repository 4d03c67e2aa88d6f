"""`importance_correction`: weights of the advantages where another policy has sampled than the one that is trained."""

import warnings
from typing import Any

import torch
from accelerate import Accelerator

from trl_apa.algorithms.importance import importance_weights
from trl_apa.rollout.batch import Rollouts


class ImportanceCorrection:
    """Weighs the tokens of each iteration, as the options say."""

    def __init__(self) -> None:
        self._has_warned = False

    def weigh(self, rollouts: Rollouts, args: Any) -> None:
        """Fill in `importance_weights_BR`; without the sampler's log-probs a warning says once that there are none.

        Args:
            rollouts: with the log-probs of the policy before the update, and the sampler's where they are known.
            args: the trainer's options.

        Raises:
            ValueError: if they are not known with `rollouts_ahead`.
        """
        if args.importance_correction is None:
            return
        if rollouts.sampling_logprobs_BR is None and args.rollouts_ahead:
            raise ValueError(
                "rollouts_ahead=1, but the vLLM server does not report the log-probs that importance_correction "
                "needs; with temperature, top_p, top_k or a penalty start it with --logprobs-mode processed_logprobs"
            )
        if rollouts.sampling_logprobs_BR is None:
            if not self._has_warned:
                text = (
                    f"importance_correction={args.importance_correction!r}, but the sampler's log-probs of these "
                    "responses are unknown: all weights are 1. They are known of responses that generate() made and "
                    "step() gets unchanged; an engine of your own has to return them"
                )
                warnings.warn(text, UserWarning, stacklevel=2)
            self._has_warned = True
            return
        rollouts.importance_weights_BR = importance_weights(
            rollouts.old_logprobs_BR,
            rollouts.sampling_logprobs_BR,
            rollouts.response_mask_BR,
            args.importance_correction,
            args.importance_level,
            args.importance_max,
            args.importance_min,
        )


def importance_statistics(rollouts: Rollouts, accelerator: Accelerator) -> dict[str, float]:
    """Mean, smallest and largest weight of the counted tokens of all processes; nothing where none are weighed.

    Args:
        rollouts: of this process.
        accelerator: of the run.
    """
    weights_BR, mask_BR = rollouts.importance_weights_BR, rollouts.response_mask_BR
    if weights_BR is None:
        return {}
    low, high = (weights_BR.masked_fill(~mask_BR, limit) for limit in (torch.inf, -torch.inf))
    total = weights_BR.masked_fill(~mask_BR, 0.0).sum()
    numbers = torch.stack([total, mask_BR.sum().float(), low.min(), high.max()])
    table = accelerator.gather(numbers[None])
    total, count = table[:, :2].sum(dim=0).tolist()
    return {
        "sampling/importance_weight_mean": total / max(count, 1.0),
        "sampling/importance_weight_min": float(table[:, 2].min()),
        "sampling/importance_weight_max": float(table[:, 3].max()),
    }
