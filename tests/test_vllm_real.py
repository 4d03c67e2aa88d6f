"""vLLM itself on a CPU, in the training process and as a server: `make test-vllm`.

Its log-probs and greedy tokens after each update are compared with the policy's own, before and after it.
"""

import gc
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)

from tests.test_training import PROMPTS, parameters, trainer_for
from tests.test_update import assert_same
from tests.tiny import LAYERS, SHARED, lora_config, tiny_rollouts, tiny_tokenizer


pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm installs it"),
]
# vLLM has no attention on a CPU for heads as narrow as those of the other tests' models.
SIZES = {**SHARED, **LAYERS, "hidden_size": 64}
GROUPED = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 1}
CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen2, tied": lambda: Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=128),
    "gpt2, tied": lambda: GPT2Config(**SHARED, n_embd=64, n_layer=2, n_head=2, n_positions=64),
    "opt, tied": lambda: OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
}
QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [9, 3], [12])]
NEW_TOKENS = 12
# One answer to choose from at each token: with the same weights the samples are the same, whoever samples.
GREEDY = {"top_k": 1, "max_steps": 8, "learning_rate": 0.03, "use_vllm": True, "vllm_max_model_length": 64}
# In nats a token. Both sides add in float32; an update moves log-probs by far more than the second.
SAME, MOVED = 1e-4, 0.1


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes a model once, and says in which folder it is."""
    folders = {}

    def make(family):
        if family not in folders:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
            folders[family] = str(tmp_path_factory.mktemp("model"))
            model.save_pretrained(folders[family])
            tiny_tokenizer().save_pretrained(folders[family])
        return folders[family]

    return make


def policy_from(folder, adapted, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    torch.manual_seed(1)
    return get_peft_model(model, lora_config(init_lora_weights=False)) if adapted else model


@pytest.fixture
def colocate(monkeypatch):
    """Options of a trainer with vLLM in its process, in float32: left to itself vLLM turns float32 into bfloat16."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # compiles no kernels, which takes longer than these tests
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("trl.generation.vllm_generation.LLM", partial(LLM, dtype="float32"))
    yield {"vllm_mode": "colocate"}
    gc.collect()
    cleanup_dist_env_and_memory()


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def address(folder_of, tmp_path_factory):
    """Of a vLLM server in a process of its own, which holds the Llama in float32."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    options = {"host": "127.0.0.1", "port": port, "dtype": "float32", "max-model-len": 64, "max-num-seqs": 8}
    options |= {"weight-transfer-config": json.dumps({"backend": "store"})}
    options |= {"worker-extension-cls": "tests.vllm_wire.Extension"}
    # What `vllm serve` runs; that command looks for a package called vllm, and the one for CPUs is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder_of('llama')}"]
    command += ["--enforce-eager", *(f"--{name}={value}" for name, value in options.items())]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": path}
    with log.open("w") as output:
        server = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    while not answers(url):
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(1)
    yield url
    server.terminate()
    server.wait(timeout=60)


def answers(url):
    with suppress(OSError):
        return urlopen(f"{url}/health").status == 200
    return False


@pytest.fixture
def server(address, monkeypatch):
    """Options of a trainer that asks the server, to which weights go by `tests.vllm_wire`."""
    from tests import vllm_wire

    vllm_wire.install(monkeypatch)
    return {"vllm_mode": "server", "vllm_server_base_url": address, "vllm_group_port": free_port()}


@pytest.fixture(params=["colocate", "server"])
def mode(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def differences(policy, sampled):
    """Nats a token between vLLM's log-probs of its samples and `policy`'s own."""
    policy = policy.eval()
    found = []
    for query, (tokens, logprobs) in zip(QUERIES, sampled, strict=True):
        logits = policy(torch.cat([query, tokens])[None]).logits[0, len(query) - 1 : -1]
        found.append((logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0] - logprobs).abs())
    return torch.cat(found)


def sampled_by(trainer):
    return trainer.vllm.samples_and_logprobs(QUERIES, NEW_TOKENS, trainer.state.global_step)


@torch.no_grad()
def greedy_of(policy, query):
    """The likeliest tokens, by a forward pass for each."""
    row = query
    for _ in range(NEW_TOKENS):
        row = torch.cat([row, policy.eval()(row[None]).logits[0, -1:].argmax(-1)])
    return row.tolist()


def assert_follows(trainer, policy, updates, capfd, name):
    """After each update vLLM samples from the policy as it is, and not from what it was before."""
    worst, moved = 0.0, []
    for seed in range(updates):
        before = deepcopy(policy)
        trainer.step(*tiny_rollouts(seed=seed))
        sampled = sampled_by(trainer)
        assert all(len(tokens) == NEW_TOKENS for tokens, _ in sampled)
        worst = max(worst, float(differences(policy, sampled).max()))
        moved.append(float(differences(before, sampled).mean()))
        found = trainer.generate(QUERIES, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=99)
        assert [row.tolist() for row in found] == [greedy_of(policy, query) for query in QUERIES]
    with capfd.disabled():
        least = f"an update moves them by {min(moved):.2f} or more on average"
        print(f"\n{name}: vLLM's log-probs differ by at most {worst:.1e} nats a token; {least}")
    assert worst < SAME and min(moved) > MOVED


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_in_one_process_vllm_follows_each_update(tmp_path, folder_of, colocate, capfd, family, adapted):
    policy = policy_from(folder_of(family), adapted)
    trainer = trainer_for(tmp_path, model=policy, **{**GREEDY, **colocate})
    assert_follows(trainer, policy, 2, capfd, f"colocate, {family}, {'LoRA' if adapted else 'full'}")


def test_in_one_process_vllm_follows_adapters_on_a_4_bit_base(tmp_path, folder_of, colocate, capfd):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    policy = policy_from(folder_of("llama"), True, quantization_config=quantization, dtype=torch.float32)
    trainer = trainer_for(tmp_path, model=policy, **{**GREEDY, **colocate})
    assert_follows(trainer, policy, 2, capfd, "colocate, llama in 4-bit, LoRA")


@pytest.mark.parametrize("adapted", [False, True])
def test_a_server_follows_each_update(tmp_path, folder_of, server, capfd, adapted):
    policy = policy_from(folder_of("llama"), adapted)
    trainer = trainer_for(tmp_path, model=policy, **{**GREEDY, **server})
    assert_follows(trainer, policy, 2, capfd, f"server, llama, {'LoRA' if adapted else 'full'}")


@pytest.mark.parametrize("adapted", [False, True])
def test_training_with_vllm_is_training_with_generate(tmp_path, folder_of, mode, adapted):
    """To the bit, since the tokens are the same: learning takes nothing else from vLLM."""
    plain = trainer_for(tmp_path, model=policy_from(folder_of("llama"), adapted), **{**GREEDY, "use_vllm": False})
    start = parameters(plain)
    plain.train()
    trainer = trainer_for(tmp_path, model=policy_from(folder_of("llama"), adapted), **{**GREEDY, **mode})
    trainer.train()
    assert_same(parameters(trainer), parameters(plain), tolerance=1e-30)
    assert any(not tensor.equal(start[name]) for name, tensor in parameters(trainer).items())


@pytest.mark.parametrize("adapted", [False, True])
def test_a_resumed_run_with_a_server_is_the_run_left_alone(tmp_path, folder_of, server, adapted):
    """The server still holds what the first run sent last; the second sends the checkpoint's weights first."""

    def run(folder, **options):
        config = {**GREEDY, **server, "vllm_group_port": free_port(), "save_strategy": "steps", "save_steps": 4}
        return trainer_for(tmp_path / folder, model=policy_from(folder_of("llama"), adapted), **{**config, **options})

    alone = run("alone")
    alone.train()
    run("parts", max_steps=4).train()
    resumed = run("parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert_same(parameters(resumed), parameters(alone), tolerance=1e-30)


@pytest.mark.parametrize("adapted", [False, True])
def test_log_probs_in_vllms_own_precision(tmp_path, folder_of, colocate, capfd, monkeypatch, adapted):
    """bfloat16 in vLLM and float32 in the update, as it is without any option."""
    from vllm import LLM

    monkeypatch.setattr("trl.generation.vllm_generation.LLM", LLM)
    trainer = trainer_for(tmp_path, model=policy_from(folder_of("llama"), adapted), **{**GREEDY, **colocate})
    trainer.train()
    finding = trainer.check(PROMPTS)["log-probs, vLLM"]
    with capfd.disabled():
        print(f"\ncolocate in bfloat16, {'LoRA' if adapted else 'full'}, after 8 updates: {finding.measured}")
    assert finding.ok and 1e-5 < finding.figures["mean_nats"]
