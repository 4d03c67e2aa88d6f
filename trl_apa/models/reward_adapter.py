"""A reward model on the policy's own base: a frozen adapter of a sequence classifier, and its score layer."""

import re
from typing import Any

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from trl_apa._trl import is_peft_model
from trl_apa.models.adapters import adapter_parameters, add_adapter, held_repeatable, only_adapter
from trl_apa.models.logprobs import forward_parameters
from trl_apa.models.network_parts import trunk_of


DEFAULT_NAME = "reward_adapter"
# Heads that peft saves in full with a SEQ_CLS adapter; a language model has neither.
CLASSIFIER_HEADS = ("score", "classifier")
SCORE_KEY = re.compile(r"(?:^|\.)score\.(?:modules_to_save\.)?(weight|bias)$")


def load_reward_adapter(
    policy: PeftModel, path: str, adapter_name: str = DEFAULT_NAME, argument: str | None = None, **hub: Any
) -> nn.Linear:
    """Put a reward model's adapter on `policy`, frozen and not active.

    Args:
        policy (`PeftModel`): a decoder language model with its own adapter, which is not changed.
        path (`str`): folder or hub name of an adapter that was trained on the same base with `task_type="SEQ_CLS"`.
        adapter_name (`str`, *optional*, defaults to `"reward_adapter"`): what to call it on the policy.
        argument (`str`, *optional*): how messages name it; by default `reward_adapter=` and the path.
        hub: `token`, `revision`, `cache_dir`, ... for a hub name.

    Returns:
        `nn.Linear`: the frozen score layer, float32: hidden state -> one score per label.

    Raises:
        ValueError: if the policy is no PEFT model or an encoder-decoder, or the adapter works by prompt learning, has
            no `score` layer, does not fit the base, or is called like one that is there already.
    """
    argument = argument or f"reward_adapter={path!r}"
    if not is_peft_model(policy):
        raise ValueError(
            f"{argument} needs a PEFT policy on the same base, but the policy is a "
            f"{type(policy).__name__}; give peft_config, or a model with adapters"
        )
    if policy.config.is_encoder_decoder:
        raise ValueError(f"{argument} needs a decoder policy; {policy.config.model_type} is none")
    config = PeftConfig.from_pretrained(path, **hub)
    if config.is_prompt_learning:
        kind = config.peft_type.value
        raise ValueError(f"{argument} is a {kind} adapter; it should be LoRA or another")
    weights = load_peft_weights(path, device="cpu", **hub)
    score = score_layer(argument, weights)
    whole = [name for name in getattr(config, "modules_to_save", None) or [] if name not in CLASSIFIER_HEADS]
    config.modules_to_save, config.inference_mode = whole or None, True
    _add_frozen_adapter(policy, argument, adapter_name, config, weights)
    return score.to(next(policy.parameters()).device)


def score_layer(argument: str, weights: dict[str, Tensor]) -> nn.Linear:
    """Take the frozen score layer of a reward model's adapter out of its `weights`."""
    found = {name: match[1] for name in weights if (match := SCORE_KEY.search(name))}
    state = {part: weights.pop(name).float() for name, part in found.items()}
    if "weight" not in state:
        raise ValueError(f"{argument} has no score.weight; train it with task_type='SEQ_CLS'")
    num_labels, width = state["weight"].shape
    score = nn.Linear(width, num_labels, bias="bias" in state)
    score.load_state_dict(state)
    return score.requires_grad_(False)


def _add_frozen_adapter(
    policy: PeftModel, argument: str, adapter_name: str, config: PeftConfig, weights: dict[str, Tensor]
) -> None:
    if adapter_name in policy.peft_config:
        raise ValueError(f"reward_adapter_name={adapter_name!r} is taken: the policy has {list(policy.peft_config)}")
    add_adapter(policy, adapter_name, config, argument)
    unexpected, missing = load_adapter_weights(policy, adapter_name, weights)
    for parameter in adapter_parameters(policy, adapter_name).values():
        parameter.requires_grad_(False)
    if unexpected or missing:
        policy.delete_adapter(adapter_name)
        raise ValueError(
            f"{argument} does not fit the policy's base: "
            + "; ".join(
                f"{len(names)} weights {what}, {names[0]!r} first"
                for what, names in (("without a place", unexpected), ("missing", missing))
                if names
            )
        )


def load_adapter_weights(
    policy: PeftModel, adapter_name: str, weights: dict[str, Tensor]
) -> tuple[list[str], list[str]]:
    """Names of the weights that found no place, and of those of the adapter that were not there."""
    try:
        result = set_peft_model_state_dict(policy, weights, adapter_name=adapter_name)
    except RuntimeError as error:  # a weight of another shape
        return [str(error).splitlines()[-1].strip()], []
    return list(result.unexpected_keys), [name for name in result.missing_keys if f".{adapter_name}." in name]


def reward_scores(
    policy: PeftModel,
    score: nn.Linear,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    adapter_name: str = DEFAULT_NAME,
) -> Tensor:
    """Scores of the reward adapter after every token. The policy's own adapter is afterwards as it was.

    Positions are counted over the real tokens, so padding on the left does not change a score.

    Args:
        policy (`PeftModel`): with the adapter that `load_reward_adapter` put on it.
        score (`nn.Linear`): what `load_reward_adapter` returned.
        input_ids (`Tensor` `(B, T)`): token ids.
        attention_mask (`Tensor` `(B, T)`, *optional*): 1 = real token.
        adapter_name (`str`, *optional*, defaults to `"reward_adapter"`): which adapter.

    Returns:
        `Tensor` `(B, T, labels)`: float32, reward units, without gradient. A sequence's score is the one at its last
        real token.
    """
    trunk = trunk_of(policy.get_base_model())
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if attention_mask is not None and "position_ids" in forward_parameters(trunk):
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), held_repeatable(policy), only_adapter(policy, adapter_name):
        hidden_BTH = trunk(**inputs).last_hidden_state
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            scores_BTL: Tensor = score(hidden_BTH.to(score.weight))
            return scores_BTL


class RewardAdapter(nn.Module):
    """A reward adapter's score layer and the adapter's name on the policy, which is not a part of this.

    Args:
        score (`nn.Linear`): what `load_reward_adapter` returned.
        adapter_name (`str`): what it was called there.
    """

    def __init__(self, score: nn.Linear, adapter_name: str):
        super().__init__()
        self.score = score
        self.adapter_name = adapter_name

    def scores(self, policy: PeftModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """See `reward_scores`."""
        return reward_scores(policy, self.score, input_ids, attention_mask, self.adapter_name)
