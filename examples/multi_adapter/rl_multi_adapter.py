"""Policy and reward model as two adapters on one quantised base, which is in memory once for both: aligned by APA.

The reward adapter was trained on the same base with `task_type="SEQ_CLS"`. See `examples/README.md`.
"""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer, BitsAndBytesConfig, HfArgumentParser, PreTrainedTokenizerBase

from trl_apa import APAConfig, APATrainer, AutoModelForCausalLMWithValueHead, set_seed
from trl_apa.data import prompts, read_preferences


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    model_name: str = option("huggyllama/llama-7b", "Base of policy and reward model: folder or hub name.")
    rm_adapter: str = option("trl-lib/llama-7b-hh-rm-adapter", "The reward model's adapter: folder or hub name.")
    dataset_name: str = option("Anthropic/hh-rlhf", "Dialogues in that layout: hub name or file.")
    dataset_rows: int = option(10_000, "Dialogues that are read.")
    max_query_length: int = option(512, "Prompts with more tokens are left out.")
    load_in_4bit: bool = option(True, "Load the base with bitsandbytes' nf4 weights.")
    loss_type: str = option("apa", "'apa', 'awr' or 'ppo'.")
    kl_coef: float | None = option(None, "lambda of APA and AWR; PPO's initial coefficient.")
    value_model: str = option("separate", "'separate': APA's, one more base; 'head': on the policy, as classic's.")
    learning_rate: float = option(1e-5, "Of the policy's adapter and the value model.")
    batch_size: int = option(32, "Prompts an iteration and process.")
    mini_batch_size: int = option(4, "Rollouts a forward pass of the update.")
    gradient_accumulation_steps: int = option(2, "Forward passes an optimizer step.")
    max_new_tokens: int = option(128, "Most tokens of a response.")
    steps: int = option(10_000, "Prompts to learn from, on each process.")
    output_dir: str = option("llama-7b-hh-apa", "Where to.")
    log_with: str = option("none", "Tracker: 'wandb', 'tensorboard', ...")
    seed: int = option(0, "Of everything random.")


def build_config(script: ScriptArguments) -> APAConfig:
    return APAConfig(
        output_dir=script.output_dir,
        model_name=script.model_name,
        log_with=script.log_with,
        seed=script.seed,
        steps=script.steps,
        loss_type=script.loss_type,
        kl_coef=script.kl_coef,
        learning_rate=script.learning_rate,
        batch_size=script.batch_size,
        mini_batch_size=script.mini_batch_size,
        gradient_accumulation_steps=script.gradient_accumulation_steps,
    )


def build_dataset(script: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Dialogues up to the last turn of the assistant, which the policy is to write."""
    queries = prompts(read_preferences(script.dataset_name, limit=script.dataset_rows).pairs)
    dataset = Dataset.from_dict({"query": queries, "input_ids": tokenizer(queries)["input_ids"]})
    return dataset.filter(lambda row: len(row["input_ids"]) <= script.max_query_length).with_format("torch")


def collator(rows: list[dict]) -> dict:
    return {name: [row[name] for row in rows] for name in rows[0]}


def build_model(script: ScriptArguments) -> AutoModelForCausalLMWithValueHead:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        script.model_name,
        device_map={"": Accelerator().device},
        quantization_config=nf4 if script.load_in_4bit else None,
        peft_config=LoraConfig(r=16, lora_alpha=32, bias="none", task_type="CAUSAL_LM"),
        reward_adapter=script.rm_adapter,
    )


def main() -> None:
    (script,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()
    config = build_config(script)
    set_seed(config.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A score belongs to a text's last token, which then is the last of its row.
    tokenizer.padding_side = "left"
    dataset = build_dataset(script, tokenizer)
    trainer = APATrainer(
        config,
        build_model(script),
        tokenizer=tokenizer,
        dataset=dataset,
        data_collator=collator,
        value_model=script.value_model,
    )

    generation_kwargs = {
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": tokenizer.pad_token_id,
        "max_new_tokens": script.max_new_tokens,
    }
    for iteration, batch in enumerate(tqdm(trainer.dataloader)):
        if iteration >= config.total_ppo_epochs:
            break
        question_tensors = batch["input_ids"]
        response_tensors = trainer.generate(question_tensors, return_prompt=False, **generation_kwargs)
        batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)

        texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
        inputs = tokenizer(texts, padding=True, return_tensors="pt").to(trainer.accelerator.device)
        raw_rewards = trainer.accelerator.unwrap_model(trainer.model).compute_reward_score(**inputs)
        # Of two labels the second one is "better".
        rewards = list(raw_rewards[:, -1, -1])

        stats = trainer.step(question_tensors, response_tensors, rewards)
        trainer.log_stats(stats, batch, rewards)
    trainer.save_pretrained(script.output_dir)


if __name__ == "__main__":
    main()
