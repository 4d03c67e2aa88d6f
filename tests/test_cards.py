"""Model cards: valid metadata, true figures, Python that loads, and nothing of this machine or of a key."""

import json
import math
import re
import sys
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from tests._cli import run
from tests.test_cli import hh_rows, jsonl, make_model
from tests.tiny import (
    VOCABULARY,
    byte_tokenizer,
    lora_config,
    tiny_config,
    tiny_model,
    tiny_rollouts,
    tiny_tokenizer,
    tiny_trainer,
)
from trl_apa import APATrainer
from trl_apa.algorithms import ALGORITHMS
from trl_apa.cards import Card, Figure, figures_of, write_card
from trl_apa.cards.card import hub_name, shown_name
from trl_apa.cards.figures import LOADED_STEP, step_of_weights
from trl_apa.cards.of_runs import merged_card, tracker_links
from trl_apa.cards.papers import APA, PAPERS, papers_of
from trl_apa.demo.smollm2.measuring import METRICS
from trl_apa.demo.smollm2.options import RealDemoOptions
from trl_apa.demo.smollm2.pipeline import save_card
from trl_apa.offline import OfflineAPATrainer, OfflineConfig
from trl_apa.offline.config import LOSS_TYPES


CARD = Card("m", "A model.", ["import os"], "model = os.sep")
TOKEN = "hf_Hub0Token0Of0Mine"


def card_in(folder):
    """The text of a card, whose metadata are what the hub takes."""
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name in ("transformers", "peft") and card.data.model_name
    assert all(isinstance(tag, str) for tag in card.data.tags)
    for name in filter(None, [card.data.base_model, *(card.data.datasets or [])]):
        validate_repo_id(name)
    assert "{{" not in card.text.split("## Citations")[0]
    return card


def load_as_it_says(folder):
    """What the Python of a card leaves."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    left = {}
    exec(code.replace("path/to/this/folder", str(folder)), left)
    return left


def trained(folder, model=None, **options):
    """A trainer that has made two steps, with one evaluation."""
    trainer = APATrainer(
        tiny_config(folder, max_completion_length=4, max_steps=2, logging_steps=1, **options.pop("config", {})),
        tiny_model() if model is None else model,
        tokenizer=tiny_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w5" for i in range(2, 12)]}),
        eval_dataset=[{"prompt": "w3 w4"}, {"prompt": "w3 w9"}],
        **{"reward_funcs": count_nines, **options},
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def count_nines(completions, **columns):
    return [float(text.count("9")) for text in completions]


# ---- what the log says ----


def test_the_figures_are_the_first_the_last_and_the_best_of_the_log():
    """Half an interval: 1.96 standard errors, 1.96 * 0.05 = 0.098 and 1.96 * 0.1 = 0.196."""
    log = [
        {"step": 0, "eval_reward": 0.25, "eval_reward_stderr": 0.05, "eval_ref_reward": 0.25},
        {"step": 2, "apa/mean_scores": 1.5, "objective/kl": 3.0, "loss": 0.75},
        {"step": 4, "apa/mean_scores": -2.0, "objective/kl": 5.0, "loss": 0.5},
        {"step": 4, "eval_reward": 0.125, "eval_reward_stderr": 0.1, "eval_ref_reward": 0.25},
        {"step": 4, "eval_far_kl": 7.0, "eval_far_runtime": 1.0},
        {"step": 6, "train_runtime": 3.0, "apa/mean_scores": 0.5, "objective/kl": None, "loss": math.nan},
    ]
    assert figures_of(log) == [
        Figure("reward of the rollouts", "1.5", "0.5", "1.5 (step 2)"),
        Figure("KL to the initial model, nats per response", "3", "5", ""),
        Figure("training loss", "0.75", "nan", "0.5 (step 4)"),
        Figure("held-out prompts: reward of the initial model", "0.25", "0.25", ""),
        Figure("held-out prompts: reward", "0.25 ± 0.098", "0.125 ± 0.2", "0.25 ± 0.098 (step 0)"),
        Figure("held-out prompts, far: KL to the initial model, nats per response", "7", "7", ""),
    ]
    assert figures_of([]) == []


def test_held_out_prompts_have_names_where_they_were_evaluated_under_one():
    """TRL's trainer of reward models logs the least, the mean and the largest reward of its pairs."""
    of_pairs = {"eval_min_reward": -1.0, "eval_mean_reward": 0.5, "eval_max_reward": 2.0, "eval_accuracy": 0.75}
    accuracy = "accuracy on pairs"
    assert figures_of([{"step": 1, "eval_runtime": 1.0, **of_pairs}]) == [
        Figure(f"held-out prompts: {accuracy}", "0.75", "0.75", "0.75 (step 1)")
    ]
    several = [
        {"step": 1, "eval_near_by_accuracy": 0.25, "eval_near_by_min_reward": -1.0, "eval_near_by_runtime": 1.0},
        {"step": 1, "eval_ref_accuracy": 0.5, "eval_ref_reward": 3.0, "eval_ref_runtime": 1.0},
    ]
    assert figures_of(several) == [
        Figure(f"held-out prompts, near_by: {accuracy}", "0.25", "0.25", "0.25 (step 1)"),
        Figure("held-out prompts, ref: reward", "3", "3", "3 (step 1)"),
        Figure(f"held-out prompts, ref: {accuracy}", "0.5", "0.5", "0.5 (step 1)"),
    ]


