"""Options of TRL 0.12 to 1.12's `PPOConfig`: each is accepted, means what it meant, or says why it has no effect."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import HfArgumentParser, TrainingArguments

from tests.test_value_head import away_from_identity
from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APAConfig, APATrainer, PPOConfig
from trl_apa.config.trl_0_12 import WITHOUT_EFFECT, TRL012Options
from trl_apa.models import choose_reference, reference_policy, select_adapter
from trl_apa.rollout.generation import end_token_ids


FACTS = json.loads((Path(__file__).parent / "data" / "second_generation_options.json").read_text())
# A value for each option that those scripts could set; those of TrainingArguments among them.
VALUES = {
    **{"num_ppo_epochs": 3, "num_mini_batches": 2, "total_episodes": 100, "local_rollout_forward_batch_size": 16},
    **{"num_sample_generations": 5, "response_length": 53, "stop_token": "eos", "stop_token_id": 7},
    **{"temperature": 0.7, "missing_eos_penalty": 1.0, "sft_model_path": "sft", "reward_model_path": "reward"},
    **{"world_size": 1, "num_total_batches": 4, "micro_batch_size": 8, "local_batch_size": 32, "batch_size": 32},
    **{"local_mini_batch_size": 8, "mini_batch_size": 8, "push_to_hub": False, "exp_name": "run7", "run_name": "run7"},
    **{"model_adapter_name": "policy", "ref_adapter_name": "sft", "whiten_rewards": True, "kl_coef": 0.05},
    **{"kl_estimator": "k3", "cliprange": 0.1, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 0.99, "lam": 0.9},
    **{"ds3_gather_for_generation": False, "dataset_num_proc": 2, "logging_steps": 5, "bf16": False},
    **{"gradient_checkpointing": True, "lr_scheduler_kwargs": {}, "learning_rate": 3e-6, "use_liger_kernel": False},
    **{"torch_empty_cache_steps": 4},
}
PPO_ONLY = {"cliprange", "kl_estimator"}


def config(cls=APAConfig, **kwargs):
    return cls(**{"use_cpu": True, "report_to": "none", **kwargs})


def warnings_of(cls=APAConfig, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = config(cls, **kwargs)
    return made, [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def sizes(made):
    return made.batch_size, made.per_device_train_batch_size, made.batch_size // made.backward_batch_size


# ---- every option is accepted ----


def test_the_list_of_options_covers_every_release():
    assert (FACTS["versions"][0], FACTS["versions"][-1], len(FACTS["versions"])) == ("0.12.0", "1.12.0", 52)
    assert set(FACTS["options"]) == set(VALUES)
    ours = {field.name for field in dataclasses.fields(TRL012Options)}
    assert ours <= set(FACTS["options"])


@pytest.mark.parametrize("cls", [APAConfig, PPOConfig])
@pytest.mark.parametrize("option", VALUES)
def test_every_option_is_accepted_with_at_most_one_warning(cls, option):
    made, messages = warnings_of(cls, **{option: VALUES[option]})
    explained = option in {*WITHOUT_EFFECT, "dataset_num_proc"} or (cls is APAConfig and option in PPO_ONLY)
    # num_mini_batches meant two things, and says so.
    assert len(messages) == (explained or option == "num_mini_batches"), messages
    assert all(message.startswith(option) for message in messages)
    if option == "local_batch_size":
        assert made.batch_size == 32
    else:
        assert getattr(made, option) == VALUES[option]


@pytest.mark.parametrize("cls", [APAConfig, PPOConfig])
def test_a_command_line_with_all_options_parses(cls):
    line = ["--output_dir", "x", "--use_cpu", "True", "--num_mini_batches", "4"]
    for option in set(VALUES) - {"num_mini_batches", "stop_token_id", "lr_scheduler_kwargs", "exp_name"}:
        line += [f"--{option}", str(VALUES[option])]
    with pytest.warns(UserWarning):
        (made,) = HfArgumentParser(cls).parse_args_into_dataclasses(line)
    assert sizes(made) == (32, 8, 4)
    assert (made.num_epochs_per_batch, made.max_completion_length, made.total_episodes) == (3, 53, 100)
    assert made.ds3_gather_for_generation is False and made.ref_adapter_name == "sft"


# ---- what they meant ----


def test_other_names_of_our_options_can_be_read_back():
    made = config(num_ppo_epochs=3, response_length=53, local_batch_size=24)
    assert (made.num_epochs_per_batch, made.max_completion_length, made.batch_size) == (3, 53, 24)
    assert (made.num_ppo_epochs, made.ppo_epochs, made.response_length) == (3, 3, 53)
    assert config().num_ppo_epochs == 2
    for options in ({"num_ppo_epochs": 3, "ppo_epochs": 5}, {"local_batch_size": 24, "batch_size": 48}):
        with pytest.raises(ValueError, match="are the same option"):
            config(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # TRL 0.12 to 0.16: 4 a forward pass, 4 * 2 = 8 an optimizer step, 3 of these: 24 rollouts.
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 3}, (24, 4, 3)),
        # One optimizer step an epoch where num_mini_batches was left at 1; every version agrees.
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 8, "num_mini_batches": 1}, (128, 16, 1)),
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 8, "response_length": 53}, (128, 16, 1)),
        # Their per_device_train_batch_size was 8 when left out.
        ({"num_mini_batches": 2}, (16, 8, 2)),
        # TRL 0.17 to 1.12: 64 rollouts cut into 4 mini-batches of 16.
        ({"batch_size": 64, "num_mini_batches": 4}, (64, 16, 4)),
        ({"local_batch_size": 64, "num_mini_batches": 4, "gradient_accumulation_steps": 2}, (64, 8, 4)),
        ({"batch_size": 64, "num_mini_batches": 4, "per_device_train_batch_size": 8}, None),
        # Our own names mean what they mean without.
        ({"per_device_train_batch_size": 4}, (64, 4, 16)),
        ({"per_device_train_batch_size": 4, "total_episodes": 1000}, (64, 4, 16)),
        ({"mini_batch_size": 4, "response_length": 53}, (64, 4, 16)),
        ({"batch_size": 32, "per_device_train_batch_size": 4, "response_length": 53}, (32, 4, 8)),
    ],
)
@pytest.mark.filterwarnings("ignore:num_mini_batches")
def test_sizes_worked_by_hand(options, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"num_mini_batches=4, but batch_size=64 is 8 times .* = 8 \* 1"):
            config(**options)
    else:
        assert sizes(config(**options)) == expected


def test_mini_batches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size=10 should be a multiple"):
        config(batch_size=10, num_mini_batches=4)
    for option in ("num_mini_batches", "total_episodes", "local_rollout_forward_batch_size"):
        with pytest.raises(ValueError, match=f"{option}=0: it should be greater than 0"):
            config(**{option: 0})


def test_only_an_ambiguous_number_of_mini_batches_warns():
    sizes_given = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
    _, (message,) = warnings_of(**sizes_given, num_mini_batches=2)
    assert message.startswith("num_mini_batches=2 makes batch_size 128 = 16 * 4 * 2") and "it was 64" in message
    assert warnings_of(**sizes_given, num_mini_batches=1)[1] == []
    assert warnings_of(**sizes_given, num_mini_batches=2, batch_size=128)[1] == []


def test_the_kl_of_those_scripts_has_no_controller():
    made = config(PPOConfig, kl_estimator="k3", num_ppo_epochs=4)
    assert (made.kl_penalty, made.adap_kl_ctrl, made.kl_coef) == ("k3", False, 0.05)
    assert config(PPOConfig, kl_estimator="k1").kl_penalty == "kl"
    made = config(PPOConfig, response_length=53, kl_coef=0.1, adap_kl_ctrl=True)
    assert (made.kl_coef, made.adap_kl_ctrl) == (0.1, True)
    assert config(PPOConfig, response_length=53, init_kl_coef=0.3).kl_coef == 0.3
    for options in ({}, {"total_episodes": 100}, {"ppo_epochs": 4}):
        made = config(PPOConfig, **options)
        assert (made.adap_kl_ctrl, made.kl_coef) == (True, 0.2)
    made = config(PPOConfig, num_ppo_epochs=4, loss_type="apa")
    assert (made.adap_kl_ctrl, made.kl_coef, made.kl_penalty) == (None, 0.1, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_token": "pad"}, "stop_token='pad': it should be 'eos' or None"),
        ({"stop_token": "eos", "stop_token_id": 3}, "stop_token and stop_token_id=3 both set the end token"),
        ({"kl_estimator": "k2", "loss_type": "ppo"}, "kl_estimator='k2': it should be one of k1, k3"),
        ({"kl_estimator": "k3", "kl_penalty": "kl", "loss_type": "ppo"}, "kl_estimator='k3' and kl_penalty='kl'"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_number_of_processes_is_read_and_cannot_be_set():
    made, messages = warnings_of(world_size=8)
    assert made.world_size == 1 and messages == ["world_size=8 has no effect: the launcher sets it to 1"]
    assert config().world_size == TrainingArguments("x", use_cpu=True, report_to="none").world_size == 1
    assert made.to_dict()["world_size"] == 1


def test_a_changed_copy_of_a_config_warns_of_nothing():
    made = config(PPOConfig, num_ppo_epochs=2, response_length=53, num_mini_batches=1, total_episodes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        copy = dataclasses.replace(made, seed=3)
        assert dataclasses.replace(config(), batch_size=32).batch_size == 32
    assert sizes(copy) == sizes(made) and (copy.kl_coef, copy.adap_kl_ctrl) == (0.05, False)


# ---- what the trainer makes of them ----


def test_a_stop_token_takes_the_place_of_eos():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert end_token_ids(model, tokenizer) == [1]
    assert end_token_ids(model, tokenizer, stop_token_id=0) == [0]


def policy_with_two_adapters():
    """A policy whose adapters "default" and "sft" both change something, each something else."""
    model = get_peft_model(tiny_model(), lora_config())
    model.add_adapter("sft", lora_config())
    return away_from_identity(model)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 8)[None]).logits


def logits_with(model, adapter):
    active = model.active_adapter
    model.set_adapter(adapter)
    found = logits(model)
    model.set_adapter(active)
    return found


def test_the_adapter_that_is_named_is_the_one_trained():
    policy = policy_with_two_adapters()
    select_adapter(policy, None)
    assert policy.active_adapter == "default"
    select_adapter(policy, "sft")
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all(".sft." in name for name in trained)
    with pytest.raises(ValueError, match="model_adapter_name='other', but the adapters of model are 'default', 'sft'"):
        select_adapter(policy, "other")
    with pytest.raises(ValueError, match="model_adapter_name='sft', but model is not a PEFT model"):
        select_adapter(tiny_model(), "sft")


@pytest.mark.parametrize("trains_more", [False, True])
def test_the_adapter_that_is_named_is_the_reference(trains_more):
    policy = policy_with_two_adapters()
    if trains_more:
        next(p for name, p in policy.named_parameters() if "norm" in name).requires_grad_(True)
    expected, own = logits_with(policy, "sft"), logits(policy)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    reference = choose_reference(policy, ref_adapter_name="sft")
    assert (reference is not None) == trains_more
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
    for _ in range(2):
        with reference_policy(policy, reference) as pi_init:
            torch.testing.assert_close(logits(pi_init), expected)
        assert not torch.allclose(own, expected, atol=1e-3)
        torch.testing.assert_close(logits(policy), own)
        # A frozen copy: what becomes of the adapter itself does not move it.
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if ".sft." in name:
                    parameter.zero_()


def test_a_reference_adapter_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="ref_adapter_name='other', but the adapters of model are 'default', 'sft'"):
        choose_reference(policy_with_two_adapters(), ref_adapter_name="other")
    with pytest.raises(ValueError, match="ref_adapter_name='sft', but model is not a PEFT model"):
        choose_reference(tiny_model(), ref_adapter_name="sft")
    with pytest.warns(UserWarning, match="ref_adapter_name has no effect when ref_model is given"):
        choose_reference(policy_with_two_adapters(), tiny_model(), ref_adapter_name="sft")


# ---- the trainer reads them ----


def test_the_trainer_ends_responses_at_the_stop_token(tmp_path):
    query = torch.arange(2, 8)
    greedy = tiny_trainer(tmp_path).generate(query, do_sample=False, return_prompt=False, max_new_tokens=6)[0].tolist()
    stop = greedy[2]
    trainer = tiny_trainer(tmp_path, stop_token_id=stop, missing_eos_penalty=1.0)
    response = trainer.generate(query, do_sample=False, return_prompt=False, max_new_tokens=6)[0].tolist()
    assert response == greedy[: greedy.index(stop) + 1]
    queries, responses, scores = tiny_rollouts()
    responses[0] = torch.tensor([5, stop])
    _, ended_B = trainer._collect(queries, responses, scores, None)
    assert ended_B.tolist() == [int(response[-1]) == stop for response in responses] and ended_B[0]


def test_the_trainer_trains_and_anchors_the_adapters_that_are_named(tmp_path):
    policy = policy_with_two_adapters()
    expected = logits_with(policy, "default")
    trainer = tiny_trainer(tmp_path, policy, model_adapter_name="sft", ref_adapter_name="default")
    before = {name: p.clone() for name, p in policy.named_parameters()}
    trainer.step(*tiny_rollouts())
    changed = {name for name, p in policy.named_parameters() if name in before and not p.equal(before[name])}
    assert changed and all(".sft." in name for name in changed)
    with reference_policy(policy, trainer.ref_model) as pi_init:
        torch.testing.assert_close(logits(pi_init), expected)


def test_the_size_of_rollout_passes_changes_nothing_else(tmp_path):
    kinds = [{}, {"local_rollout_forward_batch_size": 3}]
    trainers = [tiny_trainer(tmp_path, batch_size=4, mini_batch_size=2, **kind) for kind in kinds]
    sizes_seen = []
    for trainer in trainers:
        forward, seen = trainer.model.forward, set()
        trainer.model.forward = lambda *args, _forward=forward, _seen=seen, **kwargs: (
            _seen.add((torch.is_grad_enabled(), len(kwargs["sequence_lengths"]))),
            _forward(*args, **kwargs),
        )[1]
        trainer.step(*tiny_rollouts())
        sizes_seen.append(seen)
    assert sizes_seen == [{(False, 2), (True, 2)}, {(False, 3), (False, 1), (True, 2)}]
    for ours, theirs in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_policy_goes_by_its_name_of_0_12_and_a_tokenizer_in_its_place_is_explained(tmp_path):
    config = tiny_config(tmp_path)
    reference = tiny_model(seed=4)
    trainer = APATrainer(config, policy=tiny_model(), ref_policy=reference, processing_class=tiny_tokenizer())
    assert trainer.ref_model is reference
    with pytest.raises(ValueError, match=r"model is a tokenizer.*give these arguments by keyword"):
        APATrainer(config, tiny_tokenizer(), tiny_model())
    with pytest.raises(ValueError, match="model and policy are the same argument"):
        APATrainer(config, tiny_model(), policy=tiny_model(), tokenizer=tiny_tokenizer())
