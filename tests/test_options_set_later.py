"""Options that are set after the config or the trainer was made: they take effect, or raise by name."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from tests.tiny import tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APAConfig, APATrainer, PPOConfig
from trl_apa.config import later
from trl_apa.config.apa import ALIASES, WITHOUT_EFFECT
from trl_apa.config.sizes import SIZES


# What is read where it is used. An option that is neither here nor fixed nor another name has not been decided.
TAKE_EFFECT = {
    *("batch_size", "num_epochs_per_batch", "num_generations", "shuffle", "generation_batch_size"),
    *("turn_discount", "gae_over"),
    *("gamma", "gae_lambda", "group_normalization", "vf_coef", "cliprange", "cliprange_high", "cliprange_value"),
    *("importance_correction", "importance_level", "importance_max", "importance_min", "normalizer"),
    *("loss_aggregation", "kl_penalty", "ratio_threshold", "value_kl_coef"),
    *("whiten_advantages", "whiten_rewards", "scale_rewards", "center_rewards", "score_clip", "missing_eos_penalty"),
    *(
        "tokens_per_micro_batch",
        "early_stopping",
        "target_kl",
        "max_kl",
        "exact_kl",
        "value_max_grad_norm",
        "optimize_device_cache",
    ),
    *("max_prompt_length", "max_completion_length", "temperature", "top_p", "top_k", "stop_strings"),
    *("max_tool_calling_iterations", "tool_timeout"),
    *("chat_template_kwargs", "local_rollout_forward_batch_size", "ds3_gather_for_generation", "total_episodes"),
    *("log_completions", "num_completions_to_print", "compare_steps", "push_to_hub_if_best_kwargs", "resume_anyway"),
    *("task_name", "model_name", "query_dataset", "reward_model", "sft_model_path", "reward_model_path"),
}


def config(cls=APAConfig, **kwargs):
    return cls(**{"use_cpu": True, "report_to": "none", "batch_size": 8, "mini_batch_size": 4, **kwargs})


def values_of(options):
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def parameters_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_every_option_has_been_decided():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(APAConfig)} - inherited
    decided = [TAKE_EFFECT, later.FIXED, ALIASES, later.MORE_ALIASES, WITHOUT_EFFECT]
    assert own - set().union(*decided) == set()
    assert TAKE_EFFECT - own == set()
    assert TAKE_EFFECT & later.FIXED.keys() == {
        "batch_size",
        "num_epochs_per_batch",
        "num_generations",
        "total_episodes",
    }


# One value for each, other than the default; with PPO all of them are read. Names that TRL 0.12 brought are not here:
# at construction they also mean that trainer's defaults.
VALUES = {
    **{"lam": 0.5, "gae_lambda": 0.5, "gamma": 0.9, "vf_coef": 0.7, "cliprange": 0.3, "cliprange_value": 0.4},
    **{"ppo_epochs": 3, "num_epochs_per_batch": 3, "mini_batch_size": 2},
    **{"turn_discount": 0.8, "gae_over": "turns"},
    **{
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "batch_size": 16,
        "kl_coef": 0.4,
        "beta": 0.3,
    },
    **{"init_kl_coef": 0.4, "target": 2.0, "horizon": 500.0, "adap_kl_ctrl": False, "kl_penalty": "abs"},
    **{"use_score_scaling": True, "scale_rewards": True, "use_score_norm": True, "score_clip": 2.0},
    **{"max_completion_length": 9, "log_with": "tensorboard", "max_grad_norm": None},
    **{"report_to": ["tensorboard"], "learning_rate": 1e-3, "optimize_cuda_cache": True, "top_k": 5},
    **{
        "shuffle": "groups",
        "optimize_device_cache": True,
        "exp_name": "a",
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
    },
    **{
        "tracker_kwargs": '{"wandb": {"entity": "a"}}',
        "chat_template_kwargs": '{"a": 1}',
        "tracker_project_name": "p",
    },
    **{"push_to_hub_if_best_kwargs": '{"repo_id": "a"}', "seed": 3, "ratio_threshold": 5.0, "steps": 100},
    **{"gradient_checkpointing": True, "optim": "sgd", "project_kwargs": '{"logging_dir": "a"}', "use_vllm": False},
    **{"eval_strategy": "steps", "output_dir": "~/runs", "metric_for_best_model": "apa/mean_scores"},
    **{"forward_batch_size": 2, "early_stopping": True, "total_episodes": 64},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", ["ppo", "apa"])
def test_an_option_set_on_a_config_is_the_option_given_to_it(loss_type):
    """Every other option too, and under every name: what construction computes from it is computed anew."""
    for name, value in VALUES.items():
        if loss_type == "ppo" or name not in ("cliprange", "target", "horizon", "adap_kl_ctrl", "kl_penalty"):
            made = config(loss_type=loss_type)
            setattr(made, name, value)
            given = values_of(config(loss_type=loss_type, **_without_sizes(name), **{name: value}))
            if name in ("report_to", "forward_batch_size"):  # which construction notes under one name
                given |= {alias: getattr(made, alias) for alias in ("log_with", "forward_batch_size")}
            assert values_of(made) == given, name
            assert pickle.loads(pickle.dumps(made)) == made, name


def _without_sizes(name):
    replaced = {"per_device_train_batch_size", "forward_batch_size"}
    return {"mini_batch_size": None} if name in replaced else {}


@pytest.mark.parametrize("made_by", ["construction", "pickle", "pickle of 0.1.0", "copy", "deepcopy", "replace"])
def test_both_names_of_an_option_read_what_was_set_last(made_by):
    made = config(PPOConfig)
    if made_by == "pickle of 0.1.0":
        old = PPOConfig.__new__(PPOConfig)
        state = {name: value for name, value in vars(made).items() if name != later.MADE}
        old.__setstate__(state)
        made = old
    elif made_by != "construction":
        how = {"pickle": lambda c: pickle.loads(pickle.dumps(c)), "replace": dataclasses.replace}
        made = (how | {"copy": copy.copy, "deepcopy": copy.deepcopy})[made_by](made)
    for alias, name in {**ALIASES, "init_kl_coef": "kl_coef", "forward_batch_size": "mini_batch_size"}.items():
        values = (True, False) if alias.startswith(("use_", "optimize_")) else (2, 4)
        values = {"log_with": ("tensorboard", ["tensorboard"]), "lam": (0.2, 0.4)}.get(alias, values)
        for setting, reading, value in ((alias, name, values[0]), (name, alias, values[1])):
            setattr(made, setting, value)
            expected = {"log_with": "tensorboard", "report_to": ["tensorboard"]}.get(reading, value)
            assert getattr(made, reading) == expected, (setting, reading)
            assert getattr(made, setting) == value


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
def test_options_set_on_a_trainers_config_count_from_the_next_step_on(tmp_path, loss_type):
    """To the bit the step of a trainer that was made with them; the step before is that of the old ones."""
    options = {
        **{"ppo_epochs": 3, "mini_batch_size": 2, "lam": 0.5, "gamma": 0.9, "vf_coef": 0.7, "cliprange_value": 0.4},
        **{
            "score_clip": 0.5,
            "whiten_rewards": True,
            "max_grad_norm": 0.3,
            "temperature": 0.8,
            "use_score_scaling": True,
        },
        **{"missing_eos_penalty": 0.5, "early_stopping": True, "target_kl": 9.0, "whiten_advantages": False},
        **({"cliprange": 0.1, "kl_penalty": "abs"} if loss_type == "ppo" else {"kl_coef": 0.3}),
    }
    later_set, given = (
        tiny_trainer(tmp_path, loss_type=loss_type),
        tiny_trainer(tmp_path, loss_type=loss_type, **options),
    )
    for name, value in options.items():
        setattr(later_set.config, name, value)
    stats = [trainer.step(*tiny_rollouts()) for trainer in (later_set, given)]
    assert_same(parameters_of(later_set), parameters_of(given))
    numbers = [{n: v for n, v in s.items() if isinstance(v, float) and "time/" not in n} for s in stats]
    assert numbers[0] == numbers[1]
    assert later_set.state.global_step == 6
    unchanged = tiny_trainer(tmp_path, loss_type=loss_type)
    unchanged.step(*tiny_rollouts())
    assert not torch.equal(next(unchanged.model.parameters()), next(given.model.parameters()))


def test_sizes_set_one_after_the_other_count_together(tmp_path):
    """Whatever the order, also those over all processes that scripts read, and the rollouts of accumulation."""
    made = tiny_trainer(tmp_path, batch_size=8, mini_batch_size=2, gradient_accumulation_steps=2, seed=3)
    trainer = tiny_trainer(tmp_path, batch_size=4, mini_batch_size=4, seed=3)
    for name, value in (("batch_size", 8), ("gradient_accumulation_steps", 2), ("mini_batch_size", 2)):
        setattr(trainer.config, name, value)
    assert (trainer.config.global_batch_size, trainer.config.global_backward_batch_size) == (8, 4)
    for each in (trainer, made):
        each.step(*tiny_rollouts(8))
    assert trainer.state.global_step == 2
    assert_same(parameters_of(trainer), parameters_of(made))
    trainer.config.batch_size = 6
    before = parameters_of(trainer)
    with pytest.raises(ValueError, match=r"batch_size=6 should be a multiple of mini_batch_size \* .* = 2 \* 2"):
        trainer.step(*tiny_rollouts(6))
    assert_same(parameters_of(trainer), before)
    trainer.config.gradient_accumulation_steps = 1
    trainer.step(*tiny_rollouts(6))


FIXED_VALUES = {
    **dict.fromkeys(("learning_rate", "value_learning_rate", "weight_decay", "adam_beta1", "adam_epsilon"), 0.5),
    **{"log_with": "tensorboard", "report_to": ["tensorboard"], "tracker_kwargs": {"a": {}}, "exp_name": "a"},
    **{"seed": 5, "num_unfrozen_layers": 1, "padding_free": False, "use_vllm": True, "gradient_checkpointing": True},
    **{"reward_weights": [1.0], "stop_token_id": 4, "optim": "sgd", "remove_unused_columns": False},
    **{"bf16": True, "loss_type": "awr", "num_mini_batches": 2, "backward_batch_size": 2, "global_batch_size": 9},
    **{
        "init_kl_coef": 0.9,
        "kl_coef": 0.9,
        "target": 2.0,
        "horizon": 50.0,
        "adap_kl_ctrl": False,
        "is_peft_model": True,
    },
}


def test_what_a_trainer_has_used_up_raises_by_name_and_stays_as_it_was(tmp_path):
    trainer = tiny_trainer(tmp_path, loss_type="ppo")
    before = values_of(trainer.config)
    for name, value in FIXED_VALUES.items():
        advice = later.FIXED.get(name, later.FIXED[{"log_with": "report_to"}.get(name, name)]).advice
        with pytest.raises(ValueError, match=f"^{name}=.* is set after the (trainer|config) was made") as raised:
            setattr(trainer.config, name, value)
        assert advice in str(raised.value)
        setattr(trainer.config, name, getattr(trainer.config, name))  # which changes nothing
    assert values_of(trainer.config) == before
    trainer.config.lr_scheduler_type = "linear"
    trainer.step(*tiny_rollouts())
    with pytest.raises(
        ValueError, match="lr_scheduler_type='cosine' is set after the learning rate schedule was made"
    ):
        trainer.config.lr_scheduler_type = "cosine"


def test_the_advice_works(tmp_path):
    """The rate in the optimizer's groups, the controller's coefficient, a copy for another trainer."""
    trainer = tiny_trainer(tmp_path, loss_type="ppo")
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.kl_ctl.value = 0.9
    before = parameters_of(trainer)
    assert trainer.step(*tiny_rollouts())["objective/kl_coef"] == 0.9
    assert_same(parameters_of(trainer), before)
    other = copy.copy(trainer.config)
    other.learning_rate, other.init_kl_coef = 0.5, 0.7
    second = APATrainer(other, tiny_model(), tokenizer=tiny_tokenizer())
    assert (second.optimizer.param_groups[0]["lr"], second.kl_ctl.value) == (0.5, 0.7)
    assert trainer.config.learning_rate == 1e-2


def test_the_config_of_a_trainer_that_is_gone_can_be_changed(tmp_path):
    made = tiny_config(tmp_path)
    trainer = APATrainer(made, tiny_model(), tokenizer=tiny_tokenizer())
    assert pickle.loads(pickle.dumps(made)).learning_rate == 1e-2
    with pytest.raises(ValueError, match=r"learning_rate=0\.5"):
        made.learning_rate = 0.5
    del trainer
    made.learning_rate = 0.5


def test_lambda_is_no_controller_and_can_be_changed(tmp_path):
    trainer = tiny_trainer(tmp_path, loss_type="apa")
    trainer.config.kl_coef = 0.3
    assert trainer.step(*tiny_rollouts())["objective/kl_coef"] == 0.3
    with pytest.warns(UserWarning, match="init_kl_coef=0.5 has no effect with loss_type='apa'"):
        trainer.config.init_kl_coef = 0.5
    assert trainer.config.kl_coef == 0.3


@pytest.mark.parametrize("with_trainer", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gamma", 1.5, "gamma=1.5: it should be between 0 and 1"),
        ("lam", -0.1, "gae_lambda=-0.1"),
        ("ppo_epochs", 0, "num_epochs_per_batch=0: it should be greater than 0"),
        ("mini_batch_size", -2, "per_device_train_batch_size=-2"),
        ("batch_size", None, "batch_size=None: it should be of type int"),
        ("gamma", "0.9", "gamma='0.9': it should be a number, not a text"),
        ("vf_coef", float("nan"), "vf_coef=nan: it should be a finite number"),
        ("cliprange", 0.0, "cliprange=0.0"),
        ("kl_penalty", "huber", "kl_penalty='huber'"),
        ("scale_rewards", "group", "scale_rewards='group'"),
        ("save_strategy", "sometimes", "save_strategy='sometimes': it should be one of no, steps"),
        ("push_to_hub_if_best_kwargs", {"private": True}, "it should have a repo_id"),
        ("tracker_kwargs", "{", "tracker_kwargs is not JSON"),
    ],
)
def test_a_bad_value_is_refused_as_at_construction_and_the_old_one_stays(
    tmp_path, trainer, with_trainer, name, value, message
):
    if with_trainer and name == "tracker_kwargs":
        pytest.skip("fixed by then")
    made = trainer.config if with_trainer else tiny_config(tmp_path, loss_type="ppo")
    before = values_of(made)
    with pytest.raises(ValueError, match=message):
        setattr(made, name, value)
    assert values_of(made) == before
    made.gamma = 0.9 if made.gamma == 1.0 else 1.0  # and others can still be set


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny_trainer(tmp_path_factory.mktemp("trainer"), loss_type="ppo")


def test_a_tracker_that_is_not_installed_is_refused_as_at_construction():
    made = config()
    with pytest.raises(ImportError, match="neptune"):
        made.log_with = "neptune"
    assert made.report_to == []


def test_a_scripts_own_attributes_are_its_own():
    made = config()
    made.anything = 1
    assert made.anything == 1


class Sets(TrainerCallback):
    def __init__(self, **options):
        self.options = options

    def on_step_end(self, args, state, control, **kwargs):
        for name, value in self.options.items():
            setattr(args, name, value)


def trainer_of_prompts(tmp_path, *callbacks, **options):
    return APATrainer(
        tiny_config(tmp_path, max_completion_length=4, save_strategy="no", **options),
        tiny_model(),
        tokenizer=tiny_tokenizer(),
        dataset=Dataset.from_dict({"input_ids": [[2 + i, 3, 4] for i in range(8)]}),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("name", ["ppo_epochs", "batch_size", "mini_batch_size", "max_steps", "num_generations"])
def test_train_refuses_what_it_has_counted_its_steps_by_and_takes_the_rest(tmp_path, name):
    trainer = trainer_of_prompts(tmp_path, Sets(gamma=0.5, **{name: 2}), max_steps=1)
    with pytest.raises(ValueError, match=rf"^{name}=2 is set after train\(\) began .*: set it before train\(\)"):
        trainer.train()
    assert trainer.config.gamma == 0.5
    setattr(trainer.config, name, 2)


def test_train_counts_by_the_options_as_they_are_when_it_begins(tmp_path):
    """`total_episodes` stays so many rollouts when epochs are set later."""
    trainer = trainer_of_prompts(tmp_path, total_episodes=8)
    assert trainer.config.max_steps == 2
    trainer.config.ppo_epochs = 3
    assert trainer.config.max_steps == 6
    trainer.config.total_episodes = 4
    trainer.train()
    assert (trainer.state.global_step, trainer.num_iterations_done) == (3, 1)
    trainer.config.max_steps = 5
    trainer.config.ppo_epochs = 1
    assert trainer.config.max_steps == 5


def test_a_batch_size_set_later_is_what_step_takes_beside_a_dataloader(tmp_path):
    """As in classic, where scripts set it to the rows of the batch at hand."""
    trainer = trainer_of_prompts(tmp_path)
    trainer.config.batch_size = trainer.config.mini_batch_size = 2
    assert len(next(iter(trainer.dataloader))["input_ids"]) == 4
    trainer.step(*tiny_rollouts(2))
    assert trainer.num_iterations_done == 1


def test_a_config_that_a_trainer_was_given_later_is_followed_too(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.config = given = copy.copy(trainer.config)
    with pytest.raises(ValueError, match="learning_rate"):
        given.learning_rate = 0.5
    given.kl_coef = 0.7
    assert trainer.kl_ctl.value == 0.7


def test_options_may_be_none_after_a_command_line_was_parsed_too(tmp_path):
    # `HfArgumentParser` changes the types of the fields of the class itself.
    (parsed,) = HfArgumentParser(APAConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "True", "--report_to", "none", "--save_total_limit", "1"]
    )
    may_be_none = [field.name for field in dataclasses.fields(parsed) if field.default is None]
    free = [name for name in may_be_none if name not in {*later.FIXED, *SIZES, *ALIASES, *later.MORE_ALIASES}]
    assert "save_total_limit" in free and "max_kl" in free
    for name in free:
        setattr(parsed, name, None)
    for name, value in (("gamma", None), ("batch_size", None), ("seed", None)):
        with pytest.raises(ValueError, match=f"{name}=None"):
            setattr(parsed, name, value)
