"""Compares the memory of the networks with the prediction of `trl-apa memory`."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from trl_apa._trl import is_peft_model
from trl_apa.checking.report import Finding, skipped
from trl_apa.checking.subject import Subject
from trl_apa.memory import Setup, predict
from trl_apa.memory.measuring import peak_of
from trl_apa.memory.prediction import forward_and_backward
from trl_apa.memory.pretending import scales_of
from trl_apa.models import PolicyAndValue, ValueModel
from trl_apa.models.adapters import trains_its_adapter_only
from trl_apa.models.network_parts import inner_model, text_trunk
from trl_apa.models.trials import ordinary_tokens
from trl_apa.rollout.batch import lay_out


MIB = 2**20
# Allowed relative errors of the prediction, and a difference in bytes that does not matter.
CLOSE, CLOSE_PASS, SMALL = 0.05, 0.15, MIB
OFF = "the predictions of `trl-apa memory` are off for this model: report it, and leave spare memory"
# Tokens of a row on a CPU, where a pass of a large model takes long.
LONGEST_ON_CPU = 256


def weights(subject: Subject) -> Iterator[Finding]:
    """Bytes of policy, value model and pi_init, and of them what the planner predicts."""
    name = "memory of the weights"
    measured = _storages(subject)
    try:
        prediction = predict(_setup(subject))
    except Exception as error:  # the planner builds families that it has never seen
        yield skipped(name, f"{_size(measured)}; not predicted: {' '.join(str(error).split())[:200]}")
        return
    kept = ("weights: policy", "weights: value", "weights: reference", "adapters and heads")
    predicted = sum(prediction.update.get(part, 0) for part in kept)
    ok = abs(measured - predicted) <= max(SMALL, CLOSE * measured)
    figures = {"measured_bytes": measured, "predicted_bytes": predicted, "predicted_peak_bytes": prediction.peak}
    text = f"{_size(measured)}, predicted {_size(predicted)}; a run's peak is predicted at {_size(prediction.peak)}"
    yield Finding(name, ok, text, figures, "" if ok else OFF)


def micro_batch(subject: Subject) -> Iterator[Finding]:
    """Bytes at the peak of a forward and backward pass of one row, weights and gradients with them, and predicted."""
    name = "memory of a micro-batch"
    module, device = subject.module, subject.policy.device
    if any(parameter.grad is not None for parameter in module.parameters()):
        yield skipped(name, "not measured: there are gradients")
        return
    response = min(subject.args.max_completion_length, LONGEST_ON_CPU // 2 if device.type == "cpu" else 2**62)
    length = max(min(subject.longest, LONGEST_ON_CPU if device.type == "cpu" else 2**62), response + 1)
    try:
        options: dict[str, Any] = {"max_length": length, "max_new_tokens": response, "optimizer": "sgd"}
        one_row = replace(_setup(subject), micro_batch_size=1, gradient_accumulation_steps=1)
        one_row = replace(one_row, tokens_per_micro_batch=None)
        predicted = sum(predict(replace(one_row, **options)).update.values())
    except Exception as error:  # as above
        yield skipped(name, f"not predicted: {' '.join(str(error).split())[:200]}")
        return
    tokens, training = _row(subject, length, response), module.training
    module.train()
    try:
        with subject.around():
            measured = _storages(subject) + peak_of(lambda: _passes(module, tokens, response), device)
    finally:
        module.zero_grad()
        module.train(training)
    ok = abs(measured - predicted) <= max(SMALL, CLOSE_PASS * measured)
    figures = {"measured_bytes": measured, "predicted_bytes": predicted, "tokens": length}
    text = f"{_size(measured)} with one row of {length} tokens, predicted {_size(predicted)}"
    yield Finding(name, ok, text, figures, "" if ok else OFF)


def _row(subject: Subject, length: int, response: int) -> dict[str, Any]:
    known = torch.tensor(ordinary_tokens(inner_model(subject.policy)), device=subject.policy.device)
    row = known[torch.arange(length, device=known.device) % len(known)]
    return lay_out(subject.layout_of(length), [row[:-response]], [row[-response:]], subject.pad_token_id)


def _passes(module: PolicyAndValue, tokens: dict[str, Any], response: int) -> None:
    for networks in module.passes:
        with module.adapter_for(**networks):
            forward_and_backward(module, tokens, response, networks)


def _setup(subject: Subject) -> Setup:
    """The run in the planner's terms.

    Raises:
        ValueError: for networks that it does not know.
    """
    module, args, policy = subject.module, subject.args, subject.policy
    base, adapted = inner_model(policy), is_peft_model(policy)
    peft_config = policy.active_peft_config if adapted else None
    if peft_config is not None:
        _check_plain_lora(peft_config)
    with subject.around():
        device = policy.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    bits = {"load_in_8bit": "8bit", "load_in_4bit": "4bit"}
    quantisation = getattr(base.config, "quantization_config", None)
    longest = max(subject.longest, args.max_completion_length + 1)
    with subject.reference(policy) as pi_init:
        reference = "copy" if pi_init is not policy else None
    if adapted and reference is None:
        reference = "base" if not _has_reference_adapter(policy) else "adapter"
    return Setup(
        config=base.config,
        quantization=next((kind for name, kind in bits.items() if getattr(quantisation, name, False)), None),
        dtype=base.get_input_embeddings().weight.dtype,
        autocast=autocast,
        lora_r=0 if peft_config is None else peft_config.r,
        lora_target_modules=None if peft_config is None else _targets(peft_config),
        value=_value(module),
        reference=reference or "auto",
        learned_normalizer=args.learns_normalizer,
        num_unfrozen_layers=args.num_unfrozen_layers,
        micro_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        tokens_per_micro_batch=args.tokens_per_micro_batch,
        max_length=longest,
        max_new_tokens=args.max_completion_length,
        generation_batch_size=args.generation_batch_size or args.batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
        attention=_attention(base.config._attn_implementation),
    )


# What the planner does not know of LoRA.
BEYOND_PLAIN_LORA = (
    "modules_to_save",
    "rank_pattern",
    "use_dora",
    "lora_bias",
    "target_parameters",
    "layers_to_transform",
    "trainable_token_indices",
    "exclude_modules",
)


def _check_plain_lora(peft_config: PeftConfig) -> None:
    if getattr(peft_config, "r", None) is None:
        raise ValueError("adapters that are not LoRA")
    beyond = [name for name in BEYOND_PLAIN_LORA if getattr(peft_config, name, None)]
    if beyond:
        raise ValueError(f"the planner does not know LoRA's {', '.join(beyond)}")


def _value(module: PolicyAndValue) -> Any:
    """The value model in the planner's terms."""
    if module.value_model is None:
        return None
    if module.value_is_a_head:
        return "head"
    if module.base_is_shared:
        return "adapter"
    if not isinstance(module.value_model, ValueModel):
        raise ValueError("a value model of your own")
    policy, network = inner_model(module.policy), inner_model(module.value_model.network)
    if network.get_input_embeddings().weight.dtype != policy.get_input_embeddings().weight.dtype:
        raise ValueError("a value model in another precision than the policy")
    shapes = [
        {name: tuple(weight.shape) for name, weight in text_trunk(part).named_parameters() if "lora_" not in name}
        for part in (policy, network)
    ]
    return "separate" if shapes[0] == shapes[1] else network.config


def _targets(peft_config: PeftConfig) -> str | list[str]:
    targets = peft_config.target_modules
    return targets if isinstance(targets, str) else sorted(targets)


def _attention(implementation: str) -> str:
    return "flash" if "flash" in implementation else "eager" if implementation == "eager" else "sdpa"


def _has_reference_adapter(policy: PeftModel) -> bool:
    return not trains_its_adapter_only(policy) or len(policy.peft_config) > 1


def _storages(subject: Subject) -> int:
    """Bytes of all networks' weights, buffers and scales, what they share counted once."""
    networks: list[nn.Module] = [subject.module]
    with subject.reference(subject.policy) as pi_init:
        networks.append(pi_init)
    tensors = (tensor for network in networks for tensor in _tensors(network))
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
    yield from scales_of(network)


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / MIB:.1f} MiB"
