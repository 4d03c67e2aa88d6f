"""New weights for a vLLM that runs in this process."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def reload_weights(llm: Any, weights: Iterator[tuple[str, Tensor]], on_cpu: bool) -> None:
    """Load weights into vLLM's network, and have it compute from them.

    Once they are loaded vLLM lays the weights of some layers out anew for its kernels: all linear ones on a CPU,
    experts on some GPUs. Its own `reload_weights` undoes that, loads, and does it again. On a CPU it leaves out two
    kinds of layers, which would compute from the old weights: experts, and a head that is tied to the embedding.

    Args:
        llm: `vllm.LLM`.
        weights: names as in the family's checkpoints, and tensors.
        on_cpu: whether vLLM computes on a CPU.
    """
    if on_cpu:
        llm.apply_model(_forget_packed_experts)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if on_cpu:
        llm.apply_model(_pack_heads)


def _forget_packed_experts(network: nn.Module) -> None:
    """Experts are packed for a CPU where their kernel is made, which is made only where there is none."""
    layer: Any  # vLLM's
    for layer in network.modules():
        if getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None:
            layer.quant_method.moe_kernel = None


def _pack_heads(network: nn.Module) -> None:
    """Embeddings and heads keep their weights beside the packed ones, from which they can be packed at any time."""
    layer: Any
    for layer in network.modules():
        if hasattr(layer, "cpu_linear") and layer.weight.numel() > 0:
            layer.quant_method.process_weights_after_loading(layer)
