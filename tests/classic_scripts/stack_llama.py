"""StackLLaMA's last stage as a script for TRL 0.11 would do it; the trainer's import is the line that a user changes.

Transformers 5 needs two more: `quantization_config` for `model_kwargs={"load_in_8bit": True}` of the reward pipeline,
and `top_k=None` for `return_all_scores=True`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import Adafactor, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser, pipeline

from trl_apa import APATrainer as PPOTrainer, APAConfig as PPOConfig, AutoModelForCausalLMWithValueHead, set_seed
from trl_apa.core import LengthSampler


@dataclass
class ScriptArguments:
    model_name: str = field(default="")
    tokenizer_name: str = field(default="")
    reward_model_name: str = field(default="")
    dataset_name: str = field(default="")
    log_with: str | None = field(default=None)
    learning_rate: float = field(default=1.41e-5)
    output_min_length: int = field(default=32)
    output_max_length: int = field(default=128)
    mini_batch_size: int = field(default=1)
    batch_size: int = field(default=32)
    ppo_epochs: int = field(default=4)
    gradient_accumulation_steps: int = field(default=4)
    adafactor: bool = field(default=False)
    early_stopping: bool = field(default=False)
    target_kl: float = field(default=0.1)
    reward_baseline: float = field(default=0.0)
    batched_gen: bool = field(default=False)
    save_freq: int | None = field(default=None)
    output_dir: str = field(default="runs/")
    seed: int = field(default=0)
    steps: int = field(default=20000)
    init_kl_coef: float = field(default=0.2)
    adap_kl_ctrl: bool = field(default=True)


script_args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
config = PPOConfig(
    steps=script_args.steps,
    model_name=script_args.model_name,
    learning_rate=script_args.learning_rate,
    log_with=script_args.log_with,
    batch_size=script_args.batch_size,
    mini_batch_size=script_args.mini_batch_size,
    gradient_accumulation_steps=script_args.gradient_accumulation_steps,
    optimize_cuda_cache=True,
    early_stopping=script_args.early_stopping,
    target_kl=script_args.target_kl,
    ppo_epochs=script_args.ppo_epochs,
    seed=script_args.seed,
    init_kl_coef=script_args.init_kl_coef,
    adap_kl_ctrl=script_args.adap_kl_ctrl,
    remove_unused_columns=False,
)
set_seed(config.seed)

tokenizer = AutoTokenizer.from_pretrained(script_args.tokenizer_name)
if getattr(tokenizer, "pad_token", None) is None:
    tokenizer.pad_token = tokenizer.eos_token


def prompts(examples):
    new = {"query": [], "input_ids": []}
    for question in examples["question"]:
        query = "Question: " + question + "\n\nAnswer: "
        new["query"].append(query)
        new["input_ids"].append(tokenizer(query, truncation=True)["input_ids"])
    return new


train_dataset = load_dataset("json", data_files=script_args.dataset_name, split="train")
dataset = train_dataset.map(prompts, batched=True, remove_columns=train_dataset.column_names)
dataset = dataset.filter(lambda x: len(x["input_ids"]) < 512, batched=False)
dataset.set_format(type="torch")


def collator(data):
    return dict((key, [d[key] for d in data]) for key in data[0])


current_device = Accelerator().local_process_index
lora_config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    config.model_name, load_in_8bit=True, device_map={"": current_device}, peft_config=lora_config
)
optimizer = None
if script_args.adafactor:
    optimizer = Adafactor(
        filter(lambda p: p.requires_grad, model.parameters()),
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        lr=config.learning_rate,
    )
ppo_trainer = PPOTrainer(
    config,
    model,
    ref_model=None,
    tokenizer=tokenizer,
    dataset=dataset,
    data_collator=collator,
    optimizer=optimizer,
)

device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"
sentiment_pipe = pipeline(
    "sentiment-analysis",
    model=script_args.reward_model_name,
    device_map={"": device},
    model_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    tokenizer=tokenizer,
    return_token_type_ids=False,
)
if sentiment_pipe.model.config.pad_token_id is None:
    sentiment_pipe.model.config.pad_token_id = sentiment_pipe.model.config.eos_token_id
sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 16, "truncation": True}

generation_kwargs = {
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.pad_token_id,
    "eos_token_id": 100_000,
}
output_length_sampler = LengthSampler(script_args.output_min_length, script_args.output_max_length)

history = []
for epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    if epoch >= config.total_ppo_epochs:
        break
    question_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(
        question_tensors, return_prompt=False, length_sampler=output_length_sampler, **generation_kwargs
    )
    batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)

    texts = [q + r for q, r in zip(batch["query"], batch["response"])]
    pipe_outputs = sentiment_pipe(texts, **sent_kwargs)
    rewards = [torch.tensor(output[0]["score"] - script_args.reward_baseline) for output in pipe_outputs]

    stats = ppo_trainer.step(question_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    if script_args.save_freq and epoch and epoch % script_args.save_freq == 0:
        ppo_trainer.save_pretrained(script_args.output_dir + f"step_{epoch}")
    history.append({**stats, "lengths": [len(r) for r in response_tensors], "rewards": [float(r) for r in rewards]})

print("optimizer", type(ppo_trainer.optimizer.optimizer).__name__)
model.eval()
probe = dataset[0]["input_ids"].unsqueeze(0)
torch.save({"probe": probe, "logits": model(probe)[0], **model.state_dict()}, script_args.output_dir + "end.bin")
Path(script_args.output_dir, "history.json").write_text(json.dumps(history, default=lambda array: array.tolist()))
