"""StackLLaMA whole, by the commands of its README: what each step leaves fits the next, and says what it should."""

import json
import os
import re
import shlex
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from trl_apa import ValueModel
from trl_apa.cli import COMMANDS
from trl_apa.commands import reward, sft, train_options
from trl_apa.commands.launching import shipped_configs
from trl_apa.commands.options import read_yaml
from trl_apa.models import load_policy, load_reward_model
from trl_apa.models.reward_adapter import load_reward_adapter, reward_scores


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "stack_llama"
ROWS = "--dataset_name tiny/questions.jsonl"
SHORT = f"{ROWS} --eval_dataset_name tiny/questions.jsonl --use_cpu --per_device_train_batch_size 4 --logging_steps 1"
SHORT += " --gradient_accumulation_steps 2 --learning_rate 1e-2"
SAMPLING = "--max_completion_length 8 --max_prompt_length 32"
# What is smaller here than in the README; the last value of an option counts.
IN_SMALL = {
    "sft": f"{SHORT} --model_name_or_path tiny/llama --max_steps 4 --max_length 64 --max_eval_rows 8",
    "merge": "--dtype float32",
    "reward": f"{SHORT} --max_steps 6 --max_length 64 --max_eval_rows 16",
    "train": f"{SHORT} {SAMPLING} --max_steps 4 --batch_size 8 --eval_steps 4 --max_eval_rows 8",
    "generate": f"{ROWS} {SAMPLING} --use_cpu --max_eval_rows 4",
    "winrate": "--judge local --judge_model tiny/judge --references tiny/questions.jsonl --use_cpu",
}


def documented():
    """The commands in the README, in order, each as its name and its options."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).splitlines():
        program, command, *options = shlex.split(line)
        assert program == "trl-apa"
        yield command, options


def make_inputs(folder):
    """What `examples/tiny_inputs.py` makes, and a judge that can read a whole question."""
    spec = spec_from_file_location("tiny_inputs", ROOT / "examples" / "tiny_inputs.py")
    tiny_inputs = module_from_spec(spec)
    spec.loader.exec_module(tiny_inputs)
    tiny_inputs.main(folder)
    config = AutoConfig.from_pretrained(folder / "llama", max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "judge")
    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(folder / "judge")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that the README's commands fill, on small models and rows; the working directory stays their root."""
    folder = tmp_path_factory.mktemp("stack_llama")
    make_inputs(folder / "tiny")
    (folder / "examples").symlink_to(ROOT / "examples")
    before = os.getcwd()
    os.chdir(folder)
    try:
        for command, options in documented():
            if "--accelerate_config" in options:
                place = options.index("--accelerate_config")
                assert options[place + 1] in shipped_configs()
                del options[place : place + 2]  # here in this process
            assert import_module(COMMANDS[command][0]).main([*options, *IN_SMALL[command].split()]) == 0
        yield folder / "runs" / "stack_llama"
    finally:
        os.chdir(before)


def logged(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row[name] for row in history if name in row]


@torch.no_grad()
def logits(model):
    tokens = torch.arange(3, 23).reshape(2, 10)
    return model.eval()(tokens).logits


