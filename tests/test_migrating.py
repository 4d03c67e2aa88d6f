"""docs/migrating.md leaves out no option, names nothing of ours that is not there, and its diffs make good scripts."""

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    TrainingArguments,
    pipeline,
)
from trl import GRPOConfig, GRPOTrainer

from tests.test_docs import documented_statistics, fenced, resolves
from tests.tiny import byte_tokenizer
from trl_apa import APAConfig, APATrainer, PPOConfig
from trl_apa.config.apa import WITHOUT_EFFECT


ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "migrating.md"
FACTS = {
    path.stem.removesuffix("_options"): json.loads(path.read_text())
    for path in (ROOT / "tests" / "data").glob("*.json")
}
FIELDS = {field.name for field in dataclasses.fields(APAConfig)}
ARGUMENTS = set(inspect.signature(APATrainer.__init__).parameters) - {"self"}


def rows_of(heading):
    """The cells of the table under a heading."""
    (section,) = re.findall(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", GUIDE.read_text(), re.MULTILINE | re.DOTALL
    )
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names_in(cell):
    return re.findall(r"`([^`]+)`", cell)


def theirs(heading):
    """Every option that the first column of the table names, as often as it does."""
    return [name for row in rows_of(heading) for name in names_in(row[0])]


def second_generation_arguments():
    named = {name for entry in FACTS["second_generation"]["trainer_arguments"] for name in entry["arguments"]}
    return named | set(FACTS["second_generation"]["older_names_of_arguments"])


def grpo_options():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {
        name for cls in GRPOConfig.__mro__ if "grpo" in cls.__module__ for name in vars(cls).get("__annotations__", ())
    }
    return {field.name for field in dataclasses.fields(GRPOConfig)} - inherited | (own & inherited)


TABLES = {
    "Options of classic's PPOConfig": set(FACTS["classic"]["options"]),
    "Arguments of classic's PPOTrainer": set(FACTS["classic"]["trainer_arguments"]),
    "Options of the second generation's PPOConfig": set(FACTS["second_generation"]["options"]),
    "Arguments of the second generation's PPOTrainer": second_generation_arguments(),
    "Options of TRLConfig": {
        f"{section}.{name}" for section, names in FACTS["trlx"]["options"].items() for name in names
    },
    "Arguments of train": set(FACTS["trlx"]["train_arguments"]),
    "Options of GRPOConfig": grpo_options(),
    "Arguments of GRPOTrainer": set(inspect.signature(GRPOTrainer.__init__).parameters) - {"self"},
}


@pytest.mark.parametrize("heading", TABLES)
def test_every_option_is_in_its_table_once(heading):
    listed = theirs(heading)
    assert set(listed) == TABLES[heading]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("heading", TABLES)
def test_what_is_called_ours_is_there(heading):
    for option, ours, note in rows_of(heading):
        assert note, f"{option}: no word of what became of it"
        assert names_in(ours) or ours == "-", f"{option}: neither a name nor a dash"
        for name in names_in(ours):
            assert name in FIELDS | ARGUMENTS or resolves(name), f"{option}: {name} is not ours"


def test_the_rest_of_grpos_options_is_there_under_the_same_name():
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= FIELDS


def test_the_options_that_are_said_to_have_no_effect_are_those_that_warn_of_it():
    headings = [heading for heading in TABLES if heading.startswith("Options of")]
    said = [row[0] for heading in headings for row in rows_of(heading) if row[2].startswith("without effect")]
    assert {name for cell in said for name in names_in(cell)} == set(WITHOUT_EFFECT)


@pytest.mark.parametrize("name", [row[0] for row in rows_of("Options of classic's PPOConfig") if "PPO only" in row[2]])
def test_options_that_are_said_to_be_ppos_say_so_themselves(name):
    (name,) = names_in(name)
    with pytest.warns(UserWarning, match=f"{name}=.* has no effect .*: only .* it$"):
        APAConfig(use_cpu=True, **{name: "kl" if name == "kl_penalty" else 0.3})


def test_the_statistics_that_are_called_ours_are_documented():
    ours = {name for names in documented_statistics().values() for name in names}
    heading = "Statistics of the second generation"
    assert set(theirs(heading)) == set(FACTS["second_generation"]["last_statistics"])
    for _, cell, _ in rows_of(heading):
        assert set(names_in(cell)) <= ours


def as_value(text):
    """A cell of the table of defaults: its first word as a number, True, False, None or a word."""
    word = text.split(",")[0]
    known = {"none": None, "True": True, "False": False}
    if word in known:
        return known[word]
    return float(word) if re.fullmatch(r"[\d.e-]+", word) else word


def as_source(text):
    return eval(text, {}, {}) if text else None


def test_the_table_of_defaults_is_right():
    rows = {names_in(row[0])[0]: row[1:] for row in rows_of("Defaults that differ")}
    made = {cls: cls(use_cpu=True, report_to="none") for cls in (PPOConfig, APAConfig)}
    classic_name = {"kl_coef": "init_kl_coef", "num_epochs_per_batch": "ppo_epochs"}
    classic_name["per_device_train_batch_size"] = "mini_batch_size"
    second_name = {"num_epochs_per_batch": "num_ppo_epochs", "max_completion_length": "response_length"}
    compared = 0
    for name, (classic, second, _, ppo, apa) in rows.items():
        for cls, cell in ((PPOConfig, ppo), (APAConfig, apa)):
            value = getattr(made[cls], name)
            # What is off may be None or False, as the version of transformers has it.
            assert as_value(cell) == (value or {"none": None, "False": False}.get(cell, value)), name
        for cell, facts, other_name in (
            (classic, FACTS["classic"]["options"], classic_name.get(name, name)),
            (second, FACTS["second_generation"]["last_defaults"], second_name.get(name, name)),
        ):
            source = as_source(facts.get(other_name, ""))
            if source is not None:
                assert as_value(cell) == source, name
                compared += 1
    assert compared >= 15


