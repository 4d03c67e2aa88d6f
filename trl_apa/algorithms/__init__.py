"""The algorithms that train the policy: each one's loss, and what the rest of the trainer has to do for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from trl_apa.algorithms.importance import LEVELS
from trl_apa.algorithms.losses import Stats, apa_loss, awr_loss, ppo_loss
from trl_apa.algorithms.named import named
from trl_apa.algorithms.policy_gradient import cispo_loss, grpo_loss, kl_loss, rloo_loss
from trl_apa.algorithms.regression import pairwise_regression_loss, response_regression_loss


# Options of a KL penalty in the reward. In the loss the default of `kl_penalty` is k3.
KL_CONTROL = {"adap_kl_ctrl": True, "target": 6.0, "horizon": 10000.0, "kl_penalty": "kl"}
# Where KL is charged by default: in GRPO's loss, in RLOO's reward.
KL_IN_LOSS = {**KL_CONTROL, "kl_in": "loss", "adap_kl_ctrl": False}
KL_IN_REWARD = {**KL_CONTROL, "kl_in": "reward", "adap_kl_ctrl": False}
# Of options whose default is the algorithm's.
DEFAULTS = {"advantage_estimator": "gae", "group_normalization": "none", "whiten_advantages": True}
GRPO_DEFAULTS = {"advantage_estimator": "group", "group_normalization": "std", "whiten_advantages": False}


class PolicyTokens(NamedTuple):
    """What a policy loss reads of a micro-batch, `(B, R)` unless another shape is named.

    Args:
        logprobs_BR: sampled tokens under pi_theta, nats; carries the gradient.
        ref_logprobs_BR: the same tokens under pi_init, nats.
        advantages_BR: reward units, or whitened.
        response_mask_BR: bool, `True` = a counted response token.
        num_tokens: counted tokens of the optimizer step on all processes, 0-D: the denominator of means over tokens,
            so that micro-batches add up to the step.
        old_logprobs_BR: the same tokens under the policy that sampled them, nats; None unless the algorithm asks for
            them with `needs_old_logprobs`.
        num_responses: responses with a counted token of the optimizer step on all processes, 0-D: the denominator of
            means over responses.
        groups_B: int64 `(B,)`, the same number for responses to one prompt that are compared; None unless the
            algorithm asks for them with `compares_responses`.
    """

    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    advantages_BR: Tensor
    response_mask_BR: Tensor
    num_tokens: Tensor
    old_logprobs_BR: Tensor | None = None
    num_responses: Tensor | None = None
    groups_B: Tensor | None = None


@dataclass(frozen=True)
class Algorithm:
    """What differs between the algorithms of this package and one of your own.

    Args:
        loss: takes [`PolicyTokens`] and the trainer's config; returns the loss (0-D) and 0-D statistics, all divided
            by `num_tokens` or `num_responses`. Statistics appear as `apa/policy/NAME`.
        kl_coef: default of the option `kl_coef`.
        options: options among `SELECTIVE_OPTIONS` that it reads, with their defaults. With `ratio_threshold` the loss
            returns a statistic `ratio`, and a mini-batch above the threshold is skipped.
        kl_in_reward: whether the reward of each token is charged `kl_coef` times its KL, and a controller may adapt
            `kl_coef`. The options of that penalty are then among `options`; with `kl_in` among them that option
            decides.
        needs_old_logprobs: whether the loss reads `old_logprobs_BR`, for which rollouts are evaluated once more.
        classic_statistics: whether the entropy is the mean over all epochs, as in TRL <= 0.11, and early stopping
            looks at the sign of the KL.
        compares_responses: whether the loss compares responses to one prompt and reads `groups_B`. A group then comes
            in one forward pass.
        needs_ref_logprobs: whether the loss reads `ref_logprobs_BR`, apart from a KL that `kl_in` puts into it.
        defaults: of options that every algorithm reads, where they are others than `DEFAULTS`.
        of_responses: whether the loss is a squared error of complete responses, for `normalizer` among its options.
        importance_levels: levels at which `importance_correction` may weigh the advantages, the default first: for a
            policy gradient, linear in the advantages, "token" and "sequence"; none for other losses.
    """

    loss: Callable[[PolicyTokens, Any], tuple[Tensor, Stats]]
    kl_coef: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    kl_in_reward: bool = False
    needs_old_logprobs: bool = False
    classic_statistics: bool = False
    compares_responses: bool = False
    needs_ref_logprobs: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    of_responses: bool = False
    importance_levels: tuple[str, ...] = ()

    @property
    def prices_kl(self) -> bool:
        """Whether `kl_coef` is the price of KL, which may be 0; else it is the lambda of a policy to be fitted."""
        return self.kl_in_reward or "kl_in" in self.options

    def __post_init__(self) -> None:
        options = {**KL_CONTROL, **self.options} if self.prices_kl else dict(self.options)
        object.__setattr__(self, "options", MappingProxyType(options))
        object.__setattr__(self, "defaults", MappingProxyType({**DEFAULTS, **self.defaults}))


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
    loss, stats = ppo_loss(*_with_old_logprobs(tokens), args.cliprange, tokens.num_tokens)
    return _plus_kl(loss, stats, tokens, args)


def _grpo(tokens: PolicyTokens, args: Any) -> tuple[Tensor, Stats]:
    counts = tokens.num_tokens, tokens.num_responses, args.max_completion_length
    loss, stats = grpo_loss(
        *_with_old_logprobs(tokens), args.cliprange, args.cliprange_high, args.loss_aggregation, *counts
    )
    return _plus_kl(loss, stats, tokens, args, args.loss_aggregation)


def _cispo(tokens: PolicyTokens, args: Any) -> tuple[Tensor, Stats]:
    loss, stats = cispo_loss(*_with_old_logprobs(tokens), args.cliprange_high, tokens.num_tokens)
    return _plus_kl(loss, stats, tokens, args)


def _rloo(tokens: PolicyTokens, args: Any) -> tuple[Tensor, Stats]:
    counts = tokens.num_tokens, tokens.num_responses
    loss, stats = rloo_loss(*_with_old_logprobs(tokens), args.cliprange, args.cliprange_high, *counts)
    return _plus_kl(loss, stats, tokens, args, "sum")


def _mirror_descent(tokens: PolicyTokens, args: Any) -> tuple[Tensor, Stats]:
    return response_regression_loss(*_with_old_logprobs(tokens), args.kl_coef, tokens.num_responses)


def _rebel(tokens: PolicyTokens, args: Any) -> tuple[Tensor, Stats]:
    assert tokens.groups_B is not None  # compares_responses
    return pairwise_regression_loss(*_with_old_logprobs(tokens), tokens.groups_B, args.kl_coef, tokens.num_responses)


def _response_apa(tokens: PolicyTokens, args: Any) -> tuple[Tensor, Stats]:
    read = tokens.logprobs_BR, tokens.ref_logprobs_BR, tokens.advantages_BR, tokens.response_mask_BR
    return response_regression_loss(*read, args.kl_coef, tokens.num_responses)


def _with_old_logprobs(tokens: PolicyTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What losses with a ratio to the rollout policy read first."""
    assert tokens.old_logprobs_BR is not None  # needs_old_logprobs
    return tokens.logprobs_BR, tokens.old_logprobs_BR, tokens.advantages_BR, tokens.response_mask_BR


