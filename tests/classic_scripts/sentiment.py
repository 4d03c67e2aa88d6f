"""Sentiment control as a script for TRL 0.11 would do it; the trainer's import is the line that a user changes.

One more line is transformers 5's doing: `top_k=None` for `return_all_scores=True`, with the labels sorted by score.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, pipeline

from trl_apa import APATrainer as PPOTrainer, APAConfig as PPOConfig
from trl_apa import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, set_seed
from trl_apa.core import LengthSampler


@dataclass
class ScriptArguments:
    use_seq2seq: bool = field(default=False, metadata={"help": "the policy is an encoder-decoder"})
    use_peft: bool = field(default=False, metadata={"help": "train adapters"})
    lora_alpha: float = field(default=16, metadata={"help": "their scale"})
    lora_r: int = field(default=16, metadata={"help": "their rank"})


args, ppo_config = HfArgumentParser((ScriptArguments, PPOConfig)).parse_args_into_dataclasses()
model_class = AutoModelForSeq2SeqLMWithValueHead if args.use_seq2seq else AutoModelForCausalLMWithValueHead
set_seed(ppo_config.seed)

tokenizer = AutoTokenizer.from_pretrained(ppo_config.model_name)
tokenizer.pad_token_id = tokenizer.eos_token_id


def make_dataset(path, shortest=2, longest=8):
    ds = load_dataset("json", data_files=path, split="train")
    ds = ds.rename_columns({"text": "review"})
    ds = ds.filter(lambda row: len(row["review"]) > 200, batched=False)
    query_size = LengthSampler(shortest, longest)

    def cut(row):
        row["input_ids"] = tokenizer.encode(row["review"])[: query_size()]
        row["query"] = tokenizer.decode(row["input_ids"])
        return row

    ds = ds.map(cut, batched=False)
    ds.set_format(type="torch")
    return ds


def collator(data):
    return dict((key, [d[key] for d in data]) for key in data[0])


if args.use_peft:
    peft_config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, bias="none", task_type="CAUSAL_LM")
    ref_model = None
    device_map = {"": Accelerator().local_process_index}
else:
    peft_config = None
    ref_model = model_class.from_pretrained(ppo_config.model_name)
    device_map = None
model = model_class.from_pretrained(ppo_config.model_name, device_map=device_map, peft_config=peft_config)

dataset = make_dataset(ppo_config.query_dataset)
ppo_trainer = PPOTrainer(ppo_config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)

device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"
task, reward_name = ppo_config.reward_model.split(":")
assert ppo_trainer.accelerator.state.deepspeed_plugin is None
sentiment_pipe = pipeline(task, model=reward_name, device=device)
sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 16}


def positive_logits(texts):
    outputs = sentiment_pipe(texts, **sent_kwargs)
    return [torch.tensor(next(o["score"] for o in output if o["label"] == "POSITIVE")) for output in outputs]


generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
    "max_new_tokens": 12,
    "batch_size": 32,
}
history = []
for epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    query_tensors = batch["input_ids"]
    response_tensors, ref_response_tensors = ppo_trainer.generate(
        query_tensors, return_prompt=False, generate_ref_response=True, **generation_kwargs
    )
    batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
    batch["ref_response"] = tokenizer.batch_decode(ref_response_tensors, skip_special_tokens=True)

    rewards = positive_logits([q + r for q, r in zip(batch["query"], batch["response"])])
    batch["ref_rewards"] = positive_logits([q + r for q, r in zip(batch["query"], batch["ref_response"])])

    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response", "ref_response", "ref_rewards"])
    history.append({**stats, "ref_rewards": float(torch.stack(batch["ref_rewards"]).mean()), "epoch": epoch})

ppo_trainer.save_pretrained(ppo_config.output_dir)
Path(ppo_config.output_dir, "history.json").write_text(json.dumps(history, default=lambda array: array.tolist()))
