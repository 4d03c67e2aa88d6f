"""A classic script: questions whose answers the policy looks up, after TRL 0.11's, with a search of its own."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser

from trl_apa import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TextEnvironment


@dataclass
class ScriptArguments:
    model_name: str = field(metadata={"help": "the policy"})
    questions: str = field(metadata={"help": "a file with the columns question and answer"})
    output_dir: str = field(metadata={"help": "where to write"})
    log_with: str | None = field(default=None, metadata={"help": "a tracker"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of the update"})
    mini_batch_size: int = field(default=1, metadata={"help": "rows a backward pass"})
    batch_size: int = field(default=4, metadata={"help": "rollouts an iteration"})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "backward passes an optimizer step"})
    max_new_tokens: int = field(default=40, metadata={"help": "most tokens of a turn"})
    ppo_epochs: int = field(default=1, metadata={"help": "passes over an iteration"})
    iterations: int = field(default=2, metadata={"help": "number of them"})
    seed: int = field(default=0, metadata={"help": "of everything"})


parser = HfArgumentParser(ScriptArguments)
args = parser.parse_args_into_dataclasses()[0]
lora_config = LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]
)
model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model_name, peft_config=lora_config)
tokenizer = AutoTokenizer.from_pretrained(args.model_name)
tokenizer.pad_token = tokenizer.eos_token
prompt = "Q: Who danced?\nA: <request><Wiki>dance<call>Neary danced.<response>\nResult=Neary<submit>\n\nQ: "
generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
    "eos_token_id": -1,
    "max_new_tokens": args.max_new_tokens,
}
config = PPOConfig(
    batch_size=args.batch_size,
    model_name=args.model_name,
    learning_rate=args.learning_rate,
    log_with=args.log_with,
    mini_batch_size=args.mini_batch_size,
    ppo_epochs=args.ppo_epochs,
    gradient_accumulation_steps=args.gradient_accumulation_steps,
    seed=args.seed,
    optimize_cuda_cache=True,
)
ppo_trainer = PPOTrainer(config=config, model=model, tokenizer=tokenizer)
dataset = load_dataset("json", data_files=args.questions, split="train")
dataset = dataset.shuffle(args.seed + ppo_trainer.accelerator.process_index * 100003)
rows = iter([(row["question"], row["answer"]["normalized_aliases"]) for row in dataset])


def generate_data(count):
    tasks, answers = zip(*(next(rows) for _ in range(count)), strict=True)
    return list(tasks), list(answers)


def exact_match_reward(responses, answers=None):
    rewards = []
    for response, aliases in zip(responses, answers, strict=True):
        rewards.append(torch.tensor(float(any(alias.lower() in response.lower() for alias in aliases))))
    return rewards


def search(query):
    return f"id\n{query} is in Bern, says the encyclopaedia.\nmore"


def tool_fn(query):
    return search(query).split("\n")[1][:600]


text_env = TextEnvironment(
    model,
    tokenizer,
    {"Wiki": tool_fn},
    exact_match_reward,
    prompt,
    generation_kwargs=generation_kwargs,
    max_tool_reponse=24,
)
history = []
for i in range(args.iterations):
    tasks, answers = generate_data(config.batch_size)
    queries, responses, masks, rewards, histories = text_env.run(tasks, answers=answers)
    train_stats = ppo_trainer.step(queries, responses, rewards, masks)
    response_texts = [tokenizer.decode(response) for response in responses]
    query_texts = [tokenizer.decode(query) for query in queries]
    texts = {
        "query": [text.split("<submit>")[-1].strip() for text in query_texts],
        "response": response_texts,
        "answer": [", ".join(item) for item in answers],
    }
    all_rewards = ppo_trainer.accelerator.gather(torch.tensor(rewards, device=ppo_trainer.accelerator.device))
    ppo_trainer.log_stats(train_stats, texts, list(all_rewards), columns_to_log=["query", "response", "answer"])
    print(json.dumps({"responses": response_texts, "rewards": all_rewards.tolist()}))
    history.append({name: float(value) for name, value in train_stats.items() if isinstance(value, int | float)})
    if i % 100 == 0:
        ppo_trainer.save_pretrained(f"{args.output_dir}/{args.seed}_{i}_triviaqa")
(Path(args.output_dir) / "history.json").write_text(json.dumps(history))
