"""A script as people wrote it for TRL 0.11 and older, run whole with nothing but its imports changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model, tiny_tokenizer
from trl_apa import ValueModel


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


@pytest.mark.parametrize("name", IMPORTS)
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
    assert float(ValueModel.from_pretrained(tmp_path / "step_1" / "value_model").head.out.weight.abs().max()) > 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "classic")
    assert all(p.equal(dict(trained.named_parameters())[n]) for n, p in again.named_parameters())