@pytest.mark.parametrize(
    ("adapter", "base", "merged"), [("sft", "tiny/llama", "sft-merged"), ("apa", "sft-merged", "apa-merged")]
)
def test_plain_transformers_loads_a_merged_model_that_computes_what_the_adapter_on_its_base_does(
    runs, adapter, base, merged
):
    path = Path(base) if "/" in base else Path("runs/stack_llama") / base
    assert PeftConfig.from_pretrained(runs / adapter).base_model_name_or_path == str(path)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = logits(whole)
    expected = logits(PeftModel.from_pretrained(whole, runs / adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(runs / merged, dtype=torch.float32))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((found - before).abs().max()) > 1e-2


def test_the_reward_adapter_prefers_good_answers_and_scores_the_same_beside_the_policy(runs):
    assert logged(runs / "reward", "eval_accuracy")[-1] == 1.0
    config = PeftConfig.from_pretrained(runs / "reward")
    assert config.task_type == "SEQ_CLS" and config.base_model_name_or_path == "runs/stack_llama/sft-merged"
    tokenizer = AutoTokenizer.from_pretrained(runs / "reward")
    row = json.loads(Path("tiny/questions.jsonl").read_text().splitlines()[0])
    texts = [
        f"Question: {row['question']}\n\nAnswer: {row[name]}{tokenizer.eos_token}"
        for name in ("response_j", "response_k")
    ]
    better, worse = (tokenizer(text, return_tensors="pt")["input_ids"] for text in texts)
    # In 8 bits a rounded activation may be one step of 127 away, in each layer.
    for quantization, dtype, tolerance in ((None, torch.float32, 1e-4), ("8bit", torch.bfloat16, 0.1)):
        policy = load_policy(str(runs / "apa"), quantization, dtype=dtype)
        score = load_reward_adapter(policy, str(runs / "reward"))
        alone = load_reward_model(str(runs / "reward"), quantization, dtype=dtype).eval()
        beside = [float(reward_scores(policy, score, ids)[0, -1, 0]) for ids in (better, worse)]
        with torch.no_grad():
            apart = [float(alone(ids).logits[0, 0]) for ids in (better, worse)]
        assert beside[0] - beside[1] > 0.2
        assert beside == pytest.approx(apart, abs=tolerance)


def test_apa_trains_two_adapters_on_one_base_from_the_fine_tuned_model(runs):
    # Rounding of an 8-bit base in bfloat16: sampled with a cache, and read again without.
    assert logged(runs / "apa", "objective/kl")[0] == pytest.approx(0.0, abs=2e-2)
    assert logged(runs / "apa", "eval_kl")[-1] > 0.01
    ranks = [PeftConfig.from_pretrained(path).r for path in (runs / "sft", runs / "reward", runs / "apa")]
    assert ranks == [16, 8, 16]
    weights = load_peft_weights(str(runs / "apa"))
    assert len(weights) == 8 and all(weight.any() for weight in weights.values())
    # The value model is a second adapter and a head, on the policy's base.
    base = load_policy(str(runs / "apa"), "8bit", dtype=torch.bfloat16)
    value_model = ValueModel.from_pretrained(runs / "apa" / "value_model", base_model=base)
    assert float(value_model.head.out.weight.detach().abs().max()) > 0
    assert {file.name for file in (runs / "apa").rglob("*.safetensors") if "checkpoint" not in str(file)} == {
        "adapter_model.safetensors",
        "value_head.safetensors",
    }


def test_the_win_rate_comes_from_both_orders_with_the_preferred_answer_as_reference(runs):
    result = json.loads((runs / "winrate.json").read_text())
    rows = [json.loads(line) for line in Path("tiny/questions.jsonl").read_text().splitlines()]
    preferred = {f"Question: {row['question']}\n\nAnswer:": f" {row['response_j']}" for row in rows}
    assert result["pairs"] == len(result["judgements"]) == 4
    assert 0 <= result["low"] <= result["win_rate"] <= result["high"] <= 1
    assert {"agreement", "first_place"} <= result.keys()
    answers = {
        name: [json.loads(line)["completion"] for line in (runs / f"{name}.jsonl").read_text().splitlines()]
        for name in ("apa", "sft")
    }
    for number, judgement in enumerate(result["judgements"]):
        assert len(judgement["verdicts"]) == 2 and set(judgement["verdicts"]) <= {"first", "second", "tie"}
        assert judgement["reference"] == preferred[judgement["prompt"]]
        assert [judgement["ours"], judgement["theirs"]] == [answers["apa"][number], answers["sft"][number]]
    assert answers["apa"] != answers["sft"]


def test_the_files_have_the_numbers_of_table_1():
    files = {name: read_yaml(str(FOLDER / f"{name}.yaml")) for name in ("sft", "reward", "apa", "generate")}
    for name, rank, folder in (("sft", 16, "finetune"), ("reward", 8, "reward"), ("apa", 16, "rl")):
        options = files[name]
        batch = (options["per_device_train_batch_size"], options["gradient_accumulation_steps"])
        assert (batch, float(options["learning_rate"]), options["lora_r"]) == ((16, 8), 2e-5, rank)
        assert options["load_in_8bit"] and options["use_peft"]
        assert (options["dataset_name"], options["dataset_data_dir"]) == (
            "lvwerra/stack-exchange-paired",
            f"data/{folder}",
        )
        assert options["eval_dataset_data_dir"] == "data/evaluation"
    apa = files["apa"]
    assert files["sft"]["max_length"] == files["reward"]["max_length"] == 1024
    assert (apa["max_completion_length"], apa["max_prompt_length"]) == (128, 1024 - 128)
    assert (apa["loss_type"], apa["kl_coef"]) == ("apa", 0.1)
    assert files["sft"]["model_name_or_path"] == "huggyllama/llama-7b"
    # The curve of figure 2 is this run.
    assert {**read_yaml(str(ROOT / "reproduction/configs/fig2-apa.yaml")), "output_dir": apa["output_dir"]} == apa


@pytest.mark.parametrize(("name", "command"), [("sft", sft), ("reward", reward), ("apa", train_options)])
def test_the_files_have_options_that_exist(tmp_path, name, command):
    parser = command.make_parser()
    file = FOLDER / f"{name}.yaml"
    values = parser.parse(["--config", str(file), "--use_cpu"])
    given = {option: value for option, value in read_yaml(str(file)).items() if option != "output_dir"}
    assert given.keys() <= values.keys()
    made = parser.build({**values, "output_dir": str(tmp_path)})
    config = next(part for part in made if isinstance(part, TrainingArguments))
    assert config.output_dir == str(tmp_path) and config.learning_rate == float(given["learning_rate"])
