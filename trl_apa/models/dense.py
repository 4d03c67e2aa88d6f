"""The policy as one dense network, a tensor at a time: adapters merged, 4-bit weights written out."""

import copy
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from trl_apa._trl import is_peft_model
from trl_apa.models.quantization import use_one_kernel


def merged_parameters(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights that a plain checkpoint of the merged policy would have.

    Nothing in `policy` changes. Merging an adapter in place and taking it out again would move its base, and pi_init
    with it, by a rounding error each time; and who still holds a tensor then would see it change.

    Args:
        policy: a language model, with or without PEFT adapters, of which the active one counts; its linear layers may
            be 4-bit. Tied weights come once.
    """
    adapted = is_peft_model(policy)
    use_one_kernel(policy)
    layers = {name: module for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer)}
    merged: tuple[str, nn.Module | None] = ("", None)
    for name, parameter in policy.named_parameters():
        if adapted and (policy.prefix in name or not _is_in_use(name, policy.active_adapters)):
            continue
        owner, _, attribute = name.rpartition(".base_layer.")
        if owner not in layers:
            yield _plain_name(name), _dense(parameter)
            continue
        if merged[0] != owner:
            merged = (owner, _merged_copy(layers[owner]))
        yield _plain_name(name), merged[1].get_parameter(attribute).detach()


def _is_in_use(name: str, active_adapters: list[str]) -> bool:
    """False for a module that `modules_to_save` has replaced, and for what another adapter has replaced it with."""
    if ".original_module." in name:
        return False
    _, saved, rest = name.partition(".modules_to_save.")
    return not saved or rest.partition(".")[0] in active_adapters


def _plain_name(name: str) -> str:
    """The name without what PEFT has put into it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    before, saved, rest = name.partition(".modules_to_save.")
    return f"{before}.{rest.partition('.')[2]}" if saved else name


def _dense(parameter: nn.Parameter) -> Tensor:
    """The weights in the precision that the layer computes in."""
    if type(parameter).__name__ == "Params4bit":
        return dequantize_bnb_weight(parameter)
    return parameter.detach()


def _merged_copy(layer: BaseTunerLayer) -> nn.Module:
    """The base layer with the active adapters' changes, dense."""
    base = layer.get_base_layer()
    if type(base.weight).__name__ != "Params4bit":
        merged = copy.deepcopy(layer)
        merged.merge()
        return merged.get_base_layer()
    weight = dequantize_bnb_weight(base.weight)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant:
            weight = layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
        elif adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    dense = nn.Module()
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = base.bias
    return dense