@pytest.mark.filterwarnings("ignore:no dataset")
def test_several_sets_of_held_out_prompts_are_shown_under_their_names(tmp_path):
    trainer = trained(tmp_path)
    trainer.evaluate({"near": ["w3 w4"], "far": ["w3 w9"]})
    trainer.save_pretrained(tmp_path)
    shown = re.findall(r"\| (held-out prompts.*?): reward \|", card_in(tmp_path).text)
    assert shown == ["held-out prompts", "held-out prompts, far", "held-out prompts, near"]


def test_the_last_figures_are_those_of_the_best_checkpoint_where_it_is_loaded_at_the_end():
    """Three steps, then the checkpoint of step 2, which is evaluated once more on other prompts."""
    log = [
        {"step": 1, "objective/kl": 1.0, "eval_kl": 10.0, "eval_reward": 0.5},
        {"step": 2, "objective/kl": 2.0, "eval_kl": 20.0, "eval_reward": 0.75},
        {"step": 3, "objective/kl": 3.0, "eval_kl": 30.0, "eval_reward": 0.25},
    ]
    loaded = [*log, {"step": 3, LOADED_STEP: 2}]
    later = [
        *loaded,
        {"step": 3, "eval_new_kl": 40.0, "eval_new_reward": 1.0, "eval_new_runtime": 9.0},
        {"step": 3, "eval_reward": 1.0},
    ]
    kl, reward = "KL to the initial model, nats per response", "held-out prompts: reward"
    assert figures_of(log)[:3] == [
        Figure(kl, "1", "3"),
        Figure(reward, "0.5", "0.25", "0.75 (step 2)"),
        Figure(f"held-out prompts: {kl}", "10", "30"),
    ]
    assert figures_of(loaded)[:3] == [
        Figure(kl, "1", "2"),
        Figure(reward, "0.5", "0.75", "0.75 (step 2)"),
        Figure(f"held-out prompts: {kl}", "10", "20"),
    ]
    assert figures_of(later)[1:] == [
        Figure(reward, "0.5", "1", "1 (step 2)"),
        Figure(f"held-out prompts: {kl}", "10", "20"),
        Figure("held-out prompts, new: reward", "1", "1", "1 (step 2)"),
        Figure(f"held-out prompts, new: {kl}", "40", "40"),
    ]
    assert [step_of_weights(rows, 3) for rows in (log, loaded, later)] == [3, 2, 2]
    # Training that goes on from there is of its own steps.
    on = [*later, {"step": 4, "objective/kl": 4.0}]
    assert step_of_weights(on, 4) == 4 and figures_of(on)[0] == Figure(kl, "1", "4")
    assert step_of_weights(later, 4) == 4 and figures_of(later, steps=4)[0] == Figure(kl, "1", "3")


