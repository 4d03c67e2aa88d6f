"""Two adapters on one base, policy and reward, as a script for TRL 0.11 would do it; one import line differs."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer, BitsAndBytesConfig, HfArgumentParser

from trl_apa import APATrainer as PPOTrainer, APAConfig as PPOConfig, AutoModelForCausalLMWithValueHead
from trl_apa.core import LengthSampler


@dataclass
class ScriptArguments:
    model_name: str = field(default="")
    dataset_name: str = field(default="")
    rm_adapter: str = field(default="")
    log_with: str | None = field(default=None)
    output_dir: str = field(default="")
    seed: int = field(default=0)


script_args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]

lora_config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
nf4_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    script_args.model_name,
    device_map={"": 0},
    peft_config=lora_config,
    quantization_config=nf4_config,
    reward_adapter=script_args.rm_adapter,
)
tokenizer = AutoTokenizer.from_pretrained(script_args.model_name)
tokenizer.pad_token = tokenizer.eos_token

input_size = LengthSampler(4, 10)


def tokenize(example):
    example["input_ids"] = tokenizer.encode(example["chosen"])[: input_size()]
    example["query"] = tokenizer.decode(example["input_ids"])
    return example


dataset = load_dataset("json", data_files=script_args.dataset_name, split="train[:50%]")
dataset = dataset.map(tokenize, batched=False)
dataset.set_format("torch")


def collator(data):
    return dict((key, [d[key] for d in data]) for key in data[0])


config = PPOConfig(
    model_name=script_args.model_name,
    log_with=script_args.log_with,
    learning_rate=1e-2,
    batch_size=8,
    mini_batch_size=2,
    gradient_accumulation_steps=2,
    optimize_cuda_cache=True,
    seed=script_args.seed,
)
ppo_trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer, dataset=dataset, data_collator=collator)

generation_kwargs = {
    "top_k": 0.0,
    "top_p": 0.9,
    "do_sample": True,
    "pad_token_id": tokenizer.pad_token_id,
    "max_new_tokens": 8,
}
history = []
for epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    question_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(question_tensors, return_prompt=False, **generation_kwargs)
    batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)

    texts = [q + r for q, r in zip(batch["query"], batch["response"])]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(ppo_trainer.accelerator.device)
    raw_rewards = ppo_trainer.accelerator.unwrap_model(ppo_trainer.model).compute_reward_score(**inputs)
    rewards = [raw_rewards[i, -1, 1] for i in range(len(raw_rewards))]

    stats = ppo_trainer.step(question_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    history.append({**stats, "epoch": epoch})

ppo_trainer.save_pretrained(script_args.output_dir)
model.eval()
probe = dataset[0]["input_ids"].unsqueeze(0)
torch.save({"probe": probe, "logits": model(probe)[0], **model.state_dict()}, Path(script_args.output_dir, "end.bin"))
Path(script_args.output_dir, "history.json").write_text(json.dumps(history, default=lambda array: array.tolist()))
