"""The algorithms that train the policy: each one's loss, and what the rest of the trainer has to do for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from trl_apa.algorithms.losses import Stats, apa_loss, awr_loss, ppo_loss
from trl_apa.algorithms.named import imported


KL_CONTROL = {"adap_kl_ctrl": True, "target": 6.0, "horizon": 10000.0, "kl_penalty": "kl"}


class PolicyTokens(NamedTuple):
    """What a policy loss reads of a micro-batch, all `(B, R)`.

    Args:
        logprobs_BR: sampled tokens under pi_theta, nats; carries the gradient.
        ref_logprobs_BR: the same tokens under pi_init, nats.
        advantages_BR: reward units, or whitened.
        response_mask_BR: bool, `True` = a counted response token.
        num_tokens: counted tokens of the optimizer step on all processes, 0-D: the denominator of every mean, so that
            micro-batches add up to the step.
        old_logprobs_BR: the same tokens under the policy that sampled them, nats; None unless the algorithm asks for
            them with `needs_old_logprobs`.
    """

    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    advantages_BR: Tensor
    response_mask_BR: Tensor
    num_tokens: Tensor
    old_logprobs_BR: Tensor | None = None


@dataclass(frozen=True)
class Algorithm:
    """What differs between APA, AWR, PPO and an algorithm of your own.

    Args:
        loss: takes [`PolicyTokens`] and the trainer's config; returns the loss (0-D) and 0-D statistics, all divided
            by `num_tokens`. Statistics appear as `apa/policy/NAME`.
        kl_coef: default of the option `kl_coef`.
        options: options among `SELECTIVE_OPTIONS` that it reads, with their defaults. With `ratio_threshold` the loss
            returns a statistic `ratio`, and a mini-batch above the threshold is skipped.
        kl_in_reward: whether the reward of each token is charged `kl_coef` times its KL, and a controller may adapt
            `kl_coef`. The options of that penalty are then among `options`.
        needs_old_logprobs: whether the loss reads `old_logprobs_BR`, for which rollouts are evaluated once more.
        classic_statistics: whether the entropy is the mean over all epochs, as in TRL <= 0.11, and early stopping
            looks at the sign of the KL.
    """

    loss: Callable[[PolicyTokens, Any], tuple[Tensor, Stats]]
    kl_coef: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    kl_in_reward: bool = False
    needs_old_logprobs: bool = False
    classic_statistics: bool = False

    def __post_init__(self) -> None:
        options = {**KL_CONTROL, **self.options} if self.kl_in_reward else dict(self.options)
        object.__setattr__(self, "options", MappingProxyType(options))


def _apa(tokens: PolicyTokens, args: Any) -> tuple[Tensor, Stats]:
    return apa_loss(
        tokens.logprobs_BR,
        tokens.ref_logprobs_BR,
        tokens.advantages_BR,
        tokens.response_mask_BR,
        args.kl_coef,
        tokens.num_tokens,
    )


def _awr(tokens: PolicyTokens, args: Any) -> tuple[Tensor, Stats]:
    return awr_loss(tokens.logprobs_BR, tokens.advantages_BR, tokens.response_mask_BR, args.kl_coef, tokens.num_tokens)


def _ppo(tokens: PolicyTokens, args: Any) -> tuple[Tensor, Stats]:
    assert tokens.old_logprobs_BR is not None  # needs_old_logprobs
    return ppo_loss(
        tokens.logprobs_BR,
        tokens.old_logprobs_BR,
        tokens.advantages_BR,
        tokens.response_mask_BR,
        args.cliprange,
        tokens.num_tokens,
    )


ALGORITHMS: dict[str, Algorithm] = {
    "apa": Algorithm(_apa, kl_coef=0.1),
    "awr": Algorithm(_awr, kl_coef=1.0),
    "ppo": Algorithm(
        _ppo,
        kl_coef=0.05,
        options={"cliprange": 0.2, "ratio_threshold": 10.0},
        kl_in_reward=True,
        needs_old_logprobs=True,
        classic_statistics=True,
    ),
}
# Options that only some algorithms read.
SELECTIVE_OPTIONS = tuple(dict.fromkeys(name for algorithm in ALGORITHMS.values() for name in algorithm.options))


def algorithm_of(loss_type: str) -> Algorithm:
    """The algorithm that `loss_type` names: `"apa"`, `"awr"`, `"ppo"`, or `"module:name"` of an [`Algorithm`].

    Raises:
        ValueError: naming `loss_type`, if there is no such algorithm.
    """
    if isinstance(loss_type, str) and loss_type in ALGORITHMS:
        return ALGORITHMS[loss_type]
    algorithm = imported("loss_type", loss_type, Algorithm, ALGORITHMS)
    unknown = [name for name in algorithm.options if name not in SELECTIVE_OPTIONS]
    if unknown:
        raise ValueError(
            f"loss_type={loss_type!r} has options {unknown}: it should have some of {', '.join(SELECTIVE_OPTIONS)}"
        )
    return algorithm
