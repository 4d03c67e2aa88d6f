"""What engines that shard weights, DeepSpeed and FSDP2, need beyond DDP; all other code is the same for all."""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl_apa._trl import add_hooks, prepare_deepspeed, remove_hooks
from trl_apa.models import PolicyAndValue
from trl_apa.models.copying import independent_copy
from trl_apa.models.network_parts import Network
from trl_apa.models.partitioned import gathered, is_partitioned


def zero_stage(accelerator: Accelerator) -> int:
    """The stage of DeepSpeed's ZeRO; 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin.zero_stage if plugin else 0


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether an engine holds weights, gradients or optimizer, and may shard them: DeepSpeed, FSDP."""
    plugins = (getattr(accelerator.state, f"{engine}_plugin", None) for engine in ("deepspeed", "fsdp"))
    return any(plugin is not None for plugin in plugins)


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether a process holds a part of the weights only: FSDP2, ZeRO-3."""
    return accelerator.is_fsdp2 or zero_stage(accelerator) == 3


def check_engine(
    accelerator: Accelerator, args: Any, module: PolicyAndValue, optimizer: Any, lr_scheduler: Any
) -> None:
    """Raise an error, before any GPU time is spent, for options that this run's engine would ignore or change.

    Args:
        accelerator: of the run.
        args: the trainer's options.
        module: policy and value model.
        optimizer, lr_scheduler: the caller's own, or None.

    Raises:
        ValueError: naming the option.
    """
    asked_for_fsdp = bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if asked_for_fsdp and not is_fsdp:
        raise ValueError(
            "fsdp: accelerate needs several processes with a GPU (or another accelerator) each; here it would "
            f"silently train with {accelerator.distributed_type.value}"
        )
    if is_fsdp and not accelerator.is_fsdp2:
        raise ValueError("fsdp_config: version 1 is not supported; version 2 is")
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    for name, given in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
        if given is not None:
            raise ValueError(f"{name}: DeepSpeed would ignore it; set optim, learning_rate, ... instead")
    if args.reads("ratio_threshold") and args.ratio_threshold != float("inf"):
        raise ValueError(
            f"ratio_threshold={args.ratio_threshold}: DeepSpeed updates the weights inside the backward pass, so a "
            "mini-batch cannot be skipped afterwards; set ratio_threshold=float('inf')"
        )
    if args.value_max_grad_norm is not None:
        raise ValueError(
            f"value_max_grad_norm={args.value_max_grad_norm}: DeepSpeed clips the gradient of both networks together; "
            "leave it out"
        )
    zero = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    if module.base_is_shared and (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        raise ValueError(
            "deepspeed: with value_model='adapter' offload_optimizer would accumulate the value model's gradients "
            "over all updates; remove it, or set value_model='separate'"
        )
    if zero_stage(accelerator) == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ValueError(
            "deepspeed: set zero_optimization.stage3_gather_16bit_weights_on_model_save to true; "
            "without it the full weights cannot be saved"
        )


def keep_outputs_precise(accelerator: Accelerator) -> None:
    """Let FSDP2 compute in half precision, but not round what comes out: accelerate has it round log-probs, too."""
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def prepare_frozen(model: Network, policy: Network, accelerator: Accelerator) -> Network:
    """A network that is not trained, on the device and sharded where the policy will be.

    Args:
        model: pi_init or a reward model. Where weights are sharded it gets its own copy of those that it shares with
            the policy.
        policy: before it is prepared.
    """
    if shards_weights(accelerator) and {id(p) for p in model.parameters()} & {id(p) for p in policy.parameters()}:
        model = independent_copy(model).requires_grad_(False)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # The engine's hooks are on the model itself, whose config and generate are those of a language model.
        return prepare_deepspeed(model, accelerator).module
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, model)
    return accelerator.prepare_model(model, evaluation_mode=True)


def serve_sharded_weights(model: Network, accelerator: Accelerator) -> None:
    """Let a frozen network compute that ZeRO-3 has sharded while it was loaded; nothing happens to any other."""
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        prepare_deepspeed(model, accelerator)


@contextmanager
def policy_gathered(wrapped: nn.Module) -> Iterator[None]:
    """Inside, under ZeRO-3, every process has the full policy, for sampling many tokens.

    Args:
        wrapped: the `PolicyAndValue` as the engine has prepared it.
    """
    if not any(is_partitioned(parameter) for parameter in wrapped.parameters()):
        yield
        return
    engine: Any = wrapped  # DeepSpeed's
    with gathered(engine.module.policy.parameters()):
        remove_hooks(wrapped)  # which would gather layer by layer
        try:
            yield
        finally:
            add_hooks(wrapped)


def forget_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set to zero what ZeRO-3 still has of the last update's gradients; nothing happens to other parameters.

    It replaces them in the first backward pass of an update, and in later ones adds to what it has. So it would to the
    old gradient of what the first pass does not reach, the value adapter.
    """
    sharded: list[Any] = [parameter for parameter in parameters if is_partitioned(parameter)]
    for parameter in sharded:
        from deepspeed.utils import safe_set_local_grad

        safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))


def full_tensor(tensor: Any) -> Any:
    """A tensor that is sharded among processes (FSDP2's) as one that is not; anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of the gradients of all parameters together, sharded or not, 0-D."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm: Tensor = full_tensor(nn.utils.get_total_norm(gradients))
    return norm
