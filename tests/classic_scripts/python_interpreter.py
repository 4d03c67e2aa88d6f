"""A classic script: questions that the policy answers with a program, after TRL 0.11's python_interpreter.

The interpreter is a toy without a sandbox: it runs what the policy writes, in this process.
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from trl_apa import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TextEnvironment


model_name, train_file, test_file, output_dir = sys.argv[1:]


class PythonInterpreter:
    """What was `load_tool("lvwerra/python-interpreter")`."""

    def __call__(self, code):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        return printed.getvalue().strip()


def exact_match_reward(responses, answers=None):
    rewards = []
    pattern = r"Result\s*=\s*(-?\d+(?:\.\d+)?)\s*<submit>"
    for response, answer in zip(responses, answers, strict=True):
        found = re.findall(pattern, response)
        rewards.append(torch.tensor(float(bool(found) and np.abs(float(found[0]) - float(answer)) < 0.1)))
    return rewards


def evaluate(test_dataloader, text_env, ppo_trainer):
    test_rewards = []
    for test_batch in test_dataloader:
        _, _, _, rewards, _ = text_env.run(test_batch["query"], answers=test_batch["answer"])
        test_rewards.extend(rewards)
    stacked = torch.stack(test_rewards).to(ppo_trainer.accelerator.device)
    return ppo_trainer.accelerator.gather_for_metrics(stacked).mean()


lora_config = LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]
)
model = AutoModelForCausalLMWithValueHead.from_pretrained(model_name, peft_config=lora_config)
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token


def read(path):
    rows = load_dataset("json", data_files=path, split="train")
    rows = rows.rename_columns({"question": "query"})
    return rows.map(lambda row: {"answer": row["answer"].split("#### ")[1]})


ds = read(train_file)
ds = ds.select(range(1, len(ds)))
test_dataloader = torch.utils.data.DataLoader(read(test_file), batch_size=2)
prompt = "Q: What is 1 + 1?\n<request><PythonInterpreter>\nprint(1 + 1)\n<call>2<response>\nResult = 2 <submit>\nQ: "
generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
    "eos_token_id": -1,
    "max_new_tokens": 60,
}
ppo_config = PPOConfig(
    batch_size=4,
    learning_rate=1e-3,
    mini_batch_size=1,
    ppo_epochs=1,
    gradient_accumulation_steps=2,
    tracker_project_name="gsm8k",
    remove_unused_columns=False,
    optimize_cuda_cache=True,
)
ppo_trainer = PPOTrainer(config=ppo_config, model=model, tokenizer=tokenizer, dataset=ds)
test_dataloader = ppo_trainer.accelerator.prepare(test_dataloader)
text_env = TextEnvironment(
    model,
    tokenizer,
    [PythonInterpreter()],
    exact_match_reward,
    prompt,
    max_turns=2,
    generation_kwargs=generation_kwargs,
)
history = []
for epoch in range(2):
    for step, batch in enumerate(ppo_trainer.dataloader):
        reward_mean_test = evaluate(test_dataloader, text_env, ppo_trainer) if (step == 0 and epoch == 0) else None
        queries, responses, masks, rewards, histories = text_env.run(batch["query"], answers=batch["answer"])
        train_stats = ppo_trainer.step(queries, responses, rewards, masks)
        if reward_mean_test is not None:
            train_stats["env/reward_mean_test"] = reward_mean_test
        response_texts = [tokenizer.decode(response) for response in responses]
        texts = {"query": batch["query"], "response": response_texts, "answer": batch["answer"]}
        ppo_trainer.log_stats(train_stats, texts, rewards)
        print(json.dumps({"responses": response_texts, "rewards": [float(reward) for reward in rewards]}))
        history.append({name: float(value) for name, value in train_stats.items() if isinstance(value, int | float)})
reward_mean_test = evaluate(test_dataloader, text_env, ppo_trainer)
print(json.dumps({"test": float(reward_mean_test)}))
ppo_trainer.save_pretrained(f"{output_dir}/model-gsm8k")
(Path(output_dir) / "history.json").write_text(json.dumps(history))
