"""An adapter put into its base for good: a plain checkpoint without peft."""

import os
import tempfile
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_apa._trl import is_peft_model
from trl_apa.models.adapters import adapts_tied_weights
from trl_apa.models.copying import independent_copy
from trl_apa.models.gguf import load_tokenizer
from trl_apa.models.loading import load_language_model
from trl_apa.models.network_parts import Network, without_unknown_pad
from trl_apa.models.value_model import save_network


def merge_and_save(
    source: str | os.PathLike[str] | Network,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> None:
    """Write the policy as a checkpoint that `AutoModelForCausalLM` (or `AutoModelForSeq2SeqLM`) loads without peft.

    Only the active adapter is merged: others on the base (value, reward, reference) stay out. A base that is quantised
    is reloaded unquantized, so that nothing is lost to its rounding; any other is copied from memory.

    Args:
        source: a policy with adapters, or the folder or hub name of a saved one. One without adapters is written as it
            is.
        path: a folder, made if it is not there.
        tokenizer: written with the model; by default the one saved with `source`, if that is a path or hub name.
        kwargs: passed on to `from_pretrained` of a base that is loaded (`dtype`, `device_map`, ...), which without
            `dtype` is float32. With any of them the base is always reloaded.

    Raises:
        ValueError: if a base is to be loaded anew and its adapter does not say where it came from; for `kwargs` where
            no base is loaded.
        OSError: if there is no such checkpoint.
    """
    if isinstance(source, nn.Module):
        merged = _merged_copy(source, kwargs)
    else:
        tokenizer = tokenizer or load_tokenizer(source)
        merged = _merged(os.fspath(source), kwargs)
    with without_unknown_pad(merged):
        merged.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _merged_copy(policy: Network, kwargs: dict[str, Any]) -> Network:
    if not is_peft_model(policy):
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: the policy has no adapters and is written as it is in memory")
        return policy
    active = policy.active_adapter
    if not kwargs and not getattr(policy, "is_quantized", False):
        return _apart(independent_copy(policy)).merge_and_unload(adapter_names=[active])
    if not policy.peft_config[active].base_model_name_or_path:
        raise ValueError("the policy's base has to be reloaded, but its adapter does not say from where")
    with tempfile.TemporaryDirectory() as folder:
        save_network(policy, folder, policy.state_dict())
        return _merged(folder, kwargs)


def _merged(path: str, kwargs: dict[str, Any]) -> Network:
    model = load_language_model(path, **kwargs)
    return _apart(model).merge_and_unload() if is_peft_model(model) else model


def _apart(model: PeftModel) -> PeftModel:
    """An adapter on one of two tied weights makes them two: merged in place it would change the other as well."""
    if adapts_tied_weights(model):
        head = model.get_base_model().get_output_embeddings()
        head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.get_base_model().config.get_text_config().tie_word_embeddings = False
    return model
