"""`examples/hh/run_hh.py` runs to the end on synthetic rows, resumes, and refuses what would mix results."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "examples" / "hh"

TINY = [
    *("--held-out", "0.25", "--max-prompt-length", "24", "--max-target-length", "12", "--max-new-tokens", "6"),
    *("--vocab-size", "300", "--hidden-size", "64", "--num-layers", "1"),
    *("--sft-epochs", "1", "--reward-epochs", "1", "--iterations", "2", "--batch-size", "8", "--mini-batch-size", "4"),
    *("--eval-prompts", "6", "--samples", "2"),
]


@pytest.fixture(scope="module")
def hh_file(tmp_path_factory):
    """60 pairs in the HH layout and two bad rows."""
    rows = []
    for number in range(60):
        prompt = f"\n\nHuman: What is {number} plus {number % 7}?\n\nAssistant:"
        rows.append({"chosen": f"{prompt} It is {number + number % 7}.", "rejected": f"{prompt} I do not know that."})
    rows.insert(5, {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"})
    rows.insert(9, {"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": "\n\nHuman: Hi\n\nAssistant: Hi"})
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def first_run(hh_file, tmp_path_factory):
    """What a user does: the script in a process of its own."""
    output_dir = tmp_path_factory.mktemp("run")
    arguments = ["--dataset", str(hh_file), "--output-dir", str(output_dir), *TINY]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(EXAMPLE / "run_hh.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return output_dir, done.stdout


@pytest.fixture
def example_module(monkeypatch):
    """Import a module of the example, which is no package, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    names = {path.stem for path in EXAMPLE.glob("*.py")}
    for name in names & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)
    yield importlib.import_module
    for name in names & set(sys.modules):
        del sys.modules[name]


