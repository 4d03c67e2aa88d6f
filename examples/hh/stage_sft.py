"""Supervised fine-tuning on the preferred responses."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from options import UserError
from progress import say, use_progress_lines
from small_model import PAD, new_model, train_tokenizer
from texts import encode_prompt, encode_response
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from trl_apa.data import Preference, sft_rows
from trl_apa.trl_trainers import QuietSFTTrainer


def run(options: argparse.Namespace, pairs: Sequence[Preference], output_dir: Path) -> dict[str, Any]:
    """Train the base model, or a new small one, and save it with its tokenizer in `output_dir`."""
    model, tokenizer = load_base(options, pairs)
    check_positions(model, options)
    rows = [encode_row(tokenizer, row, options) for row in sft_rows(pairs)]
    say("sft", f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens, {len(rows)} dialogues")
    trainer = QuietSFTTrainer(
        model=model,
        args=SFTConfig(
            learning_rate=options.sft_learning_rate,
            num_train_epochs=options.sft_epochs,
            per_device_train_batch_size=options.sft_batch_size,
            max_length=None,
            **common_arguments(options, output_dir),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    use_progress_lines(trainer, "sft", "loss", "mean_token_accuracy")
    loss = trainer.train().training_loss
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return {"parameters": model.num_parameters(), "dialogues": len(rows), "mean_loss": loss}


def load_base(
    options: argparse.Namespace, pairs: Sequence[Preference]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and its tokenizer: those of `--model`, or new ones, the tokenizer trained on `pairs`."""
    if options.model is None:
        texts = (text for pair in pairs for text in (pair.prompt + pair.chosen, pair.rejected))
        tokenizer = train_tokenizer(texts, options.vocab_size)
        max_length = options.max_prompt_length + max(options.max_target_length, options.max_new_tokens)
        return new_model(tokenizer, options.hidden_size, options.num_layers, max_length, options.seed), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    if tokenizer.pad_token is None:
        # Pythia has a padding token in its vocabulary that its tokenizer does not name.
        tokenizer.pad_token = PAD if PAD in tokenizer.get_vocab() else tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), tokenizer


def encode_row(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, str], options: argparse.Namespace
) -> dict[str, list[int]]:
    """One dialogue as token ids and labels.

    A model without pre-training learns the prompts as well, having nothing else to learn the language from.
    """
    prompt = encode_prompt(tokenizer, row["prompt"], options.max_prompt_length)
    response = encode_response(tokenizer, row["completion"], options.max_target_length)
    ids = prompt + response
    labels = ids if options.model is None else [-100] * len(prompt) + response
    return {"input_ids": ids, "labels": labels}


def check_positions(model: PreTrainedModel, options: argparse.Namespace) -> None:
    """Refuse lengths that the model has no positions for, before anything is trained."""
    wanted = options.max_prompt_length + max(options.max_target_length, options.max_new_tokens)
    available = getattr(model.config, "max_position_embeddings", None)
    if available is not None and wanted > available:
        raise UserError(
            f"a prompt and a response may take {wanted} tokens, but the model has {available} positions: lower "
            "--max-prompt-length, --max-target-length or --max-new-tokens"
        )


def common_arguments(options: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """Training arguments that SFT and the reward model share."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(output_dir),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "seed": options.seed,
        "use_cpu": not cuda,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": False,
        "dataloader_pin_memory": cuda,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 50,
        "disable_tqdm": True,
    }
