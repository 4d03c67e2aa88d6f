"""The rate of a run that was given none: by what is trained of each network."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from transformers import HfArgumentParser

from tests.tiny import lora_config, tiny_model, tiny_rollouts, tiny_tokenizer
from trl_apa import APAConfig, APATrainer, PPOConfig, PPOTrainer
from trl_apa.config.rates import NEW_WEIGHTS_RATE, PRETRAINED_RATE
from trl_apa.models import ValueModel
from trl_apa.offline import OfflineAPATrainer, OfflineConfig


LORA = {"peft_config": lora_config()}
HEAD_COPY = {"peft_config": lora_config(modules_to_save=["lm_head"])}
OPTIONS = {"use_cpu": True, "report_to": "none", "batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1}


def config_of(tmp_path, config_class=APAConfig, **options):
    return config_class(output_dir=str(tmp_path), **OPTIONS, **options)


def trainer_of(config, trainer_class=APATrainer, model=None, **given):
    model = tiny_model() if model is None else model
    return trainer_class(config, model, tokenizer=tiny_tokenizer(), **given)


def rates_of(trainer):
    """Of policy and value model, as the optimizer has them; a set each."""
    rate_of = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    parts = trainer.model.trainable_parameters()
    return {rate_of[id(p)] for p in parts["policy"]}, {rate_of[id(p)] for p in parts["value"]}


def whole_critic():
    return ValueModel.from_policy(tiny_model(seed=1))


@pytest.mark.parametrize(
    ("given", "policy", "value"),
    [
        ({}, 1.41e-5, 1.41e-5),
        ({"value_model": "head"}, 1.41e-5, 1.41e-5),
        (LORA, 3e-4, 3e-4),
        (LORA | {"value_model": "adapter"}, 3e-4, 3e-4),
        (LORA | {"value_model": "head"}, 3e-4, 3e-4),
        (LORA | {"value_model": whole_critic}, 3e-4, 1.41e-5),
        (HEAD_COPY, 1.41e-5, 3e-4),  # the value model has no vocabulary head
        ({"peft_config": lora_config(target_modules=["q_proj"], layers_to_transform=[0])}, 3e-4, 3e-4),
    ],
)
def test_adapters_and_pretrained_weights_have_rates_of_their_own(tmp_path, given, policy, value):
    given = {name: option() if callable(option) else option for name, option in given.items()}
    trainer = trainer_of(config_of(tmp_path), **given)
    stats = trainer.step(*tiny_rollouts())
    assert rates_of(trainer) == ({policy}, {value})
    assert trainer.args.learning_rate == stats["apa/learning_rate"] == policy


def test_biases_of_the_base_are_pretrained_weights(tmp_path):
    given = {"peft_config": lora_config(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)}
    assert rates_of(trainer_of(config_of(tmp_path), model=tiny_model("gpt2"), **given))[0] == {PRETRAINED_RATE}


@pytest.mark.parametrize("rate", [PRETRAINED_RATE, 1e-6, 1e-3])
def test_a_rate_that_is_given_is_the_rate(tmp_path, rate):
    assert rates_of(trainer_of(config_of(tmp_path, learning_rate=rate), **LORA)) == ({rate}, {rate})
    later = config_of(tmp_path)
    later.learning_rate = rate
    assert rates_of(trainer_of(later, **LORA)) == ({rate}, {rate})
    given = config_of(tmp_path, value_learning_rate=rate)
    assert rates_of(trainer_of(given, **LORA)) == ({NEW_WEIGHTS_RATE}, {rate})


def test_classics_config_keeps_classics_rate(tmp_path):
    assert rates_of(trainer_of(config_of(tmp_path, PPOConfig), PPOTrainer, **LORA)) == ({1.41e-5}, {1.41e-5})


def test_an_optimizer_of_the_callers_has_its_own(tmp_path):
    model = get_peft_model(tiny_model(), lora_config())
    config = config_of(tmp_path)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    trainer = trainer_of(config, model=model, optimizer=optimizer)
    assert rates_of(trainer) == ({1.41e-5}, {1.41e-5})


def test_one_config_serves_several_trainers(tmp_path):
    config = config_of(tmp_path)
    chosen = [trainer_of(config, **given).args.learning_rate for given in (LORA, {}, LORA)]
    assert chosen == [NEW_WEIGHTS_RATE, PRETRAINED_RATE, NEW_WEIGHTS_RATE]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_of_a_config_has_the_default_too(tmp_path, copied):
    config = copied(config_of(tmp_path))
    assert type(config.learning_rate) is float and config.learning_rate == PRETRAINED_RATE
    assert trainer_of(config, **LORA).args.learning_rate == NEW_WEIGHTS_RATE


@pytest.mark.parametrize(("options", "rate"), [([], NEW_WEIGHTS_RATE), (["--learning_rate", "1.41e-5"], 1.41e-5)])
def test_a_command_line_gives_a_rate_or_none(tmp_path, options, rate):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--batch_size", "4", *options]
    (config,) = HfArgumentParser(APAConfig).parse_args_into_dataclasses(words)
    assert trainer_of(config, **LORA).args.learning_rate == rate


@pytest.mark.parametrize(("given", "rate"), [({}, PRETRAINED_RATE), (LORA, NEW_WEIGHTS_RATE)])
def test_offline_too(tmp_path, given, rate):
    rows = [{"prompt": f"w{i} w3", "completion": f" w{i + 1} w5", "reward": float(i)} for i in range(2, 6)]
    config = OfflineConfig(str(tmp_path), loss_type="awr", use_cpu=True, report_to="none", max_steps=1, value_epochs=1)
    trainer = OfflineAPATrainer(config, tiny_model(), None, tiny_tokenizer(), rows, **given)
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rate}
    config.learning_rate = 1e-5
    assert OfflineAPATrainer(config, tiny_model(), None, tiny_tokenizer(), rows, **LORA).args.learning_rate == 1e-5


def test_the_choice_is_told_once(tmp_path, caplog):
    trainer_of(config_of(tmp_path), **LORA)
    told = [record.getMessage() for record in caplog.records if "learning_rate" in record.getMessage()]
    assert told == ["learning_rate is 0.0003, as adapters alone are trained; for all weights it would be 1.41e-05"]
    caplog.clear()
    trainer_of(config_of(tmp_path))
    assert not [record for record in caplog.records if "learning_rate" in record.getMessage()]