def test_every_algorithm_has_its_paper():
    assert ALGORITHMS.keys() | set(LOSS_TYPES) == PAPERS.keys()
    assert papers_of("apa") == [APA] == papers_of("mine:algorithm")
    assert [paper.arxiv for paper in papers_of("rebel")] == ["2306.02231", "2404.16767"]
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv) for paper in PAPERS.values())


@pytest.mark.parametrize(
    ("name", "hub", "shown"),
    [
        ("gpt2", "gpt2", "gpt2"),
        ("someone/policy", "someone/policy", "someone/policy"),
        ("/home/me/runs/sft", None, "sft"),
        ("../secret-project/sft/", None, "sft"),
        ("data/rows.jsonl.gz", None, "rows.jsonl.gz"),
        ("rows.parquet", None, "rows.parquet"),
    ],
)
def test_of_a_path_the_last_part_is_shown(name, hub, shown):
    assert (hub_name(name), shown_name(name)) == (hub, shown)


def test_a_folder_that_is_there_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    assert hub_name("runs/sft") is None and shown_name("runs/sft") == "sft"


# ---- how it is written ----


def test_a_generated_card_is_replaced(tmp_path):
    write_card(CARD, tmp_path)
    write_card(Card("n", "Another.", [], ""), tmp_path)
    assert card_in(tmp_path).data.model_name == "n"


OWN_READMES = {
    "without metadata": b"# Mine\n",
    "our tags in its text": b"---\ntitle: x\n---\n# Mine\n\n- generated_from_trainer\n- trl-apa\n",
    "an example further down": b"---\ntitle: x\n---\n```\n---\ntags:\n- generated_from_trainer\n- trl-apa\n---\n```\n",
    "an example alone": b"# Mine\n\n---\ntags:\n- generated_from_trainer\n- trl-apa\n---\n",
    "one of our tags": b"---\nlibrary_name: transformers\ntags:\n- trl-apa\n---\n# Mine\n",
    "another library's": b"---\nlibrary_name: peft\ntags:\n- generated_from_trainer\n- lora\n---\n# Model card\n",
    "a tag that is no list": b"---\ntags: generated_from_trainer trl-apa\n---\n# Mine\n",
    "metadata that cannot be read": b"---\ntags: [generated_from_trainer\n---\n# Mine\n",
    "a list as metadata": b"---\n- generated_from_trainer\n- trl-apa\n---\n# Mine\n",
    "other line ends": b"---\r\ntitle: x\r\n---\r\n# Mine\r\n",
    "no UTF-8": b"---\ntitle: \xe9\n---\n# \xe0 moi\n",
}


@pytest.mark.parametrize("kind", OWN_READMES)
def test_a_readme_of_the_users_stays_byte_for_byte(tmp_path, kind):
    (tmp_path / "README.md").write_bytes(OWN_READMES[kind])
    with pytest.warns(UserWarning, match=r"README\.md is no generated model card and stays"):
        write_card(CARD, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == OWN_READMES[kind]


@pytest.mark.parametrize("kind", OWN_READMES)
@pytest.mark.parametrize("value_model", ["separate", "adapter"])
@pytest.mark.filterwarnings("ignore:no dataset")
def test_saving_adapters_leaves_the_users_readmes_alone(tmp_path, kind, value_model):
    """peft by itself writes metadata into a README.md that is there, and fails on one that it cannot read."""
    policy = get_peft_model(tiny_model(), lora_config())
    trainer = tiny_trainer(tmp_path / "run", policy, {"value_model": value_model})
    places = [tmp_path / "m" / "README.md", tmp_path / "m" / "value_model" / "README.md"]
    for place in places:
        place.parent.mkdir()
        place.write_bytes(OWN_READMES[kind])
    with pytest.warns(UserWarning, match="is no generated model card and stays"):
        trainer.save_pretrained(tmp_path / "m")
    assert all(place.read_bytes() == OWN_READMES[kind] for place in places)
    assert (tmp_path / "m" / "adapter_model.safetensors").is_file()
    policy.save_pretrained(tmp_path / "by_peft")
    assert "library_name: peft" in (tmp_path / "by_peft" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:no dataset")
def test_what_peft_writes_itself_stays_too(tmp_path):
    policy = get_peft_model(tiny_model(), lora_config())
    policy.save_pretrained(tmp_path / "m")
    before = (tmp_path / "m" / "README.md").read_bytes()
    with pytest.warns(UserWarning, match="stays as it is"):
        tiny_trainer(tmp_path / "run", policy).save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "README.md").read_bytes() == before


def test_values_of_options_do_not_break_the_table(tmp_path):
    write_card(Card("m", "A model.", [], "", options={"stop_strings": ["|", "\n", "`"], "x": None}), tmp_path)
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if "stop_strings" in line]
    assert rows == ['| `stop_strings` | `["\\|", "\\n", "\'"]` |']


