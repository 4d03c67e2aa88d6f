"""A micro-batch without padding: all sequences in one row, each of which attends to itself alone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trl_apa.models.logprobs import UNREAD_MASK, forward_parameters
from trl_apa.models.network_parts import Network, inner_model


# What the attention of a network is called in its config once it can be packed; padded batches see plain SDPA.
PER_SEQUENCE = "sdpa_per_sequence"
# Layers whose attention sees all tokens before one, as long as there are no more than the window or chunk has.
OF_A_WINDOW = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def attend_per_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    prompt_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, sequence by sequence where a row is packed: cost grows with the sum of squares.

    A response without a prompt of its own also attends to the prompt that lies before it in the row.

    Args:
        module, query, key, value, attention_mask, dropout, scaling, kwargs: as transformers passes them.
        sequence_lengths: tokens of each sequence in the one row; None for a batch as any other.
        prompt_lengths: of each sequence, how many tokens of the last one with a prompt it continues; 0 where it has
            its own. None where no prompt is shared.

    Raises:
        ValueError: if the network has put something into the mask, which a packed row does not read.
    """
    if sequence_lengths is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return plain
    if attention_mask is not None and attention_mask.shape != UNREAD_MASK:
        raise ValueError("its attention uses the mask for more than padding")
    sequences = zip(*(states.split(sequence_lengths, dim=2) for states in (query, key, value)), strict=True)
    calls = behind_prompts(sequences, sequence_lengths, prompt_lengths or (0,) * len(sequence_lengths))
    outputs = [sdpa_attention_forward(module, *inputs, dropout, scaling, **kwargs)[0] for inputs in calls]
    return torch.cat(outputs, dim=1), None


def behind_prompts(
    sequences: Iterable[tuple[Tensor, Tensor, Tensor]],
    sequence_lengths: Sequence[int],
    prompt_lengths: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Queries, keys, values and mask of each sequence; keys and values of a shared prompt come before its own.

    Args:
        sequences: queries, keys and values of the tokens of each, `(1, heads, tokens, width)`.
        sequence_lengths, prompt_lengths: as for `attend_per_sequence`.

    Returns:
        The mask is what is added to the scores of a response behind a shared prompt, `(1, 1, queries, keys)`; None
        where there is none, for SDPA's own.
    """
    mask: Tensor | None = None
    with_prompt: tuple[Tensor, ...] = ()
    of_prompt: tuple[Tensor, ...] = ()
    longest_prompt = max(prompt_lengths)
    for (query, key, value), length, prompt in zip(sequences, sequence_lengths, prompt_lengths, strict=True):
        if prompt == 0:
            with_prompt, of_prompt = (key, value), ()
            yield query, key, value, None
            continue
        if mask is None:
            behind = (number for number, shared in zip(sequence_lengths, prompt_lengths, strict=True) if shared)
            mask = mask_behind_prompt(longest_prompt, max(behind), query)
        if not of_prompt:  # once for all responses: the backward pass of each such cut fills a tensor with zeros
            of_prompt = tuple(states[:, :, :prompt] for states in with_prompt)
        key, value = (torch.cat(pair, dim=2) for pair in zip(of_prompt, (key, value), strict=True))
        yield query, key, value, mask[:, :, :length, longest_prompt - prompt : longest_prompt + length]


def mask_behind_prompt(prompt_length: int, length: int, query: Tensor) -> Tensor:
    """0 where a response of `length` tokens sees a token of `prompt_length` and of itself, -inf where not.

    Rows without the last tokens, and columns without the first of the prompt, are the mask of a shorter one. In the
    type of `query`, so that SDPA makes no copies and all sequences keep the same mask for the backward pass.
    """
    mask = query.new_full((length, prompt_length + length), -torch.inf)
    return mask.triu(prompt_length + 1)[None, None]


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
            network.set_attn_implementation({"": own, **of_parts})


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
    if not _sees_all(config, longest, implementation):
        return "has layers that do not attend to the full sequence"
    if implementation not in ("sdpa", PER_SEQUENCE) and not implementation.startswith("flash_attention"):
        # Flex attention could be, but sampling and packed rows are more kinds of shapes than dynamo compiles it for.
        return f"uses {implementation} attention; only SDPA and flash attention support packed sequences"
    return None


def _sees_all(config: Any, longest: int, implementation: str) -> bool:
    """Whether every layer attends to a full sequence of at most `longest` tokens, or gets its window."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None):
        kinds = {"sliding_attention"}
    if implementation.startswith("flash_attention"):
        kinds -= {"sliding_attention"}
    windows = [getattr(config, OF_A_WINDOW.get(kind, ""), None) or 0 for kind in kinds - {"full_attention"}]
    return all(longest <= window for window in windows)
