"""The chat path, the scripts and the demo on SmolLM2-135M-Instruct: `make test-real`."""

import json
import re
import subprocess
import sys

import pytest
import torch

from tests._cli import run
from tests.test_docs import ROOT, fenced
from trl_apa import APAConfig, APATrainer
from trl_apa.demo.smollm2 import missing_packages


pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(missing_packages() is not None, reason=f"the real model {missing_packages()}"),
]
# Scripts of the READMEs that cannot run here: (README, number of the block from 0) -> what is missing.
CANNOT_RUN: dict[tuple[str, int], str] = {}


READMES = [ROOT / "README.md"]
READMES += sorted(
    path for folder in ("benchmarks", "examples", "parity") for path in (ROOT / folder).rglob("README.md")
)
README_SCRIPTS = [
    pytest.param(
        str(readme.relative_to(ROOT)),
        number,
        marks=[pytest.mark.skip(reason)]
        if (reason := CANNOT_RUN.get((str(readme.relative_to(ROOT)), number)))
        else [],
    )
    for readme in READMES
    for number in range(len(fenced(readme, "python")))
]
SYSTEM = {"role": "system", "content": "You are brief."}


@pytest.fixture(scope="module")
def policy():
    from trl_apa.demo.smollm2.model import load_smollm2

    return load_smollm2(0)


@pytest.fixture(scope="module")
def tokenizer():
    from trl_apa.demo.smollm2.model import load_smollm2_tokenizer

    return load_smollm2_tokenizer()


def user(text):
    return {"role": "user", "content": text}


def test_chat_messages_through_train(policy, tokenizer, tmp_path):
    seen = []

    def short_and_no_refusal(prompts, completions, completion_ids, **columns):
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        texts = [messages[-1]["content"] for messages in completions]
        return [-len(text) / 100 - ("sorry" in text.lower()) for text in texts]

    talk = [user("Name a colour."), {"role": "assistant", "content": "Blue."}, user("And another one?")]
    rows = [{"prompt": [SYSTEM, *talk]}, {"prompt": [user("Say hi.")]}] * 2
    config = APAConfig(
        output_dir=str(tmp_path),
        batch_size=4,
        mini_batch_size=4,
        ppo_epochs=1,
        max_steps=2,
        learning_rate=1e-3,
        max_prompt_length=35,
        max_completion_length=12,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = APATrainer(
        config,
        policy,
        processing_class=tokenizer,
        value_model="adapter",
        train_dataset=rows,
        reward_funcs=short_and_no_refusal,
    )
    before = {name: weight.clone() for name, weight in policy.named_parameters() if "lora_B.default" in name}
    with pytest.warns(UserWarning, match="drops complete turns"):
        trainer.train()
    assert any(not torch.equal(before[name], policy.get_parameter(name)) for name in before)
    assert len(seen) == 8
    assert all(messages[-1]["role"] == "assistant" for _, messages, _ in seen)
    assert not any("<|im_" in messages[-1]["content"] for _, messages, _ in seen)


def test_the_template_and_the_end_of_turn_are_the_models_own(policy, tokenizer):
    from trl_apa.demo.networks import sample
    from trl_apa.rollout.prompts import query_of

    query = query_of({"prompt": [SYSTEM, user("Say hi.")]}, tokenizer)
    assert tokenizer.decode(query) == (
        "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    )
    texts = [tokenizer.decode(query)] * 4
    responses = sample(policy, tokenizer, texts, max_new_tokens=40, seed=0)
    ended = [response for response in responses if tokenizer.decode(response[-1:]) == "<|im_end|>"]
    assert ended, "no answer ended with <|im_end|>"
    assert all(tokenizer.eos_token_id not in response[:-1] for response in responses)


@pytest.fixture(scope="module")
def dense_folder(tokenizer, tmp_path_factory):
    """The model as a plain checkpoint, for scripts that load it by name."""
    from trl_apa.demo.smollm2.model import gguf_file
    from trl_apa.models import load_policy

    folder = tmp_path_factory.mktemp("smollm2")
    load_policy(str(gguf_file())).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("readme", "number"), README_SCRIPTS)
def test_every_readme_script_runs_and_its_scores_rise(readme, number, dense_folder, tmp_path):
    """As it stands, but for the model's name; it prints the score of each step.

    Before training the scores of 32 responses have a standard deviation of 1.0 capital letters. The difference between
    two steps and one then has a standard error of 0.22, and the margin is more than four of them.
    """
    script = fenced(ROOT / readme, "python")[number]
    named = re.sub(r'^(model_name = )"[^"]+"$', lambda line: f"{line[1]}{str(dense_folder)!r}", script, flags=re.M)
    assert named != script, "the script names no model"
    printed = run_script(named, tmp_path)
    scores = [float(score) for score in re.findall(r"^score (-?\d+\.\d\d), KL -?\d+\.\d\d nats", printed, re.M)]
    assert len(scores) >= 6
    assert sum(scores[-2:]) / 2 > scores[0] + 1.0
    (output_dir,) = re.findall(r'^trainer\.save_pretrained\("(.+)"\)$', script, re.M)
    assert (tmp_path / output_dir / "model.safetensors").is_file()


def check(model, capsys):
    """Exit status of `trl-apa check`, and its report."""
    capsys.readouterr()
    status = run("check", model, "--device", "cpu", "--json")
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("source", ["plain folder", "GGUF file"])
def test_the_check_finds_nothing_wrong(source, dense_folder, capsys):
    from trl_apa.demo.smollm2.model import gguf_file

    model = str(dense_folder if source == "plain folder" else gguf_file())
    status, report = check(model, capsys)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert [finding for finding in findings.values() if finding["ok"] is False] == []
    assert (status, report["ok"], report["model"]) == (0, True, model)
    measured = {name for name, finding in findings.items() if finding["ok"]}
    assert {"tokens", "chat template", "log-probs, as trained", "saved and loaded anew"} <= measured


def run_script(script, folder, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_a_chat_runs(tmp_path):
    script = (ROOT / "examples" / "smollm2" / "chat.py").read_text()
    options = ("--output_dir", "run", "--max_steps", "2", "--batch_size", "4", "--mini_batch_size", "4")
    options += ("--max_completion_length", "8", "--use_cpu", "True", "--logging_steps", "1")
    run_script(script, tmp_path, *options)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    from rich.console import Console

    from trl_apa.demo.report import Report
    from trl_apa.demo.smollm2.measuring import METRICS
    from trl_apa.demo.smollm2.options import RealDemoOptions
    from trl_apa.demo.smollm2.pipeline import run_real_demo

    def run_once(name):
        options = RealDemoOptions(
            output_dir=tmp_path / name, iterations=1, batch_size=8, samples_per_prompt=1, max_new_tokens=6
        )
        run_real_demo(options, Report(Console(quiet=True), METRICS))
        files = ("result.json", "metrics.jsonl", "samples.json")
        return [(options.output_dir / file).read_text() for file in files]

    first = run_once("first")
    assert first == run_once("second")
    result = json.loads(first[0])
    assert result["before"]["kl"] == pytest.approx(0, abs=1e-3) and result["after"]["kl"] > 0
