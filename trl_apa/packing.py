"""A micro-batch without padding: all sequences in one row, each of which attends to itself alone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trl_apa.logprobs import forward_parameters, is_sharded, last_hidden_states, network_inputs, trunk_and_head
from trl_apa.network_parts import inner_model, trunk_of
from trl_apa.rollouts import pack_tokens


# What the attention of a network is called in its config once it can be packed; padded batches see plain SDPA.
PER_SEQUENCE = "sdpa_per_sequence"


def attend_per_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, sequence by sequence where a row is packed: cost grows with the sum of squares.

    Args:
        module, query, key, value, attention_mask, dropout, scaling, kwargs: as transformers hands them over.
        sequence_lengths: tokens of each sequence in the one row; None for a batch as any other.
    """
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    sequences = zip(*(states.split(sequence_lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *states, None, dropout, scaling, **kwargs)[0] for states in sequences]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(PER_SEQUENCE, attend_per_sequence)
AttentionMaskInterface.register(PER_SEQUENCE, sdpa_mask)


def pack_if_exact(networks: Iterable[nn.Module], padding_free: bool | None) -> bool:
    """Make the networks ready for packed rows if all of them then compute what they compute without.

    Args:
        networks: language models or trunks, with or without PEFT adapters.
        padding_free: the option: True raises where False would be the answer; None asks; False says no.

    Raises:
        ValueError: naming the network that cannot be packed and why, with `padding_free=True`.
    """
    if padding_free is False:
        return False
    networks = list(networks)
    for network in networks:
        reason = why_not_packed(network)
        if reason is not None:
            if padding_free:
                raise ValueError(f"padding_free=True, but {type(inner_model(network)).__name__} {reason}")
            return False
    for network in networks:
        if inner_model(network).config._attn_implementation == "sdpa":
            inner_model(network).set_attn_implementation(PER_SEQUENCE)
    return True


def _why_unsuitable(network: nn.Module) -> str | None:
    """What in a network's kind keeps it from computing the same from a packed row; None if there is nothing."""
    base = inner_model(network)
    config = base.config
    if config.is_encoder_decoder:
        return "has an encoder, which reads a padded batch"
    if not base._supports_attention_backend or "position_ids" not in forward_parameters(base):
        return "keeps its attention or its positions to itself"
    if config.get_text_config() is not config:
        return "is made of several models"
    if getattr(config, "sliding_window", None) or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return "has layers that do not attend to the whole sequence"
    implementation = config._attn_implementation
    if implementation not in ("sdpa", PER_SEQUENCE) and not implementation.startswith("flash_attention"):
        # Flex attention could be, but sampling and packed rows are more kinds of shapes than dynamo compiles it for.
        return f"attends with {implementation}, and only SDPA and flash attention are told where sequences end"
    return None


def why_not_packed(network: nn.Module) -> str | None:
    """Why a packed row would not give what its sequences give alone; None if it does, which is tried out."""
    if (reason := _why_unsuitable(network)) is not None:
        return reason
    base = inner_model(network)
    implementation = base.config._attn_implementation
    if is_sharded(base):
        return "has its weights spread over processes, so that it cannot be tried out"
    if implementation == "sdpa":
        base.set_attn_implementation(PER_SEQUENCE)
    try:
        if base.get_output_embeddings() is not None and trunk_and_head(network) is None:
            return "does more to its logits than its head"
        return None if _packs_exactly(network) else "computes something else from a packed row"
    except Exception as error:  # a kernel that is not for this device, say
        return f"could not be tried out: {error}"
    finally:
        if implementation == "sdpa":
            base.set_attn_implementation(implementation)


@torch.no_grad()
def _packs_exactly(network: nn.Module) -> bool:
    """Whether two sequences in one row give the hidden states that they give alone, and know nothing of each other."""
    base = inner_model(network)
    trunk = trunk_of(base)
    device = trunk.get_input_embeddings().weight.device
    queries = [torch.tensor(tokens, device=device) % base.config.vocab_size for tokens in ([2, 3], [5, 6, 7])]
    answers = [torch.tensor(tokens, device=device) % base.config.vocab_size for tokens in ([4, 9], [8, 3, 2])]

    def hidden_states(*rows: int) -> Tensor:
        tokens = pack_tokens([queries[row] for row in rows], [answers[row] for row in rows])
        return last_hidden_states(trunk(**network_inputs(trunk, tokens)))[0]

    packed, alone = hidden_states(0, 1), torch.cat([hidden_states(0), hidden_states(1)])
    queries[0] = queries[0].flip(0)
    leak = (hidden_states(0, 1)[4:] - packed[4:]).abs().max()
    # int8 kernels treat a column alike for all tokens in a call, so there the second sequence may change a little.
    quantized = bool(getattr(base, "is_quantized", False))
    exact = not quantized and not torch.is_autocast_enabled(device.type)
    tolerance = 1e-4 if exact and packed.dtype in (torch.float32, torch.float64) else 3e-2
    allowed = tolerance * float(alone.abs().max())
    return torch.allclose(packed, alone, rtol=tolerance, atol=allowed) and float(leak) <= quantized * allowed
