"""Scripts as people wrote them for TRL 0.11 and for 0.12 to 1.12, run whole with nothing but their imports changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer
from trl_apa import AutoModelForCausalLMWithValueHead, ValueModel


ROOT = Path(__file__).parent.parent
IMPORTS = {
    "APA": "from trl_apa import APAConfig as PPOConfig, APATrainer as PPOTrainer",
    "PPO": "from trl_apa import PPOConfig, PPOTrainer",
}
SCRIPT = """
import sys
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl_apa import AutoModelForCausalLMWithValueHead, LengthSampler, create_reference_model, set_seed
from trl_apa.core import LengthSampler as SamplerOfCore
IMPORTS

folder = sys.argv[1]
config = PPOConfig(
    model_name=folder + "/base", learning_rate=1e-3, batch_size=8, mini_batch_size=4, gradient_accumulation_steps=1,
    ppo_epochs=2, early_stopping=True, target_kl=100.0, init_kl_coef=0.2, adap_kl_ctrl=True, seed=0, steps=16,
    optimize_cuda_cache=True, log_with=None, task_name="lengths", use_cpu=True,
)
set_seed(config.seed)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = create_reference_model(model, num_shared_layers=1)
texts = [f"w{2 + i % 9} w{3 + i % 7}" for i in range(16)]
dataset = Dataset.from_dict({"query": texts, "input_ids": [tokenizer(text)["input_ids"] for text in texts]})
dataset.set_format(type="torch")

def collator(data):
    return dict((key, [d[key] for d in data]) for key in data[0])

ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)
output_length_sampler = LengthSampler(3, 6)
assert SamplerOfCore is LengthSampler
generation_kwargs = {
    "min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id,
    "eos_token_id": 100_000,
}
for epoch, batch in enumerate(ppo_trainer.dataloader):
    query_tensors = batch["input_ids"]
    response_tensors = []
    for query in query_tensors:
        generation_kwargs["max_new_tokens"] = output_length_sampler()
        response = ppo_trainer.generate(query, **generation_kwargs)
        response_tensors.append(response.squeeze()[-generation_kwargs["max_new_tokens"]:])
    batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
    rewards = [torch.tensor(len(text) / 10) for text in batch["response"]]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response"])
    ppo_trainer.save_pretrained(folder + f"/step_{epoch}")
    assert config.ppo_epochs == 2 and config.mini_batch_size == 4
print("steps", epoch + 1, "kl", stats["objective/kl"], "total", stats["time/apa/total"] > 0)
model.save_pretrained(folder + "/classic")
"""


@pytest.mark.parametrize("name", ["APA", pytest.param("PPO", marks=pytest.mark.slow)])
def test_a_classic_script_runs_with_only_its_imports_changed(tmp_path, name):
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("IMPORTS", IMPORTS[name]))
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps 2" in done.stdout
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "step_1")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    changed = [n for n, p in trained.named_parameters() if not p.equal(dict(before.named_parameters())[n])]
    assert any(".h.1." in n for n in changed) and not any(".h.0." in n for n in changed)
    if name == "PPO":  # whose critic is the wrapper's own head, saved next to the policy
        wrappers = [AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / f) for f in ("step_1", "classic")]
        heads = [wrapper.v_head.summary.weight for wrapper in wrappers]
        assert torch.equal(*heads) and not (tmp_path / "step_1" / "value_model").exists()
    else:
        critic = ValueModel.from_pretrained(tmp_path / "step_1" / "value_model")
        assert float(critic.head.out.weight.abs().max()) > 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "classic")
    assert all(p.equal(dict(trained.named_parameters())[n]) for n, p in again.named_parameters())


SECOND_GENERATION = """
import sys
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
IMPORTS

folder = sys.argv[1]
parser = HfArgumentParser((PPOConfig,))
(training_args,) = parser.parse_args_into_dataclasses(sys.argv[2:])
tokenizer = AutoTokenizer.from_pretrained(training_args.sft_model_path, padding_side="left")
tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # beyond the embeddings, which nobody resizes
value_model = AutoModelForSequenceClassification.from_pretrained(training_args.reward_model_path, num_labels=1)
reward_model = AutoModelForSequenceClassification.from_pretrained(training_args.reward_model_path, num_labels=1)
policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
ref_policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
dataset = load_dataset("json", data_files=folder + "/prompts.jsonl", split="train")
train_dataset, eval_dataset = dataset.select(range(12)), dataset.select(range(12, 16))

def tokenize(element):
    return {"input_ids": tokenizer(element["prompt"], padding=False)["input_ids"]}

train_dataset, eval_dataset = (
    part.map(tokenize, batched=True, remove_columns=part.column_names) for part in (train_dataset, eval_dataset)
)
before = {name: p.detach().clone() for name, p in policy.named_parameters()}
trainer = PPOTrainer(
    args=training_args,
    processing_class=tokenizer,
    model=policy,
    ref_model=ref_policy,
    reward_model=reward_model,
    value_model=value_model,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    peft_config=None,
)
trainer.train()
trainer.save_model(training_args.output_dir)
metrics = trainer.evaluate()
moved = any(not p.equal(before[name]) for name, p in policy.named_parameters())
print("steps", trainer.state.global_step, "rollouts", trainer.num_iterations_done * 4, "moved", moved)
print("kl", metrics["eval_kl"], "reward", metrics["eval_reward"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["APA", "PPO"])
def test_a_script_of_the_second_generation_trains_with_only_its_imports_changed(tmp_path, name):
    tiny_model().save_pretrained(tmp_path / "sft")
    torch.manual_seed(1)
    config = CONFIGS["llama"]()
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    for folder in ("sft", "rm"):
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    rows = [json.dumps({"prompt": f"w{2 + i % 9} w{3 + i % 7}"}) for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    script = tmp_path / "script.py"
    script.write_text(SECOND_GENERATION.replace("IMPORTS", IMPORTS[name]))
    options = {
        "output_dir": tmp_path / "out",
        "sft_model_path": tmp_path / "sft",
        "reward_model_path": tmp_path / "rm",
    }
    options |= {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "num_mini_batches": 2, "num_ppo_epochs": 3}
    options |= {"total_episodes": 10, "response_length": 6, "missing_eos_penalty": 1.0, "stop_token": "eos"}
    options |= {"kl_coef": 0.1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # 10 episodes are 3 iterations of 2 * 2 rollouts; 3 epochs of 2 mini-batches over each.
    assert "steps 18 rollouts 12 moved True" in done.stdout
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = tiny_model()
    assert any(not p.equal(q) for p, q in zip(trained.parameters(), before.parameters(), strict=True))
    assert (tmp_path / "out" / "value_model" / "value_model.json").is_file()
