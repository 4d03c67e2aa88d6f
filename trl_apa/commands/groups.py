"""The options of the training commands: which group of `--help` each stands in."""

import re
from collections.abc import Callable, Collection
from dataclasses import fields

from transformers import TrainingArguments
from trl import ModelConfig

from trl_apa.commands.options import NO_EFFECT, OLDER_NAMES, Part
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
    ("precision, memory and speed", "bf16|fp16|tf32|gradient_ch|activation_|torch_|use_|auto_find|skip_memory|liger"),
    ("optimizer and schedule", "optim|learning_rate|lr_|adam|weight_decay|warmup|max_grad_norm|neftune|galore"),
)
OTHER_TRAINING = "training"
SAMPLING = {"temperature", "top_p", "top_k", "max_completion_length", "stop_strings", "max_prompt_length"}
SAMPLING |= {"generation_batch_size", "num_generations", "chat_template_kwargs"}
# Of scripts that decide by them what they do; a command always trains, and a launcher counts the processes.
OF_SCRIPTS = {"do_train", "do_eval", "do_predict", "local_rank"}
# What only `evaluation_loop` and the loss of the Trainer read, for which our trainers have their own.
UNREAD = {"label_smoothing_factor", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"}
UNREAD |= {"eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"}
# The online trainer draws its prompts itself, and no command has tools.
UNREAD_ONLINE = UNREAD | {"label_names", "train_sampling_strategy", "length_column_name", "turn_discount"}
UNREAD_ONLINE |= set(ToolOptions.__dataclass_fields__)
# Options of `APAConfig` that are not about the algorithm.
PLACES = dict.fromkeys(("reward_weights", "reward_timeout", "skip_unscored"), "rewards")
PLACES |= dict.fromkeys(("push_to_hub_if_best_kwargs", "compare_steps"), "Hugging Face hub")
PLACES |= dict.fromkeys(("log_completions", "num_completions_to_print"), "logging")
PLACES |= dict.fromkeys(("tracker_project_name", "tracker_kwargs", "project_kwargs"), "logging")
PLACES |= dict.fromkeys(("batch_size", "num_epochs_per_batch", "total_episodes", "max_kl"), "training")
PLACES |= dict.fromkeys(("num_unfrozen_layers", "shuffle"), "training")
PLACES |= dict.fromkeys(("padding_free", "optimize_device_cache"), "precision, memory and speed")
PLACES |= {"tokens_per_micro_batch": "precision, memory and speed"}
PLACES |= dict.fromkeys(("value_learning_rate", "value_max_grad_norm"), "optimizer and schedule")
PLACES |= {"resume_anyway": "saving and resuming", "ds3_gather_for_generation": "several devices"}
# What `--help` says of options whose own texts are about other trainers.
HELPS = {
    "bf16": "Compute in bfloat16 (autocast); by default where a GPU supports it, and not with fp16.",
    "output_dir": "Folder for the model, checkpoints and logs; trainer_output by default.",
    "resume_from_checkpoint": "A checkpoint's folder; true: the last one in output_dir.",
    "debug": "Alone: show the traceback of an error. With values 'underflow_overflow' (overflow in activations) or "
    "'tpu_metrics_debug': what the Trainer watches.",
    "use_cpu": "Leave a GPU alone.",
}
# Begins the help of fields that the classic loop does not read, which no command runs.
ONLINE = "train(): "
# Of classic configs: kept for the record there, and of no use to a command.
OLDER = {*ALIASES, *NOT_READ_BACK, *WITHOUT_EFFECT, "forward_batch_size", "exp_name", "task_name", "model_name"}
OLDER |= {"query_dataset", "reward_model", "init_kl_coef", "steps"}
# What scripts read, and the trainer sets.
OLDER |= {"is_encoder_decoder", "is_peft_model", "backward_batch_size", "global_batch_size"}
OLDER |= {"global_backward_batch_size"}
OLDER |= set(TRL012Options.__annotations__) - {"total_episodes", "ds3_gather_for_generation"}


def training_title(name: str) -> str:
    """The group of an option of `TrainingArguments`."""
    if name in OF_SCRIPTS:
        return OLDER_NAMES
    return next((title for title, pattern in TRAINING_GROUPS if re.match(pattern, name)), OTHER_TRAINING)


def apa_title(name: str) -> str:
    """The group of an option of `APAConfig`."""
    if name in OLDER:
        return OLDER_NAMES
    if name in UNREAD_ONLINE:
        return NO_EFFECT
    if name in SAMPLING:
        return "sampling"
    if name in VLLMOptions.__dataclass_fields__:
        return "sampling with vLLM"
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
    helps = {
        field.name: _capitalized(text.removeprefix(ONLINE))
        for field in fields(APAConfig)
        if (text := field.metadata.get("help", "")).startswith(ONLINE)
    }
    helps |= {
        "sft_model_path": "Another name of model_name_or_path.",
        "reward_model_path": "Another name of reward_model_name_or_path, for one reward model.",
    }
    return Part(APAConfig, apa_title, names, {**helps, **HELPS})


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
