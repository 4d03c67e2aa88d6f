"""The options of the training commands: which group of `--help` each stands in."""

import re
from collections.abc import Callable, Collection

from transformers import TrainingArguments
from trl import ModelConfig

from trl_apa.commands.options import OLDER_NAMES, Part
from trl_apa.config.apa import ALIASES, NOT_READ_BACK, WITHOUT_EFFECT, APAConfig
from trl_apa.config.tools import ToolOptions
from trl_apa.config.trl_0_12 import TRL012Options
from trl_apa.config.vllm import VLLMOptions


# The first pattern that a name begins with decides.
TRAINING_GROUPS = (
    ("Hugging Face hub", "hub_|push_to_hub"),
    ("logging", "log|report_to|run_name|project|trackio|disable_tqdm|include_num_input|include_tokens"),
    ("saving and resuming", "save_|load_best|resume|output_dir|restore|overwrite|metric_for|greater_is|enable_jit"),
    ("evaluation", "eval_|do_eval|per_device_eval|include_for_metrics|batch_eval|prediction_loss|use_legacy_predict"),
    ("several devices", "fsdp|deepspeed|ddp_|accelerator|parallelism|split_batches|average_tokens|local_rank"),
    ("data loading", "dataloader|remove_unused|label_names|group_by|length_column|train_sampling|dataset_num_proc"),
    ("precision, memory and speed", "bf16|fp16|tf32|gradient_checkpointing|torch_|use_|auto_find|skip_memory|liger"),
    ("optimizer and schedule", "optim|learning_rate|lr_|adam|weight_decay|warmup|max_grad_norm|neftune|galore"),
)
OTHER_TRAINING = "training"
SAMPLING = {"temperature", "top_p", "top_k", "max_completion_length", "stop_strings", "max_prompt_length"}
SAMPLING |= {"generation_batch_size", "num_generations", "chat_template_kwargs"}
# Options of `APAConfig` that are not about the algorithm.
PLACES = dict.fromkeys(("reward_weights", "reward_timeout", "skip_unscored"), "rewards")
PLACES |= dict.fromkeys(("push_to_hub_if_best_kwargs", "compare_steps"), "Hugging Face hub")
PLACES |= dict.fromkeys(("log_completions", "num_completions_to_print"), "logging")
PLACES |= dict.fromkeys(("tracker_project_name", "tracker_kwargs", "project_kwargs"), "logging")
# What `--help` says of options whose own texts are about other trainers.
HELPS = {"bf16": "Compute in bfloat16 (autocast); by default where a GPU supports it, and not with fp16."}
# Of classic configs: kept for the record there, and of no use to a command.
OLDER = {*ALIASES, *NOT_READ_BACK, *WITHOUT_EFFECT, "forward_batch_size", "exp_name", "task_name", "model_name"}
OLDER |= {"query_dataset", "reward_model", "init_kl_coef", "steps"}
OLDER |= set(TRL012Options.__annotations__) - {"total_episodes", "ds3_gather_for_generation"}


def training_title(name: str) -> str:
    """The group of an option of `TrainingArguments`."""
    return next((title for title, pattern in TRAINING_GROUPS if re.match(pattern, name)), OTHER_TRAINING)


def apa_title(name: str) -> str:
    """The group of an option of `APAConfig`."""
    if name in OLDER:
        return OLDER_NAMES
    if name in SAMPLING:
        return "sampling"
    if name in VLLMOptions.__dataclass_fields__:
        return "sampling with vLLM"
    if name in ToolOptions.__dataclass_fields__:
        return "sampling"
    if name in PLACES:
        return PLACES[name]
    if name in TrainingArguments.__dataclass_fields__:
        return training_title(name)
    return "the algorithm"


def trl_title(trainer: str) -> Callable[[str], str]:
    """The group of an option of one of TRL's configs, whose own options are called those of `trainer`."""
    return lambda name: training_title(name) if name in TrainingArguments.__dataclass_fields__ else trainer


def model_part(names: Collection[str] | None = None) -> Part:
    """Loading, quantization and LoRA, by TRL's `ModelConfig`."""

    def title(name: str) -> str:
        if "lora" in name or name in ("use_peft", "use_dora"):
            return "LoRA"
        return "quantization" if "bit" in name or "bnb" in name else "model"

    return Part(ModelConfig, title, names)


def apa_part(names: Collection[str] | None = None) -> Part:
    """Algorithm, sampling and training, by `APAConfig`."""
    return Part(APAConfig, apa_title, names, HELPS)
