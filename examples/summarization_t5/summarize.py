"""Flan-T5 learns to summarise conversations as people did: an encoder-decoder policy, aligned by APA.

The reward compares a summary with the one that a person wrote (ROUGE-1). See `examples/README.md`.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from trl_apa import APAConfig, APATrainer, AutoModelForSeq2SeqLMWithValueHead, create_reference_model, set_seed
from trl_apa.data import load_table


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    max_query_length: int = option(512, "Conversations with more tokens are left out.")
    max_new_tokens: int = option(64, "Most tokens of a summary.")


def parse_arguments() -> tuple[ScriptArguments, APAConfig]:
    parser = HfArgumentParser((ScriptArguments, APAConfig))
    parser.set_defaults(
        model_name="google/flan-t5-base",
        query_dataset="knkarthick/dialogsum",
        output_dir="flan-t5-dialogsum",
        batch_size=32,
        report_to="none",
        # The reward needs the column of the summaries.
        remove_unused_columns=False,
    )
    return parser.parse_args_into_dataclasses()


def build_dataset(config: APAConfig, script: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Conversations as prompts, each with its summary; those that are too long left out."""
    dataset = load_table(config.query_dataset)

    def to_prompts(rows: dict) -> dict:
        queries = [f"Summarize the following conversation.\n\n{text}\n\nSummary:" for text in rows["dialogue"]]
        return {"query": queries, "input_ids": tokenizer(queries)["input_ids"], "summary": rows["summary"]}

    dataset = dataset.map(to_prompts, batched=True, remove_columns=dataset.column_names)
    return dataset.filter(lambda row: len(row["input_ids"]) <= script.max_query_length).with_format("torch")


def collator(rows: list[dict]) -> dict:
    return {name: [row[name] for row in rows] for name in rows[0]}


def rouge1(text: str, reference: str) -> float:
    """F1 of the words of `text` and of `reference`, each counted as often as it occurs in both; from 0 to 1."""
    ours, theirs = (Counter(re.findall(r"\w+", t.lower())) for t in (text, reference))
    words = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / words if words else 0.0


def main() -> None:
    script, config = parse_arguments()
    set_seed(config.seed)

    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    dataset = build_dataset(config, script, tokenizer)
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(config.model_name)
    ref_model = create_reference_model(model)
    trainer = APATrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)

    generation_kwargs = {
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "max_new_tokens": script.max_new_tokens,
        "batch_size": config.batch_size,
    }
    for iteration, batch in enumerate(tqdm(trainer.dataloader)):
        if iteration >= config.total_ppo_epochs:
            break
        query_tensors = batch["input_ids"]
        # What the decoder wrote, the token that it starts from included; `step` knows that token.
        response_tensors = trainer.generate(query_tensors, **generation_kwargs)
        batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)

        pairs = zip(batch["response"], batch["summary"], strict=True)
        rewards = [torch.tensor(rouge1(text, reference)) for text, reference in pairs]

        stats = trainer.step(query_tensors, response_tensors, rewards)
        trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response", "summary"])
    trainer.save_pretrained(config.output_dir)


if __name__ == "__main__":
    main()
