"""Which value model the trainer's `value_model` argument means."""

from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from trl_apa.models.classic_value_head import PolicyValueHead, SummaryHead
from trl_apa.models.copying import independent_copy
from trl_apa.models.network_parts import Network, num_token_ids, text_trunk
from trl_apa.models.own_critic import OwnValueModel, own_value_model
from trl_apa.models.quantization import settle_quantization
from trl_apa.models.value_adapter import AdapterValueModel
from trl_apa.models.value_model import ValueModel, name_in, output_width, trainable


# Before the folder or hub name of an adapter that is to lie on the policy's own base.
ADAPTER_PREFIX = "adapter:"
# A separate network, an adapter on the policy's base, a head that reads the policy's hidden states, or a module of the
# user's own.
Critic: TypeAlias = ValueModel | AdapterValueModel | PolicyValueHead | OwnValueModel


def resolve_value_model(value_model: Any, policy: Network, classic_value_head: SummaryHead | None = None) -> Critic:
    """What the trainer's `value_model` argument means.

    Args:
        value_model: None or "separate" (a copy of the policy's trunk), "adapter" (another adapter on its base) or
            "adapter:PATH" (which starts as the adapter in that folder or of that hub name), "head" (classic's head on
            the policy itself), a `ValueModel`, a sequence classifier, a language model or bare trunk (copied), a path
            or hub name of any of these, or a module that gives values, see `own_critic.INTERFACE`.
        policy: the language model that is aligned.
        classic_value_head: the head that "head" means, if the policy came with one; otherwise a new one.

    Raises:
        ValueError: if it is none of these.
    """
    if value_model is None or value_model == "separate":
        return ValueModel.from_policy(policy)
    if value_model == "head":
        device = policy.get_output_embeddings().weight.device
        return PolicyValueHead(classic_value_head or SummaryHead(output_width(policy)).to(device))
    if value_model == "adapter":
        return AdapterValueModel.on_policy(policy)
    if isinstance(value_model, str) and value_model.startswith(ADAPTER_PREFIX):
        return AdapterValueModel.on_policy(policy, value_model.removeprefix(ADAPTER_PREFIX))
    if isinstance(value_model, ValueModel):
        return value_model
    if isinstance(value_model, str | Path):
        return ValueModel.from_pretrained(value_model, base_model=policy)
    if isinstance(value_model, nn.Module) and not isinstance(value_model, PreTrainedModel | PeftModel):
        if policy.config.is_encoder_decoder:
            raise ValueError(
                f"value_model is a {type(value_model).__name__}: a module of your own reads one row of tokens, but "
                "model is an encoder-decoder; give 'separate' or a PreTrainedModel"
            )
        return own_value_model(value_model, num_token_ids(policy), policy.device)
    if not isinstance(value_model, PreTrainedModel):
        raise ValueError(
            f"value_model is a {type(value_model).__name__}; it should be 'separate', 'adapter', 'head', a path, a "
            "ValueModel, a PreTrainedModel or an nn.Module that gives values"
        )
    value_model = settle_quantization(value_model)
    if isinstance(getattr(value_model, "score", None), nn.Linear):
        return ValueModel.from_reward_model(value_model)
    if value_model.get_output_embeddings() is not None:
        made = ValueModel.from_policy(value_model)
    else:
        made = ValueModel.on_trunk(trainable(independent_copy(value_model)))
    made.given_names = {"network": name_in(value_model, text_trunk(value_model))}
    return made
