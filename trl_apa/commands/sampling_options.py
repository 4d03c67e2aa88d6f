"""Options of the commands that sample and do not train. Imports nothing heavy, so that `--help` answers at once.

Names, types and defaults are those of TRL's `ModelConfig` and of `APAConfig`, which are made from them after the
options were read; `tests/test_start_up.py` compares them.
"""

from dataclasses import dataclass

from trl_apa.commands.data_options import DataArguments
from trl_apa.commands.options import Part
from trl_apa.config.fields import Json, option


@dataclass
class LoadingOptions:
    """How models are loaded: fields of `ModelConfig`."""

    dtype: str | None = option(
        "float32",
        "Type of the weights; auto: the one that they are saved in.",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = option(
        None, "Attention: sdpa, eager, flash_attention_2 (needs the package flash-attn), ...; the model's by default."
    )
    load_in_8bit: bool = option(False, "Quantize the weights to 8 bits (bitsandbytes).")
    load_in_4bit: bool = option(False, "Quantize the weights to 4 bits (bitsandbytes).")
    bnb_4bit_quant_type: str = option(
        "nf4", "With load_in_4bit: type of the quantized weights.", choices=["fp4", "nf4"]
    )


@dataclass
class SamplingOptions:
    """How responses are sampled: fields of `APAConfig`."""

    temperature: float = option(1.0, "Of sampling.")
    top_p: float = option(1.0, "Sample from the likeliest tokens with this share of the probability; 1 is off.")
    top_k: int = option(0, "Sample from so many likeliest tokens; 0 is off.")
    max_completion_length: int = option(128, "Most tokens of a response.")
    stop_strings: list[str] | None = option(None, "Texts that end a response; they belong to it.")
    max_prompt_length: int | None = option(
        None, "Keep the last so many tokens of a prompt, of chat messages the last complete turns; all by default."
    )
    generation_batch_size: int | None = option(None, "Rows that are sampled at a time; all of a batch by default.")
    chat_template_kwargs: Json = option(None, "JSON: more arguments of the chat template, for chat messages.")
    seed: int = option(42, "Of sampling.")
    use_cpu: bool = option(False, "Leave a GPU alone.")
    bf16: bool | None = option(None, "Compute in bfloat16 (autocast); by default where a GPU supports it.")


def loading_part(options: type[LoadingOptions] = LoadingOptions) -> Part:
    """Loading and quantization.

    Args:
        options: those of the command.
    """
    return Part(options, lambda name: "quantization" if "bit" in name else "model")


def sampling_part(options: type[SamplingOptions]) -> Part:
    """Sampling, and what it runs on.

    Args:
        options: those of the command.
    """
    machine = ("use_cpu", "bf16")
    return Part(options, lambda name: "precision, memory and speed" if name in machine else "sampling")


def prompts_part() -> Part:
    """Where the prompts are, said for a command that has no rows to train on."""
    helps = {
        "dataset_test_split": "Split of a hub data set to read; train by default.",
        "eval_share": "Read this share of the rows alone: what training with the same eval_share holds out.",
        "max_eval_rows": "Read so many prompts at most.",
    }
    names = {"dataset_name", "dataset_config", "dataset_data_dir", "dataset_layout", "dataset_prompt_column"}
    return Part(DataArguments, lambda name: "prompts", {*names, *helps}, helps)
