"""Quantised networks, made to compute the same whether they sample or learn."""

from torch import nn


def use_one_kernel(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes' 4-bit layers to the weights and the precision that training reads.

    On a CPU with AVX512-BF16 such a layer, when first called in eval mode, packs its weights anew for a kernel that
    computes in bfloat16, has no gradient, and takes widths that 32 divides. Later calls in train mode read the packed
    weights too: nothing below that layer would learn, and nothing would say so.

    Args:
        model: any network; what is not such a layer stays as it is. Weights that were packed already are unpacked.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # unpacks them in place, so that they can be saved
    return model
