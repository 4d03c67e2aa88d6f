"""Kinds of adapters: how they are put on a model, which of them cannot be trained, and how a layer is merged."""

import copy

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


# Kinds of adapters that are not supported, and why.
UNSUPPORTED = {
    "ADALORA": "chooses its ranks in calls between the optimizer steps, which this trainer does not make",
    "ADAPTION_PROMPT": "does not adapt layers, and cannot be merged",
    "POLY": "needs a task id with every row",
    "PVERA": "draws random weights in every pass, which would add noise to the log-ratio",
    "XLORA": "needs an extra pass to mix its adapters",
}


def refuse_prompt_learning(peft_config: PeftConfig) -> None:
    """Raise ValueError for adapters that change the sequence instead of the weights."""
    if peft_config.is_prompt_learning:
        raise ValueError(f"{peft_config.peft_type.value} adapters are not supported; use LoRA or another")


def refuse_unsupported(config: PeftConfig) -> None:
    """Raise ValueError for adapters that change the sequence instead of the weights, or cannot be trained here."""
    refuse_prompt_learning(config)
    kind = config.peft_type.value
    if kind in UNSUPPORTED:
        raise ValueError(f"{kind} adapters are not supported: {kind} {UNSUPPORTED[kind]}; use LoRA or another")
    if getattr(config, "layer_replication", None):
        raise ValueError(
            "layer_replication is not supported: replicated layers share weights, so adapters cannot be merged"
        )


def check_adapters(policy: PeftModel) -> None:
    """Raise ValueError for adapters that an optimizer would move twice, or that cannot be put into their base."""
    _check_memory_is_their_own(policy)
    _check_can_be_merged(policy)


def _check_memory_is_their_own(policy: PeftModel) -> None:
    """peft ties adapters on tied embeddings by views of one tensor, which are two parameters to an optimizer."""
    found: dict[int, str] = {}
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad or not parameter.numel() or parameter.is_meta or hasattr(parameter, "ds_id"):
            continue
        other = found.setdefault(parameter.data_ptr(), name)
        if other != name:
            raise ValueError(
                f"the trainable weights {other} and {name} share memory, so every update would change them twice; "
                "leave out ensure_weight_tying, or remove the vocabulary head from target_modules"
            )


def _check_can_be_merged(policy: PeftModel) -> None:
    """One layer of each kind is tried. A quantized base is reloaded before it is merged."""
    tried, what = set(), policy.active_peft_config.peft_type.value
    for name, layer in policy.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        has_bias = getattr(base, "bias", None) is not None
        if any(getattr(layer, "lora_bias", {}).values()) and not has_bias:
            raise ValueError(
                f"the {what} adapter on {name} cannot be merged into its base: lora_bias=True adds a bias, and the "
                "base layer has none; leave lora_bias out"
            )
        if getattr(policy, "is_quantized", False):
            continue
        kind = (type(layer), type(base), has_bias)
        is_there = not any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in layer.parameters())
        if kind in tried or not is_there:
            continue
        tried.add(kind)
        try:
            merged_layer(layer)
        except Exception as error:
            raise ValueError(f"the {what} adapter on {name} cannot be merged into its base: {error}") from error


def with_adapters(model: nn.Module, config: PeftConfig) -> PeftModel:
    """`model` with new adapters.

    "all-linear" skips modules that are linear layers only by class: routers of a mixture of experts that choose the
    experts themselves (Llama 4).
    """
    if getattr(config, "target_modules", None) == "all-linear" and not config.exclude_modules:
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        others = {name for name, module in linear.items() if not _is_linear(module)}
        if others:
            endings = {name.rpartition(".")[2] for name in others}
            taken = {name.rpartition(".")[2] for name in linear.keys() - others}
            config = copy.deepcopy(config)
            config.exclude_modules = sorted(others if endings & taken else endings)
    return get_peft_model(model, config)


@torch.no_grad()
def _is_linear(module: nn.Linear) -> bool:
    """Whether a layer of a custom class gives the same results as a linear layer."""
    if not type(module).__module__.startswith("transformers.models.") or hasattr(module.weight, "ds_id"):
        return True
    states = torch.ones(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        output = module(states)
    except Exception:
        return False
    return isinstance(output, Tensor) and output.shape == nn.functional.linear(states, module.weight).shape


def merged_layer(layer: BaseTunerLayer) -> BaseTunerLayer:
    """A copy of a layer and its sublayers, with the active adapters merged into the base."""
    merged = copy.deepcopy(layer)
    for part in merged.modules():
        if isinstance(part, BaseTunerLayer):
            part.merge()
    return merged