@pytest.fixture
def run_hh(example_module, monkeypatch, capsys):
    """The script in this process, which saves the start of another: what it printed, or the message it ended with."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_hh.py", *map(str, arguments)])
        try:
            example_module("run_hh").main()
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_all_stages_leave_their_results(first_run):
    output_dir, printed = first_run
    assert "60 preference pairs, 2 bad rows" in printed
    assert "chosen: ends with a human turn" not in printed and "has no" in printed
    for line in ("proxy reward", "KL to SFT, k3", "distinct answers", "wins", "of held-out pairs"):
        assert line in printed
    result = json.loads((output_dir / "result.json").read_text())
    assert [bad["row"] for bad in result["bad_rows"]] == [6, 10]
    assert result["pairs"] == {"held_out": 15, "sft": 45, "reward": 45, "apa": 45}
    metrics = [json.loads(line) for line in (output_dir / "apa" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in metrics] == [1, 2]
    assert {"apa/mean_scores", "objective/kl", "apa/loss/policy"} <= set(metrics[0])
    samples = [json.loads(line) for line in (output_dir / "eval" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == result["eval"]["prompts"] == 6


@pytest.mark.slow
def test_evaluation_is_of_the_two_models(first_run):
    output_dir, _ = first_run
    result = json.loads((output_dir / "result.json").read_text())["eval"]
    samples = [json.loads(line) for line in (output_dir / "eval" / "samples.jsonl").read_text().splitlines()]
    # The SFT model is its own reference, the aligned one has moved away from it.
    assert result["before"]["kl_k1"] == result["before"]["kl_k3"] == 0.0
    assert result["after"]["kl_k3"] > 0
    for when in ("before", "after"):
        rewards = [sample[f"reward_{when}"] for sample in samples]
        assert result[when]["reward"] == pytest.approx(sum(rewards) / 6, abs=1e-5)
    wins = [
        (sample["reward_after"] > sample["reward_before"]) + 0.5 * (sample["reward_after"] == sample["reward_before"])
        for sample in samples
    ]
    assert result["win_rate"] == pytest.approx(sum(wins) / 6)


@pytest.mark.slow
def test_saved_models_are_plain_checkpoints(first_run):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    output_dir, _ = first_run
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "apa")
    text = "\n\nHuman: What is 3?\n\nAssistant: é"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert len(tokenizer) == 300
    for stage in ("sft", "apa"):
        model = AutoModelForCausalLM.from_pretrained(output_dir / stage)
        assert model(ids).logits.shape == (1, ids.shape[1], 300)
    assert AutoModelForSequenceClassification.from_pretrained(output_dir / "reward")(ids).logits.shape == (1, 1)


@pytest.mark.slow
def test_finished_stages_are_not_repeated_and_other_options_are_refused(first_run, hh_file, run_hh):
    output_dir, _ = first_run
    before = {path: path.stat().st_mtime_ns for path in output_dir.glob("*/*") if path.is_file()}
    printed = run_hh("--dataset", hh_file, "--output-dir", output_dir, *TINY)
    for stage in ("sft", "reward", "apa", "eval"):
        assert f"already in {output_dir / stage}" in printed
    assert "proxy reward" in printed
    assert {path: path.stat().st_mtime_ns for path in output_dir.glob("*/*") if path.is_file()} == before
    refused = run_hh("--dataset", hh_file, "--output-dir", output_dir, *TINY, "--held-out", "0.5")
    assert "held_out 0.25 -> 0.5" in refused and "--overwrite" in refused


@pytest.mark.slow
def test_a_result_made_from_a_repeated_stage_is_refused(first_run, hh_file, tmp_path, run_hh):
    output_dir = tmp_path / "copy"
    shutil.copytree(first_run[0], output_dir)
    data = ("--dataset", hh_file, "--output-dir", output_dir, *TINY)
    record = json.loads((output_dir / "reward" / "stage.json").read_text())
    assert "done in" in run_hh(*data, "--stages", "reward", "--overwrite")
    repeated = json.loads((output_dir / "reward" / "stage.json").read_text())
    assert repeated["id"] != record["id"]
    # One seed, one result, whichever stages ran before in the process.
    assert repeated["result"] == pytest.approx(record["result"] | {"seconds": repeated["result"]["seconds"]}, rel=1e-4)
    policy = (output_dir / "apa" / "model.safetensors").read_bytes()
    refused = run_hh(*data)
    assert "the stage 'apa' in" in refused and "reward has been repeated since" in refused
    # Nothing was deleted on the way; it is the user who says so.
    assert (output_dir / "apa" / "model.safetensors").read_bytes() == policy
    printed = run_hh(*data, "--stages", "apa,eval", "--overwrite", "--loss-type", "awr")
    assert "already in" in printed and "AWR" in printed
    assert (output_dir / "apa" / "model.safetensors").read_bytes() != policy


@pytest.mark.slow
def test_an_interrupted_stage_is_repeated(first_run, hh_file, tmp_path, run_hh):
    output_dir = tmp_path / "copy"
    shutil.copytree(first_run[0], output_dir)
    record_file = output_dir / "eval" / "stage.json"
    record_file.write_text(json.dumps(json.loads(record_file.read_text()) | {"result": None}))
    printed = run_hh("--dataset", hh_file, "--output-dir", output_dir, *TINY)
    assert printed.count("already in") == 3
    # The same samples and the same figures come out.
    assert (output_dir / "eval" / "samples.jsonl").read_text() == (first_run[0] / "eval" / "samples.jsonl").read_text()


@pytest.mark.slow
def test_a_given_model_and_reward_model_with_lora_and_ppo(first_run, hh_file, tmp_path, run_hh):
    """The way of `--model`, in the prompt/chosen/rejected layout, with another loss and disjoint parts."""
    output_dir, _ = first_run
    rows = [json.loads(line) for line in hh_file.read_text().splitlines()]
    columns = [
        {
            "prompt": row["chosen"].split("Assistant:")[0] + "Assistant:",
            "chosen": row["chosen"].split("Assistant:")[1],
            "rejected": row["rejected"].split("Assistant:")[1],
        }
        for row in rows
        if row["chosen"].count("Assistant: ")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(columns))
    models = ("--model", output_dir / "sft", "--reward-model", output_dir / "reward")
    options = ("--peft", "--loss-type", "ppo", "--disjoint", "--learning-rate", "1e-2", "--small")
    data = ("--dataset", tmp_path / "rows.json", "--output-dir", tmp_path / "out")
    run_hh(*data, *models, *TINY, *options)
    assert (tmp_path / "out" / "apa" / "adapter_config.json").exists()
    assert not (tmp_path / "out" / "reward" / "model.safetensors").exists()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["pairs"] == {"held_out": 15, "sft": 15, "reward": 15, "apa": 15}
    assert result["reward"]["trained"] is False
    assert result["eval"]["after"]["kl_k3"] > 0
    # A language model without a score head is not silently given a random one.
    wrong = ("--model", output_dir / "sft", "--reward-model", output_dir / "sft", "--stages", "reward", "--overwrite")
    refused = run_hh(*data, *wrong, *TINY, *options)
    assert "is no trained reward model" in refused


def test_stages_that_are_missing_are_named(hh_file, tmp_path, run_hh):
    refused = run_hh("--dataset", hh_file, "--output-dir", tmp_path, "--stages", "apa,eval", *TINY)
    assert "the stage 'sft' has no result" in refused


def test_unreadable_data_is_an_error_without_a_traceback(tmp_path, run_hh):
    assert "there is no such file" in run_hh("--dataset", tmp_path / "no.jsonl", "--output-dir", tmp_path)
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    refused = run_hh("--dataset", tmp_path / "other.jsonl", "--output-dir", tmp_path)
    assert "no preference pair found" in refused and "has no 'chosen' column" in refused


@pytest.mark.slow
def test_lengths_beyond_the_positions_are_refused_before_training(first_run, hh_file, tmp_path, run_hh):
    # The model of the first run has 24 + 12 positions.
    data = ("--dataset", hh_file, "--output-dir", tmp_path, "--model", first_run[0] / "sft", *TINY)
    assert "37 tokens, but the model has 36 positions" in run_hh(*data, "--max-new-tokens", "13")


# ---- the modules of the example ----


@pytest.fixture
def tokenizer(example_module):
    """Every byte is one token, so lengths can be counted by hand."""
    return example_module("small_model").train_tokenizer([], vocab_size=258)


def test_long_prompts_keep_their_last_turns(example_module, tokenizer):
    encode = example_module("texts").encode_prompt
    first, last = "\n\nHuman: one\n\nAssistant: two", "\n\nHuman: three\n\nAssistant:"
    assert (len(first), len(last)) == (28, 26)
    assert tokenizer.decode(encode(tokenizer, first + last, 54)) == first + last
    # One token short of everything: the whole first exchange goes.
    assert tokenizer.decode(encode(tokenizer, first + last, 53)) == last
    assert tokenizer.decode(encode(tokenizer, first + last, 26)) == last
    # Not even the last turn fits: its end is kept.
    assert tokenizer.decode(encode(tokenizer, first + last, 10)) == "Assistant:"
    assert tokenizer.decode(encode(tokenizer, "no turns at all", 3)) == "all"


def test_a_bos_token_stays_in_front(example_module, tokenizer):
    from tokenizers.processors import TemplateProcessing

    encode = example_module("texts").encode_prompt
    pad = tokenizer.pad_token
    tokenizer.bos_token = pad
    assert encode(tokenizer, "abcd", 3) == tokenizer("bcd")["input_ids"]
    # Now it is a tokenizer that puts its BOS before every text, as Llama's does.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{pad} $A", special_tokens=[(pad, tokenizer.pad_token_id)]
    )
    assert tokenizer.decode(encode(tokenizer, "abcd", 3)) == f"{pad}cd"
    assert tokenizer.decode(encode(tokenizer, f"{pad}abcd", 9)) == f"{pad}abcd"


def test_responses_end_with_eos_only_if_they_are_whole(example_module, tokenizer):
    encode = example_module("texts").encode_response
    eos = tokenizer.eos_token_id
    abc = tokenizer("abc")["input_ids"]
    assert encode(tokenizer, "abc", 4) == [*abc, eos]
    assert encode(tokenizer, "abc", 3) == abc
    # The reward model reads its score at EOS: there a cut response ends with it too.
    assert encode(tokenizer, "abc", 3, end=True) == [*abc[:2], eos]


def test_text_of_a_response_stops_at_the_next_turn(example_module, tokenizer):
    text = example_module("texts").response_text
    ids = [*tokenizer(" Yes.\n\nHuman:")["input_ids"], tokenizer.eos_token_id]
    assert text(tokenizer, ids) == " Yes."
    assert text(tokenizer, tokenizer(" é\n\nAssistant: x")["input_ids"]) == " é"
    assert text(tokenizer, [tokenizer.eos_token_id]) == ""


def test_prompt_batches_pass_over_all_prompts(example_module):
    prompt_batches = example_module("stage_apa").prompt_batches
    batches = prompt_batches(list("abcdef"), 3, seed=0)
    for _ in range(3):
        assert sorted(next(batches) + next(batches)) == list("abcdef")
    assert next(prompt_batches(list("abcdef"), 3, seed=0)) == next(prompt_batches(list("abcdef"), 3, seed=0))
    with pytest.raises(ValueError, match="too few"):
        next(prompt_batches(["a"], 2, seed=0))


def test_sequence_kl_against_a_slow_loop(example_module, tokenizer):
    import torch

    options = example_module("options").parse_options(["--dataset", "x", "--generation-batch-size", "2"])
    new_model = example_module("small_model").new_model
    policy, reference = (new_model(tokenizer, 64, 1, 32, seed) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randint(2, 258, (length,), generator=generator) for length in (3, 5, 2)]
    responses = [torch.randint(2, 258, (length,), generator=generator) for length in (4, 1, 6)]
    k1, k3 = example_module("stage_eval").sequence_kl(policy, reference, queries, responses, 1, options)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        ids = torch.cat([query, response])[None]
        with torch.no_grad():
            log_ratio = policy(ids).logits.log_softmax(-1) - reference(ids).logits.log_softmax(-1)
        x = [log_ratio[0, len(query) + i - 1, token].item() for i, token in enumerate(response)]
        assert k1[row].item() == pytest.approx(sum(x), abs=1e-4)
        assert k3[row].item() == pytest.approx(sum(2.718281828459045**-v - 1 + v for v in x), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "6", "--mini-batch-size", "4"], "no multiple"),
        (["--stages", "sft,rm"], "rm: expected some of sft, reward, apa, eval"),
        (["--iterations", "0"], "--iterations 0: expected a number above 0"),
        (["--held-out", "1"], "expected a share below 1"),
    ],
)
def test_options_that_make_no_sense(example_module, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example_module("options").parse_options(["--dataset", "x", *arguments])
    assert message in capsys.readouterr().err


def test_defaults_follow_the_paper_with_a_model(example_module):
    parse = example_module("options").parse_options
    real, small = parse(["--dataset", "x", "--model", "m"]), parse(["--dataset", "x", "--model", "m", "--small"])
    chosen = (real.learning_rate, real.batch_size, real.mini_batch_size, real.ppo_epochs, real.max_new_tokens)
    assert chosen == (8e-6, 64, 8, 2, 128)
    assert real.max_prompt_length + real.max_new_tokens == 1024
    # 20,000 optimizer steps of 8 rollouts in two passes over 64.
    assert real.iterations * real.ppo_epochs * real.batch_size // real.mini_batch_size == 20000
    assert real.eval_prompts == 280
    assert small.max_new_tokens < real.max_new_tokens


def test_no_network_where_everything_is_local(example_module, monkeypatch, tmp_path):
    prepare = example_module("run_hh").prepare_environment
    parse = example_module("options").parse_options
    monkeypatch.setattr(os, "environ", {})
    prepare(parse(["--dataset", "rows.jsonl", "--model", str(tmp_path)]))
    assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    os.environ.clear()
    prepare(parse(["--dataset", "rows.jsonl", "--model", "EleutherAI/pythia-160m"]))
    assert "HF_HUB_OFFLINE" not in os.environ and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