@pytest.mark.filterwarnings("ignore:no dataset")
def test_a_card_that_cannot_be_written_is_a_warning(tmp_path):
    trainer = tiny_trainer(tmp_path)
    (tmp_path / "m" / "README.md").mkdir(parents=True)
    with pytest.warns(UserWarning, match="writing a model card failed"):
        trainer.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()


def fail(*args, **kwargs):
    raise OSError("no space left")


def test_a_push_is_made_without_a_card_that_cannot_be_written(tmp_path, uploads, monkeypatch):
    trainer = trained(tmp_path / "run", config={**HUB, "hub_strategy": "end"})
    monkeypatch.setattr("trl_apa.trainer.saving.policy_card", fail)
    with pytest.warns(UserWarning, match="writing a model card failed, .* OSError: no space left"):
        trainer.push_to_hub()
    ((_, files),) = uploads
    assert "model.safetensors" in files and "README.md" not in files


def test_links_are_of_trackers_that_are_in_use(monkeypatch):
    """A log folder of a tracker that is not installed, `wandb/`, can be imported like a package, and has no code."""
    for name in ("wandb", "trackio", "comet_ml"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert tracker_links() == {}
    wandb = ModuleType("wandb")
    wandb.__file__, wandb.run = "wandb/__init__.py", None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert tracker_links() == {}
    wandb.run = SimpleNamespace(url="https://wandb.ai/me/runs/1")
    assert tracker_links() == {"Weights & Biases": "https://wandb.ai/me/runs/1"}
    for name in ("wandb", "trackio", "comet_ml"):
        monkeypatch.delitem(sys.modules, name)
    assert tracker_links() == {} and "wandb" not in sys.modules


@pytest.mark.filterwarnings("ignore:no dataset")
def test_only_the_main_process_writes(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.save_pretrained(tmp_path / "m")
    assert not list((tmp_path / "m").rglob("README.md"))


# ---- of trainers ----


def test_a_run_leaves_cards_of_policy_and_value_model_and_a_later_one_replaces_them(tmp_path):
    model = tiny_model()
    model.config._name_or_path = str(tmp_path / "where" / "it-was")
    trainer = trained(tmp_path / "run", model, config={"hub_token": TOKEN, "loss_type": "ppo"})
    trainer.card_datasets = [str(tmp_path / "data" / "mine.jsonl"), "someone/prompts"]
    trainer.save_pretrained(tmp_path / "run")
    card, values = card_in(tmp_path / "run"), card_in(tmp_path / "run" / "value_model")
    for text in (str(card), str(values)):
        assert str(tmp_path) not in text and str(Path.home()) not in text and TOKEN not in text
        assert "`it-was`" in text and "`mine.jsonl`" in text and "1707.06347" in text and "2306.02231" in text
    assert (card.data.base_model, card.data.datasets) == (None, ["someone/prompts"])
    assert card.data.tags[:2] == ["generated_from_trainer", "trl-apa"] and "value-model" in values.data.tags
    measured = {name: value for row in trainer.state.log_history for name, value in row.items()}
    assert f"| {measured['apa/mean_scores']:.4g} |" in card.text
    interval = f"{measured['eval_reward']:.4g} ± {1.96 * measured['eval_reward_stderr']:.2g}"
    assert interval in card.text and "After 2 optimizer steps." in card.text and "`count_nines`" in card.text
    assert f"{measured['apa/val/var_explained']:.4g}" in values.text
    assert '| `loss_type` | `"ppo"` |' in card.text and "| `kl_coef` | `0.05` |" in card.text
    loaded = load_as_it_says(tmp_path / "run")
    assert loaded["model"].config.model_type == "llama" and len(loaded["tokenizer"]) == VOCABULARY
    assert type(loaded["value_model"]) is type(load_as_it_says(tmp_path / "run" / "value_model")["value_model"])
    trainer.state.global_step = 9
    trainer.save_pretrained(tmp_path / "run")
    assert "After 9 optimizer steps." in card_in(tmp_path / "run").text


@pytest.mark.parametrize("value_model", ["separate", "adapter", "head"])
@pytest.mark.filterwarnings("ignore:no dataset")
def test_cards_of_adapters_load_them(tmp_path, value_model):
    tiny_model().save_pretrained(tmp_path / "base")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_config())
    trainer = tiny_trainer(tmp_path / "run", policy, {"value_model": value_model})
    trainer.step(*tiny_rollouts())
    trainer.save_pretrained(tmp_path / "run")
    assert card_in(tmp_path / "run").data.library_name == "peft"
    assert all(str(tmp_path) not in path.read_text() for path in (tmp_path / "run").rglob("README.md"))
    loaded = load_as_it_says(tmp_path / "run")
    assert loaded["model"].active_adapter == "default"
    assert ("with_head" in loaded, "value_model" in loaded) == (value_model == "head", value_model != "head")
    trainer.merge_and_save(tmp_path / "merged")
    assert card_in(tmp_path / "merged").data.library_name == "transformers"
    assert not hasattr(load_as_it_says(tmp_path / "merged")["model"], "peft_config")


def bytes_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("now", [None, "head"])
@pytest.mark.filterwarnings("ignore:no dataset")
def test_a_value_model_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path, now):
    tiny_trainer(tmp_path / "run").save_pretrained(tmp_path / "m")
    before = bytes_in(tmp_path / "m" / "value_model")
    options = {"loss_type": "grpo", "num_generations": 2} if now is None else {}
    trainer = tiny_trainer(tmp_path / "run", None, {"value_model": now}, **options)
    with pytest.warns(UserWarning, match="value_model is of another run: .* the model card leaves it out"):
        trainer.save_pretrained(tmp_path / "m")
    assert "value_model" not in card_in(tmp_path / "m").text.split("## Options")[0]
    assert bytes_in(tmp_path / "m" / "value_model") == before
    trainer.merge_and_save(tmp_path / "m")
    assert bytes_in(tmp_path / "m" / "value_model") == before


