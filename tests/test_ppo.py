"""Classic's options and names: PPOConfig and PPOTrainer, early stopping, skipped mini-batches, names of statistics."""

import json

import pytest
import torch
from transformers import HfArgumentParser

from tests.tiny import tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APAConfig, APATrainer, AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, ValueModel


def config(cls=APAConfig, **kwargs):
    return cls(**{"use_cpu": True, "report_to": "none", **kwargs})


def test_ppo_config_has_classics_defaults_and_one_option_makes_it_apa():
    made = config(PPOConfig)
    assert (made.loss_type, made.kl_coef, made.vf_coef, made.cliprange, made.cliprange_value) == (
        "ppo",
        0.2,
        0.1,
        0.2,
        0.2,
    )
    assert (made.ppo_epochs, made.batch_size, made.max_grad_norm, made.seed) == (4, 128, 0.0, 0)
    assert made.mini_batch_size == made.backward_batch_size == 128
    assert config(PPOConfig, batch_size=64, gradient_accumulation_steps=4).mini_batch_size == 16
    assert (made.target, made.horizon, made.gamma, made.lam, made.ratio_threshold) == (6.0, 10000.0, 1.0, 0.95, 10.0)
    made = config(PPOConfig, loss_type="apa")
    assert (made.kl_coef, made.ppo_epochs, made.ratio_threshold) == (0.1, 4, None)


def test_ppo_trainer_runs_classics_loop_and_reports_under_classics_names(tmp_path):
    made = config(PPOConfig, output_dir=str(tmp_path), batch_size=4, mini_batch_size=2, learning_rate=1e-3)
    trainer = PPOTrainer(made, tiny_model(), None, tiny_tokenizer())
    stats = trainer.step(*tiny_rollouts())
    assert isinstance(trainer, APATrainer)
    assert trainer.state.global_step == 8
    own = {name for name in stats if "apa/" in name}
    assert {name.replace("apa/", "ppo/") for name in own} <= stats.keys()
    assert stats["ppo/loss/total"] == pytest.approx(stats["ppo/loss/policy"] + 0.1 * stats["ppo/loss/value"], rel=1e-5)
    assert stats["time/ppo/total"] == stats["time/apa/total"]


@pytest.mark.parametrize(
    ("trainer_class", "loss_type", "wrapped", "given", "takes_the_head"),
    [
        (PPOTrainer, "ppo", True, None, True),
        (PPOTrainer, "ppo", True, "separate", False),
        (PPOTrainer, "ppo", False, None, False),
        (PPOTrainer, "apa", True, None, False),
        (APATrainer, "ppo", True, None, False),
        (APATrainer, "ppo", True, "head", True),
    ],
)
def test_the_critic_of_classics_trainer_is_the_wrappers_head(
    tmp_path, trainer_class, loss_type, wrapped, given, takes_the_head
):
    model = AutoModelForCausalLMWithValueHead(tiny_model()) if wrapped else tiny_model()
    made = config(PPOConfig, output_dir=str(tmp_path), batch_size=4, learning_rate=1e-3, loss_type=loss_type)
    trainer = trainer_class(made, model, None, tiny_tokenizer(), value_model=given)
    assert isinstance(trainer.model.value_model, ValueModel) is not takes_the_head
    before = model.v_head.summary.weight.detach().clone() if wrapped else None
    trainer.step(*tiny_rollouts())
    if wrapped:
        assert model.v_head.summary.weight.equal(before) is not takes_the_head


@pytest.mark.parametrize("loss_type", ["apa", "awr", "ppo"])
def test_early_stopping_leaves_out_the_epochs_that_remain(tmp_path, loss_type):
    """A target that no update keeps to, and one that every update keeps to."""
    options = {"loss_type": loss_type, "ppo_epochs": 4, "mini_batch_size": 2, "learning_rate": 0.05}
    stats = tiny_trainer(tmp_path, early_stopping=True, target_kl=1e-6, **options).step(*tiny_rollouts())
    assert stats["apa/epochs"] < 4
    stats = tiny_trainer(tmp_path, early_stopping=True, target_kl=1e6, **options).step(*tiny_rollouts())
    assert stats["apa/epochs"] == 4
    stats = tiny_trainer(tmp_path, target_kl=1e-6, **options).step(*tiny_rollouts())
    assert stats["apa/epochs"] == 4


