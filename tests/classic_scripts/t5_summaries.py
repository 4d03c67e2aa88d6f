"""Summaries by an encoder-decoder as a script for TRL 0.11 would write them; one import line differs.

One more line is transformers 5's doing: `top_k=None` for `return_all_scores=True`, with the labels sorted by score.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from tqdm import tqdm
from transformers import AutoTokenizer, pipeline

from trl_apa import APATrainer as PPOTrainer, APAConfig as PPOConfig
from trl_apa import AutoModelForSeq2SeqLMWithValueHead, create_reference_model, set_seed
from trl_apa.core import LengthSampler


model_name, dataset_name, reward_name, output_dir = sys.argv[1:]
config = PPOConfig(
    model_name=model_name,
    learning_rate=1e-2,
    ppo_epochs=2,
    mini_batch_size=4,
    batch_size=16,
    log_with=None,
    seed=1,
    steps=48,
)
set_seed(config.seed)

tokenizer = AutoTokenizer.from_pretrained(config.model_name)


def tokenize(sample):
    prompt = f"Summarize the following conversation.\n\n{sample['dialogue']}\n\nSummary:\n"
    sample["input_ids"] = tokenizer.encode(prompt)
    sample["query"] = tokenizer.decode(sample["input_ids"])
    return sample


dataset = load_dataset("json", data_files=dataset_name, split="train")
dataset = dataset.filter(lambda x: 20 < len(x["dialogue"]) <= 1000, batched=False)
dataset = dataset.map(tokenize, batched=False)
dataset.set_format(type="torch")
splits = dataset.train_test_split(test_size=0.2, shuffle=False, seed=42)


def collator(data):
    return dict((key, [d[key] for d in data]) for key in data[0])


model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(config.model_name)
ref_model = create_reference_model(model)
ppo_trainer = PPOTrainer(
    config=config,
    model=model,
    ref_model=ref_model,
    tokenizer=tokenizer,
    dataset=splits["train"],
    data_collator=collator,
)
assert ppo_trainer.is_encoder_decoder

judge = pipeline("sentiment-analysis", model=reward_name, device=ppo_trainer.accelerator.device)
output_length_sampler = LengthSampler(5, 9)
generation_kwargs = {"min_length": 5, "top_k": 0.0, "top_p": 1.0, "do_sample": True}

history = []
for _step, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    prompt_tensors = batch["input_ids"]
    summary_tensors = []
    for prompt_tensor in prompt_tensors:
        generation_kwargs["max_new_tokens"] = output_length_sampler()
        summary = ppo_trainer.generate(prompt_tensor, **generation_kwargs)
        summary_tensors.append(summary.squeeze())
    batch["response"] = [tokenizer.decode(r[1:].squeeze()) for r in summary_tensors]

    outputs = judge([q + r for q, r in zip(batch["query"], batch["response"])], top_k=None, function_to_apply="none")
    rewards = [torch.tensor(next(o["score"] for o in output if o["label"] == "POSITIVE")) for output in outputs]
    stats = ppo_trainer.step(prompt_tensors, summary_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    history.append({**stats, "starts": [int(r[0]) for r in summary_tensors]})

ppo_trainer.save_pretrained(output_dir)
Path(output_dir, "history.json").write_text(json.dumps(history, default=lambda array: array.tolist()))
