"""Every public name of TRL 0.11.4 that PPO's users import is at its path below `trl_apa`, or left out for a reason."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import trl_apa
from trl_apa import compat
from trl_apa.module_paths import NAMES, NEW_PATHS


HERE = Path(__file__).parent
CLASSIC = json.loads((HERE / "data" / "classic_names.json").read_text())
OTHER_METHODS = "AlignProp BCO CPO DDPO DPO GKD IterativeSFT KTO NashMD ORPO OnlineDPO RLOO Reward SFT XPO"
LEFT_OUT = {
    "trainers of other methods: import them from trl": {
        f"{method}{kind}" for method in OTHER_METHODS.split() for kind in ("Config", "Trainer")
    }
    | {"BaseTrainer", "FDivergenceConstants", "FDivergenceType"},
    "judges and callbacks of other trainers; `trl-apa winrate` compares with a judge": {
        *("BaseJudge", "BasePairwiseJudge", "BaseRankJudge", "HfPairwiseJudge", "OpenAIPairwiseJudge", "PairRMJudge"),
        *("RandomPairwiseJudge", "RandomRankJudge", "LogCompletionsCallback", "RichProgressCallback"),
        *("SyncRefModelCallback", "WinRateCallback"),
    },
    "data of other trainers: import them from trl, or gone": {
        *("ConstantLengthDataset", "DPODataCollatorWithPadding", "DataCollatorForChatML", "compute_accuracy"),
        *("DataCollatorForCompletionOnlyLM", "RewardDataCollatorWithPadding", "apply_chat_template"),
        *("extract_prompt", "is_conversational", "maybe_apply_chat_template", "maybe_extract_prompt"),
        *("maybe_unpair_preference_dataset", "unpair_preference_dataset", "setup_chat_format", "FORMAT_MAPPING"),
        *("ChatMlSpecialTokens", "SIMPLE_CHAT_TEMPLATE", "SIMPLE_SFT_CHAT_TEMPLATE", "pad_to_length"),
    },
    "the command line of TRL": {"DPOScriptArguments", "SFTScriptArguments", "TrlParser", "init_zero_verbose"},
    "diffusion models": {"PerPromptStatTracker", "is_diffusers_available", "randn_tensor"},
    "prompt tuning, which peft has": {
        *("MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"),
    },
    "helpers that the second generation's own loop called": {
        *("OnPolicyConfig", "OnlineTrainerState", "add_bos_token_if_needed", "add_eos_token_if_needed", "cap_exp"),
        *("batch_generation", "decode_and_strip_padding", "empty_cache", "exact_div", "first_true_indices", "forward"),
        *("generate", "get_exp_cap", "get_reward", "prepare_deepspeed", "print_rich_table", "truncate_response"),
        *("truncate_right",),
    },
    "parts of trainers that scripts have no use for": {
        *("GeometricMixtureWrapper", "JSONDict", "LAYER_PATTERNS", "MODEL_CARD_TEMPLATE", "get_global_statistics"),
        *("neftune_post_forward_hook", "peft_module_casting_to_bf16", "trl_sanitze_kwargs_for_tagging"),
    },
    "checks of versions and libraries that transformers 5 does not need": {
        *("OptionalDependencyNotAvailable", "is_accelerate_greater_20_0", "is_llmblender_available"),
        *("is_torch_greater_2_0", "is_transformers_greater_than", "strtobool"),
    },
    "another constructor here: `trainer.running_scores` is made by the trainer": {"RunningMoments"},
    "part of TextEnvironment.generate: give stop_strings to generate": {"StringStoppingCriteria"},
}
REASON = {name: reason for reason, names in LEFT_OUT.items() for name in names}


def has(path, name):
    try:
        return hasattr(import_module(f"trl_apa.{path}" if path else "trl_apa"), name)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("path", sorted(CLASSIC))
def test_every_name_is_at_its_path_or_left_out_for_a_reason(path):
    missing = {name for name in CLASSIC[path] if not has(path, name)}
    assert missing - REASON.keys() == set()


def test_nothing_is_said_to_be_left_out_that_is_not_classics_or_is_there():
    of_classic = {name for names in CLASSIC.values() for name in names}
    assert REASON.keys() - of_classic == {"DDPOTrainer", "IterativeSFTConfig"}  # made up by the pattern
    there = {(path, name) for path, names in CLASSIC.items() for name in names if name in REASON and has(path, name)}
    assert there == set()


@pytest.mark.parametrize("path", sorted(NAMES))
def test_the_names_of_a_path_that_is_no_module_are_real(path):
    module = import_module(f"trl_apa.{path}")
    assert module.__all__ == sorted(NAMES[path]) and f"trl_apa.{path}" not in NEW_PATHS
    assert all(callable(value) or isinstance(value, tuple) for value in map(module.__getattr__, module.__all__))
    with pytest.raises(AttributeError, match=f"trl_apa.{path}.*no_such_name"):
        module.no_such_name  # noqa: B018


def test_one_name_is_one_object_wherever_it_is_imported_from():
    from trl_apa.experimental.ppo import AutoModelForCausalLMWithValueHead as wrapper
    from trl_apa.experimental.ppo import PPOTrainer as experimental
    from trl_apa.experimental.ppo.modeling_value_head import PreTrainedModelWrapper as base
    from trl_apa.experimental.ppo.ppo_trainer import PPOTrainer as in_file
    from trl_apa.experimental.ppo.ppo_trainer import masked_whiten
    from trl_apa.models.modeling_base import PreTrainedModelWrapper
    from trl_apa.trainer.ppov2_config import PPOv2Config
    from trl_apa.trainer.ppov2_trainer import PPOv2Trainer
    from trl_apa.trainer.utils import AdaptiveKLController

    assert trl_apa.PPOTrainer is trl_apa.PPOv2Trainer is experimental is in_file is PPOv2Trainer
    assert trl_apa.PPOConfig is PPOv2Config and trl_apa.classic.core.masked_whiten is masked_whiten
    assert wrapper is trl_apa.AutoModelForCausalLMWithValueHead and base is PreTrainedModelWrapper
    assert issubclass(trl_apa.AutoModelForCausalLMWithValueHead, PreTrainedModelWrapper)
    assert trl_apa.AutoModelForCausalLMWithValueHead in trl_apa.SUPPORTED_ARCHITECTURES
    assert trl_apa.AdaptiveKLController is AdaptiveKLController


def in_a_new_process(code):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=HERE.parent
    )
    return done.stdout.strip().splitlines()[-1:], done.stderr


@pytest.mark.slow
def test_an_unedited_script_finds_the_classic_names():
    code = """
from trl_apa.compat import install
install()
install()
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, RewardTrainer, create_reference_model
from trl.core import LengthSampler, respond_to_batch
from trl.extras import BestOfNSampler
from trl.trainer.ppo_trainer import PPOTrainer as again
from trl.trainer.utils import AdaptiveKLController, pad
from trl.models import unwrap_model_for_generation
from trl.models.modeling_value_head import AutoModelForCausalLMWithValueHead as wrapper
import trl, trl_apa
assert PPOTrainer is again is trl_apa.PPOTrainer and wrapper is AutoModelForCausalLMWithValueHead
assert RewardTrainer.__module__.startswith("trl.") and trl.__version__ != trl_apa.__version__
assert trl.SFTTrainer.__module__.startswith("trl.")
print(LengthSampler.__module__)
"""
    told, errors = in_a_new_process(code)
    assert told == ["trl_apa.classic.names"], errors


def test_without_installing_it_trl_is_left_alone():
    told, errors = in_a_new_process("import trl_apa, trl\nprint(hasattr(trl, 'PPOTrainer'))\nimport trl.core")
    assert told == ["False"] and "ModuleNotFoundError: No module named 'trl.core'" in errors
    assert set(compat.NAMES) <= {name for names in CLASSIC.values() for name in names}
