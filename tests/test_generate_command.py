"""`trl-apa generate`: rows as they come, whose rows a file holds, and what is refused before a model is loaded."""

import json
import os
import shutil
import threading

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from tests import _cli
from tests.tiny import byte_tokenizer, lora_config
from trl_apa import APAConfig
from trl_apa.commands import generate, generate_options, row_file
from trl_apa.commands.models import checkpoint_stamp
from trl_apa.commands.row_file import RowFile


PROMPTS = ["Why?", "How is it that so many are so long?", "When?", "Where?", "Who?"]


def save_policy(folder, seed=0):
    tokenizer = byte_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    config = GPTNeoXConfig(**ids, **sizes, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    for number, name in enumerate(("policy", "other")):
        save_policy(folder / name, number)
    return folder


def call(*argv, prompts=PROMPTS, model="policy"):
    argv = ["--model_name_or_path", model, "--prompt", *prompts, "--use_cpu", "--max_completion_length", 6, *argv]
    return _cli.run("generate", *argv)


@pytest.fixture
def run(policies, tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with both policies; returns what it says if it ends with status 2, else None."""
    for name in ("policy", "other"):
        (tmp_path / name).symlink_to(policies / name)
    monkeypatch.chdir(tmp_path)

    def run(*argv, **options):
        capsys.readouterr()
        status = call(*argv, **options)
        assert status in (0, 2)
        return capsys.readouterr().err if status else None

    return run


@pytest.fixture(scope="module")
def complete(policies):
    """The rows of the command without more options, and their record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(policies)
        assert call("--output", "rows.jsonl") == 0
    return policies / "rows.jsonl", policies / ".rows.jsonl.run.json"


@pytest.fixture
def output(complete, tmp_path):
    """A copy of them."""
    for path in complete:
        shutil.copy(path, tmp_path)
    return tmp_path / "rows.jsonl"


def lines(path):
    return path.read_bytes().splitlines()


def no_model(monkeypatch):
    def load(*args):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(generate, "load_policy", load)
    monkeypatch.setattr(generate, "load_tokenizer", load)


# ---- rows as they come ----


def test_the_rows_of_a_batch_are_on_disk_before_the_next_is_sampled(run, tmp_path, monkeypatch):
    output, sample, there = tmp_path / "new" / "rows.jsonl", generate.generate_responses, []

    def generate_responses(model, queries, **options):
        there.append((len(queries), len(lines(output)) if output.exists() else 0))
        return sample(model, queries, **options)

    monkeypatch.setattr(generate, "generate_responses", generate_responses)
    assert run("--output", output, "--generation_batch_size", 2, "--num_generations", 2) is None
    assert there == [(2, 0), (2, 2), (2, 4), (2, 6), (2, 8)]
    rows = [json.loads(line) for line in lines(output)]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert len({row["completion"] for row in rows}) == 10
    assert sorted(path.name for path in output.parent.iterdir()) == [".rows.jsonl.run.json", "rows.jsonl"]


@pytest.mark.parametrize(("argv", "autocast"), [([], False), (["--bf16"], True), (["--bf16", "no"], False)])
def test_sampling_computes_in_bfloat16_where_bf16_says_so(run, monkeypatch, argv, autocast):
    sample, found = generate.generate_responses, []

    def generate_responses(*args, **options):
        found.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return sample(*args, **options)

    monkeypatch.setattr(generate, "generate_responses", generate_responses)
    assert run(*argv) is None
    assert found == [autocast and torch.bfloat16] and not torch.is_autocast_enabled("cpu")


def test_a_batch_depends_on_the_seed_and_its_number_alone(run, tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    assert run("--output", files[0], "--generation_batch_size", 2) is None
    # the first batch asks something else
    assert run("--output", files[1], "--generation_batch_size", 2, prompts=["x", "y", *PROMPTS[2:]]) is None
    assert run("--output", files[2], "--generation_batch_size", 2, "--seed", 1) is None
    first, second, third = map(lines, files)
    assert first[2:] == second[2:] and not set(first) & set(third)


def test_the_same_rows_go_to_standard_output(run, output, tmp_path, capsys):
    expected = output.read_text()
    for argv in ([], ["--output", "-"], ["--output", "/dev/stdout"]):
        assert run(*argv) is None
        assert capsys.readouterr().out == expected
    assert sorted(path.name for path in tmp_path.glob("*stdout*")) == []


def test_a_pipe_and_a_device_are_written_to_and_nothing_more(run, tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    assert run("--output", pipe) is None
    reader.join()
    assert len(found[0].splitlines()) == 5 and not (tmp_path / ".pipe.run.json").exists()
    assert run("--output", "/dev/null") is None
    assert "No space left on device: '/dev/full'" in run("--output", "/dev/full")


def test_a_disk_that_fills_up_ends_the_command_with_one_line_and_it_continues(run, complete, tmp_path, monkeypatch):
    output, write_all = tmp_path / "rows.jsonl", row_file.write_all

    def full(file, data):
        if len(lines(output)) == 3:
            file.write(data[:5])
            raise OSError(28, "No space left on device", str(output))
        write_all(file, data)

    monkeypatch.setattr(row_file, "write_all", full)
    said = f"trl-apa generate: [Errno 28] No space left on device: '{output}'\n"
    assert run("--output", output).endswith(said)
    monkeypatch.setattr(row_file, "write_all", write_all)
    assert len(lines(output)) == 4 and run("--output", output) is None
    assert output.read_bytes() == complete[0].read_bytes()


# ---- whose rows a file holds ----


def test_what_is_complete_is_left_as_it_is_without_a_model(run, output, monkeypatch, capsys):
    before = output.read_bytes(), output.stat().st_mtime_ns
    no_model(monkeypatch)
    assert run("--output", output, model="policy/") is None
    assert capsys.readouterr().err == f"{output}: 5 of 5 responses are done already\n"
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--temperature", 0.5], "temperature was 1.0 and is 0.5"),
        (["--top_p", 0.5, "--top_k", 3], "top_k was 0 and is 3, top_p was 1.0 and is 0.5"),
        (["--seed", 7], "seed was 42 and is 7"),
        (["--max_completion_length", 5], "max_completion_length was 6 and is 5"),
        (["--max_prompt_length", 4], "max_prompt_length was None and is 4"),
        (["--stop_strings", "x"], "stop_strings was None and is ['x']"),
        (["--generation_batch_size", 2], "generation_batch_size was 8 and is 2"),
        (["--num_generations", 2], "num_generations was 1 and is 2"),
        (["--dtype", "bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
        (["--chat_template_kwargs", '{"a": 1}'], "chat_template_kwargs was None and is {'a': 1}"),
        ({"model": "other"}, "model_name_or_path was 'policy' and is 'other'"),
        ({"prompts": PROMPTS[:4]}, "prompts was '5, sha256"),
        ({"prompts": [*PROMPTS, "What?"]}, "prompts was '5, sha256"),
        ({"prompts": [*PROMPTS[:4], "What?"]}, "prompts was '5, sha256"),
        ({"prompts": PROMPTS[::-1]}, "prompts was '5, sha256"),
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [True, False])
def test_rows_of_another_command_are_refused_by_name(changed, said, whole, run, output, monkeypatch):
    if not whole:
        output.write_bytes(output.read_bytes()[:-20])
    before = output.read_bytes()
    no_model(monkeypatch)
    argv, options = (changed, {}) if isinstance(changed, list) else ([], changed)
    message = run("--output", output, *argv, **options)
    assert f"{output} holds the rows of another command" in message and said in message
    assert message.endswith("set --overwrite to start again, or name another file\n") and message.count("\n") == 1
    assert output.read_bytes() == before


def test_rows_of_a_policy_that_was_trained_again_are_refused(run, tmp_path, policies):
    output = tmp_path / "rows.jsonl"
    save_policy(tmp_path / "mine")
    assert run("--output", output, model="mine") is None
    save_policy(tmp_path / "mine", seed=3)
    assert "files of the model was" in run("--output", output, model="mine")


def test_a_file_may_lie_beside_the_policy(run, tmp_path):
    save_policy(tmp_path / "mine")
    output = tmp_path / "mine" / "rows.jsonl"
    assert run("--output", output, model="mine") is None
    content = output.read_bytes()
    output.write_bytes(content[:100])
    assert run("--output", output, model="mine") is None and output.read_bytes() == content


def test_overwrite_begins_anew(run, tmp_path):
    output = tmp_path / "rows.jsonl"
    assert run("--output", output, "--seed", 3) is None
    expected = output.read_bytes()
    assert "another command" in run("--output", output)
    assert run("--output", output, "--overwrite") is None and output.read_bytes() != expected
    assert run("--output", output, "--overwrite", "--seed", 3) is None and output.read_bytes() == expected
    assert run("--output", output, "--seed", 3) is None and output.read_bytes() == expected


NOT_OURS = {
    "no record": lambda output, record: record.unlink(),
    "an empty record": lambda output, record: record.write_text(""),
    "half a record": lambda output, record: record.write_text(record.read_text()[:30]),
    "a list as record": lambda output, record: record.write_text("[]"),
    "nesting as record": lambda output, record: record.write_text("[" * 100_000),
    "another record": lambda output, record: record.write_text("{}"),
    "another line": lambda output, record: output.write_bytes(b'{"a": 1}\n' + output.read_bytes()),
    "a line that is no JSON": lambda output, record: output.write_bytes(b"Responses:\n" + output.read_bytes()),
    "a line that is no text": lambda output, record: output.write_bytes(b"\xff\xfe\n" + output.read_bytes()),
    "another prompt": lambda output, record: output.write_bytes(output.read_bytes().replace(b"When?", b"Then?")),
    "another order": lambda output, record: output.write_bytes(b"".join(output.read_bytes().splitlines(True)[::-1])),
    "another column": lambda output, record: output.write_bytes(
        output.read_bytes().replace(b'"completion"', b'"text"')
    ),
    "a row too many": lambda output, record: output.write_bytes(output.read_bytes() + lines(output)[0] + b"\n"),
}


@pytest.mark.parametrize("spoil", NOT_OURS.values(), ids=NOT_OURS)
def test_a_file_that_this_command_did_not_write_is_not_touched(spoil, run, output, tmp_path, monkeypatch):
    spoil(output, tmp_path / ".rows.jsonl.run.json")
    before = output.read_bytes()
    no_model(monkeypatch)
    message = run("--output", output)
    assert str(output) in message and "set --overwrite to start again, or name another file" in message
    assert message.count("\n") == 1 and output.read_bytes() == before


def test_an_empty_file_and_a_record_without_a_file_belong_to_nobody(run, tmp_path):
    output = tmp_path / "rows.jsonl"
    output.write_bytes(b"")
    assert run("--output", output) is None and len(lines(output)) == 5
    output.unlink()
    assert run("--output", output, "--seed", 3) is None and len(lines(output)) == 5


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.json", "rows.jsonl.gz", "ROWS.CSV"])
def test_a_name_under_which_nobody_could_read_the_rows_is_refused(name, run, tmp_path, monkeypatch):
    no_model(monkeypatch)
    assert "its name should end with .jsonl" in run("--output", tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_folder_is_refused(run, tmp_path, monkeypatch):
    no_model(monkeypatch)
    assert "is a folder; it should be a file" in run("--output", tmp_path)


def test_a_prompt_longer_than_the_model_can_read_is_refused_before_it_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_policy", lambda *args: pytest.fail("weights are loaded"))
    message = run("--output", tmp_path / "rows.jsonl", prompts=[*PROMPTS, "x" * 70])
    assert "the prompt of row 6 has 70 tokens; the model has 64 positions" in message
    assert not (tmp_path / "rows.jsonl").exists()


# ---- the file itself ----


def longer(folder, **special):
    """The policy with one token more in its tokenizer than its embedding has rows."""
    save_policy(folder)
    tokenizer = byte_tokenizer()
    assert tokenizer.add_special_tokens(special) == 1
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_pad_without_a_row_in_the_embedding_changes_no_answer(run, complete, tmp_path):
    assert run("--output", "padded.jsonl", model=longer(tmp_path / "longer", pad_token="[PAD]")) is None
    assert lines(tmp_path / "padded.jsonl") == lines(complete[0])


def test_a_prompt_with_a_token_without_a_row_in_the_embedding_is_refused_by_name(run, tmp_path):
    model = longer(tmp_path / "longer", additional_special_tokens=["<image>"])
    said = run("--output", "rows.jsonl", model=model, prompts=["Why?", "Why <image>?"])
    assert "the prompt of row 1 holds token ids from" in said and "('<image>'); the model knows 0 to" in said


def test_two_processes_do_not_write_one_file(tmp_path):
    first, second = (RowFile(tmp_path / "rows.jsonl", {"seed": 1}, ["p", "q"]) for _ in range(2))
    with first.writing(0) as write:
        with pytest.raises(ValueError, match=r"another process is writing .*rows\.jsonl"), second.writing(0):
            pass
        write({"prompt": "p", "completion": "ü"})
    with pytest.raises(ValueError, match=r"another process has written .*rows\.jsonl"), second.writing(0):
        pass
    with second.writing(second.count()) as write:
        write({"prompt": "q", "completion": "c"})
    assert first.count() == 2 and lines(first.path)[0].decode() == '{"prompt": "p", "completion": "ü"}'


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there" / "rows.jsonl")
    file = RowFile(tmp_path / "link.jsonl", {}, ["p"])
    with file.writing(0) as write:
        write({"prompt": "p", "completion": "c"})
    assert RowFile(tmp_path / "there" / "rows.jsonl", {}, ["p"]).count() == 1 == file.count()


def test_chat_messages_and_token_ids_are_told_apart(tmp_path):
    config = APAConfig(output_dir=str(tmp_path), use_cpu=True)
    values = generate_options.make_parser().parse(["--model_name_or_path", str(tmp_path)])
    rows = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    asked = [{"prompt": row} for row in rows] + [
        {"input_ids": [1]},
        {"input_ids": [2]},
        {"prompt": "a"},
        {"query": "b"},
    ]
    digests = {generate._what_rows_depend_on(values, [row], config)["prompts"] for row in asked}
    assert len(digests) == len(asked)
    messages = Dataset.from_list([{"prompt": row} for row in rows])["prompt"]
    file = RowFile(tmp_path / "rows.jsonl", {}, list(messages))
    with file.writing(0) as write:
        write({"prompt": messages[0], "completion": "c"})
    assert file.count() == 1


def test_the_stamp_of_a_checkpoint_changes_with_what_it_is_made_of(tmp_path):
    base = save_policy(tmp_path / "base")
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, lora_config()).save_pretrained(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    before = checkpoint_stamp(str(base)), checkpoint_stamp(str(adapter))
    assert before[0] != before[1]
    for folder in (base, adapter):
        for name in ("rows.jsonl", "winrate_cache.jsonl", "winrate.json", "README.md", "events.out.tfevents"):
            (folder / name).write_text("x")
    assert before == (checkpoint_stamp(str(base)), checkpoint_stamp(str(adapter)))
    os.utime(base / "model.safetensors", (1, 1))
    after = checkpoint_stamp(str(base)), checkpoint_stamp(str(adapter))
    assert after[0] != before[0] and after[1] != before[1]
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert checkpoint_stamp(str(base)) != after[0]
    assert checkpoint_stamp("no/such-model") == ""
