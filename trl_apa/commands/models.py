"""Models, tokenizers and reward functions by name, as the commands' options say."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from accelerate import PartialState
from peft import AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig, get_quantization_config

from trl_apa.models import load_language_model


def loading_options(arguments: ModelConfig, trust_remote_code: bool) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`."""
    dtype = arguments.dtype
    options: dict[str, Any] = {
        "dtype": dtype if dtype in (None, "auto") else getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
    }
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if (quantization := get_quantization_config(arguments)) is not None:
        # bitsandbytes quantises while it loads: each process onto its own device.
        device_map = {"": PartialState().local_process_index} if torch.cuda.is_available() else None
        options |= {"quantization_config": quantization, "device_map": device_map}
    return options


def load_policy(path: str, arguments: ModelConfig, trust_remote_code: bool, is_trainable: bool = True) -> Any:
    """A language model, or an adapter on its base.

    Args:
        path: folder or hub name; `arguments.model_revision` is read if it is `arguments.model_name_or_path`.
        arguments: precision, attention and quantization.
        trust_remote_code: whether code that comes with the model may run.
        is_trainable: whether an adapter is trained further.
    """
    options, hub = loading_options(arguments, trust_remote_code), {}
    if path == arguments.model_name_or_path and arguments.model_revision != "main":
        hub = {"revision": arguments.model_revision}
    return load_language_model(path, is_trainable=is_trainable, hub=hub, **hub, **options)


def load_tokenizer(path: str, arguments: ModelConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    revision = arguments.model_revision if path == arguments.model_name_or_path else "main"
    return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


def load_reward_model(path: str, trust_remote_code: bool) -> PreTrainedModel:
    """A sequence classifier of one label, or an adapter that makes one of its base, merged.

    Raises:
        ValueError: if the checkpoint lacks trained weights, as that of a language model does.
    """
    if find_adapter_config_file(path) is not None:
        adapted = AutoPeftModelForSequenceClassification.from_pretrained(
            path, num_labels=1, trust_remote_code=trust_remote_code
        )
        model = adapted.merge_and_unload()
        # Its tokenizer lies with the adapter.
        model.config._name_or_path = path
        return model
    model, report = AutoModelForSequenceClassification.from_pretrained(
        path, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ValueError(f"{path} is no trained reward model: it has no weights for {missing}")
    return model


def import_reward_function(name: str) -> Callable:
    """The function that a dotted name means; modules in the working directory are found.

    Only names that the user wrote, in the YAML or on the command line, come here; none is read from a checkpoint.

    Raises:
        ValueError: if it cannot be imported or called.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"reward_funcs has {name!r}; it should be a dotted name: module.function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs has {name!r}, which cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"reward_funcs has {name!r}, a {type(function).__name__}; it should be a function")
    return function


def load_rewards(
    models: Sequence[str] | None, functions: Sequence[Callable], trust_remote_code: bool
) -> list[Callable | PreTrainedModel]:
    """Reward models and reward functions, in the order of `reward_weights`: models first."""
    return [*(load_reward_model(path, trust_remote_code) for path in models or ()), *functions]
