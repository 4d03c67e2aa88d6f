"""PPO as classic scripts knew it: the same trainer with classic's defaults, one option away from APA."""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_apa.config.apa import APAConfig
from trl_apa.config.rates import PRETRAINED_RATE
from trl_apa.models.value_head import ValueHeadWrapper
from trl_apa.trainer.apa import APATrainer


@dataclass
class PPOConfig(APAConfig):
    """
    [`APAConfig`] with the defaults of TRL's classic `PPOConfig`: PPO loss, initial KL coefficient 0.2, value loss
    weight 0.1 with clipping at 0.2, four epochs over 128 rollouts in one mini-batch, no gradient clipping, seed 0, a
    learning rate of 1.41e-5 for adapters too.
    `loss_type="apa"` keeps the rest and changes the algorithm.
    """

    _default_kl_coef: ClassVar[dict[str, float]] = {"ppo": 0.2}
    _default_batch_size: ClassVar[int] = 128
    _largest_mini_batch: ClassVar[int] = 128

    loss_type: str = "ppo"
    vf_coef: float = 0.1
    cliprange_value: float | None = 0.2
    num_epochs_per_batch: int = 4
    max_grad_norm: float | None = 0.0
    learning_rate: float = PRETRAINED_RATE
    seed: int = 0


class PPOTrainer(APATrainer):
    """[`APATrainer`] under the name that classic scripts import; [`PPOConfig`] makes it PPO.

    With PPO's loss and a value-head wrapper as `model`, that head is the critic, as in classic.
    `value_model="separate"` takes a network of its own, as [`APATrainer`] and the other losses do. With an
    `advantage_estimator` that needs no values there is no critic, and a warning says that the head is not trained.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "ppo", "rlhf"]
    _name = "PPO"

    def _default_critic(self, args: APAConfig, model: Any) -> str | None:
        if args.loss_type != "ppo" or not isinstance(model, ValueHeadWrapper):
            return None
        if not args.estimator.needs_values:
            text = f"the value head of model is not trained: advantage_estimator={args.advantage_estimator!r}"
            warnings.warn(f"{text} needs no values", UserWarning, stacklevel=3)
            return None
        return "head"
