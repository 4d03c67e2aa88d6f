"""Networks that compute one function of their tokens: in eval mode while they learn, too, and checkpointed there."""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


# Classes whose own forward draws no random numbers and that need train mode: RWKV divides its weights in place when it
# is called in eval mode, xLSTM computes long rows without gradient there, bitsandbytes has another int8 kernel for
# CPUs, and the layers of state space models call their fused kernel in train mode alone.
IN_TRAIN_MODE = frozenset(
    {
        "RwkvModel",
        "xLSTMModel",
        "xLSTMForCausalLM",
        "Linear8bitLt",
        "MambaMixer",
        "FalconMambaMixer",
        "Mamba2Mixer",
        "BambaMixer",
        "FalconH1Mixer",
        "GraniteMoeHybridMambaLayer",
        "NemotronHMamba2Mixer",
        "Zamba2MambaMixer",
    }
)
LIBRARIES = ("transformers.", "bitsandbytes.")
# An attribute of a layer: whether it is said to be in train mode, so that it is checkpointed.
CHECKPOINTED = "_apa_is_checkpointed"


def make_repeatable(network: nn.Module, checkpointing: bool = False) -> None:
    """Let `network` compute the same from the same tokens: while it samples, as a reference, and while it learns.

    Whatever train mode adds is left out: dropout, of rates in a config too, layer drop, noise of routers and
    embeddings, sampled experts. transformers checkpoints layers in train mode only: one that is to be checkpointed is
    said to be in that mode, no module inside it is, and it computes in eval mode in both passes; in a pass without
    gradient it is in eval mode. Dynamic RoPE forgets
    the longest row that it has seen, and RecurrentGemma the row before.

    Args:
        network: any network.
        checkpointing: whether layers whose gradient checkpointing is on are checkpointed. `generate` wants its cache.
    """
    modules = list(network.modules())
    for module in modules:
        training = _needs_train_mode(type(module))  # type: ignore[arg-type]  # a class is hashable
        if isinstance(module, nn.RNNBase):  # of which cuDNN has a gradient in train mode alone
            training, module.dropout = True, 0.0
        if module.training is not training:  # torch takes longer to set it than to look
            module.training = training
        if CHECKPOINTED in vars(module):
            vars(module)[CHECKPOINTED] = False
        if "dynamic" in str(vars(module).get("rope_type", "")):
            if _forget_longer_rows not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_forget_longer_rows)
        if type(module).__name__ == "RecurrentGemmaRecurrentBlock":
            if _forget_the_row_before not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_forget_the_row_before, with_kwargs=True)
    if checkpointing:
        for layer in _checkpointed_layers(modules):
            layer.training = vars(layer)[CHECKPOINTED] = True
            if _train_mode_for_the_gradient not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_train_mode_for_the_gradient)
            if getattr(layer._gradient_checkpointing_func, "func", None) is not _checkpoint_in_eval_mode:
                original = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = partial(_checkpoint_in_eval_mode, layer, original)


@lru_cache
def _needs_train_mode(module_class: type[nn.Module]) -> bool:
    """peft has classes of the same names, whose own forward is random in train mode."""
    return any(c.__name__ in IN_TRAIN_MODE and c.__module__.startswith(LIBRARIES) for c in module_class.__mro__)


def _checkpointed_layers(modules: Iterable[nn.Module]) -> list[Any]:
    """The layers that are checkpointed; in code from the hub the stack of them may do it."""
    flagged = [module for module in modules if vars(module).get("gradient_checkpointing")]
    layers = [module for module in flagged if isinstance(module, GradientCheckpointingLayer)]
    return [module for module in layers or flagged if hasattr(module, "_gradient_checkpointing_func")]


def _train_mode_for_the_gradient(layer: nn.Module, _: Any) -> None:
    """Without gradient, transformers from 5.24 on does not checkpoint: the layer would compute in train mode."""
    if vars(layer)[CHECKPOINTED]:
        layer.training = torch.is_grad_enabled()


def _checkpoint_in_eval_mode(
    layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return checkpoint(partial(_in_eval_mode, layer, forward), *args, **kwargs)


def _in_eval_mode(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Older versions of transformers checkpoint the call of a layer, and its hooks with it.
    layer.training = vars(layer)[CHECKPOINTED] = False
    try:
        return forward(*args, **kwargs)
    finally:
        layer.training = vars(layer)[CHECKPOINTED] = True


def _forget_longer_rows(rope: Any, _: Any) -> None:
    """Restore the frequencies of short rows; the forward pass of a longer row recomputes its own.

    transformers keeps those of the longest row until one comes that is short again.
    """
    for name in list(vars(rope)) + list(rope._buffers):
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            kind = rope.rope_type[prefix.removesuffix("_")] if isinstance(rope.rope_type, dict) else rope.rope_type
            if "dynamic" in kind:
                frequencies = getattr(rope, f"{prefix}inv_freq")
                rope.register_buffer(f"{prefix}inv_freq", getattr(rope, name).to(frequencies.device), persistent=False)
                setattr(rope, f"{prefix}max_seq_len_cached", rope.original_max_seq_len)


def _forget_the_row_before(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin anew where a row does: transformers takes a prompt of one token for the next of the row before."""
    position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    if position_ids.shape[1] == 1 and int(position_ids.flatten()[0]) == 0:
        block.conv1d_state = None
