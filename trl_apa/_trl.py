"""The only importer of what TRL does not document as public, so that a TRL release breaks one file at most."""

from typing import TYPE_CHECKING, Any

from trl_apa.module_paths import lazy_names


if TYPE_CHECKING:
    from torch import nn
    from trl.chat_template_utils import parse_response
    from trl.import_utils import is_vllm_available
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_logprob import _use_triton
    from trl.models import prepare_deepspeed
    from trl.models.utils import add_hooks, remove_hooks
    from trl.trainer.base_config import _BaseConfig
    from trl.trainer.base_trainer import _BaseTrainer
    from trl.trainer.utils import (
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        entropy_from_logits,
        get_comet_experiment_url,
        get_trackio_space_url,
        print_prompt_completions_sample,
        selective_log_softmax,
        selective_log_softmax_and_entropy,
    )


__all__ = [
    "_CHUNKED_LOGPROB_CHUNK_SIZE",
    "ChunkedLogProbFunction",
    "_BaseConfig",
    "_BaseTrainer",
    "_use_triton",
    "add_hooks",
    "entropy_from_logits",
    "get_comet_experiment_url",
    "get_trackio_space_url",
    "is_peft_model",
    "is_vllm_available",
    "parse_response",
    "prepare_deepspeed",
    "print_prompt_completions_sample",
    "remove_hooks",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "vllm_generation_class",
]

# Each is imported when it is used: options need the first alone.
__getattr__ = lazy_names(
    __name__,
    {
        "_BaseConfig": "trl.trainer.base_config",
        "_BaseTrainer": "trl.trainer.base_trainer",
        "ChunkedLogProbFunction": "trl.kernels",
        "_use_triton": "trl.kernels.chunked_logprob",
        "is_vllm_available": "trl.import_utils",
        "parse_response": "trl.chat_template_utils",
        "prepare_deepspeed": "trl.models",
        **dict.fromkeys(("add_hooks", "remove_hooks"), "trl.models.utils"),
        **dict.fromkeys(
            (
                "_CHUNKED_LOGPROB_CHUNK_SIZE",
                "entropy_from_logits",
                "get_comet_experiment_url",
                "get_trackio_space_url",
                "print_prompt_completions_sample",
                "selective_log_softmax",
                "selective_log_softmax_and_entropy",
            ),
            "trl.trainer.utils",
        ),
    },
)

# The names under which wrappers hold a model.
WRAPPED = {"module", "_orig_mod"}


def is_peft_model(model: "nn.Module") -> bool:
    """Whether `model` is a PEFT model, or an engine's or compiler's wrapper around one.

    Accelerate's function reads the metadata of packages from disk at each call, milliseconds of each micro-batch, so
    it is called only for wrappers.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return True
    if WRAPPED.isdisjoint(model._modules):
        return False
    from accelerate.utils import is_peft_model as is_in_any_wrapper

    return bool(is_in_any_wrapper(model))


def vllm_generation_class() -> Any:
    """TRL's class that talks to vLLM; importing it imports vLLM where that is installed."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration
