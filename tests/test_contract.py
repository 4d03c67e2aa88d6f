"""What scripts for TRL's classic PPO rely on and no other file tests: options, arguments, attributes, files."""

import inspect
import json
import random
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, HfArgumentParser

import trl_apa
from tests.tiny import (
    lora_config,
    tiny_config,
    tiny_model,
    tiny_rollouts,
    tiny_tokenizer,
    tiny_trainer,
)
from trl_apa import APAConfig, APATrainer, AutoModelForCausalLMWithValueHead, PPOConfig
from trl_apa.rollout.generation import pad_queries


FACTS = json.loads((Path(__file__).parent / "data" / "classic_options.json").read_text())
DEFAULTS = {
    name: "ppo.py" if name == "exp_name" else {} if source == "dict" else eval(source, {})
    for name, source in FACTS["options"].items()
}
BOTH = pytest.mark.parametrize("cls", [APAConfig, PPOConfig])


# ---- options ----


@BOTH
@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_option_takes_classics_default_and_gives_it_back(cls, name):
    made = cls(use_cpu=True, **{name: DEFAULTS[name]})
    computed = {"world_size": 1, "max_grad_norm": 0.0, "optimize_cuda_cache": False}
    computed["backward_batch_size"] = made.mini_batch_size
    assert getattr(made, name) == computed.get(name, DEFAULTS[name])


@BOTH
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_command_line_with_all_options_parses(cls):
    given = {"tracker_kwargs": {"wandb": {"entity": "x"}}, "project_kwargs": {"logging_dir": "logs"}}
    given |= {"accelerator_kwargs": {"split_batches": True}, "push_to_hub_if_best_kwargs": {"repo_id": "me/best"}}
    values = {name: value for name, value in (DEFAULTS | given).items() if value is not None}
    line = ["--use_cpu"]
    for name, value in values.items():
        line += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    (made,) = HfArgumentParser(cls).parse_args_into_dataclasses(line)
    assert {name: getattr(made, name) for name in values} == values


@BOTH
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_flag_needs_no_value(cls):
    flags = {name for name, value in DEFAULTS.items() if isinstance(value, bool)} | {"optimize_cuda_cache"}
    line = ["--use_cpu", *(f"--{name}" for name in flags)]
    (made,) = HfArgumentParser(cls).parse_args_into_dataclasses(line)
    assert all(getattr(made, name) is True for name in flags)
    (made,) = HfArgumentParser(cls).parse_args_into_dataclasses(["--use_cpu", "--adap_kl_ctrl", "False"])
    assert made.adap_kl_ctrl is False


@BOTH
def test_as_a_dict_a_config_is_flat(cls):
    kwargs = {"wandb": {"entity": "x", "tags": {"of": "run"}}}
    made = cls(use_cpu=True, log_with="wandb", tracker_kwargs=kwargs, batch_size=12, mini_batch_size=3, steps=30)
    flat = made.to_dict()
    assert not any(isinstance(value, dict) for value in flat.values())
    assert (flat["tracker_kwargs/wandb/entity"], flat["tracker_kwargs/wandb/tags/of"]) == ("x", "run")
    assert (flat["backward_batch_size"], flat["total_ppo_epochs"], flat["lam"]) == (3, 3, 0.95)
    assert json.loads(made.to_json_string())["mini_batch_size"] == 3


def test_a_mini_batch_above_the_default_batch_is_the_batch():
    assert APAConfig(use_cpu=True, mini_batch_size=128).batch_size == 128
    assert APAConfig(use_cpu=True, mini_batch_size=40, gradient_accumulation_steps=2).batch_size == 80


# ---- the constructor ----


def test_the_names_beside_the_trainer_are_there():
    names = (
        "APAConfig APATrainer PPOConfig PPOTrainer AutoModelForCausalLMWithValueHead create_reference_model set_seed "
    )
    names += "AutoModelForSeq2SeqLMWithValueHead LengthSampler respond_to_batch AdaptiveKLController FixedKLController"
    for name in names.split():
        assert name in trl_apa.__all__ and callable(getattr(trl_apa, name))


def prompts():
    rows = [{"input_ids": [2 + i, 3], "attention_mask": [1, 1], "query": f"q{i}", "label": i} for i in range(8)]
    return datasets.Dataset.from_list([{**row, "response": "r", "text": "t"} for row in rows])


def test_all_ten_arguments_go_by_place(tmp_path):
    names = list(inspect.signature(APATrainer.__init__).parameters)[1:11]
    assert [
        {"args": "config", "processing_class": "tokenizer", "train_dataset": "dataset"}.get(n, n) for n in names
    ] == (FACTS["trainer_arguments"])
    config, model, reference, tokenizer = tiny_config(tmp_path), tiny_model(), tiny_model(seed=1), tiny_tokenizer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def collator(rows):
        return len(rows)

    with pytest.warns(UserWarning, match="num_shared_layers has no effect"):
        trainer = APATrainer(config, model, reference, tokenizer, prompts(), optimizer, collator, 1, scheduler, None)
    assert trainer.config is config and trainer.ref_model is reference and trainer.tokenizer is tokenizer
    assert trainer.optimizer.optimizer is optimizer and trainer.lr_scheduler.scheduler is scheduler
    assert list(trainer.dataloader) == [4, 4]
    with pytest.warns(UserWarning, match="training_data_collator has no effect"):
        APATrainer(config, tiny_model(), None, tokenizer, prompts(), None, None, None, None, collator)


def test_construction_seeds_every_generator_from_the_config(tmp_path):
    def draws(seed, before):
        model = tiny_model()
        trl_apa.set_seed(before)
        tiny_trainer(tmp_path, model, seed=seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draws(3, before=1)
    assert draws(3, before=2) == first
    assert not set(draws(4, before=1)) & set(first)


@pytest.mark.parametrize("kind", ["plain", "wrapper", "peft", "name"])
def test_policy_and_reference_come_plain_wrapped_with_adapters_or_by_name(tmp_path, kind):
    tiny_model(seed=1).save_pretrained(tmp_path / "model")

    def model():
        if kind == "name":
            return str(tmp_path / "model")
        if kind == "peft":
            return get_peft_model(tiny_model(seed=1), lora_config())
        plain = tiny_model(seed=1)
        return plain if kind == "plain" else AutoModelForCausalLMWithValueHead.from_pretrained(plain)

    trainer = tiny_trainer(tmp_path, model(), {"ref_model": model()})
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    # The reference is the same model, and not another one: no KL before the first update.
    assert abs(trainer.step(*tiny_rollouts())["objective/kl"]) < 1e-5
    trainer = tiny_trainer(tmp_path, tiny_model(seed=2), {"ref_model": model()})
    assert abs(trainer.step(*tiny_rollouts())["objective/kl"]) > 0.01


# ---- attributes ----


@pytest.mark.parametrize("lora", [False, True])
def test_what_scripts_read_is_there_before_the_first_step(tmp_path, lora):
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"peft_config": lora_config()} if lora else {}, learning_rate=3e-3)
    assert trainer.config is trainer.args and trainer.tokenizer is trainer.processing_class
    assert trainer.accelerator.unwrap_model(trainer.model).policy is not None
    assert trainer.current_device == trainer.accelerator.device == torch.device("cpu")
    assert (trainer.ref_model is None) is trainer.is_peft_model is trainer.config.is_peft_model is lora
    assert trainer.is_encoder_decoder is trainer.config.is_encoder_decoder is False
    assert (trainer.config.global_batch_size, trainer.config.global_backward_batch_size) == (4, 4)
    assert trainer.dataloader is None and trainer.lr_scheduler is None and trainer.kl_ctl.value == 0.1
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {3e-3}
    trainer.step(*tiny_rollouts())
    assert trainer.lr_scheduler.get_last_lr()[0] == 3e-3


def test_a_rate_that_the_script_sets_on_the_optimizer_stays(tmp_path):
    """By a schedule of its own, 0 at first and then 1e-2, or by hand; as there is no scheduler in the trainer."""
    trainer = tiny_trainer(tmp_path)
    schedule = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda epoch: float(epoch == 1))
    before = trainer.model.policy.lm_head.weight.detach().clone()
    assert trainer.step(*tiny_rollouts())["apa/learning_rate"] == 0.0
    assert torch.equal(trainer.model.policy.lm_head.weight, before)
    schedule.step()
    assert trainer.step(*tiny_rollouts())["apa/learning_rate"] == 1e-2
    assert not torch.equal(trainer.model.policy.lm_head.weight, before)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 5e-3
    assert [trainer.step(*tiny_rollouts())["apa/learning_rate"] for _ in range(2)] == [5e-3] * 2


# ---- data, generation, files ----


def test_the_columns_that_the_loop_reads_are_kept(tmp_path):
    trainer = APATrainer(tiny_config(tmp_path), tiny_model(), None, tiny_tokenizer(), prompts())
    assert next(iter(trainer.dataloader)).keys() == {"input_ids", "attention_mask", "query", "label", "response"}


def test_the_prompts_are_padded_to_a_multiple(tmp_path, monkeypatch):
    trainer, widths = tiny_trainer(tmp_path), []

    def noted(*args):
        inputs = pad_queries(*args)
        widths.append(inputs["input_ids"].shape[1])
        return inputs

    monkeypatch.setattr("trl_apa.rollout.generation.pad_queries", noted)
    queries = [torch.tensor([2, 3, 4]), torch.tensor([5])]
    options = {"return_prompt": False, "do_sample": False, "max_new_tokens": 6}
    plain = trainer.generate(queries, **options)
    padded = trainer.generate(queries, pad_to_multiple_of=8, **options)
    assert widths == [3, 8]
    assert [r.tolist() for r in padded] == [r.tolist() for r in plain]


def test_saving_needs_no_network(tmp_path, monkeypatch):
    """A model that says it came from the hub, and sockets that refuse."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model = tiny_model()
    model.config._name_or_path = model.name_or_path = "someone/policy"
    trainer = tiny_trainer(tmp_path, get_peft_model(model, lora_config()))
    trainer.save_pretrained(tmp_path / "new" / "folder")
    trainer.create_model_card(tmp_path / "card", model_name="aligned")
    assert (tmp_path / "new" / "folder" / "adapter_model.safetensors").is_file()
    assert "someone/policy" in (tmp_path / "card" / "README.md").read_text()
    plain = tiny_trainer(tmp_path)
    plain.save_pretrained(tmp_path / "plain")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config.model_type == "llama"


def test_keys_and_tokens_are_left_out_of_what_trackers_get(tmp_path):
    kwargs = {"wandb": {"entity": "me", "api_key": "k1", "settings": {"TOKEN": "k2"}}}
    with pytest.warns(UserWarning, match="tracker_kwargs"):
        config = tiny_config(
            tmp_path, tracker_kwargs=kwargs, push_to_hub_if_best_kwargs={"repo_id": "me/x", "token": "k3"}
        )
    flat = config.to_dict()
    assert flat["tracker_kwargs/wandb/entity"] == "me" and flat["push_to_hub_if_best_kwargs/repo_id"] == "me/x"
    assert not {"k1", "k2", "k3"} & set(map(str, flat.values()))
    assert config.tracker_kwargs == kwargs
