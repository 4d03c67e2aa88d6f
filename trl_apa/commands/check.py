"""`trl-apa check`: whether the numbers of a model on this machine can be trusted, in a table."""

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trl_apa.commands.options import CommandParser, Part
from trl_apa.config.fields import option


# What computes is imported where it is used, so that `--help` answers at once.
if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import ModelConfig

    from trl_apa.checking import Report
    from trl_apa.config.apa import APAConfig


NEW_LORA = "lora"


@dataclass
class CheckArguments:
    """The model, how it is loaded, and the run that is meant."""

    model: str | None = option(None, "Folder or hub name of a language model, or of an adapter on its base.")
    peft: str | None = option(
        None, "'lora': new LoRA adapters on the model, as quantization needs them.", choices=[NEW_LORA]
    )
    lora_r: int = option(16, "Rank of new adapters.")
    lora_target_modules: list[str] | None = option(["all-linear"], "Layers with adapters; 'default' is peft's choice.")
    quantization: str | None = option(None, "Quantize the base below adapters.", choices=["8bit", "4bit"])
    device: str | None = option(None, "Where to check; a GPU by default, if there is one.", choices=["cpu", "cuda"])
    dtype: str | None = option(
        None,
        "Type of unquantized weights; bfloat16 with quantization and float32 without by default.",
        choices=["float32", "bfloat16", "float16"],
    )
    bf16: bool = option(False, "Compute in bfloat16 (autocast).")
    attn_implementation: str | None = option(None, "Attention: sdpa, eager, flash_attention_2, ...")
    value_model: str = option("separate", "The value model: separate, adapter, head, or a checkpoint.")
    advantage_estimator: str = option("gae", "Of the run to check for; 'group', say, has no value model.")
    max_prompt_length: int | None = option(
        None, "Longest prompt of the run to check for, tokens; that of prompts by default."
    )
    max_completion_length: int = option(64, "Longest response of the run to check for, tokens.")
    gradient_checkpointing: bool = option(False, "Keep each layer's input only and compute the rest twice.")
    prompts: str | None = option(None, "File of texts to read, one a line; by default four questions.")
    use_vllm: bool = option(False, "Compare with vLLM's log-probs too.")
    trust_remote_code: bool = option(False, "Let code that comes with the model run.")
    json: bool = option(False, "Print the report as JSON.")

    def model_name(self) -> str:
        """The model.

        Raises:
            ValueError: if none is named.
        """
        if self.model is None:
            raise ValueError("model is not set: name a folder or a hub name")
        return self.model

    def model_config(self) -> "ModelConfig":
        """The same for the loader."""
        from trl import ModelConfig

        dtype = self.dtype or ("bfloat16" if self.quantization else "float32")
        bits = {"load_in_8bit": self.quantization == "8bit", "load_in_4bit": self.quantization == "4bit"}
        return ModelConfig(
            model_name_or_path=self.model, dtype=dtype, attn_implementation=self.attn_implementation, **bits
        )

    def peft_config(self) -> "LoraConfig | None":
        """New adapters, if they are asked for; an adapter by name brings its own."""
        from peft import LoraConfig

        from trl_apa.models.gguf import adapter_config_file, load_config

        is_adapter = adapter_config_file(self.model_name()) is not None
        if is_adapter or (self.peft is None and self.quantization is None):
            return None
        encoder_decoder = load_config(self.model_name(), trust_remote_code=self.trust_remote_code).is_encoder_decoder
        targets = self.lora_target_modules or ["all-linear"]
        alone = {"all-linear": "all-linear", "default": None}
        return LoraConfig(
            r=self.lora_r,
            target_modules=alone.get(targets[0], targets) if len(targets) == 1 else targets,
            task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
        )

    def config(self, folder: str) -> "APAConfig":
        """The options of the run that is meant."""
        from trl_apa.config.apa import APAConfig

        return APAConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=self.device == "cpu",
            bf16=self.bf16,
            batch_size=4,
            mini_batch_size=1,
            advantage_estimator=self.advantage_estimator,
            gradient_checkpointing=self.gradient_checkpointing,
            max_prompt_length=self.max_prompt_length,
            max_completion_length=self.max_completion_length,
            use_vllm=self.use_vllm,
            disable_tqdm=True,
        )


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        "check",
        "Measure on a model and a machine whether log-probs, gradients, sampling, saving and sizes are right. "
        "Exit status 1 if something is wrong.",
        Part(CheckArguments, lambda name: "model"),
        positional="[MODEL]",
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    (arguments,) = make_parser().build(make_parser().parse(argv))
    arguments.model_name()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no GPU")
    prompts = None if arguments.prompts is None else _lines(arguments.prompts)
    report = check(arguments, prompts)
    if _watched():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        print("\n".join(report.lines(colour=sys.stdout is not None and sys.stdout.isatty())))
    return 0 if report.ok else 1


def check(arguments: CheckArguments, prompts: list[str] | None = None) -> "Report":
    """Load a model as a run would, make its trainer, and check its networks.

    A trainer that refuses what it is given, because sizes do not fit say, is the finding that something is wrong.

    Raises:
        ValueError: if the model or its tokenizer cannot be loaded.
    """
    from trl_apa.checking import Finding, Report
    from trl_apa.commands.models import load_policy, load_tokenizer
    from trl_apa.trainer.apa import APATrainer

    name, loading, trust = arguments.model_name(), arguments.model_config(), arguments.trust_remote_code
    tokenizer = load_tokenizer(name, loading, trust)
    model = load_policy(name, loading, trust)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no dataset")
        try:
            trainer = APATrainer(
                arguments.config(folder),
                model,
                processing_class=tokenizer,
                value_model=None if arguments.value_model == "separate" else arguments.value_model,
                peft_config=arguments.peft_config(),
            )
        except ValueError as error:
            finding = Finding("construction of the trainer", False, str(error))
            return Report(name, arguments.device or "this machine", (finding,))
        return trainer.check(prompts, tell=_tell if _watched() else None)


def _lines(path: str) -> list[str]:
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"prompts={path!r} has no text: it should have one prompt per line")
    return lines


def _watched() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _tell(name: str) -> None:
    print(f"\r\033[Kchecking: {name} ...", end="", file=sys.stderr, flush=True)
