"""Networks with two kernels for one layer, made to compute the same whether they sample or learn."""

from typing import Any

from transformers import PreTrainedModel

from trl_apa.models.gguf import without_gguf_marks
from trl_apa.models.network_parts import M


def use_one_kernel(model: M) -> M:
    """Keep bitsandbytes' 4-bit layers, and kernels from the hub, to what training computes with.

    On a CPU with AVX512-BF16 a 4-bit layer, when first called in eval mode, packs its weights anew for a kernel that
    computes in bfloat16, has no gradient, and takes widths that 32 divides. Later calls in train mode read the packed
    weights too: nothing below that layer would learn, and nothing would say so. Kernels from the hub are chosen when
    the mode of a model changes, and those for eval mode need not have a gradient.

    Args:
        model: any network; what has no such layers stays as it is. Weights that were packed already are unpacked.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "use_kernels", False):
            _choose_training_kernels(module)
    packing: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in packing:
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # unpacks them in place, so that they can be saved
    return model


def _choose_training_kernels(model: PreTrainedModel) -> None:
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, training in modes.items():
        module.training = training


def settle_quantization(model: M) -> M:
    """`model` itself, changed in place: see `use_one_kernel` and `gguf.without_gguf_marks`."""
    return use_one_kernel(without_gguf_marks(model))
