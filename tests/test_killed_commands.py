"""`generate` and `winrate` are killed while they write, and continue to the same files. The kills are real ones."""

import json
import multiprocessing
import os
import signal
import time
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from tests.endpoint import Endpoint, prefers_longer, servers
from tests.tiny import byte_tokenizer
from trl_apa.cli import COMMANDS
from trl_apa.commands import generate_options, winrate
from trl_apa.winrate import VerdictCache


# Processes are forked from one that has imported the commands once, which takes longer than all the rest.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def start(command, argv, rows=None):
    """A process of the command; if `rows` is given, it kills itself in the middle of writing the row after so many."""
    process = PROCESSES.Process(target=run_in_process, args=(command, list(map(str, argv)), rows), daemon=True)
    process.start()
    return process


def wait_for_kill(process):
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    process.close()


def run_in_process(command, argv, rows):
    from trl_apa.commands import row_file

    write, written = row_file.write_all, []

    def write_all(file, data):
        if len(written) == rows:
            write(file, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(data)
        write(file, data)

    row_file.write_all = write_all
    torch.set_num_threads(1)
    import_module(COMMANDS[command][0]).main(argv)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = byte_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GPTNeoXConfig(**ids, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(policy, tmp_path, count=10):
    """Two responses to each prompt, in batches that do not end where a prompt does."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Question {number}" + "?" * (number % 4)} for number in range(count)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model_name_or_path", policy, "--dataset_name", prompts, "--use_cpu", "--num_generations", 2]
    return [*argv, "--generation_batch_size", 3, "--max_completion_length", 8]


def test_responses_are_those_of_a_command_that_was_not_killed(policy, tmp_path, capsys):
    argv = list(map(str, options(policy, tmp_path)))
    assert generate_options.main([*argv, "--output", str(tmp_path / "untouched.jsonl")]) == 0
    output = tmp_path / "responses.jsonl"
    there = 0
    # in the first row, within a batch, and at its end
    for rows in (0, 4, 2):
        wait_for_kill(start("generate", [*argv, "--output", output], rows))
        there += rows
        content = output.read_bytes()
        assert content.count(b"\n") == there and not content.endswith(b"\n")
    capsys.readouterr()
    assert generate_options.main([*argv, "--output", str(output)]) == 0
    assert f"{output}: 6 of 20 responses are done already" in capsys.readouterr().err
    assert output.read_bytes() == (tmp_path / "untouched.jsonl").read_bytes()
    texts = [json.loads(line)["completion"] for line in output.read_text().splitlines()]
    assert len(set(texts)) == 20  # they are sampled, each anew


def test_so_they_are_after_a_kill_from_outside(policy, tmp_path):
    argv = list(map(str, options(policy, tmp_path, count=60)))
    assert generate_options.main([*argv, "--output", str(tmp_path / "untouched.jsonl")]) == 0
    output = tmp_path / "responses.jsonl"
    process = start("generate", [*argv, "--output", output])
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    wait_for_kill(process)
    assert 5 <= output.read_bytes().count(b"\n") < 120
    assert generate_options.main([*argv, "--output", str(output)]) == 0
    assert output.read_bytes() == (tmp_path / "untouched.jsonl").read_bytes()


def test_the_win_rate_is_that_of_a_command_that_was_not_killed(tmp_path, monkeypatch):
    for name, completion in [("ours", "long"), ("theirs", "short")]:
        rows = [{"prompt": str(number), "completion": completion * number} for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    processes = []

    def reply(text):
        # The sixth question ends the process that asks it.
        if processes and len(server.requests) == 6:
            os.kill(processes.pop().pid, signal.SIGKILL)
        return prefers_longer(text)

    with servers(monkeypatch) as keep:
        server = keep(Endpoint(reply))
        argv = [
            str(tmp_path / "ours.jsonl"),
            str(tmp_path / "theirs.jsonl"),
            "--judge",
            "openai",
            "--judge_model",
            "m",
        ]
        argv += ["--base_url", server.url, "--workers", "1", "--output"]
        untouched = [str(tmp_path / "untouched.json"), "--cache", str(tmp_path / "untouched.jsonl")]
        # In both orders, but once about the two answers to prompt 0, which are both empty.
        assert winrate.main([*argv, *untouched]) == 0 and len(server.requests) == 7
        server.requests.clear()
        result, cache = tmp_path / "result.json", tmp_path / "winrate_cache.jsonl"
        process = start("winrate", [*argv, result])
        processes.append(process)
        wait_for_kill(process)
        assert len(VerdictCache(cache)) == 5 and not result.exists()
        # half a verdict, as a kill in the middle of a line leaves it
        cache.write_bytes(cache.read_bytes()[:-20])
        server.requests.clear()
        assert winrate.main([*argv, str(result)]) == 0 and len(server.requests) == 3
    assert result.read_bytes() == (tmp_path / "untouched.json").read_bytes()
