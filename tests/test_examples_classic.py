"""Whole scripts: classic ones with nothing but their imports changed, and the examples as their README runs them."""

import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, load_peft_weights
from transformers import (
    Adafactor,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from tests.tiny import byte_tokenizer
from tests.tool_dialogues import tool_model
from trl_apa import APATrainer, ValueModel
from trl_apa.models.quantization import use_one_kernel


ROOT = Path(__file__).parents[1]
README = ROOT / "examples" / "README.md"
INT8 = BitsAndBytesConfig(load_in_8bit=True)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
STATISTICS = {
    *(
        "objective/kl",
        "objective/kl_coef",
        "objective/entropy",
        "tokens/queries_len_mean",
        "tokens/responses_len_mean",
    ),
    *("apa/loss/policy", "apa/loss/value", "apa/loss/total", "apa/policy/entropy", "apa/policy/advantages_mean"),
    *("apa/returns/mean", "apa/returns/var", "apa/val/vpred", "apa/val/error", "apa/val/mean", "apa/val/var"),
    *("apa/val/var_explained", "apa/mean_scores", "apa/std_scores", "apa/learning_rate", "time/apa/total"),
}


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What `examples/tiny_inputs.py` makes."""
    folder = tmp_path_factory.mktemp("inputs") / "tiny"
    load_module(ROOT / "examples" / "tiny_inputs.py").main(folder)
    return folder


def run_classic(name, output_dir, *arguments):
    """Run a classic script in a process of its own; what it printed, and the statistics of its steps."""
    output_dir.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "classic_scripts" / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=output_dir.parent, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((output_dir / "history.json").read_text())
    for stats in history:
        assert stats.keys() >= STATISTICS
        assert all(math.isfinite(stats[name]) for name in STATISTICS)
    return done.stdout, history


WIKI = "Q: Who danced?\nA: <request><Wiki>dance<call>Neary danced.<response>\nResult=Neary<submit>\n\nQ: "
PYTHON = "Q: What is 1 + 1?\n<request><PythonInterpreter>\nprint(1 + 1)\n<call>2<response>\nResult = 2 <submit>\nQ: "
# What the tools answer is between the policy's two turns; Wiki's is cut.
LOOKED_UP = ("<request><Wiki>Bear<call>", "Bear is in Bern, says...<response>", "\nResult=Bern<submit>")
COMPUTED = (
    "\n<request><PythonInterpreter>\nprint(3 + 4)\n<call>", "7<response>", "\nResult = 7 <submit>"
)  # fmt: skip


@pytest.fixture(scope="module")
def tool_user(tmp_path_factory):
    """A policy that was taught by heart to call a tool and to read its answer, in both scripts' ways."""
    folder, tokenizer = tmp_path_factory.mktemp("tool_user"), byte_tokenizer()
    model = tool_model(positions=512)
    texts = [WIKI + "Where is the bear?" + "".join(LOOKED_UP), PYTHON + "What is 3 + 4?" + "".join(COMPUTED)]
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in enumerate((WIKI, PYTHON)):
        labels[row, : len(prompt)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        loss = model(**batch, labels=labels).loss
        if loss < 0.03:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.03
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # what is likeliest is now nearly certain
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def read_rollouts(printed, dialogue):
    """Rewards of the rollouts that a script printed and that went as the policy was taught, of each iteration some."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"responses')]
    assert [len(line["responses"]) for line in lines] == [4, 4]
    rewards = []
    for line in lines:
        pairs = zip(line["responses"], line["rewards"], strict=True)
        rewards.append([reward for text, reward in pairs if text == "".join(dialogue)])
    assert all(len(of_iteration) >= 2 for of_iteration in rewards)
    return [reward for of_iteration in rewards for reward in of_iteration]


def test_the_triviaqa_script_of_trl_0_11(tool_user, tmp_path):
    names = [["berne", "bern"]] * 6 + [["rome"]] * 2
    rows = [{"question": "Where is the bear?", "answer": {"normalized_aliases": aliases}} for aliases in names]
    output, questions = tmp_path / "out", written(tmp_path / "questions.jsonl", rows)
    options = {"model_name": tool_user, "questions": questions, "output_dir": output}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    printed, history = run_classic("triviaqa.py", output, *arguments)
    rewards = read_rollouts(printed, LOOKED_UP)
    assert set(rewards) == {0.0, 1.0} and sum(rewards) > len(rewards) / 2
    # Of both turns the tokens count, and none of the tool's.
    assert max(stats["tokens/counted"] for stats in history) <= 4 * 2 * 40
    assert all(weight.any() for weight in load_peft_weights(str(output / "0_0_triviaqa")).values())


def test_the_python_script_of_trl_0_11(tool_user, tmp_path):
    rows, output = [{"question": "What is 3 + 4?", "answer": "Add. #### 7"}] * 5, tmp_path / "out"
    files = [written(tmp_path / f"{name}.jsonl", rows) for name in ("train", "test")]
    printed, history = run_classic("python_interpreter.py", output, tool_user, *files, output)
    assert set(read_rollouts(printed, COMPUTED)) == {1.0} and len(history) == 2
    [tested] = re.findall(r'\{"test": (.*)\}', printed)
    assert float(tested) > 0
    assert {"q_proj", "v_proj"} == {name.split(".")[-3] for name in load_peft_weights(str(output / "model-gsm8k"))}


def mean(history, name):
    return sum(stats[name] for stats in history) / len(history)


def changed(model, other):
    """Names of the parameters in which two models of one kind differ."""
    others = dict(other.named_parameters())
    return {name for name, parameter in model.named_parameters() if not parameter.equal(others[name])}


def assert_value_model_was_trained(folder, base_model=None):
    value_model = ValueModel.from_pretrained(folder / "value_model", base_model=base_model)
    assert float(value_model.head.out.weight.detach().abs().max()) > 0


def quantised_layers(model, kinds=(bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)):
    return sum(isinstance(module, kinds) for module in model.modules())


def quantised(base, config):
    model = use_one_kernel(
        AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": "cpu"})
    )
    assert quantised_layers(model) == 14
    return model


def assert_base_is_untouched(end, base):
    """The quantised weights that a script ended with are those that it started from."""
    layers = "base_model.model."
    weights = {
        name.removeprefix(layers).replace(".base_layer", ""): tensor
        for name, tensor in end.items()
        if name.startswith(layers) and "lora_" not in name
    }
    for name, tensor in base.state_dict().items():
        assert weights[name].dtype == tensor.dtype and weights[name].equal(tensor), name


def adapter_weights(state, adapter):
    """The LoRA matrices of one adapter in a state dict, as peft names them on disk."""
    return {
        name.replace(f".{adapter}.", "."): tensor for name, tensor in state.items() if f".{adapter}." in f"{name}."
    }


# ---- classic scripts ----


@pytest.mark.slow
def test_sentiment_control_learns(tiny, tmp_path):
    """The score rises by 3.7 to 4.3 in 18 steps with the seeds 0 to 5 and 42, whose standard deviation is 0.25.

    Scores of single responses deviate by 4.8 and each mean below is over 512 of them, so that without learning the
    difference would deviate from 0 by 0.3: a margin of 2 is seven of either deviations away.
    """
    reviews = tmp_path / "reviews.jsonl"
    reviews.write_text((tiny / "reviews.jsonl").read_text() * 18)
    output_dir = tmp_path / "out"
    options = {
        "model_name": tiny / "gpt2",
        "query_dataset": reviews,
        "reward_model": f"sentiment-analysis:{tiny / 'sentiment'}",
        "batch_size": 64,
        "mini_batch_size": 32,
        "learning_rate": 3e-3,
        "seed": 42,
        "report_to": "none",
        "output_dir": output_dir,
    }
    _, history = run_classic("sentiment.py", output_dir, *(f"--{name}={value}" for name, value in options.items()))
    assert len(history) == 18
    assert mean(history[-8:], "apa/mean_scores") - mean(history[-8:], "ref_rewards") > 2
    assert abs(history[0]["objective/kl"]) < 0.5 < history[-1]["objective/kl"] < 20
    trained, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (output_dir, tiny / "gpt2"))
    assert len(changed(trained, before)) > 20
    assert_value_model_was_trained(output_dir)
    text = "the film was great ."
    assert AutoTokenizer.from_pretrained(output_dir)(text) == AutoTokenizer.from_pretrained(tiny / "gpt2")(text)


@pytest.mark.slow
def test_stack_llama_with_lora_on_int8_and_adafactor(tiny, tmp_path):
    output_dir = tmp_path / "out"
    options = {
        "model_name": tiny / "llama",
        "tokenizer_name": tiny / "llama",
        "reward_model_name": tiny / "reward_model",
        "dataset_name": tiny / "questions.jsonl",
        "batch_size": 8,
        "mini_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "steps": 24,
        "output_min_length": 4,
        "output_max_length": 9,
        "save_freq": 1,
        "adafactor": True,
        "learning_rate": 1e-2,
        "reward_baseline": 0.5,
        "early_stopping": True,
        "target_kl": 1e-9,
        "output_dir": f"{output_dir}/",
    }
    printed, history = run_classic("stack_llama.py", output_dir, *(f"--{k}={v}" for k, v in options.items()))
    assert "optimizer Adafactor" in printed
    # Of four: no update keeps within such a target.
    assert [stats["apa/epochs"] for stats in history] == [1, 1, 1]
    for stats in history:
        # No EOS ends a response, and the sampler is drawn for every four of them.
        assert set(stats["lengths"]) <= {4, 5, 6, 7, 8} and len(set(stats["lengths"])) <= 2
        assert stats["apa/mean_scores"] == pytest.approx(sum(stats["rewards"]) / 8, abs=1e-5)
    assert {path.name for path in output_dir.glob("step_*")} == {"step_1", "step_2"}
    end = torch.load(output_dir / "end.bin")
    first, last = (load_peft_weights(str(output_dir / f"step_{step}")) for step in (1, 2))
    assert adapter_weights(end, "default").keys() == last.keys() and len(last) == 8
    assert all(end_weight.equal(last[name]) for name, end_weight in adapter_weights(end, "default").items())
    assert not any(last[name].equal(first[name]) for name in last)

    base = quantised(tiny / "llama", INT8)
    assert end["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"].dtype == torch.int8
    assert_base_is_untouched(end, base)
    with torch.no_grad():
        without = base(end["probe"]).logits.float()
        again = PeftModel.from_pretrained(base, output_dir / "step_2")(end["probe"]).logits.float()
    torch.testing.assert_close(again, end["logits"])
    assert float((without - again).abs().max()) > 1e-2
    assert_value_model_was_trained(output_dir / "step_2", base_model=base)


@pytest.mark.slow
def test_a_reward_adapter_on_the_policys_nf4_base(tiny, tmp_path):
    output_dir = tmp_path / "out"
    options = {
        "model_name": tiny / "llama",
        "rm_adapter": tiny / "reward_adapter",
        "dataset_name": tiny / "chats.jsonl",
        "output_dir": output_dir,
    }
    _, history = run_classic("multi_adapter.py", output_dir, *(f"--{name}={value}" for name, value in options.items()))
    assert len(history) == 4 and all(stats["apa/std_scores"] > 0 for stats in history)
    end = torch.load(output_dir / "end.bin")
    reward = load_peft_weights(str(tiny / "reward_adapter"))
    score = reward.pop("base_model.model.score.weight")
    assert end["score.weight"].equal(score)
    for name, weight in adapter_weights(end, "reward_adapter").items():
        assert weight.equal(reward.pop(name))
    assert not reward
    policy = load_peft_weights(str(output_dir))
    assert all(weight.equal(policy[name]) for name, weight in adapter_weights(end, "default").items())
    assert all(weight.any() for weight in policy.values()) and not (output_dir / "reward_adapter").exists()

    base = quantised(tiny / "llama", NF4)
    assert_base_is_untouched(end, base)
    with torch.no_grad():
        without = base(end["probe"]).logits.float()
        again = PeftModel.from_pretrained(base, output_dir)(end["probe"]).logits.float()
    torch.testing.assert_close(again, end["logits"])
    assert float((without - again).abs().max()) > 1e-2
    assert_value_model_was_trained(output_dir, base_model=base)


@pytest.mark.slow
def test_summaries_by_an_encoder_decoder(tiny, tmp_path):
    output_dir = tmp_path / "out"
    _, history = run_classic(
        "t5_summaries.py", output_dir, tiny / "t5", tiny / "dialogues.jsonl", tiny / "sentiment", output_dir
    )
    trained, before = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (output_dir, tiny / "t5"))
    assert len(history) == 3
    assert all(set(stats["starts"]) == {before.config.decoder_start_token_id} for stats in history)
    assert all(0 < stats["objective/kl"] < 50 for stats in history[1:])
    names = changed(trained, before)
    assert all(any(name.startswith(stack) for name in names) for stack in ("encoder", "decoder"))
    assert_value_model_was_trained(output_dir)


# ---- the examples ----


def small_commands():
    """The commands of the examples' README that run on what `tiny_inputs.py` makes, by script."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if " tiny/" in line]
    return {shlex.split(line)[1]: shlex.split(line)[2:] for line in lines}


@pytest.fixture
def run_example(tiny, tmp_path, monkeypatch):
    """Run the README's small command of a script, with more options; the trainer that it made, what `step` was given.

    In this process, which saves the start of another.
    """
    (tmp_path / "tiny").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    trainers, rollouts = [], []
    make, step = APATrainer.__init__, APATrainer.step
    monkeypatch.setattr(APATrainer, "__init__", lambda self, *a, **k: (trainers.append(self), make(self, *a, **k))[1])
    monkeypatch.setattr(APATrainer, "step", lambda self, *a: (rollouts.append(a), step(self, *a))[1])

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script, *small_commands()[script], *options])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        (trainer,) = trainers
        return trainer, rollouts

    return run


