"""The networks: policy, reference, standalone value model, and the module that holds policy and value."""

from trl_apa.models.copying import independent_copy
from trl_apa.models.critic import resolve_value_model
from trl_apa.models.dense import merged_parameters
from trl_apa.models.loaders import load_policy, load_reward_model, load_value_model
from trl_apa.models.loading import load_language_model
from trl_apa.models.merging import merge_and_save
from trl_apa.models.policy_and_value import (
    VALUE_MODEL_FOLDER,
    PolicyAndValue,
    build_policy,
    load_policy_and_value,
    select_adapter,
)
from trl_apa.models.reference import choose_reference, create_reference_model, freeze_all_but, reference_policy
from trl_apa.models.value_adapter import AdapterValueModel
from trl_apa.models.value_head import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    ValueHeadWrapper,
    reward_adapter_of,
    value_head_of,
    without_value_head,
)
from trl_apa.models.value_model import ValueHead, ValueModel
from trl_apa.module_paths import lazy_names


__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "VALUE_MODEL_FOLDER",
    "AdapterValueModel",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PolicyAndValue",
    "PreTrainedModelWrapper",
    "ValueHead",
    "ValueModel",
    "build_policy",
    "choose_reference",
    "create_reference_model",
    "freeze_all_but",
    "independent_copy",
    "load_language_model",
    "load_policy",
    "load_policy_and_value",
    "load_reward_model",
    "load_value_model",
    "merge_and_save",
    "merged_parameters",
    "reference_policy",
    "resolve_value_model",
    "reward_adapter_of",
    "select_adapter",
    "value_head_of",
    "without_value_head",
]

PreTrainedModelWrapper = ValueHeadWrapper  # classic's name of it
__getattr__ = lazy_names(__name__, {"unwrap_model_for_generation": "trl.models.utils"})
