"""Log-probabilities and entropies of a language model's tokens, at response positions only, in float32."""

import inspect
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trl_apa._trl import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy
from trl_apa.algorithms.masking import at_least_float32
from trl_apa.models.fused_head import can_fuse, fused_logprobs, runs_kernel
from trl_apa.models.network_identity import identity_of
from trl_apa.models.network_parts import Head, Network, inner_model, num_token_ids, trunk_of
from trl_apa.models.packed_rows import PackedRow
from trl_apa.rollout.batch import send


TOKEN_FIELDS = (
    "input_ids",
    "position_ids",
    "token_index",
    "predicting_index",
    "response_index",
    "attention_mask",
    "sequence_lengths",
    "prompt_lengths",
    "row_groups",
    "encoder_input_ids",
    "encoder_attention_mask",
)
# The shape of the mask of a packed row.
UNREAD_MASK = (1, 1, 1, 1)
# Entries of logits in memory at a time where the head is not fused with the softmax; more are computed in chunks of
# tokens, and once more in the backward pass.
LOGITS_AT_ONCE = 2**25


class PolicyOutputs(NamedTuple):
    """What a language model says of the response tokens of a micro-batch; 0 where a row has none.

    Args:
        logprobs_BR: log pi(a|s), nats, float32, with gradient.
        entropy_BR: of the full next-token distribution, nats, float32, without gradient; None unless asked for.
        hidden_BRH: the last hidden states, from which logits are computed; None unless requested.
        logits_BRV: the logits divided by the temperature, float32; None unless requested.
    """

    logprobs_BR: Tensor
    entropy_BR: Tensor | None
    hidden_BRH: Tensor | None
    logits_BRV: Tensor | None = None


