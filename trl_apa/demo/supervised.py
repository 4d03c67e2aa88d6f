"""Supervised fine-tuning with TRL, and the settings that it shares with the training of the reward model."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig

from trl_apa.trl_trainers import QuietSFTTrainer


Tick = Callable[[int, float | None], None]


class TickCallback(TrainerCallback):
    """Calls `tick(steps done, loss)` after each optimizer step; the loss is None where none is logged."""

    def __init__(self, tick: Tick):
        self.tick = tick

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tick(state.global_step, None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.tick(state.global_step, float(logs["loss"]))


def training_options(output_dir: str, seed: int, learning_rate: float, max_steps: int) -> dict[str, Any]:
    """float32 on the CPU, batches of 32, nothing written to disk, no tracker."""
    return {
        "output_dir": output_dir,
        "seed": seed,
        "learning_rate": learning_rate,
        "max_steps": max_steps,
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "cosine",
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
    }


def run_trainer(trainer: Trainer) -> None:
    """Train without printing the logs, and leave the model ready for use."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.eval()


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: list[dict[str, str]],
    options: dict[str, Any],
    tick: Tick,
) -> None:
    """Teach `model`, in place, to imitate the demonstrations; the loss covers the answers only.

    Args:
        demonstrations: rows with the text columns `prompt` and `completion`.
        options: from `training_options`.
        tick: told of every step.
    """
    prompts = tokenizer([row["prompt"] for row in demonstrations])["input_ids"]
    answers = tokenizer([row["completion"] for row in demonstrations])["input_ids"]
    # Tokenized in one go: the trainer would do it row by row, which takes a quarter of this stage's time.
    rows = [
        {
            "input_ids": prompt + answer + [tokenizer.eos_token_id],
            "completion_mask": [0] * len(prompt) + [1] * (len(answer) + 1),
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    trainer = QuietSFTTrainer(
        model=model,
        args=SFTConfig(**options, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[TickCallback(tick)],
    )
    run_trainer(trainer)
