"""Teach GPT-2 to write film reviews that a sentiment classifier likes: the classic sentiment script, aligned by APA.

The options are those below and all of `APAConfig`, `--loss_type ppo` among them. See `examples/README.md`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, pipeline

from trl_apa import APAConfig, APATrainer, AutoModelForCausalLMWithValueHead, LengthSampler, set_seed
from trl_apa.data import load_table


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    use_peft: bool = option(False, "Train LoRA adapters instead of the whole model.")
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "Their scale, times the rank.")
    label: str = option("POSITIVE", "The classifier's label whose logit is the reward.")
    min_review_characters: int = option(200, "Shorter reviews are left out.")
    query_min_length: int = option(2, "Least tokens of a review's beginning, the query.")
    query_max_length: int = option(8, "One more than the most tokens of it.")
    output_min_length: int = option(4, "Least tokens of a response.")
    output_max_length: int = option(16, "One more than the most tokens of a response.")


def parse_arguments() -> tuple[ScriptArguments, APAConfig]:
    parser = HfArgumentParser((ScriptArguments, APAConfig))
    parser.set_defaults(
        model_name="lvwerra/gpt2-imdb",
        query_dataset="stanfordnlp/imdb",
        reward_model="sentiment-analysis:lvwerra/distilbert-imdb",
        output_dir="gpt2-imdb-positive",
        report_to="none",
    )
    return parser.parse_args_into_dataclasses()


def build_dataset(config: APAConfig, script: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Reviews cut after a few tokens, a random number of them, for the policy to continue."""
    dataset = load_table(config.query_dataset)
    dataset = dataset.filter(lambda row: len(row["text"]) > script.min_review_characters)
    query_length = LengthSampler(script.query_min_length, script.query_max_length)

    def tokenize(row: dict) -> dict:
        ids = tokenizer.encode(row["text"])[: query_length()]
        return {"input_ids": ids, "query": tokenizer.decode(ids)}

    return dataset.map(tokenize, remove_columns=dataset.column_names).with_format("torch")


def collator(rows: list[dict]) -> dict:
    return {name: [row[name] for row in rows] for name in rows[0]}


def build_reward(
    config: APAConfig, script: ScriptArguments, device: torch.device
) -> Callable[[list[str]], list[torch.Tensor]]:
    """Texts to the classifier's logits for the label."""
    task, name = config.reward_model.split(":", 1)
    classifier = pipeline(task, model=name, device=device)

    def reward(texts: list[str]) -> list[torch.Tensor]:
        # `top_k=None` gives every label, the likeliest first, so the one that is wanted has to be looked up.
        outputs = classifier(texts, top_k=None, function_to_apply="none", batch_size=16)
        return [torch.tensor(next(o["score"] for o in output if o["label"] == script.label)) for output in outputs]

    return reward


def main() -> None:
    script, config = parse_arguments()
    set_seed(config.seed)

    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dataset = build_dataset(config, script, tokenizer)
    lora = LoraConfig(r=script.lora_r, lora_alpha=script.lora_alpha, task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        config.model_name, peft_config=lora if script.use_peft else None
    )
    trainer = APATrainer(config, model, tokenizer=tokenizer, dataset=dataset, data_collator=collator)

    reward = build_reward(config, script, trainer.accelerator.device)

    generation_kwargs = {
        "min_length": -1,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": tokenizer.pad_token_id,
        "batch_size": config.batch_size,
    }
    output_length = LengthSampler(script.output_min_length, script.output_max_length)
    for iteration, batch in enumerate(tqdm(trainer.dataloader)):
        if iteration >= config.total_ppo_epochs:
            break
        query_tensors = batch["input_ids"]
        response_tensors, ref_response_tensors = trainer.generate(
            query_tensors,
            return_prompt=False,
            generate_ref_response=True,
            length_sampler=output_length,
            **generation_kwargs,
        )
        batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
        batch["ref_response"] = tokenizer.batch_decode(ref_response_tensors, skip_special_tokens=True)

        rewards = reward([q + r for q, r in zip(batch["query"], batch["response"], strict=True)])
        batch["ref_rewards"] = reward([q + r for q, r in zip(batch["query"], batch["ref_response"], strict=True)])

        stats = trainer.step(query_tensors, response_tensors, rewards)
        trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response", "ref_response", "ref_rewards"])
    trainer.save_pretrained(config.output_dir)


if __name__ == "__main__":
    main()
