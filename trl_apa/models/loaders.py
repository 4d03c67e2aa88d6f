"""Loads policy, value model and reward model: quantized, with new adapters, each process on its own device."""

from typing import Any, TypeAlias

import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, TaskType
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_torch_bf16_gpu_available
from transformers.utils.peft_utils import find_adapter_config_file

from trl_apa._trl import is_peft_model
from trl_apa.models.adapter_kinds import with_adapters
from trl_apa.models.loading import load_language_model, process_device
from trl_apa.models.quantization import settle_quantization
from trl_apa.models.value_model import ValueHead, ValueModel, output_width


Quantization: TypeAlias = str | BitsAndBytesConfig | None


def load_policy(
    name: str, quantization: Quantization = None, lora: int | LoraConfig | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """A policy for `APATrainer`: a language model, optionally in 8 or 4 bits, with new or existing LoRA adapters.

    A quantised base keeps its own precision outside the quantised layers; adapters are float32.

    Args:
        name: folder or hub name of a language model, or of an adapter (an SFT one, say), which is trained further.
        quantization (`str` or `BitsAndBytesConfig`, *optional*): `"8bit"`, `"4bit"` (NF4, its constants quantised too)
            or a configuration of your own.
        lora (`int` or `LoraConfig`, *optional*): rank of new adapters on all linear layers, with a `lora_alpha` twice
            that; or their configuration.
        kwargs: passed on to transformers' `from_pretrained`. Without `dtype` weights that are not quantised come in
            float32. A quantised model goes to this process's GPU, if there is one, unless `device_map` is given.

    Raises:
        ValueError: for another `quantization`; for new adapters on top of those that `name` has; for a rank below 1.
        OSError: if there is no such checkpoint.
    """
    model = load_language_model(name, **_options(quantization, kwargs))
    if lora is None:
        return model
    if is_peft_model(model):
        raise ValueError(f"lora={lora!r}, but {name!r} is an adapter already, which will be trained further")
    kind = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    return with_adapters(model, _lora_config(lora, kind))


def load_value_model(
    name: str, quantization: Quantization = None, lora: int | LoraConfig | None = None, **kwargs: Any
) -> ValueModel:
    """A standalone value model for `APATrainer(value_model=...)`, with its own weights.

    Args:
        name: folder or hub name of a saved value model, a reward model or a language model, which need not be of the
            policy's architecture but has to know its token ids.
        quantization, lora: as for `load_policy`: a language model with new adapters. A quantised network needs them.
        kwargs: as for `load_policy`.

    Raises:
        ValueError: for `quantization` without `lora`: quantised weights cannot be trained.
        OSError: if there is no such checkpoint.
    """
    if lora is None:
        if quantization is not None:
            raise ValueError(f"quantization={quantization!r} needs lora: quantised weights cannot be trained")
        return ValueModel.from_pretrained(name, **kwargs)
    network = load_policy(name, quantization, lora, **kwargs)
    base = network.get_base_model()
    return ValueModel(network, ValueHead(output_width(base)).to(base.get_output_embeddings().weight.device))


def load_reward_model(name: str, quantization: Quantization = None, **kwargs: Any) -> PreTrainedModel:
    """A sequence classifier of one label; an adapter that makes one of its base is merged into it.

    Args:
        name: folder or hub name.
        quantization: as for `load_policy`; the score layer stays whole. An adapter on a quantised base is not merged
            but left on it.
        kwargs: passed on to transformers' `from_pretrained`.

    Raises:
        ValueError: if the checkpoint lacks trained weights, as that of a language model does.
        OSError: if there is no such checkpoint.
    """
    options = _options(quantization, kwargs, ["score", "classifier"])
    if find_adapter_config_file(name) is not None:
        model = AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=1, **options)
        model = model if quantization is not None else model.merge_and_unload()
        # Its tokenizer is saved with the adapter.
        model.config._name_or_path = name
        return settle_quantization(model)
    model, report = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **options)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ValueError(f"{name} is no trained reward model: it has no weights for {missing}")
    return settle_quantization(model)


def _options(
    quantization: Quantization, kwargs: dict[str, Any], keep_whole: list[str] | None = None
) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    if quantization is None:
        return kwargs
    if not isinstance(quantization, BitsAndBytesConfig):
        if quantization not in ("8bit", "4bit"):
            raise ValueError(f"quantization={quantization!r}; it should be '8bit', '4bit' or a BitsAndBytesConfig")
        quantization = BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit",
            load_in_4bit=quantization == "4bit",
            llm_int8_skip_modules=keep_whole,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if is_torch_bf16_gpu_available() else torch.float32,
        )
    return {"device_map": {"": process_device()}, **kwargs, "quantization_config": quantization}


def _lora_config(lora: int | LoraConfig, task_type: TaskType) -> LoraConfig:
    if isinstance(lora, LoraConfig):
        return lora
    if lora < 1:
        raise ValueError(f"lora={lora}: the rank should be at least 1")
    return LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type=task_type)