def texts_of(trainer, queries, responses):
    pairs = zip(queries, responses, strict=True)
    return [trainer.tokenizer.decode(torch.cat(pair), skip_special_tokens=True) for pair in pairs]


def logits_of(classifier, tokenizer, texts):
    """One text at a time, so that no padding is in the way."""
    with torch.no_grad():
        inputs = [tokenizer(text, return_tensors="pt").to(classifier.device) for text in texts]
        return torch.stack([classifier(**each).logits[0] for each in inputs]).cpu()


@pytest.mark.parametrize(("options", "label"), [([], 1), (["--use_peft", "True", "--label", "NEGATIVE"], 0)])
def test_the_sentiment_example(run_example, tiny, tmp_path, options, label):
    trainer, rollouts = run_example("examples/sentiment/ppo.py", *options)
    assert len(rollouts) == 4
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny / "sentiment")
    queries, responses, scores = rollouts[-1]
    expected = logits_of(classifier, trainer.tokenizer, texts_of(trainer, queries, responses))
    torch.testing.assert_close(torch.stack(scores), expected[:, label], atol=1e-4, rtol=1e-4)
    assert all(2 <= len(query) < 8 for query in queries) and all(len(response) < 16 for response in responses)
    output_dir = tmp_path / "runs" / "sentiment"
    if options:
        assert all(weight.any() for weight in load_peft_weights(str(output_dir)).values())
    else:
        before = AutoModelForCausalLM.from_pretrained(tiny / "gpt2")
        assert changed(AutoModelForCausalLM.from_pretrained(output_dir), before)
    assert_value_model_was_trained(output_dir)