def _plus_kl(
    loss: Tensor, stats: Stats, tokens: PolicyTokens, args: Any, aggregation: str = "dapo"
) -> tuple[Tensor, Stats]:
    """The loss and, unless the reward is charged for KL, `kl_coef` times the KL, aggregated as the loss is."""
    if args.kl_in_reward or args.kl_coef == 0:
        return loss, stats
    read = tokens.logprobs_BR, tokens.ref_logprobs_BR, tokens.response_mask_BR
    counts = tokens.num_tokens, tokens.num_responses, args.max_completion_length
    kl = kl_loss(*read, args.kl_penalty, aggregation, *counts)
    return loss + args.kl_coef * kl, {**stats, "kl_loss": kl.detach()}


ALGORITHMS: dict[str, Algorithm] = {
    "apa": Algorithm(_apa, kl_coef=0.1, options={"normalizer": None}),
    "awr": Algorithm(_awr, kl_coef=1.0, needs_ref_logprobs=False),
    "ppo": Algorithm(
        _ppo,
        kl_coef=0.05,
        options={"cliprange": 0.2, "ratio_threshold": 10.0, "kl_in": "reward"},
        kl_in_reward=True,
        needs_old_logprobs=True,
        needs_ref_logprobs=False,
        classic_statistics=True,
        importance_levels=LEVELS,
    ),
    "grpo": Algorithm(
        _grpo,
        kl_coef=0.0,
        defaults=GRPO_DEFAULTS,
        options={"cliprange": 0.2, "cliprange_high": None, "loss_aggregation": "dapo", **KL_IN_LOSS},
        needs_old_logprobs=True,
        needs_ref_logprobs=False,
        importance_levels=LEVELS,
    ),
    "cispo": Algorithm(
        _cispo,
        kl_coef=0.0,
        defaults=GRPO_DEFAULTS,
        options={"cliprange_high": 4.0, **KL_IN_LOSS},
        needs_old_logprobs=True,
        needs_ref_logprobs=False,
        importance_levels=LEVELS,
    ),
    "rloo": Algorithm(
        _rloo,
        kl_coef=0.05,
        defaults={"advantage_estimator": "leave_one_out", "whiten_advantages": False},
        options={"cliprange": 0.2, "cliprange_high": None, **KL_IN_REWARD},
        needs_old_logprobs=True,
        needs_ref_logprobs=False,
        importance_levels=("sequence",),
    ),
    "mirror_descent": Algorithm(
        _mirror_descent,
        kl_coef=0.2,
        defaults={"advantage_estimator": "group", "whiten_advantages": False},
        needs_old_logprobs=True,
        needs_ref_logprobs=False,
    ),
    "rebel": Algorithm(
        _rebel,
        kl_coef=0.2,
        defaults={"advantage_estimator": "group", "whiten_advantages": False},
        needs_old_logprobs=True,
        needs_ref_logprobs=False,
        compares_responses=True,
    ),
    "response_apa": Algorithm(
        _response_apa,
        kl_coef=0.2,
        defaults={"advantage_estimator": "group", "whiten_advantages": False},
        options={"normalizer": None},
        of_responses=True,
    ),
    "astar_po": Algorithm(
        _response_apa,
        kl_coef=0.2,
        defaults={"advantage_estimator": "optimal_value", "whiten_advantages": False},
    ),
    "qrpo": Algorithm(
        _response_apa,
        kl_coef=0.03,
        defaults={"advantage_estimator": "quantile", "whiten_advantages": False},
    ),
}
# Options that only some algorithms read.
SELECTIVE_OPTIONS = tuple(dict.fromkeys(name for algorithm in ALGORITHMS.values() for name in algorithm.options))


def algorithm_of(loss_type: str) -> Algorithm:
    """The algorithm that `loss_type` names, one of `ALGORITHMS`, or `"module:name"` of an [`Algorithm`].

    Raises:
        ValueError: naming `loss_type`, if there is no such algorithm.
    """
    return named("loss_type", loss_type, Algorithm, ALGORITHMS, SELECTIVE_OPTIONS)
