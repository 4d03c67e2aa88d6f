"""What a user gets wrong on the command line, command by command: a line or two, and never a traceback."""

import errno
import gzip
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import PreTrainedModel

from tests._cli import run
from tests.test_cli import hh_rows, jsonl, make_model
from trl_apa import cli
from trl_apa.commands import env, evaluate, launching
from trl_apa.commands.streams import streams_that_may_be_lost


ROOT = Path(__file__).parents[1]
REWARDS = """
def broken(completions, **columns):
    return [1 / 0 for _ in completions]


def length(completions, **columns):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with models and files, most of which are not what they should be, as the working directory."""
    folder, before, path = tmp_path_factory.mktemp("place"), os.getcwd(), list(sys.path)
    os.chdir(folder)
    make_model(Path("base"))
    jsonl(Path("rows.jsonl"), hh_rows(20))
    for name, text in {
        "file": "",
        "my_rewards.py": REWARDS,
        "rewards_with_a_slip.py": "def f(:\n",
        "rewards_that_fail.py": "x = undefined\n",
        "rewards_that_exit.py": "import sys; sys.exit(3)\n",
        "empty.jsonl": "",
        "brackets.jsonl": "[\n{\n" + "[" * 100_000 + "\n",
        "texts.jsonl": '{"txt": "a"}\n',
        "empty_prompts.jsonl": '{"prompt": ""}\n' * 8,
        "chat.jsonl": '{"prompt": [{"role": "user", "content": "hi"}]}\n' * 8,
        "document.json": "{",
        "deep.json": "[" * 100_000,
        "table.csv": "",
        "table.parquet": "no table",
        "torn.yaml": "a: [",
        "list.yaml": "- a",
        "key.yaml": "{[1]: 2}",
        "date.yaml": "seed: 2020-13-45",
        "json.yaml": "tracker_kwargs: '{bad'",
        "state/trainer_state.json": "{",
        "list/trainer_state.json": "[]",
        "number/trainer_state.json": '{"log_history": 3}',
        "figures/figures.yaml": "fig0: 3\nfig1: {title: a, command: train, seeds: 3, panels: {}}\n"
        "fig2: {title: a, command: train, seeds: [0], panels: {a: {b: c.yaml}}}\n"
        "fig3: {title: a, command: train, seeds: [0], panels: {}}\n",
        "figures/c.yaml": "loss_type: dpo\n",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("torn.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9])
    Path("torn.json.gz").write_bytes(gzip.compress(b"[]" * 99)[:-9])
    jsonl(Path("long.jsonl"), [{"prompt": f"{n}" * 300, "chosen": "y", "rejected": "z"} for n in range(8)])
    jsonl(Path("demonstrations.jsonl"), [{"prompt": "x" * 300, "completion": "y"}] * 8)
    rewarded = {"prompt": "x", "completion": "y", "reward": 1.0}
    compared = {**rewarded, "ref_rewards": [0.5]}
    jsonl(Path("rewarded.jsonl"), [compared, rewarded] * 4)
    jsonl(Path("mixed.jsonl"), [compared, {"prompt": "x", "chosen": "y", "rejected": "z"}] * 4)
    jsonl(Path("answers.jsonl"), [{"prompt": "p", "completion": "c"}])
    Path("nothing").mkdir()
    Path("run").mkdir()
    for name, file, text in [
        ("torn_config", "config.json", "{"),
        ("torn_weights", "model.safetensors", "?"),
        ("torn_tokenizer", "tokenizer.json", "{"),
    ]:
        shutil.copytree("base", name)
        Path(name, file).write_text(text)
    shutil.copytree("base", "no_weights")
    Path("no_weights/model.safetensors").unlink()
    yield folder
    os.chdir(before)
    sys.path[:] = path


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


ROWS = "--model_name_or_path base --dataset_name rows.jsonl"
QUICK = "--use_cpu --report_to none --max_steps 1 --per_device_train_batch_size 4 --output_dir out"
COMMON = {
    "train": f"{ROWS} --reward_funcs my_rewards.length --batch_size 8 --max_completion_length 4 {QUICK}",
    "offline": f"{ROWS} --reward_funcs my_rewards.length {QUICK}",
    "sft": f"{ROWS} --bf16 no {QUICK}",
    "reward": f"{ROWS} --bf16 no {QUICK}",
    "evaluate": "--use_cpu --checkpoints base --dataset_name rows.jsonl --reward_funcs my_rewards.length "
    "--max_completion_length 4 --max_eval_rows 2",
    "generate": "--use_cpu --model_name_or_path base --prompt a --max_completion_length 4",
    "winrate": "answers.jsonl answers.jsonl --judge local --judge_model base --use_cpu",
    "paper": "--scale mini --configs figures --output_dir out",
    "merge": "--output_dir out",
}

# What is found before any weight is loaded.
TRAINING = [
    ("--output_dir file", "output_dir='file'"),
    ("--output_dir file/below", "is a file; it should be a folder"),
    ("--resume_from_checkpoint true", "there is no checkpoint in output_dir='out'"),
    ("--resume_from_checkpoint nowhere", "resume_from_checkpoint='nowhere': there is no such folder"),
    ("--model_name_or_path nowhere", "'nowhere' cannot be loaded: there is no such folder"),
    ("--model_name_or_path nothing", "'nothing' cannot be loaded"),
    ("--model_name_or_path torn_config", "not a valid JSON file"),
    ("--model_name_or_path torn_tokenizer", "the tokenizer of 'torn_tokenizer' cannot be loaded"),
    ("--dataset_name nowhere.jsonl", "'nowhere.jsonl': there is no such file"),
    ("--dataset_name empty.jsonl", "empty.jsonl has no usable row: it is empty"),
    ("--dataset_name brackets.jsonl", "row 1: not JSON"),
    ("--dataset_name torn.jsonl.gz", "torn.jsonl.gz is not a complete gzip file"),
    ("--dataset_name torn.json.gz", "torn.json.gz is not a complete gzip file"),
    ("--dataset_name document.json", "document.json is not one JSON document"),
    ("--dataset_name deep.json", "deep.json is not one JSON document"),
    ("--dataset_name table.csv", "table.csv cannot be read: No columns"),
    ("--dataset_name table.parquet", "table.parquet cannot be read"),
    ("--dataset_name texts.jsonl", "txt|has no 'chosen' column"),
    ("--dataset_name file", "'file': expected one of .jsonl"),
    ("--dataset_name nothing", "data files"),
    ("--dataset_name some/hub", "some/hub"),
    ("--eval_dataset_name nowhere.jsonl", "there is no such file"),
    ("--learning_rate much", "argument --learning_rate"),
    ("--config torn.yaml", "torn.yaml is not YAML"),
    ("--config list.yaml", "list.yaml holds a list"),
    ("--config key.yaml", "key.yaml is not YAML"),
    ("--config date.yaml", "date.yaml is not YAML"),
    ("--config nowhere.yaml", "No such file or directory: 'nowhere.yaml'"),
    ("--config nothing", "Is a directory: 'nothing'"),
    ("--config", "argument --config: expected one argument"),
    ("--accelerate_config nowhere", "accelerate_config='nowhere' is no file"),
    ("--accelerate_config torn.yaml", "torn.yaml is not YAML"),
    ("stray", "unexpected argument 'stray'"),
]
REWARDED = [
    ("--reward_funcs rewards_with_a_slip.f", "SyntaxError"),
    ("--reward_funcs rewards_that_fail.f", "rewards_that_fail.py:1, in <module>: x = undefined"),
    ("--reward_funcs rewards_that_exit.f", "SystemExit: 3"),
    ("--reward_funcs no_such_module.f", "No module named 'no_such_module'"),
    ("--reward_funcs my_rewards.loudness", "has no attribute 'loudness'"),
]
EARLY = {
    "train": [
        *TRAINING,
        *REWARDED,
        ("--batch_size 24", "train_dataset has 20 rows; one iteration needs 24"),
        ("--batch_size 6", "batch_size=6 should be a multiple"),
        ("--max_completion_length 300", "max_completion_length=300: the model has 256 positions"),
        ("--max_completion_length 240", "the prompt of row 1 has 38 tokens; the model has 256 positions"),
        ("--dataset_name long.jsonl", "the prompt of row 1 has 300 tokens"),
        ("--eval_dataset_name long.jsonl", "the prompt of row 1 has 300 tokens"),
        ("--dataset_name empty_prompts.jsonl", "the prompt of row 1 cannot be read: the prompt '' has no token"),
        ("--dataset_name chat.jsonl", "the prompt of row 1 cannot be read: Cannot use chat template"),
        ("--config json.yaml", "tracker_kwargs is not JSON"),
        ("--use_vllm", "vLLM is not installed"),
    ],
    "offline": [
        *TRAINING,
        *REWARDED,
        ("--dataset_name long.jsonl", "row 1 has 300 tokens of prompt and 2 of resp"),
        ("--loss_type qrpo", "row 1 is a preference pair and has no ref_rewards, which loss_type='qrpo' compares"),
        ("--loss_type qrpo --dataset_name rewarded.jsonl", "row 2 has no ref_rewards, which loss_type='qrpo'"),
        ("--loss_type qrpo --dataset_name mixed.jsonl", "row 2 is a preference pair and has no ref_rewards"),
    ],
    "sft": [
        *TRAINING,
        ("--dataset_name demonstrations.jsonl", "row 1 has 301 tokens; the model has 256 positions"),
        ("--packing true", "max_length=1024 with packing: the model has 256 positions"),
        ("--max_length 0", "max_length=0: it should be at least 1"),
    ],
    "reward": [*TRAINING, ("--dataset_name long.jsonl", "row 1 has 301 tokens; the model has 256 positions")],
    "check": [
        ("", "model is not set"),
        ("nowhere", "'nowhere' cannot be loaded: there is no such folder"),
        ("base --prompts nowhere.txt", "No such file or directory: 'nowhere.txt'"),
        ("base --quantization 3bit", "invalid choice: '3bit'"),
        ("base --quantisation 4bit", "did you mean '--quantization'"),
    ],
    "evaluate": [
        *REWARDED,
        ("--checkpoints nowhere", "'nowhere' cannot be loaded: there is no such folder"),
        ("--ref_model_name_or_path nowhere", "'nowhere' cannot be loaded: there is no such folder"),
        ("--max_completion_length 240", "the prompt of row 1 has 38 tokens"),
        ("--output file/below.json", "output='file/below.json'"),
        ("--output nothing", "output='nothing' is a folder"),
        ("--dataset_name nowhere.jsonl", "there is no such file"),
        ("--config torn.yaml", "torn.yaml is not YAML"),
    ],
    "generate": [
        ("--model_name_or_path nowhere", "'nowhere' cannot be loaded: there is no such folder"),
        ("--model_name_or_path torn_config", "not a valid JSON file"),
        ("--dataset_name rows.jsonl", "set either prompt or dataset_name"),
        ("--temperature 0", "temperature=0.0: it should be greater than 0"),
        ("--max_completion_length 256", "max_completion_length=256: the model has 256 positions"),
        ("--max_completion_length 255 --prompt abc", "the prompt of row 1 has 3 tokens; the model has 256 positions"),
        ("--output file/below.jsonl", "output='file/below.jsonl'"),
        ("--config torn.yaml", "torn.yaml is not YAML"),
    ],
    "winrate": [
        ("--judge_model nowhere", "the judge 'nowhere' cannot be loaded: there is no such folder"),
        ("--judge x", "argument --judge: invalid choice"),
        ("--references nowhere.jsonl", "there is no such file"),
        ("--request [1]", "invalid JSON object"),
    ],
    "memory": [
        ("", "model is not set"),
        ("--model nowhere", "model 'nowhere' is no folder"),
        ("--model torn_config", "not a valid JSON file"),
        ("--model nothing", "Unrecognized model"),
        ("--model gpt2 --batch many", "argument --batch"),
    ],
    "merge": [
        ("", "the following arguments are required: ADAPTER"),
        ("nowhere", "the adapter 'nowhere' cannot be loaded: there is no such folder"),
        ("nothing", "the adapter 'nothing' cannot be loaded"),
        ("base --output_dir file", "output_dir='file'"),
        ("base --dtype int8", "argument --dtype: invalid choice"),
    ],
    "paper": [
        ("", "the following arguments are required: FIG"),
        ("fig9", "figures.yaml has fig0, fig1, fig2, fig3, but not 'fig9'"),
        ("fig1 --configs nothing", "configs='nothing' has no figures.yaml"),
        ("fig1 --output_dir file", "output_dir='file'"),
        ("fig0", "fig0 is a int"),
        ("fig1", "fig1 is not laid out as it should be"),
        ("fig2", "loss_type='dpo': it should be one of"),
        ("fig3", "fig3 has no curve"),
        ("fig1 --sft_steps 0", "0 should be at least 1"),
    ],
    "plot": [
        ("", "the following arguments are required: RUN"),
        ("nowhere", "nowhere is not a trainer_state.json, and contains none"),
        ("state", "state/trainer_state.json is not JSON"),
        ("list", "list/trainer_state.json is no trainer_state.json"),
        ("number", "number/trainer_state.json is no trainer_state.json"),
        ("base/model.safetensors", "base/model.safetensors is not JSON"),
    ],
    "demo": [
        ("--output-dir file", "output-dir='file'"),
        ("--iterations 0", "0 should be at least 1"),
        ("stray", "unrecognized arguments: stray"),
    ],
    "env": [("stray", "unrecognized arguments: stray")],
}
CASES = [(command, options, problem) for command, cases in EARLY.items() for options, problem in cases]
# What only shows when weights are loaded, or when it runs.
LATE = [
    ("train", "--model_name_or_path torn_weights", "the model 'torn_weights' cannot be loaded"),
    ("train", "--model_name_or_path no_weights", "the model 'no_weights' cannot be loaded"),
    ("train", "--reward_model_name_or_path base", "base is no trained reward model"),
    ("train", "--reward_model_name_or_path nowhere", "the reward model 'nowhere' cannot be loaded"),
    ("train", "--value_model nowhere", "the value model 'nowhere' cannot be loaded"),
    ("train", "--value_model adapter", "needs a policy with adapters"),
    ("train", "--reward_weights 1 2", "reward_weights has 2 elements"),
    ("train", "--learning_rate 1e30 --max_steps 3 --logging_steps 9", "lower the learning rate"),
    ("offline", "--reward_funcs my_rewards.broken", "reward function broken failed: ZeroDivisionError"),
    ("offline", "--value_model head", "it should be a network of its own"),
    ("reward", "--model_name_or_path torn_weights", "the model 'torn_weights' cannot be loaded"),
    ("reward", "--max_length 3", "no row is left to train on"),
    ("evaluate", "--reward_funcs my_rewards.broken", "reward function broken failed: ZeroDivisionError"),
    ("generate", "--model_name_or_path torn_weights", "the model 'torn_weights' cannot be loaded"),
    ("winrate", "", "the model has 256 positions"),
    ("winrate", "--judge_model torn_weights", "the judge 'torn_weights' cannot be loaded"),
    ("merge", "torn_weights", "the adapter 'torn_weights' cannot be loaded"),
]


def lines_of(capsys, command, options, status=2):
    """What a command says, given `options` after the common ones, which they override."""
    capsys.readouterr()
    assert run(command, *shlex.split(COMMON.get(command, "")), *shlex.split(options)) == status
    # pyarrow's own reader says something too.
    return [line for line in capsys.readouterr().err.strip().splitlines() if "Failed to read schema" not in line]


def assert_told(lines, command, problem):
    assert 1 <= len(lines) <= 3, lines
    assert lines[0].startswith(f"trl-apa {command}: ") and all(len(line) < 1100 for line in lines)
    assert any(part in "\n".join(lines) for part in problem.split("|")), lines


def test_every_command_is_tried():
    assert EARLY.keys() == cli.COMMANDS.keys()


@pytest.mark.parametrize(("command", "options", "problem"), CASES, ids=[" ".join(case[:2]) for case in CASES])
def test_a_mistake_is_told_in_a_line_or_two_before_weights_are_loaded(capsys, monkeypatch, command, options, problem):
    def load(*args, **kwargs):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    assert_told(lines_of(capsys, command, options), command, problem)


@pytest.mark.parametrize(("command", "options", "problem"), LATE, ids=[" ".join(case[:2]) for case in LATE])
def test_a_mistake_that_shows_later_is_told_in_a_line_or_two(capsys, command, options, problem):
    assert_told(lines_of(capsys, command, options), command, problem)


def test_where_a_reward_function_failed_is_said(capsys):
    what, where = lines_of(capsys, "train", "--reward_funcs my_rewards.broken")
    assert "reward function broken failed: ZeroDivisionError" in what
    assert where.strip().startswith("my_rewards.py:3, in ") and where.endswith("return [1 / 0 for _ in completions]")


# ---- the traceback ----


@pytest.mark.parametrize("command", EARLY)
@pytest.mark.parametrize("place", ["before the command", "after it", "at the end"])
def test_debug_shows_the_traceback_and_changes_nothing_else(capsys, failing, command, place):
    options = {"memory": "--model nowhere", "demo": "--output-dir file", "plot": "nowhere", "merge": "nowhere"}
    options |= {"paper": "fig0", "winrate": "--references nowhere.jsonl", "generate": "--model_name_or_path nowhere"}
    options |= dict.fromkeys([*cli.WITH_TRAINER, "evaluate"], "--dataset_name nowhere.jsonl")
    words = shlex.split(f"{COMMON.get(command, '')} {options.get(command, '')}")
    failing(OSError("no"))  # `env` can do nothing wrong by itself
    assert run(command, *words) == 2
    said = capsys.readouterr().err.splitlines()
    argv = {
        "before the command": ["--debug", command, *words],
        "after it": [command, "--debug", *words],
        "at the end": [command, *words, "--debug"],
    }[place]
    assert run(*argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines and lines[-len(said) :] == said
    assert cli.DEBUG not in os.environ


@pytest.mark.parametrize(
    ("command", "given", "own", "debug"),
    [
        ("train", "--debug underflow_overflow --seed 1", "--debug underflow_overflow --seed 1", False),
        ("train", "--debug=underflow_overflow", "--debug=underflow_overflow", False),
        ("train", "--seed 1 --debug", "--seed 1", True),
        ("train", "--debug --seed 1", "--seed 1", True),
        ("plot", "--debug runs/apa", "runs/apa", True),
        ("paper", "fig2 -- --debug", "fig2 -- --debug", False),
        ("paper", "fig2 --debug -- --seed 1", "fig2 -- --seed 1", True),
        ("env", "", "", False),
    ],
)
def test_debug_with_a_value_is_the_trainers(command, given, own, debug):
    assert cli.without_debug(command, given.split()) == (own.split(), debug)


# ---- what counts as a mistake ----


@pytest.fixture
def failing(monkeypatch):
    """`trl-apa env` fails with the error that this is called with."""

    def fail_with(error):
        def environment():
            raise error

        monkeypatch.setattr(env, "environment", environment)

    return fail_with


OF_THE_MACHINE = [
    (MemoryError(), "out of memory: MemoryError"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "out of memory: CUDA out of memory."),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: [enforce"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "out of memory: CUDA error"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: [Errno 12] Cannot allocate memory"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "[Errno 28] No space left on device: 'runs/a'"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error: No space left on device"),
    (RuntimeError("PytorchStreamWriter failed writing file data/0"), "PytorchStreamWriter failed"),
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), "[Errno 13] Permission denied: 'runs/a'"),
    (ConnectionError("no route to host"), "no route to host"),
    (FloatingPointError("the gradient norm is nan"), "the gradient norm is nan"),
]


@pytest.mark.parametrize(("error", "said"), OF_THE_MACHINE, ids=[said for _, said in OF_THE_MACHINE])
def test_what_the_machine_lacks_is_no_bug(capsys, failing, error, said):
    failing(error)
    assert_told(lines_of(capsys, "env", ""), "env", f"trl-apa env: {said}")


def test_running_out_of_memory_inside_a_reward_function_is_told_as_that(capsys, failing):
    error = RuntimeError("reward function f failed")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried")
    failing(error)
    first, advice = lines_of(capsys, "env", "")
    assert first == "trl-apa env: out of memory: CUDA out of memory. Tried" and "`trl-apa memory`" in advice


@pytest.mark.parametrize(("packages", "kind"), [((3,), "Error"), (3, "TypeError"), (None, "TypeError")])
def test_a_bug_of_ours_says_where_it_is_and_how_to_see_more(capsys, monkeypatch, packages, kind):
    monkeypatch.setattr(env, "PACKAGES", packages)
    what, where, how = lines_of(capsys, "env", "", status=1)
    assert what.startswith("trl-apa env: unexpected ") and f"{kind}: " in what
    assert "trl_apa/commands/env.py:" in where and how.strip() == cli.SHOW_TRACEBACK


def test_what_our_code_refuses_is_a_mistake_and_what_happens_to_it_is_a_bug():
    """The same kind of error, raised on purpose and not foreseen."""
    with pytest.raises(ValueError) as refused:
        launching.config_file("nowhere")
    assert cli.explain(refused.value).status == cli.MISTAKE
    with pytest.raises(ValueError) as happened:
        evaluate.table({"a": {evaluate.COLUMNS[0][1]: "a text in place of a number"}})
    told = cli.explain(happened.value)
    assert told.status == cli.BUG and "commands/evaluate.py:" in told.lines[1]


def test_what_a_library_refuses_is_a_mistake_until_the_run_has_begun():
    def _inner_training_loop():
        transformers.AutoConfig.for_model("nothing")

    with pytest.raises(ValueError) as early:
        transformers.AutoConfig.for_model("nothing")
    early.value.__traceback__ = early.value.__traceback__.tb_next  # without this file's frame
    told = cli.explain(early.value)
    assert told.status == cli.MISTAKE and told.lines[1:] == [f"  {cli.SHOW_TRACEBACK}"]
    with pytest.raises(ValueError) as late:
        _inner_training_loop()
    assert cli.explain(late.value).status == cli.BUG


def test_neither_message_nor_traceback_tells_a_secret(capsys, failing):
    failing(
        ConnectionError("401 for https://someone:pass1234word@host with token hf_abcdefghijklmnopqrstuvwxyzABCDEFGH")
    )
    assert run("env", "--debug") == 2
    said = capsys.readouterr().err
    assert "401 for https://" in said and "Traceback" in said and "pass1234word" not in said and "hf_abc" not in said
    assert (
        run("winrate", "a", "b", "--judge", "openai", "--judge_model", "m", "--request", '{"api_key": "sk-a1b2c3"')
        == 2
    )
    assert "sk-a1b2c3" not in capsys.readouterr().err


def test_a_message_is_one_line_and_not_endless(capsys, failing):
    failing(ConnectionError("a\n  b\n\n" + "c" * 5000 + " what to do"))
    (line,) = lines_of(capsys, "env", "")
    assert line.startswith("trl-apa env: a b ccc") and line.endswith("ccc what to do")
    assert "ccc ... ccc" in line and len(line) < 1100


def test_ctrl_c_and_the_trainers_own_status_pass(capsys, failing):
    failing(KeyboardInterrupt())
    assert lines_of(capsys, "env", "", status=130) == ["trl-apa env: interrupted"]
    for status in (143, 130):
        failing(SystemExit(status))
        assert lines_of(capsys, "env", "", status=status) == []


# ---- several processes ----


@pytest.mark.parametrize(
    ("rank", "error", "waits"),
    [
        ("0", OSError("no"), 0),
        ("1", OSError("no"), 1),
        ("0", ValueError("1 other process(es) failed at the same point; see their messages"), 2),
    ],
)
def test_the_first_process_speaks_and_the_others_wait_to_be_ended(capsys, monkeypatch, failing, rank, error, waits):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("RANK", "5" if rank == "1" else "0")
    failing(error)
    assert run("env") in (1, 2)
    assert waited == [waits * cli.GRACE]
    assert capsys.readouterr().err.startswith("trl-apa env (rank 5): no" if rank == "1" else "trl-apa env: ")


def test_only_the_first_process_says_that_it_was_interrupted(capsys, monkeypatch, failing):
    monkeypatch.setenv("LOCAL_RANK", "1")
    failing(KeyboardInterrupt())
    assert lines_of(capsys, "env", "", status=130) == []


def child_failed(exit_code):
    return ChildFailedError("python", {1: ProcessFailure(1, 77, exit_code, "no file")})


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (subprocess.CalledProcessError(2, "python"), 2, []),
        (subprocess.CalledProcessError(130, "python"), 130, []),
        (subprocess.CalledProcessError(-9, "python"), 137, ["trl-apa train: process 0 was ended by SIGKILL"]),
        (child_failed(2), 2, []),
        (child_failed(143), 143, []),
        (child_failed(-11), 139, ["trl-apa train: process 1 was ended by SIGSEGV"]),
        (SignalException("got one", signal.SIGINT), 130, []),
        (ValueError("You need to use at least 2 processes"), 2, None),
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_launch_ends_as_its_processes_do(capsys, monkeypatch, error, status, said, debug):
    """Each of them has told what went wrong itself, unless a signal ended it."""
    started = []

    def launch(arguments):
        started.append((arguments.training_script_args, os.environ.get(cli.DEBUG), signal.getsignal(signal.SIGINT)))
        raise error

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = signal.getsignal(signal.SIGINT)
    argv = [*shlex.split(COMMON["train"]), "--accelerate_config", "single_gpu"]
    assert run("train", *argv, *debug) == status
    lines = capsys.readouterr().err.splitlines()
    assert lines == said if said is not None else lines
    ((given, told_to_debug, handler),) = started
    assert given == ["train", *argv] and told_to_debug == ("1" if debug else None)
    # The keyboard's signal is for the processes, which are in the same group: this one waits for them.
    assert handler(signal.SIGINT, None) is None and signal.getsignal(signal.SIGINT) is before


# ---- what is printed and nobody reads ----


@contextmanager
def stdout_that_fails(kind):
    """A pipe that is closed at its other end, a full disk, or a file that is closed, as stdout."""
    if kind == "full":
        file = open("/dev/full", "w")
    else:
        reader, writer = os.pipe()
        os.close(reader)
        file = os.fdopen(writer, "w", buffering=1 if kind == "pipe by lines" else -1)
    if kind == "closed":
        file.close()
    before, sys.stdout = sys.stdout, file
    try:
        yield file
    finally:
        sys.stdout = before
        file.close()


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("pipe", 141, []),
        ("pipe by lines", 141, []),
        ("full", 2, ["trl-apa env: [Errno 28] No space left on device"]),
    ],
)
def test_a_command_that_only_prints_ends_when_nobody_reads(capsys, kind, status, said):
    with stdout_that_fails(kind):
        assert run("env") == status
    assert capsys.readouterr().err.splitlines() == said


@pytest.mark.parametrize("kind", ["pipe", "pipe by lines", "full", "closed"])
def test_a_command_that_makes_more_goes_on_when_nobody_reads(capsys, kind, tmp_path):
    rows = [{"step": 1, "apa/mean_scores": 1.0, "objective/kl": 2.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    with stdout_that_fails(kind):
        assert run("plot", tmp_path) == 0
    assert len(list(tmp_path.glob("*.png"))) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trl-apa plot: stdout is lost (") and line.endswith("continuing without it")


def test_what_a_terminal_cannot_show_is_printed_as_escapes(capsys):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    before, sys.stdout = sys.stdout, file
    try:
        with streams_that_may_be_lost("trl-apa train"):
            print("caf\u00e9 \ud800")
            assert sys.stdout.encoding == "ascii" and not sys.stdout.isatty()
        assert sys.stdout is file
    finally:
        sys.stdout = before
    assert file.buffer.getvalue() == b"caf\\xe9 \\ud800\n" and capsys.readouterr().err == ""


def test_nothing_is_said_when_the_process_ends_either():
    """Python flushes stdout once more then."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    for word, status in (("--help", 0), ("env", 141)):
        command = [sys.executable, "-m", "trl_apa.cli", word]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (status, "")
    os.close(writer)
