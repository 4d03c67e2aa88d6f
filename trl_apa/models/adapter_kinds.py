"""Kinds of adapters: how they are put on a model, which of them cannot be trained, and how a layer is merged."""

import copy

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


# Kinds of adapters that train, or seem to, and what is wrong with them here.
UNSUPPORTED = {
    "ADALORA": "chooses its ranks in calls between the optimizer steps, which this trainer does not make",
    "ADAPTION_PROMPT": "is no adapter of layers, and cannot be merged",
    "POLY": "waits for the id of a task with every row",
    "PVERA": "draws its weights anew in every pass, which would be noise in the ratio of two policies",
    "XLORA": "mixes adapters with a pass of its own before each",
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
        raise ValueError("layer_replication: layers share their weights then, into which no adapter can be merged")


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
                f"the trainable weights {other} and {name} lie in the same memory, so that every update would move "
                "them twice; leave out ensure_weight_tying, or the vocabulary head of target_modules"
            )


def _check_can_be_merged(policy: PeftModel) -> None:
    """One layer of each kind is tried. A quantised base is loaded anew before it is merged."""
    tried, what = set(), policy.active_peft_config.peft_type.value
    for name, layer in policy.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        has_bias = getattr(base, "bias", None) is not None
        if any(getattr(layer, "lora_bias", {}).values()) and not has_bias:
            raise ValueError(
                f"the {what} adapter on {name} cannot be merged into its base: with lora_bias=True it has a bias, and "
                "the base has no bias that it could be added to; leave lora_bias out"
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

    "all-linear" leaves out what is a linear layer by name only: routers of a mixture of experts that choose the
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
    """Whether a layer of a class of its own gives what a linear layer gives."""
    if not type(module).__module__.startswith("transformers.models.") or hasattr(module.weight, "ds_id"):
        return True
    states = torch.ones(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        output = module(states)
    except Exception:
        return False
    return isinstance(output, Tensor) and output.shape == nn.functional.linear(states, module.weight).shape


def merged_layer(layer: BaseTunerLayer) -> BaseTunerLayer:
    """A copy of a layer, of those that lie in it too, with the active adapters put into the base."""
    merged = copy.deepcopy(layer)
    for part in merged.modules():
        if isinstance(part, BaseTunerLayer):
            part.merge()
    return merged
