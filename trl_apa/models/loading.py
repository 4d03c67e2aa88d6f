"""Language models from folders and the hub: whole ones, and adapters on the base that they name."""

import os
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.peft_utils import find_adapter_config_file

from trl_apa.models.quantization import use_one_kernel


def load_language_model(
    path: str,
    auto_class: Any = None,
    is_trainable: bool = True,
    hub: dict[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """A language model, or an adapter on the base that it names.

    Args:
        path: folder or hub name.
        auto_class: `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`; by default what the checkpoint's config says.
        is_trainable: whether an adapter is to be trained further.
        hub: `token`, `revision`, ... of `path`.
        kwargs: passed on to transformers' `from_pretrained`. Without `dtype` the model comes in float32, whatever the
            checkpoint holds; quantised models keep transformers' default.

    Raises:
        ValueError: for an adapter that works by prompt learning.
        OSError: if there is no such checkpoint.
    """
    hub = hub or {}
    if find_adapter_config_file(path, **hub) is None:
        return _load_base(path, auto_class, kwargs)
    config = PeftConfig.from_pretrained(path, **hub)
    refuse_prompt_learning(config)
    base_kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    base = _load_base(config.base_model_name_or_path, auto_class, base_kwargs)
    return PeftModel.from_pretrained(base, path, is_trainable=is_trainable, **hub)


def _load_base(path: str, auto_class: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    if auto_class is None:
        found_by = {name: kwargs[name] for name in ("revision", "subfolder", "trust_remote_code") if name in kwargs}
        config = AutoConfig.from_pretrained(path, **found_by)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if is_deepspeed_zero3_enabled() and "quantization_config" not in kwargs:
        kwargs = {"dtype": torch.float32, **kwargs}  # weights that are cut up as they are loaded cannot be cast later
    model = use_one_kernel(auto_class.from_pretrained(path, **kwargs))
    if kwargs.get("dtype") is None and not getattr(model, "is_quantized", False):
        model = model.float()  # small updates vanish in half precision, where transformers 5 leaves such checkpoints
    return model


def refuse_prompt_learning(peft_config: PeftConfig) -> None:
    """Raise ValueError for adapters that change the sequence instead of the weights."""
    if peft_config.is_prompt_learning:
        raise ValueError(f"{peft_config.peft_type.value} adapters are not supported; use LoRA or another")


def process_device() -> str:
    """The device of this process, known before accelerate is set up, which the trainer's config decides about."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"