@pytest.mark.filterwarnings("ignore:no dataset")
def test_a_head_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path):
    tiny_trainer(tmp_path, None, {"value_model": "head"}).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"v_head\.safetensors is of another run"):
        tiny_trainer(tmp_path).save_pretrained(tmp_path)
    assert "ValueHead" not in card_in(tmp_path).text and "ValueModel" in card_in(tmp_path).text


@pytest.mark.filterwarnings("ignore:no dataset")
def test_an_encoder_decoder_is_loaded_as_one(tmp_path):
    tiny_trainer(tmp_path, tiny_model("t5")).save_pretrained(tmp_path / "m")
    assert load_as_it_says(tmp_path / "m")["model"].config.is_encoder_decoder


def worse_each_time():
    """A reward function, by which the first checkpoint is the best."""
    calls = count()
    return lambda completions, **_: [-float(next(calls))] * len(completions)


def test_the_card_of_a_best_checkpoint_is_of_its_step(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": True}
    trainer = trained(tmp_path / "run", reward_funcs=worse_each_time(), config=options)
    trainer.save_pretrained(tmp_path / "run")
    trainer.save_state()
    card, values = card_in(tmp_path / "run").text, card_in(tmp_path / "run" / "value_model").text
    assert "After 1 optimizer steps." in card and "After 1 optimizer steps." in values
    kl, _, again = (row["eval_kl"] for row in trainer.state.log_history if "eval_kl" in row)
    first, last = re.search(r"\| held-out prompts: KL .*?\| (\S+) ± \S+ \| (\S+) ± ", card).groups()
    assert first == last == f"{kl:.4g}" == f"{again:.4g}"
    explained = [row["apa/val/var_explained"] for row in trainer.state.log_history if "apa/val/var_explained" in row]
    assert f"| {explained[0]:.4g} | {explained[0]:.4g} |" in values and explained[0] != explained[1]
    # A checkpoint's own log, and the card of one that is merged, are of the step that was its last.
    states = [tmp_path / "run" / folder / "trainer_state.json" for folder in ("", "checkpoint-2")]
    (tmp_path / "run" / "README.md").unlink()
    cards = [merged_card(str(state.parent), "m", "AutoModelForCausalLM") for state in states]
    assert [card.steps for card in cards] == [1, 2]


def test_the_card_of_an_offline_runs_best_checkpoint_is_of_its_step(tmp_path):
    rows = [{"prompt": "w5 w6", "completion": f"w{i} w9", "reward": float(i)} for i in range(2, 8)]
    options = {"report_to": "none", "use_cpu": True, "max_steps": 3, "value_epochs": 1, "logging_steps": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 9, "max_completion_length": 4}
    config = OfflineConfig(str(tmp_path), **options)
    trainer = OfflineAPATrainer(
        config,
        tiny_model(),
        processing_class=tiny_tokenizer(),
        train_dataset=rows,
        eval_dataset=[{"prompt": "w3 w4"}],
        reward_funcs=worse_each_time(),
    )
    trainer.train()
    trainer.save_pretrained(tmp_path)
    assert trainer.state.global_step == 3 and "After 1 optimizer steps." in card_in(tmp_path).text


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_offline_run_leaves_a_card(tmp_path, loss_type):
    rows = [
        {"prompt": "w5 w6", "completion": f"w{i} w9", "reward": float(i), "ref_rewards": [0.0, 5.0]}
        for i in range(2, 8)
    ]
    options = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "max_steps": 1, "value_epochs": 1}
    config = OfflineConfig(str(tmp_path), loss_type=loss_type, logging_steps=1, **options)
    trainer = OfflineAPATrainer(config, tiny_model(), processing_class=tiny_tokenizer(), train_dataset=rows)
    trainer.train()
    trainer.save_pretrained(tmp_path)
    card = card_in(tmp_path)
    assert "on fixed responses" in card.text and PAPERS[loss_type].arxiv in card.text and "training loss" in card.text
    assert ("`OfflineAPATrainer` shifts it" in card.text) == (loss_type == "ilql")
    assert load_as_it_says(tmp_path)["model"].config.model_type == "llama"


