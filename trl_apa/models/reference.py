"""pi_init, the policy that APA is anchored to: a frozen copy, or the policy's own base without its adapter."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from trl_apa._trl import is_peft_model, use_adapter


REFERENCE_ADAPTER = "reference"


def create_reference_model(policy: nn.Module, num_shared_layers: int | None = None) -> nn.Module:
    """A frozen copy of `policy` in eval mode.

    Args:
        policy: a decoder language model.
        num_shared_layers: freeze this many of the lowest layers of `policy`, and the embeddings below them, and share
            their memory with the copy.

    Raises:
        ValueError: if the policy has fewer layers than that, or is not laid out as a stack of layers.
    """
    shared = _lowest_layers(policy, num_shared_layers) if num_shared_layers else []
    for parameter in shared:
        parameter.requires_grad_(False)
    # deepcopy leaves alone what its memo already holds, which is how the lower layers stay one tensor.
    reference = copy.deepcopy(policy, memo={id(parameter): parameter for parameter in shared})
    return reference.requires_grad_(False).eval()


def _lowest_layers(policy: nn.Module, num_layers: int) -> list[nn.Parameter]:
    stacks = [module for module in policy.modules() if isinstance(module, nn.ModuleList)]
    stack = next((module for module in stacks if len(module) == policy.config.num_hidden_layers), None)
    if stack is None or num_layers > len(stack):
        raise ValueError(
            f"num_shared_layers={num_layers}, but {type(policy).__name__} has "
            f"{'no stack of layers to share' if stack is None else f'{len(stack)} layers'}"
        )
    parameters = [policy.get_input_embeddings().weight]
    for layer in stack[:num_layers]:
        parameters.extend(layer.parameters())
    return parameters


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
