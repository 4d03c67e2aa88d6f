"""Model cards: valid metadata, true figures, Python that loads, and nothing of this machine or of a key."""

import json
import math
import re
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

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
from trl_apa.cards.papers import APA, PAPERS, papers_of
from trl_apa.offline import OfflineAPATrainer, OfflineConfig
from trl_apa.offline.config import LOSS_TYPES
from trl_apa.trainer.resuming import is_complete


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
        reward_funcs=count_nines,
        **options,
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
        {"step": 4, "eval_reward": 0.125, "eval_reward_stderr": 0.1, "eval_ref_reward": 0.25, "eval_far_kl": 7.0},
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


def test_a_readme_of_somebody_elses_stays_and_a_card_is_replaced(tmp_path):
    write_card(CARD, tmp_path)
    write_card(Card("n", "Another.", [], ""), tmp_path)
    assert card_in(tmp_path).data.model_name == "n"
    (tmp_path / "README.md").write_text("---\ntitle: x\n---\n# My project\n\n- generated_from_trainer\n")
    with pytest.warns(UserWarning, match=r"README\.md is no generated model card and stays"):
        write_card(CARD, tmp_path)
    assert "My project" in (tmp_path / "README.md").read_text()


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
    """peft writes a card of its own first, with the path of the base."""
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


@pytest.mark.filterwarnings("ignore:no dataset")
def test_a_checkpoint_of_adapters_has_a_card_of_the_run(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_config())
    trained(tmp_path / "run", policy, config={"save_strategy": "steps", "save_steps": 1})
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        card = card_in(folder)
        assert card.data.model_name == f"run/checkpoint-{step}" and f"After {step} optimizer step" in card.text
        assert is_complete(folder)
        for place in (folder, folder / "value_model"):
            assert "trl-apa" in card_in(place).data.tags
            assert str(tmp_path) not in (place / "README.md").read_text()


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_a_checkpoint_of_adapters_of_a_command_has_one_too(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base")
    jsonl(tmp_path / "rows.jsonl", hh_rows(8))
    options = "--use_peft --lora_target_modules all-linear --use_cpu --report_to none --max_steps 1 --save_steps 1"
    names = ["--model_name_or_path", str(tmp_path / "base"), "--dataset_name", "rows.jsonl", "--output_dir", "run"]
    assert run(command, *names, *options.split()) == 0
    card = card_in(tmp_path / "run" / "checkpoint-1")
    assert card.data.model_name == "run/checkpoint-1" and "trl-apa" in card.data.tags
    assert str(tmp_path) not in (tmp_path / "run" / "checkpoint-1" / "README.md").read_text()


def test_an_encoder_decoder_is_loaded_as_one(tmp_path):
    tiny_trainer(tmp_path, tiny_model("t5")).save_pretrained(tmp_path / "m")
    assert load_as_it_says(tmp_path / "m")["model"].config.is_encoder_decoder


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


@pytest.mark.parametrize("command", ["sft", "reward"])
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_supervised_commands_leave_a_card_in_place_of_trls(tmp_path, command, adapted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base")
    options = "--use_cpu --max_steps 2 --logging_steps 1 --per_device_train_batch_size 4 --bf16 no --report_to none"
    options += " --save_strategy no --eval_share 0.2 --max_train_rows 8 --max_eval_rows 4"
    options += " --use_peft --lora_target_modules all-linear" if adapted else ""
    given = ["--model_name_or_path", tmp_path / "base", "--dataset_name", jsonl(tmp_path / "r.jsonl", hh_rows(30))]
    assert run(command, *given, "--output_dir", tmp_path / "out", *options.split()) == 0
    card = card_in(tmp_path / "out")
    assert str(tmp_path) not in str(card) and "`r.jsonl`" in card.text and "`base`" in card.text
    assert card.data.pipeline_tag == {"sft": "text-generation", "reward": "text-classification"}[command]
    for meaning in ("training loss", "held-out prompts: loss", "held-out prompts: accuracy on"):
        assert f"| {meaning}" in card.text
    model = load_as_it_says(tmp_path / "out")["model"]
    assert hasattr(model, "peft_config") == adapted and (command == "sft" or model.config.num_labels == 1)


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
    trainer = trained(tmp_path / "run", config={**HUB, "hub_strategy": strategy, "save_steps": 1})
    during, uploads[:] = list(uploads), []
    assert len(during) == {"every_save": 2, "checkpoint": 4, "end": 0}[strategy]
    for place, files in during:
        assert {"model.safetensors", "config.json", "tokenizer.json", *VALUES} <= files
        assert CARDS <= files or place == "last-checkpoint"
    trainer.push_to_hub()
    ((_, files),) = uploads
    assert {"model.safetensors", "tokenizer.json", *VALUES, *CARDS} <= files
    assert not any(name.startswith("checkpoint-") for name in files)
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'huggingface_hub.snapshot_download("me/aligned")' in card and "# aligned\n" in card


def test_the_value_head_is_pushed_with_the_policy(tmp_path, uploads):
    trained(tmp_path / "run", value_model="head", config={**HUB, "save_steps": 1})
    assert all({"model.safetensors", "v_head.safetensors", "README.md"} <= files for _, files in uploads) and uploads
