"""The command line: what it refuses before it loads anything, what it reads, and one whole run in small."""

import gzip
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import Dataset
from peft import get_peft_model
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig

from reproduction.command import make_parser as paper_parser
from tests._cli import refused, run
from tests.tiny import byte_tokenizer, lora_config
from trl_apa import APAConfig
from trl_apa.cli import COMMANDS
from trl_apa.commands import (
    env,
    evaluate,
    evaluate_options,
    generate_options,
    launching,
    offline,
    plot,
    reward,
    reward_options,
    sft,
    train_options,
)
from trl_apa.commands.data_options import DataArguments
from trl_apa.commands.models import import_reward_function
from trl_apa.commands.options import read_yaml
from trl_apa.commands.parsing import OneLineParser
from trl_apa.commands.rows import demonstration, load_prompts, load_rows, preference, prompts_by
from trl_apa.commands.sampling_options import SamplingOptions
from trl_apa.config.precision import default_bf16
from trl_apa.data.sources import Row
from trl_apa.demo.options import parse_options
from trl_apa.models import load_reward_model
from trl_apa.offline import OfflineConfig


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"
OUR_CONFIGS = ROOT / "trl_apa" / "accelerate_configs"
WITH_YAML = {"sft": sft, "reward": reward, "train": train_options, "offline": offline}
WITH_YAML |= {"evaluate": evaluate_options, "generate": generate_options}


def yaml_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def hh_rows(count=60):
    rows = []
    for number in range(count):
        prompt = f"\n\nHuman: What is {number} plus {number % 7}?\n\nAssistant:"
        rows.append({"chosen": f"{prompt} It is {number + number % 7}.", "rejected": f"{prompt} I do not know."})
    return rows


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(folder):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=0, eos_token_id=0, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- options ----


@pytest.mark.parametrize("command", WITH_YAML)
def test_an_unknown_key_is_refused_with_the_nearest_name_before_anything_is_loaded(tmp_path, capsys, command):
    key, right = (
        ("tempratur", "temperature") if command in ("evaluate", "generate") else ("lerning_rate", "learning_rate")
    )
    path = yaml_file(tmp_path, f"{key}: 1e-4\ndataset_name: not-there.jsonl\n")
    message = f"trl-apa {command}: {path}: unknown option '{key}'; did you mean '{right}'?"
    assert refused(capsys, command, "--config", path) == message
    message = f"trl-apa {command}: unknown option '--{key}'; did you mean '--{right}'?"
    assert refused(capsys, command, f"--{key}", "1e-4") == message
    assert refused(capsys, command, "--xyzzy=1") == f"trl-apa {command}: unknown option '--xyzzy'"


