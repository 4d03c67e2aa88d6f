"""Log-probabilities and entropies of a language model's tokens, at response positions only, in float32."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trl_apa._trl import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy
from trl_apa.fused_head import can_fuse, fused_logprobs, runs_kernel
from trl_apa.masking import at_least_float32
from trl_apa.network_parts import inner_model, num_token_ids, trunk_of
from trl_apa.rollouts import send


TOKEN_FIELDS = (
    "input_ids",
    "position_ids",
    "predicting_index",
    "response_index",
    "attention_mask",
    "sequence_lengths",
    "encoder_input_ids",
    "encoder_attention_mask",
)
# Entries of logits in memory at a time where the head is not fused with the softmax; more are computed in chunks of
# tokens, and once more in the backward pass.
LOGITS_AT_ONCE = 2**25


class PolicyOutputs(NamedTuple):
    """What a language model says of the response tokens of a micro-batch; 0 where a row has none.

    Args:
        logprobs_BR: log pi(a|s), nats, float32, with gradient.
        entropy_BR: of the whole next-token distribution, nats, float32, without gradient; None unless asked for.
        hidden_BRH: the last hidden states that the logits are computed from; None unless asked for.
        logits_BRV: the logits over the temperature, float32; None unless asked for.
    """

    logprobs_BR: Tensor
    entropy_BR: Tensor | None
    hidden_BRH: Tensor | None
    logits_BRV: Tensor | None = None


def response_logprobs(
    model: nn.Module,
    tokens: Mapping[str, Any],
    response_width: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi(a|s) of the response tokens of each row, and their entropy: see `policy_outputs`."""
    return policy_outputs(model, tokens, response_width, temperature, with_entropy)[:2]


def policy_outputs(
    model: nn.Module,
    tokens: Mapping[str, Any],
    response_width: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_hidden: bool = False,
    with_logits: bool = False,
    own_forward: bool = False,
) -> PolicyOutputs:
    """log pi(a|s) of the response tokens of each row, at the temperature that they were sampled at.

    The vocabulary head runs where a response token is predicted and nowhere else, in the model's own precision, fused
    with the softmax or on so many tokens at a time that their logits do not outgrow `LOGITS_AT_ONCE`. A model whose
    logits are more than its head makes of its trunk's hidden states (`trunk_and_head`) computes them itself, all at
    once.

    Args:
        model: a language model, with or without PEFT adapters.
        tokens: what `rollouts.pad_tokens` or, for models that can read it, `rollouts.pack_tokens` gives.
        response_width: `R`, tokens.
        temperature: logits are divided by it.
        with_entropy, with_hidden, with_logits: what else to return; logits only of a padded layout.
        own_forward: call the model as a whole, which an engine that has cut it up waits for.

    Raises:
        RuntimeError: for a packed layout where the model computes its logits itself.
    """
    parts = None if with_logits or own_forward else trunk_and_head(model)
    if parts is None:
        if "sequence_lengths" in tokens:
            raise RuntimeError(f"a packed row was given to {type(model).__name__}, which needs a padded batch")
        logits_BRV, hidden_BRH = response_logits(model, tokens, response_width, temperature, with_hidden)
        logprobs_BR = sampled_logprobs(logits_BRV, tokens)
        entropy_BR = response_entropy(logits_BRV) if with_entropy else None
        return PolicyOutputs(logprobs_BR, entropy_BR, hidden_BRH, logits_BRV if with_logits else None)
    trunk, head = parts
    hidden_MH = response_states(trunk, tokens)
    targets_M = tokens["input_ids"].flatten()[tokens["predicting_index"] + 1]
    logprobs_M, entropy_M = head_logprobs(head, hidden_MH, targets_M, temperature, with_entropy)
    return PolicyOutputs(
        response_rows(logprobs_M, tokens, response_width),
        response_rows(entropy_M, tokens, response_width) if with_entropy else None,
        response_rows(hidden_MH, tokens, response_width) if with_hidden else None,
    )


def response_states(trunk: nn.Module, tokens: Mapping[str, Any], **options: Any) -> Tensor:
    """The last hidden states that predict the `M` response tokens, `(M, H)`; `options` are the trunk's."""
    hidden_BTH = last_hidden_states(trunk(**network_inputs(trunk, tokens), **options))
    return hidden_BTH.flatten(0, 1).index_select(0, tokens["predicting_index"].to(hidden_BTH.device))


def response_rows(values_M: Tensor, tokens: Mapping[str, Any], response_width: int) -> Tensor:
    """Values of the `M` response tokens in rows, `(B, R)` or `(B, R, H)`, with 0 where a row has no token."""
    num_rows = len(tokens["sequence_lengths"]) if "sequence_lengths" in tokens else len(tokens["input_ids"])
    index_M = tokens["response_index"].to(values_M.device)
    flat = values_M.new_zeros(num_rows * response_width, *values_M.shape[1:]).index_copy(0, index_M, values_M)
    return flat.unflatten(0, (num_rows, response_width))


