"""Log-probs and entropies of a plain vocabulary head without its logits, where TRL's Triton kernel runs."""

import torch
from torch import Tensor, nn

from trl_apa._trl import _CHUNKED_LOGPROB_CHUNK_SIZE, ChunkedLogProbFunction, _use_triton


def can_fuse(head: nn.Module, hidden_MH: Tensor) -> bool:
    """Whether `fused_logprobs` computes what the head and a softmax do, and a GPU is there for it.

    False for a head with adapters, of quantised or sharded weights, with hooks, or that accelerate has put on a device
    of its own: only the module's own forward computes what these do. False for float64, as statistics are float32.
    """
    return runs_kernel(next(head.parameters()).device) and _is_plain(head) and hidden_MH.dtype != torch.float64


def runs_kernel(device: torch.device) -> bool:
    """Whether Triton launches on `device`: the current one alone. TRL's counterpart in torch is slow on a CPU."""
    return bool(_use_triton(device) and device.index == torch.get_device_module(device).current_device())


def _is_plain(head: nn.Module) -> bool:
    """Whether calling the head is `hidden @ weight.T + bias` and nothing else."""
    # The exact type: quantised, parametrised and FSDP2's layers are subclasses, and PEFT's wrap the layer.
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return False
    parameters = list(head.parameters())
    # A tensor of several processes (DTensor) or of torchao's quantised numbers has a type of its own.
    return all(type(parameter) is nn.Parameter and parameter.is_floating_point() for parameter in parameters)


def fused_logprobs(
    head: nn.Linear, hidden_MH: Tensor, targets_M: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """log softmax of `(hidden @ weight.T + bias) / temperature` at the targets, by `trl.kernels`.

    Tiles of tokens and vocabulary are multiplied one at a time and folded into a running log-sum-exp in float32; the
    backward pass multiplies each once more. A tile is in the dtype that the head would compute in: autocast's, or that
    of the hidden states. Unlike the head's own passes, the bias is added after the product was rounded to it, and the
    gradients of hidden states and weight are summed over tiles in float32 and rounded once. A weight that is trained
    takes its gradient in float32 for that long, whatever its dtype.

    Args:
        head: a layer that `can_fuse` allows.
        hidden_MH, targets_M, temperature, with_entropy: see `logprobs.head_logprobs`.

    Returns:
        Log-probs `(M,)`, nats, float32, with gradient, and entropies `(M,)`, nats, float32, without, or None.
    """
    device = head.weight.device
    logprobs_M, entropy_M, *_ = ChunkedLogProbFunction.apply(
        hidden_MH.to(device),
        head.weight,
        head.bias,
        targets_M.to(device),
        temperature,
        min(_CHUNKED_LOGPROB_CHUNK_SIZE, head.out_features),
        None,  # no cap on the logits
        1.0,  # and no scale
        ("entropy",) if with_entropy else (),
    )
    return logprobs_M, entropy_M.detach() if with_entropy else None
