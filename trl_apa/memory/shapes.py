"""Configs by name without the hub: folders, a table of shapes that are known, and shapes in the user's own words."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from trl_apa.models.gguf import SUFFIX, load_config


def _llama(hidden: int, layers: int, heads: int, inner: int, **others: Any) -> dict[str, Any]:
    return {
        "family": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 4096,
        **others,
    }


def _pythia(hidden: int, layers: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    return _llama(hidden, layers, heads, 4 * hidden, family="gpt_neox", vocab_size=vocabulary)


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"family": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads}


def _qwen(hidden: int, layers: int, heads: int, groups: int, inner: int, **others: Any) -> dict[str, Any]:
    others = {"family": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True, **others}
    return _llama(hidden, layers, heads, inner, num_key_value_heads=groups, **others)


# By the last part of the hub name, in lower case and without "-hf" or "-deduped".
KNOWN: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(4096, 32, 32, 11008),
    "llama-13b": _llama(5120, 40, 40, 13824),
    "llama-30b": _llama(6656, 60, 52, 17920),
    "llama-65b": _llama(8192, 80, 64, 22016),
    "llama-2-7b": _llama(4096, 32, 32, 11008),
    "llama-2-13b": _llama(5120, 40, 40, 13824),
    "llama-2-70b": _llama(8192, 80, 64, 28672, num_key_value_heads=8),
    "meta-llama-3-8b": _llama(4096, 32, 32, 14336, num_key_value_heads=8, vocab_size=128256),
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, 50432),
    "pythia-12b": _pythia(5120, 36, 40, 50688),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "qwen2.5-0.5b": _qwen(896, 24, 14, 2, 4864),
    "qwen2.5-1.5b": _qwen(1536, 28, 12, 2, 8960),
    "qwen2.5-7b": _qwen(3584, 28, 28, 4, 18944, vocab_size=152064, tie_word_embeddings=False),
}


def config_of(name: str) -> PretrainedConfig:
    """The config of a model: of a folder, GGUF file, shape (`family=llama,hidden_size=...`), known name or the hub.

    Raises:
        ValueError: if it is none of these, or the shape has a name or a value that the family does not.
    """
    if Path(name).is_dir() or name.endswith(SUFFIX):
        return load_config(name)
    if "=" in name:
        return shaped(dict(_pair(part) for part in name.split(",")))
    known = name.rpartition("/")[2].lower().removesuffix("-hf").removesuffix("-deduped")
    if known in KNOWN:
        return shaped(KNOWN[known])
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r} is no folder, its config cannot be had from the hub ({str(error).splitlines()[0]}), and "
            f"it is none of {', '.join(KNOWN)}; give the folder of its config.json, or its shape: "
            "family=llama,hidden_size=4096,num_hidden_layers=32,num_attention_heads=32,intermediate_size=11008,"
            "vocab_size=32000"
        ) from error


def shaped(shape: dict[str, Any]) -> PretrainedConfig:
    """A config of `shape["family"]` with the other entries set.

    Raises:
        ValueError: if there is no such family, or it does not know one of the entries.
    """
    entries = {name: value for name, value in shape.items() if name != "family"}
    try:
        default = AutoConfig.for_model(shape["family"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"family={shape.get('family')!r}: it should be a model_type of transformers") from error
    for name in entries:
        if not hasattr(default, name):
            raise ValueError(f"{name}: {type(default).__name__} has no such entry")
    return AutoConfig.for_model(shape["family"], **entries)


def _pair(part: str) -> tuple[str, Any]:
    name, equals, text = (piece.strip() for piece in part.partition("="))
    if not equals:
        raise ValueError(f"{part!r} in a shape should be name=value")
    if text in ("true", "false"):
        return name, text == "true"
    try:
        return name, int(text)
    except ValueError:
        if name != "family":
            raise ValueError(f"{name}={text!r} in a shape should be a whole number, true or false") from None
        return name, text