def response_logprobs(
    model: Network,
    tokens: Mapping[str, Any],
    response_width: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi(a|s) of the response tokens of each row, and their entropy: see `policy_outputs`."""
    return policy_outputs(model, tokens, response_width, temperature, with_entropy)[:2]


def policy_outputs(
    model: Network,
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
        tokens: what `batch.lay_out` gives, in a layout that the model can read.
        response_width: `R`, tokens.
        temperature: logits are divided by it.
        with_entropy, with_hidden, with_logits: what else to return.
        own_forward: call the complete model, as an engine that shards it requires.
    """
    parts = None if with_logits or own_forward else trunk_and_head(model)
    if parts is None:
        if "row_groups" in tokens or "sequence_lengths" in tokens:
            states = _separate_states if "row_groups" in tokens else _packed_states
            logits_MV, hidden_MH = states(model, tokens, response_width, with_hidden)
            return _outputs_of_tokens(
                logits_MV, hidden_MH, tokens, response_width, temperature, with_entropy, with_logits
            )
        logits_BRV, hidden_BRH = response_logits(model, tokens, response_width, temperature, with_hidden)
        logprobs_BR = sampled_logprobs(logits_BRV, tokens)
        entropy_BR = response_entropy(logits_BRV) if with_entropy else None
        return PolicyOutputs(logprobs_BR, entropy_BR, hidden_BRH, logits_BRV if with_logits else None)
    trunk, head = parts
    hidden_MH = response_states(trunk, tokens)
    targets_M = response_tokens(tokens)
    logprobs_M, entropy_M = head_logprobs(head, hidden_MH, targets_M, temperature, with_entropy)
    return PolicyOutputs(
        response_rows(logprobs_M, tokens, response_width),
        None if entropy_M is None else response_rows(entropy_M, tokens, response_width),
        response_rows(hidden_MH, tokens, response_width) if with_hidden else None,
    )


def _outputs_of_tokens(
    logits_MV: Tensor,
    hidden_MH: Tensor | None,
    tokens: Mapping[str, Any],
    response_width: int,
    temperature: float,
    with_entropy: bool,
    with_logits: bool,
) -> PolicyOutputs:
    """`policy_outputs` from the logits that predict the `M` response tokens, as the model's own forward gives them."""
    logits_MV = at_least_float32(logits_MV) / temperature
    targets_M = response_tokens(tokens)
    logprobs_M, entropy_M = token_logprobs(logits_MV, targets_M.to(logits_MV.device), with_entropy)
    others = (entropy_M, hidden_MH, logits_MV if with_logits else None)
    return PolicyOutputs(
        response_rows(logprobs_M, tokens, response_width),
        *(None if part is None else response_rows(part, tokens, response_width) for part in others),
    )


def _separate_states(
    model: Network, tokens: Mapping[str, Any], response_width: int, with_hidden: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits `(M, V)`, and hidden states `(M, H)` if asked for, by the model's own forward of rows apart."""
    options: dict[str, Any] = {"output_hidden_states": True} if with_hidden else {}
    if "logits_to_keep" in forward_parameters(model):
        options["logits_to_keep"] = response_width + 1
    outputs = [model(**inputs, **options) for inputs in separate_inputs(tokens)]

    def predicting(states: list[Tensor]) -> Tensor:
        """At the predicting positions of `N` or, where only the last of each row are there, of those."""
        flat, index_M = torch.cat([part.flatten(0, 1) for part in states]), tokens["predicting_index"]
        if len(flat) < tokens["input_ids"].shape[1]:
            index_M = _among_the_last(tokens["row_groups"], response_width + 1, index_M.device)[index_M]
        return flat.index_select(0, index_M.to(flat.device))

    hidden_MH = predicting([last_hidden_states(output) for output in outputs]) if with_hidden else None
    return predicting([output.logits for output in outputs]), hidden_MH


def _packed_states(
    model: Network, tokens: Mapping[str, Any], response_width: int, with_hidden: bool
) -> tuple[Tensor, Tensor | None]:
    """The same of a packed row: the model makes the logits of the predicting positions and no others, if it can."""
    inputs, index_M = network_inputs(model, tokens), tokens["predicting_index"]
    keeps = "logits_to_keep" in forward_parameters(model)
    options: dict[str, Any] = {"logits_to_keep": index_M} if keeps else {}
    output = model(**inputs, **options, output_hidden_states=True) if with_hidden else model(**inputs, **options)

    def predicting(states_NK: Tensor) -> Tensor:
        return states_NK.index_select(0, index_M.to(states_NK.device))

    logits_MV = output.logits[0] if keeps else predicting(output.logits[0])
    return logits_MV, predicting(last_hidden_states(output)[0]) if with_hidden else None


def _among_the_last(row_groups: tuple[tuple[int, int, int], ...], kept: int, device: torch.device) -> Tensor:
    """For each token of rows one behind the other, its place if only the last `kept` of each row were left."""
    first, places = 0, []
    for count, length, _ in row_groups:
        number = min(kept, length)
        starts = torch.arange(first, first + count * number, number)
        places.append((starts[:, None] + (torch.arange(length) - (length - number)).clamp(min=0)).flatten())
        first += count * number
    return send(torch.cat(places), device)


def response_states(trunk: nn.Module, tokens: Mapping[str, Any], **options: Any) -> Tensor:
    """The last hidden states that predict the `M` response tokens, `(M, H)`; `options` are the trunk's."""
    parts = separate_inputs(tokens) if "row_groups" in tokens else [network_inputs(trunk, tokens)]
    states = [last_hidden_states(trunk(**inputs, **options)).flatten(0, 1) for inputs in parts]
    hidden_NH = states[0] if len(states) == 1 else torch.cat(states)
    return hidden_NH.index_select(0, tokens["predicting_index"].to(hidden_NH.device))


def response_tokens(tokens: Mapping[str, Any]) -> Tensor:
    """The ids of the `M` response tokens, int64 `(M,)`."""
    ids_M: Tensor = tokens["input_ids"].flatten()[tokens["token_index"]]
    return ids_M


def response_rows(values_M: Tensor, tokens: Mapping[str, Any], response_width: int) -> Tensor:
    """Values of the `M` response tokens in rows, `(B, R)` or `(B, R, H)`, with 0 where a row has no token."""
    if "row_groups" in tokens:
        num_rows = sum(count for count, _, _ in tokens["row_groups"])
    else:
        num_rows = len(tokens.get("sequence_lengths", tokens["input_ids"]))
    index_M = tokens["response_index"].to(values_M.device)
    flat = values_M.new_zeros(num_rows * response_width, *values_M.shape[1:]).index_copy(0, index_M, values_M)
    rows: Tensor = flat.unflatten(0, (num_rows, response_width))
    return rows


def head_logprobs(
    head: Head, hidden_MH: Tensor, targets_M: Tensor, temperature: float = 1.0, with_entropy: bool = False
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
    head: Head, hidden_MH: Tensor, targets_M: Tensor, temperature: float, with_entropy: bool
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
    model: Network,
    tokens: Mapping[str, Tensor],
    response_width: int,
    temperature: float = 1.0,
    with_hidden: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The logits that predict the last `response_width` tokens of each row, over the temperature, in float32.

    The vocabulary head runs only where a response token is predicted, in the model's own precision.

    Args:
        model, temperature: see `policy_outputs`.
        tokens: what `batch.pad_tokens` gives.
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
    logprobs_BR: Tensor = selective_log_softmax(logits_BRV, tokens["input_ids"][:, -logits_BRV.shape[1] :])
    return logprobs_BR


@torch.no_grad()
def response_entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution, nats, float32, without gradient: `(..., V)` -> `(...)`."""
    entropy: Tensor = entropy_from_logits(logits)
    return entropy


def network_inputs(network: Network, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """`tokens` (of `batch.pad_tokens` or `pack_tokens`) under the names that the forward of `network` takes."""
    if "sequence_lengths" in tokens:
        return _packed_inputs(network, tokens)
    inputs: dict[str, Any] = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    if "encoder_input_ids" in tokens:
        inputs = {f"decoder_{name}": tensor for name, tensor in inputs.items()}
        inputs |= {"input_ids": tokens["encoder_input_ids"], "attention_mask": tokens["encoder_attention_mask"]}
    elif "position_ids" in forward_parameters(network):
        inputs["position_ids"] = tokens["position_ids"]
    return {**inputs, "use_cache": False}


def separate_inputs(tokens: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs of each call for `tokens` of `batch.separate_tokens`: token ids, and nothing more.

    Without a mask and positions a network makes its own, as for a row alone.
    """
    ids_N = encoder_ids_N = tokens["input_ids"][0]
    if "encoder_input_ids" in tokens:
        encoder_ids_N = tokens["encoder_input_ids"][0]
    for count, length, of_query in tokens["row_groups"]:
        ids, ids_N = ids_N.tensor_split([count * length])
        inputs = {"input_ids": ids.view(count, length)}
        if "encoder_input_ids" in tokens:
            encoder_ids, encoder_ids_N = encoder_ids_N.tensor_split([count * of_query])
            inputs = {"input_ids": encoder_ids.view(count, of_query), "decoder_input_ids": inputs["input_ids"]}
        yield {**inputs, "use_cache": False}


def _packed_inputs(network: Network, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """A packed row, for attention that knows of sequences in it: `packing.attend_per_sequence`, flash attention."""
    row, device = PackedRow(tokens["sequence_lengths"], tokens.get("prompt_lengths")), tokens["input_ids"].device
    inputs = {"input_ids": tokens["input_ids"], "position_ids": tokens["position_ids"], "use_cache": False}
    if network.config._attn_implementation.startswith("flash_attention"):
        bounds = row.bounds(device)
        inputs |= {"cu_seq_lens_q": bounds.query_ends, "cu_seq_lens_k": bounds.key_ends}
        inputs |= {"max_length_q": bounds.most_queries, "max_length_k": bounds.most_keys}
        return {**inputs, "packed_row": row} if row.is_shared else inputs
    # transformers hands on a mask of four dimensions as it is, instead of making one of N x N; it is not read.
    unread = torch.ones(UNREAD_MASK, dtype=torch.bool, device=device)
    return {**inputs, "attention_mask": unread, "packed_row": row}


def last_hidden_states(output: Any) -> Tensor:
    """The last hidden states `(B, T, H)` (of the decoder, if there are two stacks) in what a network returned."""
    hidden_BTH: Tensor | None = getattr(output, "last_hidden_state", None)
    if hidden_BTH is not None:
        return hidden_BTH
    of_decoder: tuple[Tensor, ...] | None = getattr(output, "decoder_hidden_states", None)
    of_layers: tuple[Tensor, ...] = output.hidden_states if of_decoder is None else of_decoder
    return of_layers[-1]


# An attribute of a model. A table of models by weak reference would change under a compiler that looks its keys up by
# their place.
_IS_HEAD_OF_TRUNK = "_apa_is_head_of_trunk"
_IS_HEAD_OF_EQUAL_TRUNK: dict[Hashable, bool] = {}
_FORWARD_REPLACED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def forward_replaced(model: Network) -> Iterator[None]:
    """Inside, `model` has a forward that changes its logits: log-probs come from that, not from trunk and head."""
    base = inner_model(model)
    was_replaced = base in _FORWARD_REPLACED
    _FORWARD_REPLACED.add(base)
    try:
        yield
    finally:
        if not was_replaced:
            _FORWARD_REPLACED.discard(base)


def trunk_and_head(model: Network) -> tuple[PreTrainedModel, Head] | None:
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
    if _IS_HEAD_OF_TRUNK not in vars(base):
        equal = identity_of(base) or object()
        if equal not in _IS_HEAD_OF_EQUAL_TRUNK:
            _IS_HEAD_OF_EQUAL_TRUNK[equal] = _is_head_of_trunk(base, trunk, head)
            torch.clear_autocast_cache()  # older torch would keep using the copies of weights made without gradient
        vars(base)[_IS_HEAD_OF_TRUNK] = _IS_HEAD_OF_EQUAL_TRUNK[equal]
    return (trunk, head) if vars(base)[_IS_HEAD_OF_TRUNK] else None


@torch.no_grad()
def _is_head_of_trunk(model: PreTrainedModel, trunk: PreTrainedModel, head: Head) -> bool:
    """Whether the head reads the trunk's hidden states as they are, and the model returns its logits as they are.

    Large logits are put in the place of the head's: a cap on those of a small new model could not be seen.
    """
    if is_sharded(model):
        return False
    seen: list[tuple[Tensor, Tensor]] = []

    def replace(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        made = torch.linspace(-1000, 1000, output.numel(), device=output.device).view_as(output).to(output)
        seen.append((args[0], made))
        return made

    device = model.get_input_embeddings().weight.device
    input_ids = torch.arange(4, device=device)[None] % (num_token_ids(model) or 1)
    hook = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        hook.remove()
    if len(seen) != 1:
        return False
    read, made = seen[0]
    hidden = last_hidden_states(trunk(input_ids=input_ids, use_cache=False))
    same = (read.shape, logits.shape) == (hidden.shape, made.shape) and torch.allclose(logits, made.to(logits))
    allowed = 1e-3 * float(hidden.nan_to_num().abs().max())
    return same and torch.allclose(read, hidden.to(read), rtol=1e-3, atol=allowed)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 has spread the weights over processes."""
    wrapped = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return wrapped or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def head_device(head: Head) -> torch.device:
    return next(head.parameters()).device


def head_width(head: Head) -> int:
    """The size of the vocabulary; a wrapped head (an adapter's) knows it too."""
    return int(head.out_features if hasattr(head, "out_features") else head.weight.shape[0])


def forward_parameters(model: Network) -> frozenset[str]:
    """Names that the forward of `model` (of the network inside, for a PEFT wrapper) takes."""
    return _forward_parameters(type(inner_model(model)))  # type: ignore[arg-type]  # a class is hashable


@lru_cache
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)
