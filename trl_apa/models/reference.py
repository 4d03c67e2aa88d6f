"""pi_init, the policy that APA is anchored to: a frozen copy, or the policy's own base without its adapter."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from trl_apa._trl import is_peft_model
from trl_apa.models.adapters import (
    adapter_parameters,
    config_like,
    held_repeatable,
    only_adapter,
    trainable_as_before,
    trains_its_adapter_only,
)
from trl_apa.models.classic_outputs import outputs_as_they_are
from trl_apa.models.copying import independent_copy
from trl_apa.models.modes import make_repeatable
from trl_apa.models.network_parts import M, Network, inner_model, text_trunk
from trl_apa.models.partitioned import gathered
from trl_apa.models.quantization import settle_quantization


# Not a name that a caller would give to an adapter of his own.
REFERENCE_ADAPTER = "trl_apa_reference"


def create_reference_model(model: M, num_shared_layers: int | None = None, pattern: str | None = None) -> M:
    """A frozen copy of `model`, without randomness.

    Args:
        model: a language model, with or without a value-head wrapper.
        num_shared_layers (`int`, *optional*):
            Freeze this many of the lowest layers of `model` (of an encoder-decoder, its encoder's), and all that is
            below them, and share their memory with the copy.
        pattern (`str`, *optional*):
            Which layers are counted: the end of their names, such as `"transformer.h.{layer}"`. Defaults to the first
            stack of as many layers as the model's config says. Has no effect without `num_shared_layers`.

    Raises:
        ValueError: if the model has fewer layers than that, is not laid out as a stack of layers, or `pattern` matches
            none of them.
    """
    shared = _lowest_layers(model, num_shared_layers, pattern) if num_shared_layers else []
    for parameter in shared:
        parameter.requires_grad_(False)
    reference = independent_copy(model, shared).requires_grad_(False)
    make_repeatable(reference)
    return reference


def freeze_all_but(num_unfrozen_layers: int, network: PreTrainedModel, argument: str = "model") -> int:
    """Freeze all layers but the highest, and all that is below them, as the paper did in its HH experiments.

    Args:
        num_unfrozen_layers: layers that stay as they are, with the final norm and what follows it. Below them are the
            embeddings and, where a family has them, their norm and projection. A vocabulary head that is tied to
            the embeddings is frozen with them.
        network: a decoder without adapters, or its trunk.
        argument: what the trainer's caller knows the network by.

    Returns:
        How many layers were frozen.

    Raises:
        ValueError: if the network has adapters, two stacks of layers, or fewer layers than that.
    """
    if is_peft_model(network) or network.config.is_encoder_decoder:
        kind = "adapters" if is_peft_model(network) else "two stacks of layers"
        raise ValueError(
            f"num_unfrozen_layers={num_unfrozen_layers} needs a decoder without adapters; {argument} has {kind}"
        )
    num_layers = _num_layers(network)
    if num_unfrozen_layers > num_layers:
        raise ValueError(f"num_unfrozen_layers={num_unfrozen_layers}, but {argument} has {num_layers} layers")
    num_frozen = num_layers - num_unfrozen_layers
    for parameter in _lowest_layers(network, num_frozen, None) if num_frozen else []:
        parameter.requires_grad_(False)
    return num_frozen


def _num_layers(model: Network) -> int:
    """As many as the config says; 0 if it does not."""
    num_layers: int | None = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return num_layers or 0


def _lowest_layers(model: nn.Module, num_layers: int, pattern: str | None) -> list[nn.Parameter]:
    """Parameters of the lowest layers and of all that is below them."""
    trunk = text_trunk(inner_model(getattr(model, "pretrained_model", model)))
    stacks = [module for module in trunk.modules() if isinstance(module, nn.ModuleList)]
    if pattern is None:
        layers = next((list(stack) for stack in stacks if len(stack) == _num_layers(model)), [])
    else:
        layers = _layers_named_like(model, pattern)
    if num_layers > len(layers):
        raise ValueError(
            f"num_shared_layers={num_layers}, but {type(model).__name__} has "
            f"{f'{len(layers)} layers' if layers else 'no stack of layers to share'}"
        )
    lowest = next(iter(layers[0])) if isinstance(layers[0], nn.ModuleList) else layers[0]
    parameters = [*_below(trunk, lowest, stacks), *(p for layer in layers[:num_layers] for p in layer.parameters())]
    return list({id(parameter): parameter for parameter in parameters}.values())


class _LowestLayerReached(Exception):
    """Stops a forward pass early."""


@torch.no_grad()
def _below(trunk: PreTrainedModel, lowest: nn.Module, stacks: list[nn.ModuleList]) -> list[nn.Parameter]:
    """Parameters of all embeddings outside the layers, and of what runs before the lowest layer does.

    Families name and order these differently: norms and projections of the embeddings, positions. A pass shows it. Of
    an encoder-decoder it is what belongs to the stack of the lowest layer.
    """
    in_stacks = {id(module) for stack in stacks for module in stack.modules()}
    around = [module for module in trunk.modules() if any(part is lowest for part in module.modules())]
    excluded = in_stacks | {id(module) for module in around}
    below = [m for m in trunk.modules() if isinstance(m, nn.Embedding) and id(m) not in excluded]
    # The innermost model that holds the layer: modules() gives outer ones first.
    stack = [module for module in around if isinstance(module, PreTrainedModel)][-1:]
    outside = [module for part in stack for module in part.modules() if id(module) not in excluded]

    def reached(*_: Any) -> None:
        raise _LowestLayerReached

    hooks = [module.register_forward_pre_hook(lambda module, _: below.append(module)) for module in outside]
    hooks.append(lowest.register_forward_pre_hook(reached))
    token = torch.zeros(1, 1, dtype=torch.long, device=next(trunk.parameters()).device)
    inputs = {"decoder_input_ids": token} if trunk.config.is_encoder_decoder else {"use_cache": False}
    try:
        with gathered(p for module in outside for p in module.parameters(recurse=False)), held_repeatable(trunk):
            trunk(input_ids=token, **inputs)
    except _LowestLayerReached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [parameter for module in below for parameter in module.parameters(recurse=False)]


def _layers_named_like(model: nn.Module, pattern: str) -> list[nn.Module]:
    """Layer 0, 1, ... as `pattern` names them; a pattern that fits several stacks gives a list of modules a layer."""
    if "{layer}" not in pattern:
        raise ValueError(f"pattern={pattern!r} has no {{layer}} where the number of the layer belongs")
    layers: list[nn.Module] = []
    while True:
        ending = "." + pattern.replace("{layer}", str(len(layers)))
        found = [module for name, module in model.named_modules() if f".{name}".endswith(ending)]
        if not found:
            break
        layers.append(nn.ModuleList(found))
    if not layers:
        raise ValueError(f"pattern={pattern!r} matches nothing in {type(model).__name__}")
    return layers


def choose_reference(
    policy: Network,
    ref_model: Network | None = None,
    num_shared_layers: int | None = None,
    ref_adapter_name: str | None = None,
) -> Network | None:
    """The reference that the trainer's arguments ask for, frozen; None if it is inside the policy (`build_reference`).

    Raises:
        ValueError: if `num_shared_layers` does not fit the policy, or it has no adapter called `ref_adapter_name`. It
            warns where one of them has no effect.
    """
    if num_shared_layers is not None and num_shared_layers < 0:
        raise ValueError(f"num_shared_layers={num_shared_layers}; it should not be negative")
    if num_shared_layers and (ref_model is not None or is_peft_model(policy)):
        why = "ref_model is given" if ref_model is not None else "the policy is a PEFT model"
        warnings.warn(f"num_shared_layers has no effect when {why}", UserWarning, stacklevel=4)
    if ref_adapter_name is not None:
        check_adapter_exists("ref_adapter_name", ref_adapter_name, policy)
        if ref_model is not None:
            warnings.warn("ref_adapter_name has no effect when ref_model is given", UserWarning, stacklevel=4)
    if ref_model is not None:
        make_repeatable(settle_quantization(ref_model).requires_grad_(False))
        return ref_model
    if num_shared_layers and not is_peft_model(policy):
        return create_reference_model(policy, num_shared_layers)
    return build_reference(policy, ref_adapter_name)


def check_adapter_exists(argument: str, name: str, policy: Network) -> None:
    """Raise ValueError, naming the argument, unless the policy is a PEFT model with an adapter of that name."""
    if not is_peft_model(policy):
        raise ValueError(f"{argument}={name!r}, but model is not a PEFT model with adapters")
    if name not in policy.peft_config:
        raise ValueError(
            f"{argument}={name!r}, but the adapters of model are {', '.join(map(repr, policy.peft_config))}"
        )


def build_reference(policy: Network, adapter: str | None = None) -> Network | None:
    """pi_init as the policy is now: a frozen copy of it or, where less memory will do, None for "inside the policy".

    A LoRA policy whose adapter changes nothing yet is its own base with the adapter switched off. One that starts from
    a trained (SFT) adapter keeps a frozen copy of that adapter: switching it off would anchor APA to the base below,
    another model. If more than the adapter is trained (a bias, a norm), a full copy is needed.

    Args:
        policy: the policy before training.
        adapter: of a PEFT policy, the adapter to take pi_init from; the active one by default.
    """
    if not is_peft_model(policy) or not trains_its_adapter_only(policy):
        reference = create_reference_model(policy)
        if adapter is not None:
            reference.set_adapter(adapter)
        return reference.requires_grad_(False)
    if REFERENCE_ADAPTER in policy.peft_config:
        policy.delete_adapter(REFERENCE_ADAPTER)
    if adapter is not None or not _adapter_is_identity(policy):
        _keep_reference_adapter(policy, adapter or policy.active_adapter)
    return None


def _adapter_is_identity(policy: PeftModel) -> bool:
    """Whether the active adapter is a LoRA that changes nothing yet: its B matrices zero, no rows or modules trained.

    Of a fresh one that trains rows or modules whole, the frozen copy is as small as the adapter.
    """
    active = policy.active_adapter
    config = policy.peft_config[active]
    if config.peft_type != "LORA" or config.modules_to_save or getattr(config, "trainable_token_indices", None):
        return False
    matrices = [
        parameter
        for name, parameter in policy.named_parameters()
        if f".lora_B.{active}." in f"{name}." or f".lora_embedding_B.{active}." in f"{name}."
    ]
    with gathered(matrices):
        return not any(matrix.any() for matrix in matrices)


def _keep_reference_adapter(policy: PeftModel, source: str) -> None:
    active = policy.active_adapter
    with trainable_as_before(policy):
        policy.add_adapter(REFERENCE_ADAPTER, config_like(policy, source))
        with gathered(adapter_parameters(policy, source).values()):
            state = get_peft_model_state_dict(policy, adapter_name=source)
            set_peft_model_state_dict(policy, state, adapter_name=REFERENCE_ADAPTER)
        policy.set_adapter(active)


@contextmanager
def reference_policy(policy: Network, ref_model: Network | None) -> Iterator[Network]:
    """Inside, the model that computes log pi_init: `ref_model`, or `policy` with its reference adapter or none."""
    if ref_model is not None:
        with outputs_as_they_are():
            yield ref_model
        return
    with only_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
        yield policy