# ---- of commands ----


def supervised(folder, command, options):
    """Run `sft` or `reward` for two steps on a model and rows made in `folder`."""
    make_model(folder / "base")
    given = ["--model_name_or_path", folder / "base", "--dataset_name", jsonl(folder / "r.jsonl", hh_rows(30))]
    options += " --use_cpu --max_steps 2 --logging_steps 1 --per_device_train_batch_size 4 --bf16 no --report_to none"
    options += " --eval_share 0.2 --max_train_rows 8 --max_eval_rows 4"
    assert run(command, *given, "--output_dir", folder / "out", *options.split()) == 0


@pytest.mark.parametrize("command", ["sft", "reward"])
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_supervised_commands_leave_a_card_in_place_of_trls(tmp_path, command, adapted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = " --use_peft --lora_target_modules all-linear" if adapted else ""
    supervised(tmp_path, command, f"--save_strategy no{lora}")
    card = card_in(tmp_path / "out")
    assert str(tmp_path) not in str(card) and "`r.jsonl`" in card.text and "`base`" in card.text
    assert card.data.pipeline_tag == {"sft": "text-generation", "reward": "text-classification"}[command]
    for meaning in ("training loss", "held-out prompts: loss", "held-out prompts: accuracy on"):
        assert f"| {meaning}" in card.text
    assert "held-out prompts, " not in card.text
    model = load_as_it_says(tmp_path / "out")["model"]
    assert hasattr(model, "peft_config") == adapted and (command == "sft" or model.config.num_labels == 1)


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_supervised_commands_leave_the_users_readme_alone(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    with pytest.warns(UserWarning, match="stays as it is"):
        supervised(tmp_path, command, "--save_steps 1 --use_peft --lora_target_modules all-linear")
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"
    assert not list((tmp_path / "out").glob("checkpoint-*/README.md"))


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_the_card_of_a_supervised_best_checkpoint_is_of_its_step(tmp_path, command, monkeypatch):
    """With learning rate 0 no loss is lower than the first."""
    monkeypatch.chdir(tmp_path)
    options = "--save_strategy steps --save_steps 1 --eval_strategy steps --eval_steps 1 --load_best_model_at_end true"
    supervised(tmp_path, command, f"{options} --metric_for_best_model eval_loss --learning_rate 0")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    card = card_in(tmp_path / "out").text
    assert (state["best_global_step"], state["global_step"]) == (1, 2) and "After 1 optimizer steps." in card
    assert f"| training loss | {losses[0]:.4g} | {losses[0]:.4g} |" in card and losses[1] != losses[0]


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_supervised_commands_train_to_the_end_without_a_card_that_cannot_be_written(tmp_path, command, monkeypatch):
    """TRL asks for one before each checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_apa.trl_trainers.supervised_card", fail)
    with pytest.warns(UserWarning, match="writing a model card failed, .* OSError: no space left") as warned:
        supervised(tmp_path, command, "--save_strategy steps --save_steps 1")
    assert sum("model card" in str(warning.message) for warning in warned) == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"checkpoint-1", "checkpoint-2", "model.safetensors", "trainer_state.json"} <= names
    assert "README.md" not in names


def test_merge_says_whose_adapter_it_was_and_shows_the_figures_of_its_run(tmp_path):
    make_model(tmp_path / "base")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_config())
    policy.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    log = [{"step": 3, "eval_reward": 0.5, "eval_reward_stderr": 0.25}]
    (tmp_path / "adapter" / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 3}))
    assert run("merge", tmp_path / "adapter", "--output_dir", tmp_path / "merged") == 0
    card = card_in(tmp_path / "merged")
    assert "the adapter `adapter`" in card.text and "0.5 ± 0.49" in card.text and str(tmp_path) not in str(card)
    assert load_as_it_says(tmp_path / "merged")["model"].config.model_type == "gpt_neox"


# ---- of what is uploaded ----


@pytest.fixture
def uploads(monkeypatch):
    """What would go to the hub: of each upload the place in the repository, and the files that are not ignored."""
    made = []

    def upload_folder(*, folder_path, ignore_patterns=(), path_in_repo="", run_as_future=False, **_):
        files = {path.relative_to(folder_path) for path in Path(folder_path).rglob("*") if path.is_file()}
        kept = set(filter_repo_objects(map(str, files), ignore_patterns=ignore_patterns))
        made.append((path_in_repo, kept))
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))

    def init_hf_repo(self, **_):
        self.hub_model_id, self.push_in_progress = self.args.hub_model_id, None

    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
    return made


HUB = {"push_to_hub": True, "hub_model_id": "me/aligned", "hub_always_push": True, "save_strategy": "steps"}
VALUES = {"value_model/value_head.safetensors", "value_model/value_model.json", "value_model/model.safetensors"}
CARDS = {"README.md", "value_model/README.md"}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
def test_the_value_model_and_the_cards_are_pushed_with_the_policy(tmp_path, uploads, strategy):
    """A checkpoint, which is to be resumed, has no cards."""
    trainer = trained(tmp_path / "run", config={**HUB, "hub_strategy": strategy, "save_steps": 1})
    during, uploads[:] = list(uploads), []
    assert len(during) == {"every_save": 2, "checkpoint": 4, "end": 0}[strategy]
    for place, files in during:
        assert {"model.safetensors", "config.json", "tokenizer.json", *VALUES} <= files
        assert {file for file in files if file.endswith("README.md")} == (set() if place else CARDS)
    trainer.push_to_hub()
    ((_, files),) = uploads
    assert {"model.safetensors", "tokenizer.json", *VALUES, *CARDS} <= files
    assert not any(name.startswith("checkpoint-") for name in files)
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'huggingface_hub.snapshot_download("me/aligned")' in card and "# aligned\n" in card


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_no_readme_of_an_adapters_checkpoint_shows_a_path(tmp_path, uploads, strategy):
    tiny_model().save_pretrained(tmp_path / "base")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_config())
    trained(tmp_path / "run", policy, config={**HUB, "hub_strategy": strategy, "save_steps": 1})
    places = {place for place, _ in uploads}
    of_checkpoints = {"last-checkpoint"} if strategy == "checkpoint" else {"checkpoint-1", "checkpoint-2"}
    assert places == {"", *of_checkpoints}
    assert all("adapter_model.safetensors" in files for _, files in uploads)
    assert {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("README.md")} == CARDS
    assert all(str(tmp_path) not in path.read_text() for path in (tmp_path / "run").rglob("README.md"))


def test_the_value_head_is_pushed_with_the_policy(tmp_path, uploads):
    trained(tmp_path / "run", value_model="head", config={**HUB, "save_steps": 1})
    assert all({"model.safetensors", "v_head.safetensors", "README.md"} <= files for _, files in uploads) and uploads


@pytest.mark.parametrize("strategy", ["every_save", "end"])
@pytest.mark.filterwarnings("ignore:no dataset")
def test_a_value_model_of_an_earlier_run_is_moved_away_and_not_pushed(tmp_path, uploads, strategy):
    tiny_trainer(tmp_path / "other").save_pretrained(tmp_path / "run")
    before = bytes_in(tmp_path / "run" / "value_model")
    options = {**HUB, "loss_type": "grpo", "num_generations": 2, "hub_strategy": strategy, "save_steps": 1}
    if strategy == "end":
        trainer = trained(tmp_path / "run", config=options)
        assert not uploads
        with pytest.warns(UserWarning, match="value_model is of another run, and is not to be pushed"):
            trainer.push_to_hub()
    else:
        with pytest.warns(UserWarning, match="value_model is of another run, and is not to be pushed"):
            trained(tmp_path / "run", config=options)
    shelf = Path("_older-runs", "unknown", "value_model")
    assert bytes_in(tmp_path / "run" / shelf) == before
    assert uploads and all("model.safetensors" in files and "README.md" in files for _, files in uploads)
    assert not any("value_model" in file for _, files in uploads for file in files)


def test_the_demos_card_is_of_what_was_trained(tmp_path):
    """A folder of an earlier run says nothing."""
    metrics = {name: 0.5 for name, *_ in METRICS}
    for options, has_values in (({}, True), ({"advantage_estimator": "group", "num_generations": 2}, False)):
        (tmp_path / "model" / "value_model").mkdir(parents=True, exist_ok=True)
        demo = RealDemoOptions(output_dir=tmp_path, overrides=options)
        save_card(demo, {"options": {"loss_type": "apa"}, "before": metrics, "after": metrics})
        assert ("ValueModel" in (tmp_path / "model" / "README.md").read_text()) == has_values