def test_the_stack_llama_example(run_example, tiny, tmp_path):
    trainer, rollouts = run_example("examples/stack_llama/rl_training.py")
    assert isinstance(trainer.optimizer.optimizer, Adafactor) and trainer.model.policy.is_loaded_in_8bit
    assert quantised_layers(trainer.model.policy, bitsandbytes.nn.Linear8bitLt) == 14
    queries, responses, scores = rollouts[-1]
    assert all(trainer.tokenizer.decode(query).startswith("Question: how do I") for query in queries)
    assert {len(response) for _, responses, _ in rollouts for response in responses} <= {4, 5, 6, 7, 8}
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny / "reward_model")
    expected = logits_of(classifier, trainer.tokenizer, texts_of(trainer, queries, responses))[:, 0]
    # The example's own reward model is quantised.
    assert float((torch.stack(scores) - expected).abs().max()) < 0.1 * float(expected.std())
    output_dir = tmp_path / "runs" / "stack_llama"
    assert {path.name for path in output_dir.glob("step_*")} == {"step_1"}
    step_1, last = (load_peft_weights(str(folder)) for folder in (output_dir / "step_1", output_dir))
    assert all(weight.any() and weight.equal(step_1[name]) for name, weight in last.items())


@pytest.mark.parametrize("quantise", [True, False])
def test_the_multi_adapter_example(run_example, tiny, tmp_path, quantise):
    options = [] if quantise else ["--load_in_4bit", "False", "--value_model", "head"]
    trainer, rollouts = run_example("examples/multi_adapter/rl_multi_adapter.py", *options)
    assert quantised_layers(trainer.model.policy, bitsandbytes.nn.Linear4bit) == 14 * quantise
    queries, responses, scores = rollouts[-1]
    assert len(set(map(len, queries))) > 1
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tiny / "llama", num_labels=2, quantization_config=NF4 if quantise else None
    )
    classifier = PeftModel.from_pretrained(use_one_kernel(classifier), tiny / "reward_adapter")
    expected = logits_of(classifier, trainer.tokenizer, texts_of(trainer, queries, responses))[:, 1]
    torch.testing.assert_close(torch.stack(scores).cpu(), expected, atol=1e-3, rtol=1e-3)
    output_dir = tmp_path / "runs" / "multi_adapter"
    again = AutoPeftModelForCausalLM.from_pretrained(output_dir)
    assert list(again.peft_config) == ["default"]
    assert all(weight.any() for weight in load_peft_weights(str(output_dir)).values())
    assert (output_dir / "value_model").exists() is quantise
    assert (output_dir / "v_head.safetensors").exists() is not quantise


