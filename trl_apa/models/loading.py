"""Loads language models from folders and the hub: full models, and adapters on the base that they name."""

import os
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, load_peft_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.peft_utils import find_adapter_config_file

from trl_apa.models.adapter_kinds import refuse_prompt_learning
from trl_apa.models.gguf import dense_options, gguf_read_once, gguf_source, load_config, name_after_file
from trl_apa.models.quantization import settle_quantization


def load_language_model(
    path: str,
    auto_class: Any = None,
    is_trainable: bool = True,
    hub: dict[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """A language model, or an adapter on the base that it names.

    Args:
        path: folder or hub name; or that of a GGUF file in one, "models/smollm2.gguf" say, whose weights are unpacked.
        auto_class: `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`; by default what the checkpoint's config says.
        is_trainable: whether an adapter is to be trained further.
        hub: `token`, `revision`, ... of `path`.
        kwargs: passed on to transformers' `from_pretrained`. Without `dtype` the model comes in float32, whatever the
            checkpoint holds; quantised models keep transformers' default.

    Raises:
        ValueError: for an adapter that works by prompt learning.
        OSError: if there is no such checkpoint.
    """
    path, file = gguf_source(path)
    hub, kwargs = hub or {}, {**file, **kwargs}
    if "gguf_file" in kwargs or find_adapter_config_file(path, **hub) is None:
        return _load_base(path, auto_class, kwargs)
    config = PeftConfig.from_pretrained(path, **hub)
    refuse_prompt_learning(config)
    base_kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    base_path, file = gguf_source(config.base_model_name_or_path)
    base_kwargs |= file
    base_config = _config_of(base_path, base_kwargs)
    auto_class = _class_under(path, base_config, auto_class or language_model_class(base_config), hub)
    base = _load_base(base_path, auto_class, base_kwargs)
    return PeftModel.from_pretrained(base, path, is_trainable=is_trainable, **hub)


def language_model_class(config: PreTrainedConfig) -> Any:
    """The class that makes a language model of a config: `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`.

    Where these do not know the config, as of models that read images too, it is the class that the config names.
    """
    return class_that_knows(config, AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM)


def class_that_knows(config: PreTrainedConfig, auto_class: Any) -> Any:
    """`auto_class` or, if it does not know the config, the class of transformers that the config names.

    A class that is no auto class stays as it is.
    """
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None or type(config) in mapping or getattr(config, "auto_map", None):
        return auto_class
    return _named_class(config) or auto_class


def _named_class(config: PreTrainedConfig) -> Any:
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    return next((found for found in named if found is not None), None)


def _class_under(path: str, config: PreTrainedConfig, auto_class: Any, hub: dict[str, Any]) -> Any:
    """The class of the base that the adapter in `path` was trained on: `auto_class`, or the one that the config names.

    Of some configs (Llama 4) transformers makes a model that reads text alone, or the one that reads images too. Their
    layers have different names, and peft only warns of an adapter whose layers are not there.
    """
    auto_class, named = class_that_knows(config, auto_class), _named_class(config)
    mapping = getattr(auto_class, "_model_mapping", {})
    if named is None or mapping.get(type(config), named) is named:
        return auto_class
    weights = load_peft_weights(path, device="cpu", **hub)
    with torch.device("meta"):
        candidates = {auto_class: auto_class.from_config(config), named: named._from_config(config)}
    names = {made: set(dict(model.named_modules())) for made, model in candidates.items()}
    return max(names, key=lambda made: sum(_known_length(key, names[made]) for key in weights))


def _known_length(weight: str, module_names: set[str]) -> int:
    """Parts of an adapter weight's name that lead to a module."""
    parts = weight.removeprefix("base_model.model.").split(".")
    return max(length for length in range(len(parts) + 1) if ".".join(parts[:length]) in module_names)


@gguf_read_once()
def _load_base(path: str, auto_class: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    config = _config_of(path, kwargs)
    auto_class = language_model_class(config) if auto_class is None else class_that_knows(config, auto_class)
    if is_deepspeed_zero3_enabled() and "quantization_config" not in kwargs:
        kwargs = {"dtype": torch.float32, **kwargs}  # weights that are sharded as they are loaded cannot be cast later
    model = settle_quantization(auto_class.from_pretrained(path, **dense_options(kwargs, config)))
    name_after_file(model, kwargs.get("gguf_file"))
    if kwargs.get("dtype") is None and not getattr(model, "is_quantized", False):
        model = model.float()  # small updates vanish in half precision, where transformers 5 leaves such checkpoints
    return model


def _config_of(path: str, kwargs: dict[str, Any]) -> PreTrainedConfig:
    found_by = {
        name: kwargs[name] for name in ("revision", "subfolder", "trust_remote_code", "gguf_file") if name in kwargs
    }
    return load_config(path, **found_by)


def process_device() -> str:
    """The device of this process, known before accelerate is set up, which the trainer's config decides about."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"