def test_apas_distance_from_the_rollout_policy_is_measured_from_the_first_visit(tmp_path):
    """One mini-batch an epoch: after the first epoch the record holds log pi_old itself."""
    trainer = tiny_trainer(tmp_path, ppo_epochs=2, learning_rate=1e-3)
    queries, responses, scores = tiny_rollouts()
    rollouts, _ = trainer._collect(queries, responses, scores, None)
    mask = rollouts.response_mask_BR

    def logprobs():
        batch = rollouts.micro_batch(range(4), 0)
        with torch.no_grad():
            return trainer.model(**trainer._model_inputs(batch), with_value=False)["logprobs"]

    old, seen = logprobs(), []
    norm = trainer._get_grad_norm
    trainer._get_grad_norm = lambda *args, **kwargs: (seen.append(logprobs()), norm(*args, **kwargs))[1]
    trainer.step(queries, responses, scores)
    moved = (old - seen[1])[mask]
    for name, expected in {"policykl": moved.mean(), "approxkl": 0.5 * moved.square().mean()}.items():
        reported = [float(step[f"apa/policy/{name}"]) for step in trainer.run_state.iteration.record.optimizer_steps]
        assert reported[0] == pytest.approx(0.0, abs=1e-6)
        assert reported[1] == pytest.approx(float(expected), rel=1e-3) and abs(expected) > 1e-5


def test_a_mini_batch_with_an_exploding_ratio_is_skipped_with_a_warning(tmp_path):
    trainer = tiny_trainer(tmp_path, loss_type="ppo", ratio_threshold=0.5)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.warns(UserWarning, match=r"mean ratio 1\.00 exceeds .*0\.5"):
        stats = trainer.step(*tiny_rollouts())
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert stats["apa/policy/skipped"] == 1.0
    assert trainer.state.global_step == 0
    assert tiny_trainer(tmp_path, loss_type="ppo").step(*tiny_rollouts())["apa/policy/skipped"] == 0.0


def test_classics_other_options_are_accepted_and_those_without_effect_say_so():
    made = config(exp_name="run7", task_name="t", model_name="m", query_dataset="q", reward_model="r")
    assert (made.run_name, made.model_name) == ("run7", "m")
    assert config(max_grad_norm=None).max_grad_norm == 0.0
    assert config(optimize_cuda_cache=True).torch_empty_cache_steps == 1
    with pytest.warns(FutureWarning, match="use mini_batch_size"):
        assert config(forward_batch_size=4).mini_batch_size == 4
    for name, value in {"accelerator_kwargs": {"a": 1}, "dataset_num_proc": 2}.items():
        with pytest.warns(UserWarning, match=f"{name}=.* has no effect: "):
            config(**{name: value})
    assert config(use_score_norm=True).center_rewards


def test_json_options_parse_from_a_command_line():
    parser = HfArgumentParser(PPOConfig)
    line = ["--output_dir", "x", "--use_cpu", "True", "--accelerator_kwargs", json.dumps({"a": {"b": 1}})]
    with pytest.warns(UserWarning, match="accelerator_kwargs"):
        (made,) = parser.parse_args_into_dataclasses(line)
    assert made.accelerator_kwargs == {"a": {"b": 1}}


def test_the_policy_with_the_best_scores_yet_is_pushed_before_it_is_updated(tmp_path, monkeypatch):
    options = {"push_to_hub_if_best_kwargs": '{"repo_id": "me/best", "private": true}', "compare_steps": 2}
    trainer, pushed = tiny_trainer(tmp_path, **options), []
    monkeypatch.setattr(trainer, "push_to_hub", lambda **kwargs: pushed.append((trainer.num_iterations_done, kwargs)))
    queries, responses, _ = tiny_rollouts()
    for score in (1.0, 5.0, 0.5, 9.0, 1.5):
        trainer.step(queries, responses, [torch.tensor(score)] * 4)
    # Calls 0, 2 and 4 are looked at: 1.0 is the first, 0.5 is lower, 1.5 higher.
    assert pushed == [(0, {"repo_id": "me/best", "private": True}), (4, {"repo_id": "me/best", "private": True})]
    with pytest.raises(ValueError, match=r"push_to_hub_if_best_kwargs has .*it should have a repo_id"):
        config(push_to_hub_if_best_kwargs={"private": True})


@pytest.mark.parametrize(("option", "value"), [("target_kl", 0.0), ("ratio_threshold", -1.0)])
def test_thresholds_are_positive(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        config(loss_type="ppo", **{option: value})
