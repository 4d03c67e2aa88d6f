"""The parts of a network that families name differently: its trunk, the rows of its embedding, its positions."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_apa._trl import is_peft_model


# A transformer with a config: with or without a head, with or without adapters.
Network: TypeAlias = PreTrainedModel | PeftModel
# What makes logits of hidden states, with or without an adapter on it.
Head: TypeAlias = nn.Linear | BaseTunerLayer | AuxiliaryTrainingWrapper
M = TypeVar("M", bound=nn.Module)


def inner_model(model: Network) -> Any:
    """The network inside a PEFT wrapper, with the adapters in its layers; any other model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def is_composite(config: PreTrainedConfig) -> bool:
    """Whether a config is made of several, of which one describes the part that reads text (Gemma 3 with images)."""
    return config.get_text_config() is not config


def trunk_of(network: PreTrainedModel) -> Any:
    """What turns token ids into hidden states in the network's own forward; a network without a head is its own trunk.

    That is transformers' `base_model`, but for families whose `base_model_prefix` names no attribute (Llama 4), of
    which it is the part that has the embedding.
    """
    trunk = network.base_model
    if trunk is not network or network.config.is_encoder_decoder or network.get_output_embeddings() is None:
        return trunk
    part = _part_with_embedding(network)
    return network if part is None else trunk_of(part)


def text_trunk(network: PreTrainedModel) -> Any:
    """The trunk without the towers for images and sound that a network made of several has.

    It computes what the trunk does, but for ids that stand for an image: some families read these as a pad.
    """
    trunk = trunk_of(network)
    while is_composite(trunk.config) and not trunk.config.is_encoder_decoder:
        part = _part_with_embedding(trunk)
        if part is None:
            break
        trunk = trunk_of(part)
    return trunk


def _part_with_embedding(network: PreTrainedModel) -> PreTrainedModel | None:
    embedding = network.get_input_embeddings()
    parts = (part for part in network.children() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if any(module is embedding for module in part.modules())), None)


def parameters_beyond_text(network: Network) -> list[nn.Parameter]:
    """What no text reaches in a network made of several: its towers for images and sound, with adapters on them.

    Args:
        network: a language model, with or without PEFT adapters.
    """
    base = inner_model(network)
    if not is_composite(base.config) or base.config.is_encoder_decoder:
        return []
    reached = {id(p) for part in (text_trunk(base), base.get_output_embeddings()) for p in part.parameters()}
    return [parameter for parameter in network.parameters() if id(parameter) not in reached]


def num_token_ids(network: Network) -> int | None:
    """Rows of the input embedding: the network can read the ids below. None if it has no such layer to ask.

    Counted on the layer itself: an adapter on it hides it, and the config may not say.
    """
    try:
        layer = inner_model(network).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    while isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    if (rows := getattr(layer, "num_embeddings", None)) is not None:
        return int(rows)
    weight = getattr(layer, "weight", None)
    # ZeRO-3 leaves weights that it has sharded empty.
    return None if weight is None else int(getattr(weight, "ds_shape", weight.shape)[0])


def max_positions(network: Network) -> int | None:
    """Longest sequence the network was made for, tokens; None if it sets no limit. Dynamic RoPE stretches it."""
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    kinds = rope_options(network.config)
    factors = [options.get("factor") or 1 for options in kinds if "dynamic" in (options.get("rope_type") or "")]
    return limit if limit is None else int(limit * max(factors, default=1))


def rope_options(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The options of RoPE in a config, one for each kind of layers that has its own."""
    options = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [part for part in options.values() if isinstance(part, dict)] or [options]


def padding_id(token_id: int, networks: Iterable[Network]) -> int:
    """What to pad with: `token_id`, or 0 if it is beyond the embedding of one of the networks.

    Scripts that add a pad token without resizing the embeddings have such an id. No network looks at what is padded,
    but each embeds it.
    """
    known = [rows for network in networks if (rows := num_token_ids(network)) is not None]
    return token_id if all(0 <= token_id < rows for rows in known) else 0


def token_in_words(token_id: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """An id with the token that it stands for, if the tokenizer has it: `32 ('[PAD]')`."""
    if tokenizer is None or not 0 <= token_id < len(tokenizer):
        return str(token_id)
    return f"{token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r})"


def pad_token_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad id, or its EOS id if it has none.

    Raises:
        ValueError: if it has neither.
    """
    ids: tuple[int | None, int | None] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    for token_id in ids:
        if token_id is not None:
            return token_id
    raise ValueError("tokenizer has neither a pad nor an EOS token; set one: tokenizer.pad_token = ...")


@contextmanager
def without_unknown_pad(network: Network) -> Iterator[None]:
    """Inside, the configs of a network name no pad that its embedding has no row for; afterwards they do again.

    The Trainer, and many a script, puts the tokenizer's pad into them. transformers makes the embedding of many
    families with that pad, and could not load what was saved so.
    """
    base, known = inner_model(network), num_token_ids(network)
    configs = [base.config, base.config.get_text_config(), getattr(base, "generation_config", None)]
    named = [(config, pad) for config in configs if (pad := getattr(config, "pad_token_id", None)) is not None]
    unknown = [(config, pad) for config, pad in named if known is not None and pad >= known]
    try:
        for config, _ in unknown:
            config.pad_token_id = None
        yield
    finally:
        for config, pad in unknown:
            config.pad_token_id = pad


@contextmanager
def use_cache_kept(config: PreTrainedConfig) -> Iterator[None]:
    """Afterwards `use_cache` in the config is what it was, or is not there if it was not.

    The Trainer switches it off when it is made, and it would be saved with the policy.
    """
    missing = object()
    before = vars(config).get("use_cache", missing)
    try:
        yield
    finally:
        if before is missing:
            vars(config).pop("use_cache", None)
        else:
            config.use_cache = before


def is_on_several_devices(network: Any) -> bool:
    """Whether a device map has put the layers of a network on more than one device."""
    return len(set((getattr(network, "hf_device_map", None) or {}).values())) > 1
