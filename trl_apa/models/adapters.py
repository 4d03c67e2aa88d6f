"""Several adapters on one base: which one computes, and which ones learn."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from weakref import WeakKeyDictionary

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from trl_apa.models.modes import make_repeatable


PEFT_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@contextmanager
def only_adapter(policy: PeftModel, adapter_name: str | None) -> Iterator[None]:
    """Inside, `adapter_name` is the active adapter, or with None none is; afterwards all is as it was.

    What is trainable stays so inside, although peft's own switches freeze every adapter but the one that they end on:
    DeepSpeed drops gradients of frozen parameters when a backward pass ends, also those of an earlier pass.
    """
    layers = _plain_layers(policy)
    switch = _by_peft(policy, adapter_name) if layers is None else _by_flags(policy, layers, adapter_name)
    with switch:
        yield


@contextmanager
def _by_flags(policy: PeftModel, layers: list[BaseTunerLayer], adapter_name: str | None) -> Iterator[None]:
    """Set what each layer reads in its forward pass. peft's switches take longer than a forward pass of a 1B model."""
    tuner = policy.base_model
    before = policy.active_adapter, tuner.active_adapter, policy._adapters_disabled
    of_layers = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    if adapter_name is not None and adapter_name not in policy.peft_config:
        raise ValueError(f"the policy has no adapter {adapter_name!r}")
    try:
        if adapter_name is None:
            policy._adapters_disabled = True
            for layer in layers:
                layer._disable_adapters = True
        else:
            policy.active_adapter = tuner.active_adapter = adapter_name
            for layer in layers:
                layer._active_adapter = [adapter_name]
        yield
    finally:
        policy.active_adapter, tuner.active_adapter, policy._adapters_disabled = before
        for layer, active, disabled in of_layers:
            layer._active_adapter, layer._disable_adapters = active, disabled


# The adapters that a policy had when its layers were listed, and the layers.
_LAYERS: WeakKeyDictionary[PeftModel, tuple[dict[str, PeftConfig], list[BaseTunerLayer] | None]] = WeakKeyDictionary()


def _plain_layers(policy: PeftModel) -> list[BaseTunerLayer] | None:
    """The layers with adapters, if two flags say all about which one each computes; None otherwise."""
    adapters, layers = _LAYERS.get(policy, ({}, None))
    known = adapters.keys() == policy.peft_config.keys()
    if not known or any(config is not adapters[name] for name, config in policy.peft_config.items()):
        layers = [module for module in policy.modules() if isinstance(module, PEFT_LAYERS)]
        if not all(_is_plain(type(layer)) for layer in layers):  # type: ignore[arg-type]  # a class is hashable
            layers = None
        _LAYERS[policy] = dict(policy.peft_config), layers
    if layers is not None and any(layer.merged for layer in layers):
        return None
    return layers


@cache
def _is_plain(layer_class: type[nn.Module]) -> bool:
    switches = ("set_adapter", "enable_adapters", "active_adapter", "active_adapters", "disable_adapters")
    return issubclass(layer_class, BaseTunerLayer) and all(
        getattr(layer_class, name) is getattr(BaseTunerLayer, name) for name in switches
    )


@contextmanager
def _by_peft(policy: PeftModel, adapter_name: str | None) -> Iterator[None]:
    active, active_in_layers = policy.active_adapter, list(policy.base_model.active_adapters)
    with ExitStack() as stack:
        with trainable_as_before(policy):
            if adapter_name is None:
                stack.enter_context(policy.disable_adapter())
            else:
                policy.set_adapter(adapter_name)
        try:
            yield
        finally:
            with trainable_as_before(policy):
                stack.close()
                policy.active_adapter = active
                policy.base_model.set_adapter(active_in_layers)


@contextmanager
def trainable_as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards the parameters that were there before are trainable if they were before."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@contextmanager
def held_repeatable(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is without randomness; afterwards every module of it is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        make_repeatable(model)
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def without_card_of_peft(model: nn.Module) -> Iterator[None]:
    """Inside, saving an adapter writes no `README.md`.

    peft's would name the path of the base on this machine, and begin a `README.md` of the user's with metadata.
    """
    adapted = [module for module in model.modules() if isinstance(module, PeftModel)]
    for module in adapted:
        module.create_or_update_model_card = _write_no_card
    try:
        yield
    finally:
        for module in adapted:
            del module.create_or_update_model_card


def _write_no_card(output_dir: str) -> None:
    """In place of peft's method, which it calls whenever it saves."""


def add_adapter(policy: PeftModel, adapter_name: str, config: PeftConfig, argument: str) -> None:
    """Put one more adapter on `policy`, which changes nothing about those that it has.

    Raises:
        ValueError: naming `argument`, if the adapter does not fit the base.
    """
    try:
        with trainable_as_before(policy):  # peft 0.19 switches the flags of the adapters that were there
            policy.add_adapter(adapter_name, config)
    except ValueError as error:
        raise ValueError(f"{argument} does not fit the policy's base: {error}") from error


def config_like(policy: PeftModel, adapter_name: str) -> PeftConfig:
    """The configuration of another adapter of the same shape."""
    config = copy.deepcopy(policy.peft_config[adapter_name])
    if hasattr(config, "init_lora_weights"):
        # PiSSA and its like change the base weights when an adapter is made, which must not happen a second time.
        config.init_lora_weights = True
    return config


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The parameters that belong to one adapter, under their names in `model`."""
    return {name: p for name, p in model.named_parameters() if f".{adapter_name}." in f"{name}."}


def trains_its_adapter_only(policy: PeftModel) -> bool:
    """Whether nothing of the base is trained with the adapter: no bias, no norm."""
    return _trains_only(policy, f".{policy.base_model.prefix}", ".modules_to_save.", ".trainable_tokens_delta.")


def trains_added_weights_alone(network: nn.Module) -> bool:
    """Whether training changes weights of adapters and no pretrained weight, nor a copy of one (`modules_to_save`)."""
    prefixes = [f".{network.base_model.prefix}"] if isinstance(network, PeftModel) else []
    return _trains_only(network, *prefixes)


def _trains_only(network: nn.Module, *parts_of_names: str) -> bool:
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    return all(any(part in name for part in parts_of_names) for name in trained)


def parts_tied_weights(policy: PeftModel) -> bool:
    """Whether `modules_to_save` makes two weights of embeddings and vocabulary head that are one in the base."""
    base = policy.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    given = [end.original_module if isinstance(end, ModulesToSaveWrapper) else end for end in ends]
    tied = [getattr(end, "weight", None) for end in given]
    return tied[0] is tied[1] and tied[0] is not None and ends[0].weight is not ends[1].weight


def adapts_tied_weights(policy: PeftModel) -> bool:
    """Whether an adapter changes the embeddings or the vocabulary head of a base in which they are tied."""
    base = policy.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    weights = [end.get_base_layer().weight if isinstance(end, BaseTunerLayer) else end.weight for end in ends]
    return weights[0] is weights[1] and any(isinstance(end, BaseTunerLayer) for end in ends)
