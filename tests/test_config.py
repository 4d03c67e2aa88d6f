"""Options, their classic names, and what is refused before anything is built."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
from transformers import HfArgumentParser

from tests.tiny import tiny_rollouts, tiny_trainer
from trl_apa import APAConfig
from trl_apa.algorithms import ALGORITHMS, DEFAULTS
from trl_apa.config.checks import LIMITS
from trl_apa.offline import OfflineConfig


def config(**kwargs):
    return APAConfig(**{"use_cpu": True, "report_to": "none", **kwargs})


def test_defaults_are_the_papers():
    made = config()
    assert (made.loss_type, made.kl_coef, made.gae_lambda, made.gamma, made.vf_coef) == ("apa", 0.1, 0.95, 1.0, 1.0)
    assert (made.batch_size, made.per_device_train_batch_size, made.num_epochs_per_batch) == (64, 8, 2)
    assert (made.temperature, made.top_p, made.top_k, made.whiten_advantages) == (1.0, 1.0, 0, True)
    assert made.cliprange is None and made.cliprange_value is None
    assert not made.bf16 and not made.gradient_checkpointing
    assert config(loss_type="awr").kl_coef == 1.0
    ppo = config(loss_type="ppo")
    assert (ppo.kl_coef, ppo.cliprange, ppo.adap_kl_ctrl, ppo.target, ppo.horizon, ppo.kl_penalty) == (
        0.05,
        0.2,
        True,
        6.0,
        10000.0,
        "kl",
    )


def test_loss_type_changes_nothing_but_what_its_loss_reads():
    names = {field.name for field in dataclasses.fields(APAConfig)}
    own = {"loss_type", "kl_coef", "cliprange", "adap_kl_ctrl", "target", "horizon", "kl_penalty", "logging_dir"}
    own |= {
        "ratio_threshold",
        "init_kl_coef",
        "cliprange_high",
        "loss_aggregation",
        "normalizer",
        "importance_level",
        "kl_in",
        "beta",
        "epsilon",
        *DEFAULTS,
    }
    apa, *others = (config(loss_type=loss_type) for loss_type in ALGORITHMS)
    for name in names - own:
        for other in others:
            assert getattr(apa, name) == getattr(other, name), name


def test_grpos_beta_is_another_name_of_kl_coef():
    assert config(beta=0.3).kl_coef == 0.3
    ppo = config(loss_type="ppo", num_ppo_epochs=2, beta=0.3)
    assert (ppo.kl_coef, ppo.init_kl_coef) == (0.3, 0.3)
    with pytest.raises(ValueError, match=r"beta=0\.3 and kl_coef=0\.2 are the same option"):
        config(beta=0.3, kl_coef=0.2)
    assert dataclasses.replace(config(), kl_coef=0.4).kl_coef == 0.4


def test_classic_names_are_understood_and_can_be_read_back():
    made = config(lam=0.9, ppo_epochs=3, mini_batch_size=4, batch_size=16, gradient_accumulation_steps=2)
    assert (made.gae_lambda, made.num_epochs_per_batch, made.per_device_train_batch_size) == (0.9, 3, 4)
    assert (made.lam, made.ppo_epochs, made.mini_batch_size, made.backward_batch_size) == (0.9, 3, 4, 8)
    made = config(
        use_score_scaling=True, use_score_norm=True, loss_type="ppo", init_kl_coef=0.3, steps=100, batch_size=8
    )
    assert made.scale_rewards and made.center_rewards
    assert (made.kl_coef, made.total_ppo_epochs) == (0.3, 13)
    assert dataclasses.replace(made, seed=3).mini_batch_size == made.mini_batch_size
    assert dataclasses.replace(config(), gae_lambda=0.5, num_epochs_per_batch=3).lam == 0.5


def test_parses_from_a_command_line():
    parser = HfArgumentParser(APAConfig)
    line = "--output_dir x --use_cpu True --loss_type awr --kl_coef 0.5 --mini_batch_size 2 --batch_size 6 --lam 0.8"
    (made,) = parser.parse_args_into_dataclasses(line.split())
    assert (made.loss_type, made.kl_coef, made.per_device_train_batch_size, made.gae_lambda) == ("awr", 0.5, 2, 0.8)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "expected"), [(64, 1, 8), (12, 1, 6), (12, 2, 6), (7, 1, 7), (11, 1, 1), (4, 4, 1)]
)
def test_the_default_mini_batch_divides_the_batch(batch_size, accumulation, expected):
    made = config(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    assert made.mini_batch_size == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type='dpo'.*apa, awr, ppo"),
        ({"kl_coef": 0.0}, "kl_coef=0.0: it should be greater than 0"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0: it should be greater than 0"),
        ({"kl_coef": float("nan")}, "kl_coef=nan"),
        ({"loss_type": "awr", "kl_coef": 0.0}, "kl_coef=0.0"),
        ({"loss_type": "ppo", "kl_coef": -0.1}, "kl_coef=-0.1: it should not be negative"),
        ({"loss_type": "ppo", "kl_coef": 0.1, "init_kl_coef": 0.2}, "init_kl_coef=0.2 and kl_coef=0.1"),
        ({"loss_type": "ppo", "kl_penalty": "huber"}, "kl_penalty='huber'"),
        ({"loss_type": "ppo", "cliprange": 0.0}, "cliprange=0.0"),
        ({"loss_type": "ppo", "horizon": 12.0}, "horizon=12.0: it should be more than a fifth of the 64 responses"),
        ({"gamma": 1.5}, "gamma=1.5: it should be between 0 and 1"),
        ({"gae_lambda": -0.1}, "gae_lambda=-0.1"),
        ({"lam": 0.9, "gae_lambda": 0.8}, "lam=0.9 and gae_lambda=0.8 are the same option"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 10, "mini_batch_size": 4}, r"batch_size=10 .*= 4 \* 1"),
        ({"batch_size": 10, "gradient_accumulation_steps": 3}, "batch_size=10 .*gradient_accumulation_steps"),
        ({"ppo_epochs": 3, "num_epochs_per_batch": 5}, "ppo_epochs=3 and num_epochs_per_batch=5 are the same option"),
        ({"vf_coef": -1.0}, "vf_coef=-1.0"),
        ({"scale_rewards": "group"}, "scale_rewards='group': it should be True or False"),
        ({"learning_rate": -1e-5}, "learning_rate=-1e-05: it should not be negative"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: it should not be negative"),
        ({"adam_epsilon": -1e-8}, "adam_epsilon=-1e-08: it should not be negative"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0: it should be at least 0 and below 1"),
        ({"adam_beta2": -0.1}, "adam_beta2=-0.1"),
        ({"lr_scheduler_kwargs": {"min_lr": float("nan")}}, r"lr_scheduler_kwargs\['min_lr'\]=nan"),
        ({"reward_weights": [1.0, float("inf")]}, r"reward_weights\[1\] is inf; it should be a finite number"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def floats_of(config_class):
    """Names of the options that are floats, those of `TrainingArguments` too."""
    return [field.name for field in dataclasses.fields(config_class) if field.type in (float, float | None)]


@pytest.mark.parametrize("config_class", [APAConfig, OfflineConfig])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1e-3"], ids=lambda value: str(value)[:8])
def test_every_option_that_is_no_finite_number_is_refused_by_name(config_class, value):
    names = floats_of(config_class)
    assert {"learning_rate", "kl_coef", "gamma", "weight_decay", "adam_beta2", "adam_epsilon", "temperature"} < set(
        names
    )
    assert config_class is OfflineConfig or {"missing_eos_penalty", "lam", "init_kl_coef", "reward_timeout"} < set(
        names
    )
    for name in names:
        if value != math.inf or name not in LIMITS:
            with pytest.raises(ValueError, match=rf"{name}=.*: it should be a (finite )?number"):
                config_class(use_cpu=True, report_to="none", **{name: value})


@pytest.mark.parametrize("name", ["batch_size", "ppo_epochs", "top_k", "max_steps", "seed", "warmup_steps"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_so_is_a_count_that_is_none(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: it should be a finite number"):
        config(**{name: value})


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
def test_an_infinite_limit_is_no_limit(tmp_path, loss_type):
    """The step is that of limits which nothing reaches, and none of its numbers is infinite."""
    names = set(LIMITS) - {"vllm_server_timeout"} - ({"ratio_threshold"} if loss_type == "apa" else set())
    after = []
    for limit in (math.inf, 1e9):
        options = {"early_stopping": True, "scale_rewards": True, "ppo_epochs": 2, **dict.fromkeys(names, limit)}
        trainer = tiny_trainer(tmp_path, loss_type=loss_type, **options)
        stats = trainer.step(*tiny_rollouts())
        after.append({name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()})
        assert all(np.isfinite(value).all() for value in stats.values())
    assert all(parameter.equal(after[1][name]) for name, parameter in after[0].items())


def test_ppo_without_kl_control_is_allowed():
    assert config(loss_type="ppo", kl_coef=0.0, adap_kl_ctrl=False).kl_coef == 0.0


@pytest.mark.parametrize("name", ["cliprange", "init_kl_coef", "target", "horizon", "adap_kl_ctrl", "kl_penalty"])
def test_an_option_without_effect_warns_once(name):
    value = {"adap_kl_ctrl": True, "kl_penalty": "kl", "horizon": 1000.0}.get(name, 0.2)
    with pytest.warns(UserWarning, match=f"{name}=.* has no effect with loss_type='apa'") as caught:
        config(**{name: value})
    assert len([w for w in caught if issubclass(w.category, UserWarning) and name in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(**{name: value}, loss_type="ppo")
