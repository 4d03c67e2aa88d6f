"""The networks of a `Setup`, built on the "meta" device by the functions that build the real ones."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from trl_apa.memory.pretending import BLOCK_4BIT
from trl_apa.memory.setup import Setup
from trl_apa.models import (
    PolicyAndValue,
    ValueModel,
    build_policy,
    create_reference_model,
    freeze_all_but,
    resolve_value_model,
)
from trl_apa.models.critic import Critic
from trl_apa.models.loading import language_model_class
from trl_apa.models.network_parts import Network


if TYPE_CHECKING:
    import bitsandbytes as bnb


def build_networks(setup: Setup) -> tuple[PolicyAndValue, nn.Module | None]:
    """Policy and value model as `assembly.assemble` makes them, without contents, and the reference if it is a copy.

    Raises:
        ValueError: if the networks cannot be built: bitsandbytes is missing, a layer that is named is not there.
    """
    with torch.device("meta"):
        policy = build_policy(language_model(setup.config, setup), _lora_config(setup))
        value_model = _value_model(setup, policy)
        num_shared = None
        if setup.num_unfrozen_layers is not None:
            with _NothingIsPadded():
                num_shared = freeze_all_but(setup.num_unfrozen_layers, policy)
                if isinstance(value_model, ValueModel):
                    freeze_all_but(setup.num_unfrozen_layers, value_model.network)
        module = PolicyAndValue(policy, value_model)
        with _NothingIsPadded():
            reference = create_reference_model(policy, num_shared) if setup.reference_kind == "copy" else None
    return module.train(), reference


class _NothingIsPadded(TorchFunctionMode):
    """Tells transformers that a mask without data is all ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch._C.TensorBase.__bool__ else func(*args, **(kwargs or {}))


def _lora_config(setup: Setup) -> LoraConfig | None:
    if setup.lora_r == 0:
        return None
    targets = setup.lora_target_modules
    targets = targets if targets is None or isinstance(targets, str) else list(targets)
    return LoraConfig(r=setup.lora_r, target_modules=targets, task_type="CAUSAL_LM")


def language_model(config: PretrainedConfig, setup: Setup) -> PreTrainedModel:
    """The policy without adapters, quantised if the setup says so."""
    attention = {"flash": "sdpa"}.get(setup.attention, setup.attention)
    model_class = language_model_class(config)
    make = getattr(model_class, "from_config", None) or model_class._from_config
    model = make(config, dtype=setup.dtype, attn_implementation=attention)
    return model if setup.quantization is None else quantised(model, setup.quantization)


def _value_model(setup: Setup, policy: Network) -> Critic | None:
    if setup.value is None:
        return None
    if isinstance(setup.value, PretrainedConfig):
        # As from a name: in float32, and all of it trained.
        return ValueModel.on_trunk(AutoModel.from_config(setup.value, dtype=torch.float32))
    return resolve_value_model(setup.value, policy)


def quantised(model: PreTrainedModel, quantization: str) -> PreTrainedModel:
    """`model` with bitsandbytes' layers in place of its linear ones, except the vocabulary head.

    Raises:
        ValueError: if bitsandbytes is not installed.
    """
    options: dict[str, Any] = {f"load_in_{quantization}": True}
    if quantization == "4bit":
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": model.dtype}
    try:
        config = BitsAndBytesConfig(**options)
        model = replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    except ImportError as error:
        raise ValueError(f"quantization={quantization!r} needs bitsandbytes: {error}") from error
    for layer in model.modules():
        if hasattr(layer, "source_cls"):
            _pack_weight(layer, quantization)
    setattr(model, f"is_loaded_in_{quantization}", True)
    model.is_quantized = True
    return model.requires_grad_(False)


def _pack_weight(layer: "bnb.nn.Linear8bitLt | bnb.nn.Linear4bit", quantization: str) -> None:
    """The shape and type that the weight has once it is quantised."""
    rows, columns = layer.out_features, layer.in_features
    if quantization == "8bit":
        weight, scales = torch.empty(rows, columns, dtype=torch.int8), rows
    else:
        weight, scales = torch.empty(-(-rows * columns // 2), 1, dtype=torch.uint8), -(-rows * columns // BLOCK_4BIT)
    layer.weight, layer.scale_bytes = nn.Parameter(weight, requires_grad=False), 4 * scales
    # peft asks a 4-bit weight for these.
    layer.weight.compress_statistics, layer.weight.quant_type = False, "nf4"


def classifier_bytes(config: PretrainedConfig, setup: Setup) -> int:
    """Weights of a separate reward model, in the precision of the policy's base.

    Raises:
        ValueError: if the family has no classifiers.
    """
    config = copy.deepcopy(config)
    config.num_labels, config.pad_token_id = 1, 0
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(f"reward: transformers has no sequence classifier of the family {config.model_type!r}")
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=setup.dtype)
        if setup.quantization is not None:
            model = quantised(model, setup.quantization)
    return weight_bytes(model)


def weight_bytes(model: nn.Module, beside: nn.Module | None = None) -> int:
    """Bytes of parameters and buffers, shared ones once, with the scales of quantised ones.

    Args:
        model: any network.
        beside: another model; parameters that `model` shares with it are not counted.
    """
    known = set() if beside is None else {id(parameter) for parameter in beside.parameters()}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in known}
    # peft's wrapper of such a layer has the name of its class, but not this entry.
    scales: int = sum(vars(layer).get("scale_bytes", 0) for layer in model.modules())
    return scales + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