def test_the_example_of_summaries(run_example, tiny, tmp_path):
    trainer, rollouts = run_example("examples/summarization_t5/summarize.py")
    queries, responses, scores = rollouts[-1]
    assert len(rollouts) == 3 and trainer.is_encoder_decoder
    assert {int(response[0]) for response in responses} == {0}
    rouge1 = load_module(ROOT / "examples" / "summarization_t5" / "summarize.py").rouge1
    rows = [json.loads(line) for line in (tiny / "dialogues.jsonl").read_text().splitlines()]
    summary_of = {row["dialogue"]: row["summary"] for row in rows}
    for query, response, score in zip(queries, responses, scores, strict=True):
        dialogue = trainer.tokenizer.decode(query, skip_special_tokens=True).split("\n\n")[1]
        text = trainer.tokenizer.decode(response, skip_special_tokens=True)
        assert float(score) == pytest.approx(rouge1(text, summary_of[dialogue]))
    assert max(map(float, scores)) > 0
    before = AutoModelForSeq2SeqLM.from_pretrained(tiny / "t5")
    assert changed(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "runs" / "summaries"), before)
    assert_value_model_was_trained(tmp_path / "runs" / "summaries")


def test_rouge_1_worked_by_hand():
    rouge1 = load_module(ROOT / "examples" / "summarization_t5" / "summarize.py").rouge1
    # "the" counts twice, "cat" once: 3 of 4 words and 3 of 5.
    assert rouge1("The cat, the dog", "the cat saw the bird") == pytest.approx(2 * 3 / (4 + 5))
    assert rouge1("a b", "a b") == 1 and rouge1("a", "b") == 0 and rouge1("", "") == 0


def test_every_example_has_a_small_command():
    elsewhere = ("calculator", "hh", "llama_factory", "smollm2")
    scripts = (path for path in (ROOT / "examples").glob("*/*.py") if path.parent.name not in elsewhere)
    scripts = {str(path.relative_to(ROOT)) for path in scripts}
    assert small_commands().keys() == scripts
