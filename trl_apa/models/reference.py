"""pi_init, the policy that APA is anchored to: a frozen copy, or the policy's own base without its adapter."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from trl_apa._trl import is_peft_model, use_adapter
from trl_apa.models.copying import independent_copy


REFERENCE_ADAPTER = "reference"


def create_reference_model(
    model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> nn.Module:
    """A frozen copy of `model` in eval mode.

    Args:
        model: a language model, with or without a value-head wrapper.
        num_shared_layers (`int`, *optional*):
            Freeze this many of the lowest layers of `model` (of an encoder-decoder, its encoder's), and the embeddings
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
    return independent_copy(model, shared).requires_grad_(False).eval()


def _lowest_layers(model: nn.Module, num_layers: int, pattern: str | None) -> list[nn.Parameter]:
    modules = dict(model.named_modules())
    stacks = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    if pattern is None:
        layers = next((list(stack) for stack in stacks.values() if len(stack) == model.config.num_hidden_layers), [])
    else:
        layers = _layers_named_like(model, pattern)
    if num_layers > len(layers):
        raise ValueError(
            f"num_shared_layers={num_layers}, but {type(model).__name__} has "
            f"{f'{len(layers)} layers' if layers else 'no stack of layers to share'}"
        )
    embeddings = (
        module
        for name, module in modules.items()
        if isinstance(module, nn.Embedding) and not name.startswith(tuple(f"{stack}." for stack in stacks))
    )
    return [parameter for module in (*embeddings, *layers[:num_layers]) for parameter in module.parameters()]


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


def keep_reference_adapter(policy: nn.Module) -> bool:
    """Freeze a copy of a PEFT policy's adapter as its reference, unless the adapter is still the identity.

    A policy that starts from a trained (SFT) adapter would otherwise be anchored to the base below it, another model.

    Returns:
        whether a copy was made. If not, the reference is the base with its adapter switched off.
    """
    if not is_peft_model(policy) or _adapter_is_identity(policy):
        return False
    active = policy.active_adapter
    policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[active])
    state = get_peft_model_state_dict(policy, adapter_name=active)
    set_peft_model_state_dict(policy, state, adapter_name=REFERENCE_ADAPTER)
    policy.set_adapter(active)
    return True


def _adapter_is_identity(policy: nn.Module) -> bool:
    """Whether a LoRA adapter changes nothing yet: every B matrix zero and no module trained whole."""
    config = policy.peft_config[policy.active_adapter]
    if config.peft_type != "LORA" or config.modules_to_save:
        return False
    return all(
        not parameter.any()
        for name, parameter in policy.named_parameters()
        if "lora_B" in name or "lora_embedding_B" in name
    )


@contextmanager
def reference_policy(policy: nn.Module, ref_model: nn.Module | None) -> Iterator[nn.Module]:
    """Inside, the model that computes log pi_init: `ref_model`, or `policy` with its reference adapter or none."""
    if ref_model is not None:
        yield ref_model
        return
    adapter = REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None
    with use_adapter(policy, adapter) if is_peft_model(policy) else nullcontext():
        yield policy
