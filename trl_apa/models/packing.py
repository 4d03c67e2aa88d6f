"""A micro-batch without padding: all sequences in one row, each of which attends to itself alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_apa.models.logprobs import UNREAD_MASK, forward_parameters
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.models.packed_rows import PackedRow
from trl_apa.models.varlen import attend_at_once, in_kernel_type, is_causal, why_not_at_once


# What the attention of a network is called in its config once it can be packed; padded batches see plain SDPA.
PER_SEQUENCE = "sdpa_per_sequence"
# Layers whose attention sees all tokens before one, as long as there are no more than the chunk has.
OF_A_CHUNK = {"chunked_attention": "attention_chunk_size"}
# Layers whose attention sees all tokens before one, or tells the implementation of attention its window.
OF_A_WINDOW = {"full_attention", "sliding_attention"}
_GATHERING: set[Callable[..., Any]] = set()
_LAUNCHES: ContextVar[list[str] | None] = ContextVar("launches", default=None)


def attend_per_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_row: PackedRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, in which each sequence of a packed row attends to itself.

    A response without a prompt of its own also attends to the prompt that lies before it in the row. On a GPU and in
    half precision all sequences take one launch of torch's kernel for sequences of several lengths, where it can
    compute them; elsewhere each takes one of SDPA. The results are the same.

    Args:
        module, query, key, value, attention_mask, dropout, scaling, kwargs: as transformers passes them.
        packed_row: the sequences in the one row; None for a batch as any other.

    Raises:
        ValueError: if the network has put something into the mask, which a packed row does not read.
    """
    if packed_row is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return plain
    if attention_mask is not None and attention_mask.shape != UNREAD_MASK:
        raise ValueError("its attention uses the mask for more than padding")
    if any(states.shape[2] != sum(packed_row.sequence_lengths) for states in (query, key, value)):
        raise ValueError("its attention has other numbers of keys or queries than tokens")
    window = packed_row.window(kwargs.get("sliding_window"))
    states = in_kernel_type(query, key, value)
    why = why_not_at_once(module, states, dropout, scaling, window, kwargs)
    if why is None:
        return attend_at_once(states, packed_row, scaling, window), None
    if (noted := _LAUNCHES.get()) is not None:
        noted.append(why)
    masks = packed_row.masks(window, states[0])
    if not is_causal(module, kwargs) and any(mask is not None for mask in masks):
        raise ValueError("its attention is not causal")
    sequences = zip(*(part.split(packed_row.sequence_lengths, dim=2) for part in states), strict=True)
    calls = zip(behind_prompts(sequences, packed_row.prompt_lengths), masks, strict=True)
    outputs = [sdpa_attention_forward(module, *inputs, mask, dropout, scaling, **kwargs)[0] for inputs, mask in calls]
    return torch.cat(outputs, dim=1), None