# ---- the scripts ----


def scripts():
    """For each section its script and its diff."""
    sections = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    found = {}
    for title, text in sections:
        blocks = [
            re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
            for language in ("python", "diff")
        ]
        if all(blocks):
            found[title.split(",")[0]] = (blocks[0][0], blocks[1][0])
    return found


def patched(script, diff):
    """The script after the diff: each hunk's old lines are found in it, in order, and make room for the new ones."""
    done, rest = [], script.splitlines()
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        old = [line[1:] for line in hunk.splitlines() if line[0] in "- "]
        new = [line[1:] for line in hunk.splitlines() if line[0] in "+ "]
        at = next(i for i in range(len(rest)) if rest[i : i + len(old)] == old)
        done += [*rest[:at], *new]
        rest = rest[at + len(old) :]
    return "\n".join([*done, *rest]) + "\n"


SECTIONS = ("Classic PPO", "Second-generation PPO", "trlX", "GRPO")


def test_there_is_a_script_and_a_diff_for_each_trainer():
    assert tuple(scripts()) == SECTIONS
    assert len(fenced(GUIDE, "diff")) == len(SECTIONS) + 1


@pytest.mark.parametrize("section", SECTIONS)
def test_after_the_diff_a_script_imports_our_trainer_and_knows_its_names(section):
    tree = ast.parse(patched(*scripts()[section]))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    packages = {module.split(".")[0] for module in imported}
    assert "trl_apa" in packages and not packages & {"trl", "trlx"}
    calls = {
        node.func.id: node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    (config,) = (call for name, call in calls.items() if name in ("APAConfig", "PPOConfig"))
    (trainer,) = (call for name, call in calls.items() if name in ("APATrainer", "PPOTrainer"))
    assert {keyword.arg for keyword in config.keywords} <= FIELDS
    assert {keyword.arg for keyword in trainer.keywords} <= ARGUMENTS


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Small models in place of those that the scripts name."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer) + 7,
        hidden_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "sentiment")
    config.id2label = {0: "LABEL_0"}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for path in folder.iterdir():
        tokenizer.save_pretrained(path)
    return folder


NAMES = {
    "lvwerra/gpt2-imdb": "policy",
    "lvwerra/distilbert-imdb": "sentiment",
    "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr": "policy",
    "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr": "reward",
    "EleutherAI/pythia-160m": "policy",
}
# A size of the scripts -> one that takes seconds.
SMALLER = {
    r"\bbatch_size=\d+": "batch_size=8",
    r"\bmini_batch_size=\d+": "mini_batch_size=4",
    r"per_device_train_batch_size=\d+": "per_device_train_batch_size=4",
    r"gradient_accumulation_steps=\d+": "gradient_accumulation_steps=2",
    r"(response_length|max_completion_length)=\d+": r"\1=4",
    r"total_episodes=[\d_* ]+": "total_episodes=16",
    r"output_dir=": "use_cpu=True, num_train_epochs=1, output_dir=",
}


def run(section, hub, monkeypatch, folder):
    """The section's script after its diff, on small models, in an empty folder; what it leaves behind."""
    script = patched(*scripts()[section])
    for name, kind in NAMES.items():
        script = script.replace(f'"{name}"', repr(str(hub / kind)))
    for pattern, smaller in SMALLER.items():
        script = re.sub(pattern, smaller, script)
    texts = [f"A review, the {i}th: {'very ' * (i % 4)}good" for i in range(16)]
    rows = {"text": texts, "prompt": texts, "completion": texts, "label": [0] * 16}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict(rows))
    monkeypatch.chdir(folder)
    namespace = {}
    exec(compile(script, section, "exec"), namespace)
    return namespace


def test_the_classic_script_runs_after_its_diff(hub, monkeypatch, tmp_path):
    namespace = run("Classic PPO", hub, monkeypatch, tmp_path)
    assert isinstance(namespace["ppo_trainer"], APATrainer)
    assert namespace["ppo_trainer"].num_iterations_done == 2
    assert namespace["stats"]["apa/mean_scores"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2-imdb-positive")


@pytest.mark.parametrize("section", SECTIONS[1:])
def test_the_other_scripts_run_after_their_diffs(section, hub, monkeypatch, tmp_path):
    trainer = run(section, hub, monkeypatch, tmp_path)["trainer"]
    assert isinstance(trainer, APATrainer)
    assert trainer.num_iterations_done == 2


def test_the_options_that_pipelines_lost_have_replacements_that_work(hub):
    lost = fenced(GUIDE, "diff")[1]
    assert 'model_kwargs={"load_in_8bit": True}' in lost and '"return_all_scores": True' in lost
    quantised, all_scores = (line[1:].strip() for line in lost.splitlines() if line.startswith("+"))
    kwargs = eval(f"dict({quantised})", {"BitsAndBytesConfig": BitsAndBytesConfig})
    sentiment = pipeline("sentiment-analysis", model=str(hub / "sentiment"), device_map={"": "cpu"}, **kwargs)
    assert sentiment.model.is_quantized
    (labels,) = sentiment(["good"], **eval("{" + all_scores + "}"))
    assert {label["label"] for label in labels} == {"POSITIVE", "NEGATIVE"}
    with pytest.raises(ValueError):
        pipeline("sentiment-analysis", model=str(hub / "sentiment"), model_kwargs={"load_in_8bit": True})
    (best,) = sentiment(["good"], return_all_scores=True)
    assert isinstance(best, dict)
