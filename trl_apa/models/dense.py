"""The policy as one dense network, a tensor at a time: adapters merged, 4-bit weights written out."""

from collections.abc import Collection, Iterable, Iterator
from copy import copy
from itertools import groupby

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.core_model_loading import WeightTransform, revert_weight_conversion

from trl_apa._trl import is_peft_model
from trl_apa.models.adapter_kinds import merged_layer
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.models.quantization import use_one_kernel


def merged_parameters(policy: Network) -> Iterator[tuple[str, Tensor]]:
    """Names and weights that a plain checkpoint of the merged policy would have.

    Nothing in `policy` changes. Merging an adapter in place and taking it out again would move its base, and pi_init
    with it, by a rounding error each time; and who still holds a tensor then would see it change.

    Args:
        policy: a language model, with or without PEFT adapters, of which the active one counts; its linear layers may
            be 4-bit. Tied weights come once. Experts that are one tensor stay one, as in a policy without adapters.
    """
    adapted = is_peft_model(policy)
    use_one_kernel(policy)
    layers = {name: module for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer)}
    merged_name, merged = "", nn.Module()
    for name, parameter in policy.named_parameters():
        if adapted and (policy.prefix in name or not _is_in_use(name, policy.active_adapters)):
            continue
        owner = _outermost(name, layers)
        if owner is None:
            yield _plain_name(name), _dense(parameter)
            continue
        if merged_name != owner:
            with torch.autocast(parameter.device.type, enabled=False):  # which would round the product of the adapters
                merged_name, merged = owner, _merged_copy(layers[owner])
        yield _plain_name(name), merged.get_parameter(name.removeprefix(f"{owner}.")).detach()


def as_in_checkpoints(model: Network, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters under the names that the family's checkpoints have for them, from which vLLM loads.

    transformers has other names for some of them in memory (GPT-NeoX's head, Mixtral's routers), one tensor for the
    experts of a layer where most checkpoints have three for each expert, and several where some have one. A block of
    the network at a time goes through transformers' own conversion, as each tensor of a checkpoint comes from one.

    Args:
        model: a language model, whose family says which names these are.
        named: names in memory, and complete tensors, in the order of `named_parameters`.
    """
    network = copy(inner_model(model))
    if (conversions := getattr(network, "_weight_conversions", None)) is not None:
        network._weight_conversions = [conversion for conversion in conversions if _can_be_reverted(conversion)]
    for _, block in groupby(named, key=lambda item: _block(item[0])):
        yield from revert_weight_conversion(network, {name: tensor.detach() for name, tensor in block}).items()


def _can_be_reverted(conversion: WeightTransform) -> bool:
    """False for how a 4-bit checkpoint was read, which says nothing of dense weights."""
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


def _block(name: str) -> tuple[str, ...]:
    """The parts of a name up to its first number, which counts the blocks of a network."""
    parts = name.split(".")
    return tuple(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)])


def _outermost(name: str, layers: Collection[str]) -> str | None:
    """The layer with adapters that a parameter lies in; those for several parameters of one module are nested."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in layers), None)


def _is_in_use(name: str, active_adapters: list[str]) -> bool:
    """False for a module that `modules_to_save` has replaced, and for what another adapter has replaced it with."""
    if ".original_module." in name:
        return False
    _, saved, rest = name.partition(".modules_to_save.")
    return not saved or rest.partition(".")[0] in active_adapters


def _plain_name(name: str) -> str:
    """The name without what PEFT has put into it."""
    parts = name.removeprefix("base_model.model.").split(".")
    before, saved, rest = ".".join(part for part in parts if part != "base_layer").partition(".modules_to_save.")
    return f"{before}.{rest.partition('.')[2]}" if saved else before


def _dense(parameter: nn.Parameter) -> Tensor:
    """The weights in the precision that the layer computes in."""
    if type(parameter).__name__ == "Params4bit":
        weight: Tensor = dequantize_bnb_weight(parameter)
        return weight
    return parameter.detach()


def _merged_copy(layer: BaseTunerLayer) -> nn.Module:
    """The layer with the active adapters' changes in its dense `base_layer`."""
    base = layer.get_base_layer()
    if type(getattr(base, "weight", None)).__name__ != "Params4bit":
        merged: nn.Module = merged_layer(layer)
        return merged
    weight, bias = dequantize_bnb_weight(base.weight), base.bias
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant:
            weight = layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
        elif adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            if layer.lora_bias[adapter]:
                bias = bias + (layer.lora_B[adapter].bias * layer.scaling[adapter]).to(bias.dtype)
    dense, around = nn.Module(), nn.Module()
    dense.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    dense.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    around.base_layer = dense
    return around