def head_logprobs(
    head: nn.Module, hidden_MH: Tensor, targets_M: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log softmax of the head's logits over the temperature at the targets, fused or in chunks of tokens.

    On a GPU a plain head is fused with the softmax (`fused_head`), however few the tokens, as in TRL's trainers:
    keeping the logits of a few would save one product of matrices and cost the copies of them in float32.

    Args:
        head: hidden states to logits.
        hidden_MH: hidden states.
        targets_M: token ids.
        temperature: logits are divided by it.
        with_entropy: also the entropy of each distribution, without gradient.

    Returns:
        Log-probs `(M,)`, nats, float32, with gradient, and entropies `(M,)` or None. Memory grows with `M * H` and
        with a tile or `LOGITS_AT_ONCE`, not with `M * V`: the logits of each are computed once more in the backward
        pass. A single chunk keeps them instead.
    """
    if can_fuse(head, hidden_MH):
        return fused_logprobs(head, hidden_MH, targets_M, temperature, with_entropy)
    size = max(1, LOGITS_AT_ONCE // head_width(head))
    if len(hidden_MH) <= size:
        return _chunk_logprobs(head, hidden_MH, targets_M, temperature, with_entropy)
    chunks = [
        checkpoint(_chunk_logprobs, head, hidden, targets, temperature, with_entropy, use_reentrant=False)
        for hidden, targets in zip(hidden_MH.split(size), targets_M.split(size), strict=True)
    ]
    entropy_M = torch.cat([entropy for _, entropy in chunks]) if with_entropy else None
    return torch.cat([logprobs for logprobs, _ in chunks]), entropy_M


def _chunk_logprobs(
    head: nn.Module, hidden_MH: Tensor, targets_M: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    hidden_MH = hidden_MH.to(head_device(head))
    logits_MV = at_least_float32(head(hidden_MH))
    if temperature != 1.0:
        logits_MV = logits_MV / temperature
    return token_logprobs(logits_MV, targets_M.to(logits_MV.device), with_entropy)


def token_logprobs(logits_MV: Tensor, targets_M: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """log softmax at the targets, and the entropy, without gradient, or None: nats, `(M,)`."""
    if runs_kernel(logits_MV.device) and logits_MV.dtype != torch.float64:
        return _token_logprobs_by_trl(logits_MV, targets_M, with_entropy)
    log_softmax_MV = logits_MV.log_softmax(dim=-1)
    logprobs_M = log_softmax_MV.gather(-1, targets_M[:, None]).squeeze(-1)
    if not with_entropy:
        return logprobs_M, None
    with torch.no_grad():
        return logprobs_M, -(log_softmax_MV.exp().mul_(log_softmax_MV)).sum(dim=-1)


def _token_logprobs_by_trl(logits_MV: Tensor, targets_M: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """With TRL's kernel, one pass over the logits on a GPU; on a CPU it makes more of them than torch."""
    # TRL takes the rows of a batch one by one where it has no kernel; as one row they are taken together.
    logits_1MV, targets_1M = logits_MV[None], targets_M[None]
    if not with_entropy:
        return selective_log_softmax(logits_1MV, targets_1M)[0], None
    logprobs_1M, entropy_1M = selective_log_softmax_and_entropy(logits_1MV, targets_1M, entropy_requires_grad=False)
    return logprobs_1M[0], entropy_1M[0]


def response_logits(
    model: nn.Module,
    tokens: Mapping[str, Tensor],
    response_width: int,
    temperature: float = 1.0,
    with_hidden: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The logits that predict the last `response_width` tokens of each row, over the temperature, in float32.

    The vocabulary head runs only where a response token is predicted, in the model's own precision.

    Args:
        model, temperature: see `policy_outputs`.
        tokens: what `rollouts.pad_tokens` gives.
        response_width: `R`, tokens.
        with_hidden: also return the last hidden states of the same positions.

    Returns:
        `logits_BRV` (nats up to a constant a position, float32) and `hidden_BRH` or None. Values at padded positions
        are arbitrary.
    """
    inputs = network_inputs(model, tokens)
    if "logits_to_keep" in forward_parameters(model):
        inputs["logits_to_keep"] = response_width + 1
    output = model(**inputs, output_hidden_states=True) if with_hidden else model(**inputs)
    # The logits at position t predict token t + 1, so the last column predicts nothing.
    logits_BRV = at_least_float32(output.logits[:, -response_width - 1 : -1]) / temperature
    return logits_BRV, last_hidden_states(output)[:, -response_width - 1 : -1] if with_hidden else None


def sampled_logprobs(logits_BRV: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
    """Log-probs of the tokens that the logits predict, nats, float32 `(B, R)`.

    The softmax is taken in float32: in bfloat16 it is off by up to 0.06 nats, and APA squares it.
    """
    return selective_log_softmax(logits_BRV, tokens["input_ids"][:, -logits_BRV.shape[1] :])


@torch.no_grad()
def response_entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution, nats, float32, without gradient: `(..., V)` -> `(...)`."""
    return entropy_from_logits(logits)


def network_inputs(network: nn.Module, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """`tokens` (of `rollouts.pad_tokens` or `pack_tokens`) under the names that the forward of `network` takes."""
    if "sequence_lengths" in tokens:
        return _packed_inputs(network, tokens)
    inputs: dict[str, Any] = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    if "encoder_input_ids" in tokens:
        inputs = {f"decoder_{name}": tensor for name, tensor in inputs.items()}
        inputs |= {"input_ids": tokens["encoder_input_ids"], "attention_mask": tokens["encoder_attention_mask"]}
    elif "position_ids" in forward_parameters(network):
        inputs["position_ids"] = tokens["position_ids"]
    return {**inputs, "use_cache": False}


def _packed_inputs(network: nn.Module, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """A packed row, for attention that knows of sequences in it: `packing.attend_per_sequence`, flash attention."""
    lengths, device = tokens["sequence_lengths"], tokens["input_ids"].device
    inputs = {"input_ids": tokens["input_ids"], "position_ids": tokens["position_ids"], "use_cache": False}
    if network.config._attn_implementation.startswith("flash_attention"):
        ends = send(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), device)
        bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        return {**inputs, **bounds, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    # transformers hands on a mask of four dimensions as it is, instead of making one of N x N; it is not read.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return {**inputs, "attention_mask": unread, "sequence_lengths": lengths}


def last_hidden_states(output: Any) -> Tensor:
    """The last hidden states `(B, T, H)` (of the decoder, if there are two stacks) in what a network returned."""
    if (hidden_BTH := getattr(output, "last_hidden_state", None)) is not None:
        return hidden_BTH
    states = getattr(output, "decoder_hidden_states", None)
    return (output.hidden_states if states is None else states)[-1]


_IS_HEAD_OF_TRUNK: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_FORWARD_REPLACED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def forward_replaced(model: nn.Module) -> Iterator[None]:
    """Inside, `model` has a forward that changes its logits: log-probs come from that, not from trunk and head."""
    base = inner_model(model)
    was_replaced = base in _FORWARD_REPLACED
    _FORWARD_REPLACED.add(base)
    try:
        yield
    finally:
        if not was_replaced:
            _FORWARD_REPLACED.discard(base)


def trunk_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """What turns tokens into hidden states and what turns these into logits, if a language model is just these two.

    Some families scale or cap their logits: each model is tried out on four tokens, once. None for these, for
    encoder-decoders, and for a model whose own forward has to be called: inside `forward_replaced`, or sharded by an
    engine.
    """
    base = inner_model(model)
    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder or base in _FORWARD_REPLACED:
        return None
    trunk, head = trunk_of(base), base.get_output_embeddings()
    if trunk is base or head is None:
        return None
    if base not in _IS_HEAD_OF_TRUNK:
        _IS_HEAD_OF_TRUNK[base] = _is_head_of_trunk(base, trunk, head)
        torch.clear_autocast_cache()  # older torch would go on with the copies of weights made without gradient
    return (trunk, head) if _IS_HEAD_OF_TRUNK[base] else None


@torch.no_grad()
def _is_head_of_trunk(model: nn.Module, trunk: nn.Module, head: nn.Module) -> bool:
    if is_sharded(model):
        return False
    input_ids = torch.arange(4, device=trunk.get_input_embeddings().weight.device)[None] % (num_token_ids(model) or 1)
    logits = model(input_ids=input_ids, use_cache=False).logits
    hidden = last_hidden_states(trunk(input_ids=input_ids, use_cache=False))
    return torch.allclose(logits, head(hidden.to(head_device(head))).to(logits), rtol=1e-4, atol=1e-5)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 has spread the weights over processes."""
    wrapped = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return wrapped or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def head_device(head: nn.Module) -> torch.device:
    return next(head.parameters()).device


def head_width(head: nn.Module) -> int:
    """The size of the vocabulary; a wrapped head (an adapter's) knows it too."""
    return head.out_features if hasattr(head, "out_features") else head.weight.shape[0]


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names that the forward of `model` (of the network inside, for a PEFT wrapper) takes."""
    return _forward_parameters(type(inner_model(model)))


@lru_cache
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)
