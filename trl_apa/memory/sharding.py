"""What one of several processes holds: the parts of one process, divided and with an engine's buffers added."""

from dataclasses import dataclass

from torch import nn

from trl_apa.memory.setup import Setup
from trl_apa.models import PolicyAndValue


# Elements that DeepSpeed reduces, or gathers, at once.
DEEPSPEED_BUCKET = 500_000_000
BUFFERS = "engine's buffers"
WEIGHTS = ("weights: policy", "weights: value", "weights: reference", "adapters and heads")
MASTER = "float32 weights"


@dataclass(frozen=True)
class Counts:
    """What the engines' buffers depend on.

    Args:
        trained: elements that learn.
        gradients: bytes of all their gradients.
        layer: elements of the largest transformer layer.
        outside: elements of the policy outside its layers (embeddings, head).
    """

    trained: int
    gradients: int
    layer: int
    outside: int


def count_elements(module: PolicyAndValue) -> Counts:
    """`Counts` of policy and value model."""
    layers = [child for stack in module.modules() if isinstance(stack, nn.ModuleList) for child in stack]
    largest = max((_numel(layer) for layer in layers), default=0)
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    outside = sum(p.numel() for p in module.policy.parameters() if id(p) not in in_layers)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return Counts(sum(parameter.numel() for parameter in trained), gradients, largest, outside)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def per_process(parts: dict[str, int], counts: Counts, setup: Setup) -> dict[str, int]:
    """The parts of one of `setup.world_size` processes.

    DDP adds buckets as large as the gradients. ZeRO trains in the precision of `setup.autocast` with a float32 copy
    of the trained weights; it divides that copy, optimizer states and gradients, and at stage 3 weights too. FSDP2
    divides all of them. What is divided is gathered a layer at a time, the next one while this one computes.

    Args:
        parts: bytes by part, undivided.
        counts: elements of the networks.
        setup: `world_size`, `sharding` and the precisions.
    """
    n = setup.world_size
    if n == 1:
        return dict(parts)
    if setup.sharding == "ddp":
        return {**parts, BUFFERS: counts.gradients}
    itemsize = (setup.autocast or setup.dtype).itemsize
    divided = {"optimizer": parts["optimizer"] // n, "gradients": parts.get("gradients", 0) // n}
    if setup.sharding != "zero2":
        divided |= {name: parts[name] // n for name in WEIGHTS if name in parts}
    if setup.sharding == "fsdp2":
        divided[BUFFERS] = (2 * counts.layer + counts.outside) * itemsize
    else:
        bucket = 2 * min(DEEPSPEED_BUCKET, counts.trained) * itemsize
        divided[BUFFERS] = bucket + (2 * counts.layer * itemsize if setup.sharding == "zero3" else 0)
        divided[MASTER] = 4 * counts.trained // n
    return {**parts, **divided}
