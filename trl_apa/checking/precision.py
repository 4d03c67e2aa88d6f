"""What half precision and quantisation change."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import nn

from trl_apa.checking.reading import LARGEST_MEAN
from trl_apa.checking.report import Finding, skipped
from trl_apa.checking.subject import Subject
from trl_apa.models.copying import independent_copy
from trl_apa.models.network_parts import inner_model


def half_precision(subject: Subject) -> Iterator[Finding]:
    """Compares log-probs as computed with those in float32."""
    policy, base = subject.policy, inner_model(subject.policy)
    low = {parameter.dtype for parameter in base.parameters()} & {torch.bfloat16, torch.float16}
    with subject.around():
        autocast = torch.is_autocast_enabled(base.device.type)
    name = "half precision against float32"
    if getattr(base, "is_quantized", False):
        yield skipped(name, "not compared: the weights are quantised")
        return
    if not low and not autocast:
        yield skipped(name, "everything is computed in float32")
        return
    actual = subject.each_alone()
    in_float32 = independent_copy(policy).float().eval() if low else policy
    expected = _each_alone_in_float32(subject, in_float32)
    difference = subject.difference(expected, actual)
    figures = {"max_nats": difference.max_nats, "mean_nats": difference.mean_nats}
    what = (
        f"weights in {' and '.join(sorted(str(dtype).removeprefix('torch.') for dtype in low))}" if low else "autocast"
    )
    ok = (difference.mean_nats or 0.0) <= LARGEST_MEAN
    advice = "" if ok else f"{what}: load with dtype=float32, and compute in bf16 if that is close"
    yield Finding(
        name, ok, f"max {difference.max_nats:.1e}, mean {difference.mean_nats:.1e} nats a token", figures, advice
    )


def _each_alone_in_float32(subject: Subject, network: nn.Module) -> list[torch.Tensor]:
    around, subject.around = subject.around, nullcontext
    try:
        return subject.each_alone(network)
    finally:
        subject.around = around


def quantised_layers(subject: Subject) -> Iterator[Finding]:
    """How many linear layers are quantised, and whether each of these carries an adapter."""
    kinds: dict[str, int] = {}
    without_adapter, plain = [], []
    for name, layer in subject.policy.named_modules():
        kind = type(layer).__name__
        if kind in QUANTISED and type(layer).__module__.startswith("bitsandbytes"):  # peft's have the same names
            kinds[kind] = kinds.get(kind, 0) + 1
            if not name.endswith(".base_layer"):
                without_adapter.append(name)
        elif isinstance(layer, nn.Linear) and "lora_" not in name:
            plain.append(name)
    if not kinds:
        yield skipped("quantised layers", "none")
        return
    count = sum(kinds.values())
    measured = f"{count} of {count + len(plain)} linear layers ({', '.join(kinds)})"
    if plain:
        measured += f"; not {', '.join(sorted({name.rsplit('.', 1)[-1] for name in plain}))}"
    if without_adapter:
        measured += f"; {len(without_adapter)} of them without an adapter"
    figures = {"quantised": count, "not_quantised": len(plain), "without_adapter": len(without_adapter)}
    yield Finding("quantised layers", True, measured, figures)


# Classes of bitsandbytes, which need not be installed.
QUANTISED = ("Linear8bitLt", "Linear4bit")
