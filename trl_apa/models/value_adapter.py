"""The standalone value model as a second adapter on the policy's frozen base."""

from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig, PeftModel, load_peft_weights
from torch import Tensor, nn

from trl_apa._trl import is_peft_model
from trl_apa.models.adapter_kinds import refuse_prompt_learning
from trl_apa.models.adapters import adapter_parameters, add_adapter, config_like, only_adapter, trains_its_adapter_only
from trl_apa.models.network_parts import Network, text_trunk
from trl_apa.models.reward_adapter import load_adapter_weights, score_layer
from trl_apa.models.value_model import (
    ValueHead,
    load_head_weights,
    load_network,
    output_width,
    read_head,
    save_value_model,
    trunk_values,
)


# Not a name that a caller would give to an adapter of his own.
VALUE_ADAPTER = "trl_apa_value"


class AdapterValueModel(nn.Module):
    """V(s): the base of the policy with an adapter of V's own, and a scalar head.

    No trainable parameter belongs to both networks. The adapter lies on the policy, whose module holds its parameters;
    this module holds the head.

    Args:
        head: maps hidden states to one number each, reward units.
    """

    def __init__(self, head: ValueHead):
        super().__init__()
        self.head = head

    def forward(self, policy: PeftModel, tokens: Mapping[str, Tensor], response_width: int) -> Tensor:
        """V of the state before each of the last `response_width` tokens, reward units, `(B, R)`.

        Args:
            policy: carries the adapter, which is active meanwhile.
            tokens: those of `batch.pad_tokens`.
            response_width: tokens.
        """
        with only_adapter(policy, VALUE_ADAPTER):
            return trunk_values(text_trunk(policy.get_base_model()), self.head, tokens, response_width)

    @classmethod
    def on_policy(cls, policy: PeftModel, source: str | Path | None = None) -> "AdapterValueModel":
        """Put a value adapter on `policy`.

        Args:
            policy: a PEFT model that trains its active adapter alone.
            source: folder or hub name of an adapter on the same base to start from: a saved value model's, or a reward
                model's (`task_type="SEQ_CLS"`), whose score layer becomes the head. By default a new adapter like
                the policy's.

        Raises:
            ValueError: if `policy` is no PEFT model, trains more than its adapter (the base would move under V), has a
                value adapter already, or `source` does not fit it.
        """
        _check_base(policy)
        if source is None:
            config, weights = _new_config(policy), None
            head = ValueHead(output_width(policy.get_base_model()))
        else:
            config, weights, head = _read(str(source))
        argument = "value_model='adapter'" if source is None else f"value_model='adapter:{source}'"
        add_adapter(policy, VALUE_ADAPTER, config, argument)
        if weights is not None:
            _fill(policy, argument, weights)
        in_trunk = {id(parameter) for parameter in text_trunk(policy.get_base_model()).parameters()}
        for parameter in adapter_parameters(policy, VALUE_ADAPTER).values():
            # One on the vocabulary head would never have a gradient.
            parameter.requires_grad_(id(parameter) in in_trunk)
        return cls(head.to(policy.get_output_embeddings().weight.device))

    def load_weights(self, policy: PeftModel, path: str | Path) -> None:
        """Put what `save_pretrained` wrote into adapter and head."""
        load_network(policy, path, VALUE_ADAPTER)
        self.head.load_state_dict(load_head_weights(path))

    def save_pretrained(
        self, policy: PeftModel, path: str | Path, policy_state: dict[str, Tensor], head_state: dict[str, Tensor]
    ) -> None:
        """Write adapter, head and description as `ValueModel.save_pretrained` does: each loads what the other wrote.

        Args:
            policy: carries the adapter.
            path: a folder, made if it is not there.
            policy_state, head_state: the weights of the policy and of this module.
        """
        save_value_model(policy, self.head, path, policy_state, head_state, VALUE_ADAPTER)


def _check_base(policy: Network) -> None:
    if not is_peft_model(policy):
        raise ValueError(
            "value_model='adapter' needs a policy with adapters on a frozen base; give peft_config or a PEFT model, "
            "or value_model='separate'"
        )
    if VALUE_ADAPTER in policy.peft_config:
        raise ValueError(f"the policy has an adapter {VALUE_ADAPTER!r} already: it belongs to another trainer")
    if not trains_its_adapter_only(policy):
        raise ValueError(
            "value_model='adapter' needs a frozen base, but the policy trains more than its adapter (biases, a norm): "
            "the value model would move with it; give value_model='separate'"
        )


def _new_config(policy: PeftModel) -> PeftConfig:
    config = config_like(policy, policy.active_adapter)
    config.modules_to_save, config.inference_mode = None, False
    if hasattr(config, "bias"):
        config.bias = "none"  # a bias belongs to the base, which stays as it is
    return config


def _read(source: str) -> tuple[PeftConfig, dict[str, Tensor], ValueHead]:
    """Configuration, weights and head of a saved value model or of a reward model's adapter."""
    config = PeftConfig.from_pretrained(source)
    refuse_prompt_learning(config)
    weights = load_peft_weights(source, device="cpu")
    head = read_head(source)
    if head is None:
        score = score_layer(f"value_model='adapter:{source}'", weights)
        if score.out_features != 1:
            raise ValueError(f"value_model='adapter:{source}' has {score.out_features} labels; it should have one")
        head = ValueHead.like(score)
    config.modules_to_save, config.inference_mode = None, False
    return config, weights, head


def _fill(policy: PeftModel, argument: str, weights: dict[str, Tensor]) -> None:
    unexpected, missing = load_adapter_weights(policy, VALUE_ADAPTER, weights)
    if unexpected or missing:
        policy.delete_adapter(VALUE_ADAPTER)
        name = (unexpected or missing)[0]
        raise ValueError(f"{argument} does not fit the policy's base, {name!r} first")