@pytest.mark.parametrize("command", ["plot", "env", "winrate", "paper"])
def test_commands_without_a_file_refuse_unknown_options_too(capsys, command):
    arguments = {
        "plot": ["somewhere"],
        "winrate": "a b --judge local --judge_model c".split(),
        "paper": ["fig3", "--scale", "mini"],
    }.get(command, [])
    assert "unrecognized arguments: --xyzzy" in refused(capsys, command, *arguments, "--xyzzy", "1")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("batch_size: many", "batch_size: 'many' is of the wrong type"),
        ("batch_size: 2.5", "batch_size: 2.5 is of the wrong type"),
        ("batch_size: [1, 2]", "no list is expected"),
        ("eval_strategy: sometimes", "choose from no, steps, epoch"),
        ("use_cpu: perhaps", "use_cpu: 'perhaps' is of the wrong type"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("- seed", "it should hold options"),
        ("seed: [", "is not YAML"),
        ("learning_rate: 1e-4\nloss_type: dpo\nmodel_name_or_path: x", "loss_type='dpo': it should be one of"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(tmp_path, capsys, text, problem):
    assert problem in refused(capsys, "train", "--config", yaml_file(tmp_path, text))


def test_the_file_is_read_as_the_command_line_and_the_command_line_wins(tmp_path):
    text = """
        learning-rate: 1e-4
        eval_strategy: no
        stop_strings: ["\\n\\nHuman:"]
        reward_weights: 2
        lr_scheduler_kwargs: {power: 2}
        kl_coef: 0.5
        score_clip: null
        whiten_advantages: false
    """
    values = train_options.make_parser().parse(["--config", str(yaml_file(tmp_path, text)), "--kl_coef", "0.25"])
    assert values["learning_rate"] == 1e-4 and values["kl_coef"] == 0.25
    assert values["eval_strategy"] == "no"
    assert values["stop_strings"] == ["\n\nHuman:"] and values["reward_weights"] == [2.0]
    assert values["lr_scheduler_kwargs"] == {"power": 2}
    assert values["score_clip"] is None and values["whiten_advantages"] is False
    assert values["gamma"] == 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_types_and_speaks_of_the_command(capsys, command):
    """No name of an option in capitals in place of its type; no function of the library in place of the command."""
    assert run(command, "--help") == 0
    told = capsys.readouterr().out
    options = re.findall(r"^  --(\w[\w-]*)(?: (\S.*?))?(?:  .*)?$", told, flags=re.MULTILINE)
    assert "debug" in dict(options)
    for name, value in options:
        assert value.strip("[]") != name.upper().replace("-", "_"), f"--{name} {value}"
    assert "train()" not in told and "Read it" not in told and "ithout effect." not in told
    for name, text in re.findall(r"^  --no_(\w+)\s+(.*)", told, flags=re.MULTILINE):
        assert text == f"{name} off."


def test_help_of_train_leaves_out_what_would_do_nothing(capsys):
    assert run("train", "--help") == 0
    short = capsys.readouterr().out
    assert run("train", "--help-all") == 0
    rest = capsys.readouterr().out.partition("options without effect in this command:")[2]
    for name in ("label_smoothing_factor", "tool_timeout", "do_train", "is_peft_model"):
        assert f"  --{name} " not in short and f"  --{name} " in rest


def test_help_groups_the_options(capsys):
    assert run("train", "--help") == 0
    short = capsys.readouterr().out
    assert run("train", "--help-all") == 0
    told = capsys.readouterr().out
    shown, everything = (set(re.findall(r"^  (--\w+)", text, flags=re.MULTILINE)) for text in (short, told))
    assert shown < everything and "--ppo_epochs" in everything - shown and "--learning_rate" in shown
    groups = dict(part.split(":\n", 1) for part in told.split("\n\n") if ":\n" in part)
    places = {"the algorithm": "--kl_coef", "sampling": "--top_p", "LoRA": "--lora_r", "data": "--eval_share"}
    places |= {"optimizer and schedule": "--learning_rate", "names and options of older scripts": "--ppo_epochs"}
    places |= {"rewards": "--reward_weights", "saving and resuming": "--save_steps", "launching": "--num_processes"}
    for title, option in places.items():
        assert [name for name, text in groups.items() if f"  {option}" in text] == [title]


@pytest.mark.parametrize("command", ["train", "evaluate", "demo", "paper"])
def test_help_shows_each_option_once_and_no_default_where_there_is_none(capsys, command):
    assert run(command, "--help") == 0
    told = capsys.readouterr().out.partition("options:")[2]
    options = re.findall(r"^  (--[\w-]+)", told, flags=re.MULTILINE)
    assert len(options) > 5 and len({option.replace("_", "-") for option in options}) == len(options)
    assert not re.search(r"--\S.*, --", told) and "default: None" not in " ".join(told.split())
    assert command == "paper" or re.search(r"\(default:\s+[^N\s]", told)


@pytest.mark.parametrize("command", ["sft", "reward", "train", "offline"])
def test_help_says_when_bf16_is_on(tmp_path, capsys, monkeypatch, command):
    """TRL's own text, on unless fp16 is, is not true here."""
    assert run(command, "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "by default where a GPU supports it, and not with fp16" in told and "defaults to `True` if `fp16`" not in told
    )
    for there, fp16, on in ((True, False, True), (False, False, False), (True, True, False)):
        monkeypatch.setattr("trl_apa.config.precision.is_torch_bf16_gpu_available", lambda there=there: there)
        assert default_bf16(fp16, use_cpu=False) is on and default_bf16(fp16, use_cpu=True) is False


@pytest.mark.parametrize("command", WITH_YAML)
def test_the_name_of_an_option_that_is_on_or_off_alone_means_on(command):
    """Also where neither is the default."""
    parser = WITH_YAML[command].make_parser()
    either = (bool, bool | None)
    names = [field.name for fields in parser.groups.values() for field in fields if field.hint in either]
    assert {"bf16", "use_cpu"} <= set(names)
    values = parser.parse([f"--{name}" for name in names])
    assert {values[name] for name in names} == {True}
    assert parser.parse(["--bf16", "no"])["bf16"] is False and parser.parse([])["bf16"] is None


def test_options_are_read_with_either_spelling(tmp_path):
    path = str(tmp_path)
    for spelling in (
        ["--output_dir", path],
        ["--output-dir", path],
        [f"--output-dir={path}"],
        [f"--output_dir={path}"],
    ):
        values = train_options.make_parser().parse([*spelling, "--kl-coef", "0.5", "--max_steps", "3"])
        assert (values["output_dir"], values["kl_coef"], values["max_steps"]) == (path, 0.5, 3)
        assert str(parse_options([*spelling, "--sft_steps", "7"]).output_dir) == path
        options = paper_parser().parse_args(["fig3", "--scale", "mini", *spelling, "--sft-steps", "7"])
        assert (options.output_dir, options.sft_steps) == (path, 7)
    command = OneLineParser(prog="p")
    command.add_argument("--a-b")
    command.add_argument("rest", nargs="*")
    assert command.parse_args(["--a_b=c_d", "--", "--a_b"]).rest == ["--a_b"]
    assert command.parse_args(["--a_b=c_d"]).a_b == "c_d"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_files_have_options_that_exist(path, tmp_path):
    parser = WITH_YAML[path.stem.partition("-")[0]].make_parser()
    values = parser.parse(["--config", str(path), "--use_cpu"])
    assert read_yaml(str(path)).keys() <= values.keys()
    assert len(parser.build({**values, "output_dir": str(tmp_path)})) == len(parser.parts)


@pytest.mark.parametrize("command", [evaluate_options, generate_options, offline, train_options])
def test_arguments_of_the_chat_template_are_json_on_the_command_line(command, tmp_path):
    parser = command.make_parser()
    values = parser.parse(["--chat_template_kwargs", '{"enable_thinking": false}', "--use_cpu"])
    parts = parser.build({**values, "output_dir": str(tmp_path)})
    (config,) = [part for part in parts if isinstance(part, APAConfig | OfflineConfig | SamplingOptions)]
    if isinstance(config, SamplingOptions):
        config = APAConfig(output_dir=str(tmp_path), **vars(config))
    assert config.chat_template_kwargs == {"enable_thinking": False}


def test_code_that_comes_with_a_model_does_not_run_unless_asked(tmp_path, capsys, monkeypatch):
    for module in WITH_YAML.values():
        assert module.make_parser().parse([])["trust_remote_code"] is False
    monkeypatch.chdir(tmp_path)
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "not_in_transformers", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("open('ran', 'w')\n")
    message = refused(capsys, "generate", "--model_name_or_path", folder, "--prompt", "a", "--use_cpu")
    assert "trust_remote_code" in message and not (tmp_path / "ran").exists()


def test_what_is_missing_is_asked_for(capsys):
    assert "model_name_or_path is not set" in refused(capsys, "train", "--reward_funcs", "math.sqrt")
    assert "no rewards: set" in refused(capsys, "train", "--model_name_or_path", "x")
    assert "dataset_name is not set" in refused(
        capsys, "train", "--model_name_or_path", "x", "--reward_funcs", "math.sqrt"
    )
    assert "no such file" in refused(
        capsys, "sft", "--use_cpu", "--model_name_or_path", "x", "--dataset_name", "nowhere.jsonl"
    )
    assert "set either prompt or dataset_name" in refused(capsys, "generate", "--model_name_or_path", "x")
    assert "checkpoints is not set" in refused(capsys, "evaluate")


# ---- rewards ----


def test_a_reward_function_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "rewards_for_this_test.py").write_text(
        "LIMIT = 3\ndef length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    assert import_reward_function("rewards_for_this_test.length")(["abc"]) == [3.0]
    for name, problem in [
        ("rewards_for_this_test.LIMIT", "a int; it should be a function"),
        ("rewards_for_this_test.breadth", "cannot be imported"),
        ("no_such_module.length", "cannot be imported"),
        ("length", "it should be a dotted name"),
    ]:
        with pytest.raises(ValueError, match=problem):
            import_reward_function(name)


def test_servers_and_judges_are_reward_functions_of_a_command(tmp_path, monkeypatch):
    (tmp_path / "style.yaml").write_text("model: m\nrubric: Is it short?\nbase_url: http://127.0.0.1:9/v1\n")
    monkeypatch.chdir(tmp_path)
    rewards = reward_options.RewardArguments(reward_funcs=["https://host/score", "judge:style.yaml"])
    assert [type(function).__name__ for function in rewards.functions()] == ["ServedReward", "JudgeReward"]
    with pytest.raises((OSError, ValueError), match="nowhere"):
        reward_options.RewardArguments(reward_funcs=["judge:nowhere.yaml"]).functions()


@pytest.mark.parametrize("options", ["--load_in_8bit", "--load_in_4bit --dtype bfloat16"])
def test_a_reward_model_learns_on_a_quantised_base_without_autocast(tmp_path, monkeypatch, options):
    """TRL leaves its head in bfloat16, which the hidden states of such a base need not be in."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base")
    jsonl(tmp_path / "rows.jsonl", hh_rows(8))
    options += " --use_peft --lora_target_modules all-linear --use_cpu --report_to none --max_steps 1"
    argv = ["--model_name_or_path", "base", "--dataset_name", "rows.jsonl", "--output_dir", "reward", *options.split()]
    assert run("reward", *argv) == 0
    state = json.loads((tmp_path / "reward" / "trainer_state.json").read_text())
    assert state["global_step"] == 1


def test_a_language_model_is_no_reward_model(tmp_path):
    with pytest.raises(ValueError, match=r"is no trained reward model: it has no weights for score"):
        load_reward_model(str(make_model(tmp_path / "model")))


def test_a_reward_adapter_is_merged_with_its_head(tmp_path):
    base = make_model(tmp_path / "model")
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(network, lora_config(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    loaded = load_reward_model(str(tmp_path / "adapter")).eval()
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert loaded(tokens).logits.item() == pytest.approx(adapted(tokens).logits.item(), abs=1e-5)
        assert loaded(tokens).logits.item() != pytest.approx(0.0, abs=1e-5)
    # where its tokenizer is looked for
    assert loaded.config._name_or_path == str(tmp_path / "adapter")


# ---- rows ----


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"prompt": "a", "target": 1}, None, {"prompt": "a", "target": 1}),
        ({"query": "b"}, None, {"query": "b"}),
        ({"input_ids": [3, 4]}, None, {"input_ids": [3, 4]}),
        ({"prompt": "a", "text": "c"}, "text", {"prompt": "c"}),
        (hh_rows(1)[0], None, {"prompt": "\n\nHuman: What is 0 plus 0?\n\nAssistant:"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, None, {"prompt": "a"}),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, None, {"prompt": MESSAGES[:-1]}),
    ],
)
def test_prompts_are_found_in_every_layout(tmp_path, row, column, expected):
    path = jsonl(tmp_path / "rows.jsonl", [row, row])
    found = list(load_prompts(DataArguments(str(path), dataset_prompt_column=column)))
    # A prompt that stands in several preferences is asked once; one that was given several times, as often.
    assert found == [expected] * (1 if "chosen" in row else 2)


@pytest.mark.parametrize(
    ("rows", "column", "problem"),
    [
        ([{"text": "c"}], None, "row 1: has the columns text; set dataset_prompt_column"),
        ([{"text": "c"}], "txt", "row 1: has no column 'txt', but text"),
        ([], None, "it is empty"),
        ([{"prompt": "a"}, {"prompt": MESSAGES}], None, "a column holds values of different types"),
    ],
)
def test_rows_without_a_prompt_say_what_they_have(tmp_path, rows, column, problem):
    path = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=problem):
        load_prompts(DataArguments(str(path), dataset_prompt_column=column))


def test_bad_rows_are_left_out_and_counted(tmp_path, capsys):
    path = jsonl(tmp_path / "rows.jsonl", [*hh_rows(3), {"chosen": "x", "rejected": "y"}, {"prompt": "a", "extra": 1}])
    path.write_text(path.read_text() + "{\n")
    assert [row["extra"] for row in load_prompts(DataArguments(str(path)))] == [None, None, None, 1]
    told = capsys.readouterr()
    assert "rows.jsonl: rows left out: 2: 1 x has no" in told.err and "(row 4)" in told.err and not told.out
    # With a share held out too, and each different prompt once.
    path.write_text(path.read_text() + json.dumps(hh_rows(1)[0]) + "\n")
    train_rows, held_out = load_rows(DataArguments(str(path), eval_share=0.5), prompts_by(DataArguments()))
    assert len(train_rows) + len(held_out) == 4
    told = capsys.readouterr().err
    assert "x not JSON" in told and "rows that repeat another one: 1, read once" in told


def test_of_a_large_data_set_only_the_rows_that_are_asked_for_are_read(monkeypatch):
    read = []

    def endless(source, name, data_dir, split, streaming):
        for number in range(1, 10**9):
            read.append((source, data_dir, number))
            yield Row(number, hh_rows(number)[-1])

    monkeypatch.setattr("trl_apa.commands.rows.iter_rows", endless)
    arguments = DataArguments(
        "many",
        dataset_data_dir="data/rl",
        eval_dataset_name="others",
        eval_dataset_data_dir="data/evaluation",
        max_train_rows=5,
        max_eval_rows=2,
    )
    train_rows, held_out = load_rows(arguments, preference)
    assert (len(train_rows), len(held_out)) == (5, 2)
    # one more row of each, which is not looked at
    assert read == [("many", "data/rl", n) for n in range(1, 7)] + [
        ("others", "data/evaluation", n) for n in (1, 2, 3)
    ]
    with pytest.raises(ValueError, match="eval_dataset_data_dir='x' is read only with eval_dataset_name"):
        DataArguments("many", eval_dataset_data_dir="x")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_are_read(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    table = Dataset.from_list([{"prompt": "a, b", "n": 1}, {"prompt": "c", "n": 2}])
    table.to_csv(path) if suffix == ".csv" else table.to_parquet(path)
    assert list(load_prompts(DataArguments(str(path)))) == [{"prompt": "a, b", "n": 1}, {"prompt": "c", "n": 2}]


def test_every_command_holds_out_the_same_rows(tmp_path):
    arguments = DataArguments(str(jsonl(tmp_path / "rows.jsonl", hh_rows())), eval_share=0.25)
    parts = {}
    for convert in (demonstration, preference, prompts_by(arguments)):
        train_rows, held_out = load_rows(arguments, convert)
        assert len(train_rows) + len(held_out) == 60 and 10 <= len(held_out) <= 20
        parts[convert.__name__] = ({row["prompt"] for row in train_rows}, {row["prompt"] for row in held_out})
    assert len({frozenset(held_out) for _, held_out in parts.values()}) == 1
    assert all(not first & second for first, second in parts.values())
    assert {row["prompt"] for row in load_prompts(arguments)} == parts["preference"][1]


def test_preferences_become_demonstrations_and_pairs(tmp_path):
    chat = {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "no"}]}
    arguments = DataArguments(str(jsonl(tmp_path / "rows.jsonl", [chat])))
    assert load_rows(arguments, demonstration)[0][0] == {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}
    assert load_rows(arguments, preference)[0][0] == chat
    arguments = DataArguments(str(jsonl(tmp_path / "rows.jsonl", [{"text": "as it is"}, *hh_rows(1)])))
    found = load_rows(arguments, demonstration)[0]
    assert found[0]["text"] == "as it is" and found[1]["completion"] == " It is 0."


# ---- launching ----


def test_a_configuration_by_name_starts_the_command_again_under_accelerate(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(
        "accelerate.commands.launch.launch_command",
        lambda arguments: started.append((arguments, os.environ[launching.LAUNCHED])),
    )
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    argv = ["--model_name_or_path", "x", "--accelerate_config", "zero2", "--num_processes", "3"]
    assert run("train", *argv) == 0
    ((arguments, mark),) = started
    assert Path(arguments.config_file).name == "zero2.yaml" and Path(arguments.config_file).is_file()
    assert Path(arguments.config_file).parent == ROOT / "trl_apa" / "accelerate_configs"
    assert arguments.num_processes == 3 and arguments.module
    assert (arguments.training_script, arguments.training_script_args) == ("trl_apa.cli", ["train", *argv])
    # The processes that it starts do not start others.
    assert mark == "1" and launching.LAUNCHED not in os.environ
    monkeypatch.setenv(launching.LAUNCHED, mark)
    assert "no rewards: set" in refused(capsys, "train", *argv)
    monkeypatch.delenv(launching.LAUNCHED)
    assert "did you mean 'zero3'?" in refused(capsys, "sft", "--accelerate_config", "zero33")
    for option in ("--num_processes", "--machine_rank", "--main_process_ip"):
        assert "only with accelerate_config" in refused(capsys, "sft", option, "2")
    assert len(started) == 1


def launch_plan(monkeypatch, *argv):
    """The options that `accelerate launch` ends up with after it has read the configuration."""
    started = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", started.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run("train", *argv) == 0
    return _validate_launch_command(started[0])[0]


@pytest.mark.parametrize("name", sorted(path.stem for path in OUR_CONFIGS.glob("*.yaml")))
def test_our_accelerate_configurations_are_what_accelerate_takes_them_for(monkeypatch, name):
    config = load_config_from_file(str(launching.config_file(name)))  # refuses a key that it does not know
    plan = launch_plan(monkeypatch, "--accelerate_config", name)
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
    engine = {"use_fsdp": plan.use_fsdp, "use_deepspeed": plan.use_deepspeed, "multi_gpu": plan.multi_gpu}
    expected = {"fsdp2": "use_fsdp", "zero2": "use_deepspeed", "zero3": "use_deepspeed", "single_gpu": None}
    assert [option for option, on in engine.items() if on] == [
        option for option in [expected.get(name, "multi_gpu")] if option
    ]
    processes = {"single_gpu": (1, 1), "two_nodes": (2, 16)}.get(name, (1, 8))
    assert (plan.num_machines, plan.num_processes) == processes
    assert plan.mixed_precision == "bf16"


def test_our_configurations_shard_as_they_say(monkeypatch):
    plan = launch_plan(monkeypatch, "--accelerate_config", "fsdp2", "--num_processes", "4")
    assert plan.num_processes == 4
    for name, value in prepare_multi_gpu_env(plan).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT and not plugin.cpu_ram_efficient_loading
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None
    assert [launch_plan(monkeypatch, "--accelerate_config", f"zero{stage}").zero_stage for stage in (2, 3)] == [2, 3]
    assert plan_of_two_nodes(monkeypatch) == (1, "10.0.0.1", 16)


def plan_of_two_nodes(monkeypatch):
    options = ["--accelerate_config", "two_nodes", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    plan = launch_plan(monkeypatch, *options)
    return plan.machine_rank, plan.main_process_ip, plan.num_processes


# ---- plots and versions ----


def state(folder, rows):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    return folder


def test_plot_reads_the_last_checkpoint_and_says_what_a_log_lacks(tmp_path, capsys, monkeypatch):
    rows = [{"step": step, "apa/mean_scores": step / 2, "objective/kl": step / 4} for step in (4, 8)]
    state(tmp_path / "run" / "checkpoint-8", rows[:1])
    state(tmp_path / "run" / "checkpoint-16", [*rows, {"step": 8, "eval_reward": 5.0, "eval_kl": 1.0}, {"loss": 1}])
    read = plot.read_run(tmp_path / "run")
    assert read == ("run", [(4, 2.0, 1.0), (8, 4.0, 2.0)], [(8, 5.0, 1.0)])
    assert run("plot", tmp_path / "run", tmp_path / "run", "--output_dir", tmp_path / "pictures") == 0
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"reward.png", "kl.png", "reward_vs_kl.png"}
    assert "contains none" in refused(capsys, "plot", tmp_path / "pictures")
    assert "neither apa/mean_scores" in refused(capsys, "plot", state(tmp_path / "sft", [{"step": 1, "loss": 2.0}]))
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert run("plot", tmp_path / "run") == 1
    assert "pip install 'trl-apa[demo]'" in capsys.readouterr().err


def test_env_names_versions_and_tells_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    assert run("env") == 0
    printed = capsys.readouterr().out
    assert f"torch         {importlib.metadata.version('torch')}" in printed and env.PACKAGES[2] in printed
    assert "secret" not in printed


# ---- a whole run ----


def documented(language):
    """The fenced blocks of docs/cli.md."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE | re.DOTALL)


SHORT = "--use_cpu --max_steps 3 --per_device_train_batch_size 4 --logging_steps 1 --learning_rate 1e-3"
SAMPLING = "--use_cpu --max_completion_length 6 --max_prompt_length 64"
IN_SMALL = {
    "sft": f"{SHORT} --model_name_or_path base --bf16 no",
    "reward": f"{SHORT} --bf16 no",
    "train": f"{SHORT} {SAMPLING} --batch_size 8 --num_epochs_per_batch 1 --eval_steps 2 --save_steps 2 "
    "--max_eval_rows 4",
    "offline": f"{SHORT} {SAMPLING} --eval_steps 2 --value_epochs 1 --max_train_rows 12 --max_eval_rows 4",
    "evaluate": f"{SAMPLING} --max_eval_rows 4",
    "generate": SAMPLING,
    "winrate": "--use_cpu",
    "paper": "--iterations 2 --samples_per_prompt 1 --batch_size 8 --sft_steps 3 --num_pairs 16 --reward_steps 2",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Every command of docs/cli.md, in order, on a small model and few rows; the folder of their outputs."""
    folder = tmp_path_factory.mktemp("pipeline")
    rows = "".join(json.dumps(row) + "\n" for row in hh_rows())
    (folder / "preferences.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (functions,) = documented("python")
    (folder / "my_rewards.py").write_text(functions)
    sys.modules.pop("my_rewards", None)  # another test's
    (folder / "examples").symlink_to(ROOT / "examples")
    make_model(folder / "base")
    before, path = os.getcwd(), list(sys.path)
    os.chdir(folder)

    def sent(**telemetry):
        raise AssertionError(f"telemetry: {telemetry}")

    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.delenv("CI", raising=False)
            monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", sent)
            for line in "".join(documented("bash")).splitlines():
                program, command, *options = shlex.split(line)
                assert program == "trl-apa"
                options += IN_SMALL.get(command, "").split()
                if "--resume_from_checkpoint" in options:
                    options += ["--max_steps", "4"]
                assert run(command, *options) == 0
    finally:
        os.chdir(before)
        sys.path[:] = path
    return folder / "runs"


def test_every_command_is_documented_and_run():
    run_in_tests = {shlex.split(line)[1] for line in "".join(documented("bash")).splitlines()}
    assert run_in_tests == COMMANDS.keys() - {"demo"}
    for line in "".join(documented("text")).splitlines():
        command, config, path = line.partition("-m trl_apa.cli ")[2].split()
        assert command in WITH_YAML and config == "--config" and (ROOT / path).is_file()


def test_the_lines_that_are_not_run_have_options_that_exist(tmp_path, capsys, monkeypatch):
    """Those with files or services that there are not: what follows the program is read and nothing more."""
    page = (ROOT / "docs" / "cli.md").read_text()
    lines = [
        shlex.split(line) for line in re.findall(r"^ {4}trl-apa (\w+ --.*|\w+ \S+ \S+ --.*)$", page, re.MULTILINE)
    ]
    assert {command for command, *_ in lines} == {"train", "winrate"} and len(lines) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-6\n")
    for command, *options in lines:
        parser = import_module(COMMANDS[command][0]).make_parser()
        values = parser.parse(options) if command == "train" else vars(parser.parse_args(options))
        given = [option.removeprefix("--").replace("-", "_") for option in options if option.startswith("--")]
        assert given and all(name == "config" or values[name] is not None for name in given)


LAUNCHERS = {"torchrun": ("torch.distributed.run", 2), "accelerate": ("accelerate.commands.launch", 1)}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launchers_of_the_page_start_the_command(pipeline, launcher):
    """torchrun starts two processes; accelerate, without GPUs, one."""
    module, processes = LAUNCHERS[launcher]
    started_by = {line.split()[0]: shlex.split(line) for line in "".join(documented("text")).splitlines()}
    arguments = started_by[launcher][2 if launcher == "accelerate" else 1 :]
    folder = pipeline / launcher
    options = [*IN_SMALL["train"].split(), "--dataset_name", "preferences.jsonl.gz", "--output_dir", str(folder)]
    options += ["--max_steps", "2", "--eval_strategy", "no", "--report_to", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments, *options]
    done = subprocess.run(command, cwd=pipeline.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (folder / "checkpoint-2").glob("apa_state_*.pt")}
    assert written == {f"apa_state_{rank}.pt" for rank in range(processes)}
    assert "gemm_4bit_forward" not in done.stderr
    # One process told of it.
    assert done.stdout.count("rollouts an iteration") == 1
    assert f"{8 * processes} rollouts an iteration" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        DataArguments,
        reward_options.RewardArguments,
        train_options.OtherModelArguments,
        evaluate_options.EvaluateArguments,
        generate_options.GenerateArguments,
        launching.LaunchArguments,
    ],
)
def test_the_reference_has_every_option_of_ours(arguments):
    tables = re.findall(r"^\| `(\w+)`\*? \|", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    assert arguments.__dataclass_fields__.keys() <= set(tables)


def test_the_reference_has_no_option_that_is_not_there():
    tables = re.findall(r"^\| `(\w+)`(\*?) \|", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    options = {name: module.make_parser().parse([]).keys() for name, module in WITH_YAML.items()}
    assert {name for name, _ in tables} <= set().union(*options.values())
    marked = {name for name, star in tables if star}
    assert marked == options["evaluate"] & DataArguments.__dataclass_fields__.keys()
    assert marked == options["generate"] & DataArguments.__dataclass_fields__.keys()


@pytest.mark.slow
def test_the_pipeline_leaves_models_that_load(pipeline):
    AutoModelForCausalLM.from_pretrained(pipeline / "apa")
    assert AutoModelForSequenceClassification.from_pretrained(pipeline / "reward").config.num_labels == 1
    assert (pipeline / "apa" / "value_model").is_dir() and (pipeline / "apa" / "tokenizer.json").is_file()
    assert (pipeline / "apa-one-base" / "value_model" / "adapter_model.safetensors").is_file()
    names = ("sft", "apa", "apa-merged")
    weights = [AutoModelForCausalLM.from_pretrained(pipeline / name).state_dict() for name in names]
    assert weights[2].keys() == weights[0].keys()
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_cannot_be_merged_ends_the_command(tmp_path, capsys):
    said = refused(capsys, "merge", tmp_path / "nothing", "--output_dir", tmp_path / "merged")
    assert said.startswith("trl-apa merge: the adapter") and "there is no such folder" in said


@pytest.mark.slow
def test_the_pipeline_logs_reward_and_kl_and_goes_on_where_it_stopped(pipeline):
    history = json.loads((pipeline / "apa" / "trainer_state.json").read_text())["log_history"]
    steps = [row["step"] for row in history if "apa/mean_scores" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 4
    assert all(row["objective/kl"] is not None for row in history if "apa/mean_scores" in row)
    assert [row["step"] for row in history if "eval_reward" in row] == [2, 3, 4]
    assert (pipeline / "apa" / "checkpoint-4").is_dir()


@pytest.mark.slow
def test_the_pipeline_learns_offline_from_labelled_responses(pipeline):
    history = json.loads((pipeline / "offline" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "policy/weight" in row] == [1, 2, 3]
    assert [row["step"] for row in history if "eval_reward" in row] == [2, 3]
    weights = [AutoModelForCausalLM.from_pretrained(pipeline / name).state_dict() for name in ("sft", "offline")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_rows_with_rewards_are_taken_and_preferences_are_labelled():
    given = {"prompt": "a", "completion": "b", "reward": 2.0, "n": 1}
    assert offline.response_with_reward(Row(1, given)) == given
    pair = offline.response_with_reward(Row(2, hh_rows(1)[0]))
    rows = offline.labelled(
        [given, pair], [lambda completions, **_: [1.0] * 2], byte_tokenizer(), OfflineConfig(use_cpu=True)
    )
    assert [(row["completion"], row["reward"]) for row in rows] == [
        ("b", 2.0),
        (" It is 0.", 1.0),
        (" I do not know.", 1.0),
    ]
    assert offline.prompts_of([given, {**given, "n": 2}, pair]) == [
        {"prompt": "a", "n": 1},
        {"prompt": pair["prompt"]},
    ]
    with pytest.raises(ValueError, match="has chat messages"):
        offline.response_with_reward(Row(3, {"chosen": MESSAGES, "rejected": MESSAGES}))


@pytest.mark.slow
def test_the_pipeline_compares_checkpoints(pipeline):
    before, after = json.loads((pipeline / "evaluation.json").read_text()).values()
    assert before["kl"] == pytest.approx(0.0, abs=1e-4) and after["kl"] != before["kl"]
    for _, name, _ in evaluate.COLUMNS:
        assert (name in before) == (name not in evaluate.WINS) and name in after
    assert before["reward"] == pytest.approx(before["rewards/reward"])
    lines = evaluate.table({"before": before, "after": after}).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1 and lines[1].startswith("before")


@pytest.mark.slow
def test_the_pipeline_writes_samples_and_pictures(pipeline):
    samples = [json.loads(line) for line in (pipeline / "samples.jsonl").read_text().splitlines()]
    assert 5 <= len(samples) <= 7
    for sample in samples:  # what met the limit says so
        ended = sample.pop("ended", True)
        assert sample.keys() == {"prompt", "completion"} and isinstance(ended, bool)
    assert len({sample["prompt"] for sample in samples}) == len(samples)
    for name in plot.FIGURES:
        assert (pipeline / "compared" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_pipeline_draws_a_figure_of_the_paper_in_small(pipeline):
    folder = pipeline / "paper" / "mini"
    curves = json.loads((folder / "fig8.json").read_text())["in small"]
    assert set(curves) == {"adaptive KL", "no KL control"} and (folder / "fig8.png").is_file()
    for (rows,) in curves.values():
        assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4) and rows[1]["kl"] > 0


@pytest.mark.slow
def test_the_pipeline_has_a_win_rate_over_the_model_before(pipeline):
    result = json.loads((pipeline / "winrate.json").read_text())
    assert result["pairs"] == len((pipeline / "samples.jsonl").read_text().splitlines())
    assert result["low"] <= result["win_rate"] <= result["high"]
    # each prompt's reference is the response that was preferred
    for row in result["judgements"]:
        first, second = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["reference"] == f" It is {first + second}."