def behind_prompts(
    sequences: Iterable[tuple[Tensor, Tensor, Tensor]], prompt_lengths: Iterable[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each sequence; keys and values of a shared prompt come before its own.

    Args:
        sequences: queries, keys and values of the tokens of each, `(1, heads, tokens, width)`.
        prompt_lengths: see [`PackedRow`].
    """
    with_prompt: tuple[Tensor, ...] = ()
    of_prompt: tuple[Tensor, ...] = ()
    for (query, key, value), prompt in zip(sequences, prompt_lengths, strict=True):
        if prompt == 0:
            with_prompt, of_prompt = (key, value), ()
            yield query, key, value
            continue
        if not of_prompt:  # once for all responses: the backward pass of each such cut fills a tensor with zeros
            of_prompt = tuple(states[:, :, :prompt] for states in with_prompt)
        key, value = (torch.cat(pair, dim=2) for pair in zip(of_prompt, (key, value), strict=True))
        yield query, key, value


@contextmanager
def noting_launches() -> Iterator[list[str]]:
    """Inside, a list of why packed rows took a launch a sequence, an entry for each layer in which they did."""
    noted: list[str] = []
    token = _LAUNCHES.set(noted)
    try:
        yield noted
    finally:
        _LAUNCHES.reset(token)


AttentionInterface.register(PER_SEQUENCE, attend_per_sequence)
AttentionMaskInterface.register(PER_SEQUENCE, sdpa_mask)


@contextmanager
def attending_with(network: Any, implementation: str) -> Iterator[None]:
    """Inside, a network has another implementation of attention; afterwards its own."""
    own = network.config._attn_implementation
    of_parts = {name: getattr(network.config, name)._attn_implementation for name in _parts(network.config)}
    if own != implementation:
        network.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if own != implementation:
            known = {name: of_part for name, of_part in of_parts.items() if of_part is not None}
            network.set_attn_implementation({"": own, **known})
            for name in of_parts.keys() - known:  # parts that no model has read have none, and cannot be asked for it
                getattr(network.config, name)._attn_implementation = None


def _parts(config: Any) -> list[str]:
    """The configs of a composite config, by name."""
    return [name for name in config.sub_configs if isinstance(getattr(config, name, None), PreTrainedConfig)]


def for_packed_rows(network: Any) -> str:
    """The implementation of attention with which a network can read packed rows: its own unless that is SDPA."""
    own = network.config._attn_implementation
    return PER_SEQUENCE if own == "sdpa" else own


def let_pack(network: Any) -> None:
    """Give a network whose attention is SDPA the one that can read packed rows; it reads all others as before."""
    if (implementation := for_packed_rows(network)) != network.config._attn_implementation:
        network.set_attn_implementation(implementation)


def let_share(implementation: str) -> bool:
    """Whether packed rows with shared prompts can be handed to an implementation of attention.

    Flash attention then gets the keys and values of a response gathered behind its prompt's, by a function registered
    with transformers under its name, which passes on what any other caller gives.
    """
    if implementation.startswith("flash_attention"):
        attention = ALL_ATTENTION_FUNCTIONS[implementation]
        if attention not in _GATHERING:
            _GATHERING.add(gathering := gathering_keys(attention))
            AttentionInterface.register(implementation, gathering)
        return True
    return implementation == PER_SEQUENCE


def gathering_keys(attention: Callable[..., Any]) -> Callable[..., Any]:
    """`attention` in which each response of a packed row also attends to the prompt that it shares, in one launch."""

    @wraps(attention)
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_row: PackedRow | None = None,
        **kwargs: Any,
    ) -> Any:
        if packed_row is not None and (index := packed_row.bounds(key.device).key_index) is not None:
            # Token by token, as flash attention lays them out.
            key, value = (part.transpose(1, 2).index_select(1, index).transpose(1, 2) for part in (key, value))
        return attention(module, query, key, value, *args, **kwargs)

    return attend


def why_unsuitable(network: Network, longest: int) -> str | None:
    """What in a network's kind keeps it from computing the same from a packed row; None if there is nothing.

    Args:
        network: a language model or a trunk, with or without PEFT adapters.
        longest: tokens of the longest sequence.
    """
    base = inner_model(network)
    config = base.config
    if config.is_encoder_decoder:
        return "has an encoder, which reads a padded batch"
    if not base._supports_attention_backend or "position_ids" not in forward_parameters(base):
        return "does not let the trainer set its attention and positions"
    if config.get_text_config() is not config:
        return "is made of several models"
    implementation = config._attn_implementation
    if not _sees_all(config, longest):
        return "has layers that do not attend to the full sequence"
    if implementation not in ("sdpa", PER_SEQUENCE) and not implementation.startswith("flash_attention"):
        # Flex attention could be, but sampling and packed rows are more kinds of shapes than dynamo compiles it for.
        return f"uses {implementation} attention; only SDPA and flash attention support packed sequences"
    return None


def _sees_all(config: Any, longest: int) -> bool:
    """Whether every layer attends to a full sequence of at most `longest` tokens, or to a window of it."""
    kinds = set(getattr(config, "layer_types", None) or ()) - OF_A_WINDOW
    limits = [getattr(config, OF_A_CHUNK.get(kind, ""), None) or 0 for kind in kinds]
    return all(longest <= limit for limit in limits)


def crosses_a_window(network: Network, longest: int) -> bool:
    """Whether layers of a network hide tokens of a sequence of `longest` tokens from others behind a window."""
    config = inner_model(network).config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return window is not None and longest > window and "sliding_attention" in kinds
