"""What surrounds the update: statistics, reward shaping, controllers, optimizers, data, trackers, the hub."""

import math

import datasets
import numpy as np
import pytest
import torch
from transformers import get_constant_schedule_with_warmup

from tests.tiny import EOS, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.algorithms.kl import AdaptiveKLController, FixedKLController
from trl_apa.trainer.preparation import rewards_of_tokens


EXPECTED = {
    "objective/kl",
    "objective/kl_per_token",
    "objective/kl_k3",
    "objective/kl_k3_per_token",
    "objective/kl_coef",
    "objective/entropy",
    "apa/policy/entropy",
    "apa/policy/advantages_mean",
    "apa/policy/approxkl",
    "apa/policy/policykl",
    "apa/policy/ratio",
    "apa/mean_scores",
    "apa/std_scores",
    "apa/mean_non_score_reward",
    "apa/loss/policy",
    "apa/loss/value",
    "apa/loss/total",
    "apa/returns/mean",
    "apa/returns/var",
    "apa/val/vpred",
    "apa/val/error",
    "apa/val/clipfrac",
    "apa/val/mean",
    "apa/val/var",
    "apa/val/var_explained",
    "apa/grad_norm/policy",
    "apa/grad_norm/value",
    "apa/grad_norm/total",
    "apa/learning_rate",
    "apa/epochs",
    "tokens/queries_len_mean",
    "tokens/queries_len_std",
    "tokens/responses_len_mean",
    "tokens/responses_len_std",
    "tokens/eos_share",
    "tokens/counted",
    "time/apa/forward_pass",
    "time/apa/compute_rewards",
    "time/apa/compute_advantages",
    "time/apa/optimize_step",
    "time/apa/calc_stats",
    "time/apa/total",
    "time/apa/tokens_per_second",
}
OF_LOSS = {
    "apa": {
        f"apa/policy/{name}"
        for name in ("residual", "residual_sq", "target_sq", "unexplained", "log_ratio", "log_normalizer")
    },
    "awr": {f"apa/policy/{name}" for name in ("weight", "weight_sq", "log_normalizer")},
    "ppo": {f"apa/policy/{name}" for name in ("clipfrac", "skipped")},
}
ARRAYS = {
    "objective/kl_dist",
    "objective/logprobs",
    "objective/ref_logprobs",
    "apa/policy/advantages",
    "tokens/queries_dist",
    "tokens/responses_dist",
}


@pytest.mark.parametrize("loss_type", ["apa", "awr", "ppo"])
def test_statistics_are_a_flat_dict_of_finite_floats_and_arrays(tmp_path, loss_type):
    stats = tiny_trainer(tmp_path, loss_type=loss_type).step(*tiny_rollouts())
    classic = {name.replace("ppo/", "apa/") for name in stats if "ppo/" in name}
    own = {name for name in stats if "ppo/" not in name}
    assert own == EXPECTED | OF_LOSS[loss_type] | ARRAYS
    assert classic == {name for name in own if "apa/" in name} | {"apa/policy/clipfrac"}
    arrays = {name: value for name, value in stats.items() if isinstance(value, np.ndarray)}
    assert {name.replace("ppo/", "apa/") for name in arrays} == ARRAYS
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert all(type(stats[name]) is float and math.isfinite(stats[name]) for name in stats.keys() - arrays.keys())


def test_statistics_by_hand(tmp_path):
    """Two responses of 1 and 3 tokens, scores 1 and 3, a value model that says 0, gamma = gae_lambda = 1.

    Returns are 1 | 3 3 3: mean 2.5, unbiased variance (2.25 + 3 * 0.25) / 3 = 1. The value loss is 0.5 * (1 + 9 + 9 +
    9) / 4 = 3.5 and the error 7, seven times the variance.
    """
    trainer = tiny_trainer(tmp_path, batch_size=2, mini_batch_size=2, gae_lambda=1.0)
    queries = [torch.tensor([2, 3]), torch.tensor([4, 5, 6, 7])]
    responses = [torch.tensor([8]), torch.tensor([9, 10, EOS])]
    stats = trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(3)])
    expected = {
        "apa/mean_scores": 2.0,
        "apa/std_scores": math.sqrt(2.0),
        "apa/returns/mean": 2.5,
        "apa/returns/var": 1.0,
        "apa/val/mean": 0.0,
        "apa/val/var_explained": -6.0,
        "apa/val/error": 7.0,
        "apa/loss/value": 3.5,
        "apa/policy/advantages_mean": 0.0,
        "tokens/queries_len_mean": 3.0,
        "tokens/queries_len_std": math.sqrt(2.0),
        "tokens/responses_len_mean": 2.0,
        "tokens/responses_len_std": math.sqrt(2.0),
        "tokens/eos_share": 0.5,
        "tokens/counted": 4.0,
        "objective/kl": 0.0,
        "objective/kl_coef": 0.1,
        "apa/mean_non_score_reward": 0.0,
    }
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, abs=1e-5), name
    # Whitened advantages are -1.5, 0.5, 0.5, 0.5 and pi = pi_init, so the residual is -A/0.1: mean square 100 * 0.75.
    assert stats["apa/loss/policy"] == pytest.approx(75.0, rel=1e-5)
    log_mean = math.log((math.exp(-15) + 3 * math.exp(5)) / 4)
    assert stats["apa/policy/log_normalizer"] == pytest.approx(log_mean, rel=1e-5)
    assert stats["apa/loss/total"] == pytest.approx(stats["apa/loss/policy"] + 3.5, rel=1e-6)
    assert stats["apa/policy/advantages"] == pytest.approx([-1.5, 0.5, 0.5, 0.5], abs=1e-5)
    assert stats["tokens/queries_dist"].tolist() == [2, 4]
    assert stats["tokens/responses_dist"].tolist() == [1, 3]
    assert stats["objective/kl_dist"] == pytest.approx([0.0, 0.0], abs=1e-5)
    # 0 behind the shorter response, so that the sums along the rows are the log-probs of the responses.
    logprobs_BR = stats["objective/logprobs"]
    assert logprobs_BR.shape == (2, 3) and logprobs_BR.dtype == np.float32
    assert ((logprobs_BR != 0) == [[True, False, False], [True, True, True]]).all()
    assert -logprobs_BR.sum(axis=1).mean() == pytest.approx(stats["objective/entropy"], rel=1e-5)
    assert stats["objective/ref_logprobs"] == pytest.approx(logprobs_BR, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
def test_arrays_are_what_the_means_are_taken_of(tmp_path, loss_type):
    """After two steps, when the policy is no longer pi_init."""
    trainer = tiny_trainer(tmp_path, loss_type=loss_type, mini_batch_size=2)
    trainer.step(*tiny_rollouts())
    stats = trainer.step(*tiny_rollouts())
    log_ratio_BR = stats["objective/logprobs"] - stats["objective/ref_logprobs"]
    assert np.abs(log_ratio_BR).max() > 0.01
    assert stats["objective/kl_dist"] == pytest.approx(log_ratio_BR.sum(axis=1), abs=1e-5)
    assert stats["objective/kl_dist"].mean() == pytest.approx(stats["objective/kl"], abs=1e-5)
    assert stats["apa/policy/advantages"].mean() == pytest.approx(stats["apa/policy/advantages_mean"], abs=1e-6)
    for name in ("queries", "responses"):
        assert stats[f"tokens/{name}_dist"].mean() == stats[f"tokens/{name}_len_mean"]
        assert stats[f"tokens/{name}_dist"].std(ddof=1) == pytest.approx(stats[f"tokens/{name}_len_std"])
    assert len(stats["apa/policy/advantages"]) == stats["tokens/counted"]


def test_masked_tokens_are_in_no_statistic(tmp_path):
    """A tool's text in the middle: what it says changes nothing that is reported of the tokens before it."""
    seen = []
    for tool_text in ([8, 9], [20, 21]):
        trainer = tiny_trainer(tmp_path, batch_size=2, mini_batch_size=2, learning_rate=1e-9)
        responses = [torch.tensor([5, 6, *tool_text]), torch.tensor([7, 5, *tool_text])]
        masks = [torch.tensor([1, 1, 0, 0])] * 2
        queries, scores = [torch.tensor([2, 3])] * 2, [torch.tensor(0.5), torch.tensor(-1.0)]
        seen.append(trainer.step(queries, responses, scores, masks))
        assert seen[-1]["tokens/counted"] == 4
        assert seen[-1]["tokens/responses_len_mean"] == 2
    for name, value in seen[0].items():
        if not name.startswith("time/"):
            assert seen[1][name] == pytest.approx(value, abs=1e-6), name


def shaped_rewards(trainer, rollouts):
    collected, ended_B = trainer._collect(*rollouts, None)
    trainer._prepare_for_updates()
    trainer._evaluate_rollouts(collected)
    return rewards_of_tokens(collected, ended_B, trainer.args, trainer.run_state).sum(dim=1)


def test_missing_eos_penalty_scaling_and_clipping_shape_the_score_in_that_order(tmp_path):
    """Rows 1 and 3 end with EOS. Scores 4, 4, 0, 0 less 1 for rows 0 and 2: 3, 4, -1, 0; unbiased std sqrt(17/3)."""
    queries, responses, _ = tiny_rollouts()
    scores = [torch.tensor(s) for s in (4.0, 4.0, 0.0, 0.0)]
    options = {"missing_eos_penalty": 1.0}
    rewards_B = shaped_rewards(tiny_trainer(tmp_path, **options), (queries, responses, scores))
    assert rewards_B.tolist() == [3.0, 4.0, -1.0, 0.0]
    options |= {"scale_rewards": True, "score_clip": 1.5}
    std = math.sqrt(17 / 3)
    rewards_B = shaped_rewards(tiny_trainer(tmp_path, **options), (queries, responses, scores))
    assert rewards_B.tolist() == pytest.approx([3 / std, 1.5, -1 / std, 0.0], rel=1e-5)
    options |= {"center_rewards": True, "score_clip": 100.0}
    rewards_B = shaped_rewards(tiny_trainer(tmp_path, **options), (queries, responses, scores))
    assert rewards_B.tolist() == pytest.approx([1.5 / std, 2.5 / std, -2.5 / std, -1.5 / std], rel=1e-5)


def test_the_kl_controllers(tmp_path):
    trainer = tiny_trainer(tmp_path, loss_type="ppo", init_kl_coef=0.2, target=6.0, horizon=100.0)
    assert isinstance(trainer.kl_ctl, AdaptiveKLController)
    stats = trainer.step(*tiny_rollouts())
    # KL 0 is far below the target: the error is clipped to -0.2, and four responses of a horizon of 100 have passed.
    assert stats["objective/kl_coef"] == pytest.approx(0.2)
    assert trainer.kl_ctl.value == pytest.approx(0.2 * (1 - 0.2 * 4 / 100))
    for options in ({"loss_type": "ppo", "adap_kl_ctrl": False}, {"loss_type": "apa"}, {"loss_type": "awr"}):
        trainer = tiny_trainer(tmp_path, **options)
        assert isinstance(trainer.kl_ctl, FixedKLController)
        trainer.step(*tiny_rollouts())
        assert trainer.kl_ctl.value == trainer.config.kl_coef


def test_the_reported_penalty_is_the_kl_part_of_the_reward_whatever_shapes_the_score(tmp_path):
    """First 0, the policy being pi_init; then what the token rewards hold beside the shaped scores."""
    options = {
        "loss_type": "ppo",
        "init_kl_coef": 0.3,
        "missing_eos_penalty": 1.0,
        "scale_rewards": True,
        "score_clip": 0.1,
    }
    trainer = tiny_trainer(tmp_path, **options)
    assert trainer.step(*tiny_rollouts())["apa/mean_non_score_reward"] == pytest.approx(0.0, abs=1e-6)
    value = trainer.kl_ctl.value
    stats = trainer.step(*tiny_rollouts())
    assert stats["apa/mean_non_score_reward"] == pytest.approx(-value * stats["objective/kl_per_token"], rel=1e-4)
    assert abs(stats["apa/mean_non_score_reward"]) > 1e-4


def test_gradients_that_somebody_left_do_not_reach_the_next_step(tmp_path):
    """As an interrupted train() may."""
    clean, dirty = tiny_trainer(tmp_path), tiny_trainer(tmp_path)
    for parameter in dirty.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    stats = [trainer.step(*tiny_rollouts())["apa/grad_norm/total"] for trainer in (clean, dirty)]
    assert stats[0] == stats[1]


def test_a_step_that_fails_halfway_leaves_nothing_in_the_next_one(tmp_path):
    """Out of memory in the second micro-batch, say: neither its gradients nor its scores stay."""
    options = {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "scale_rewards": True}
    expected = tiny_trainer(tmp_path, **options)
    expected.step(*tiny_rollouts())
    trainer = tiny_trainer(tmp_path, **options)
    training_step, calls = trainer.training_step, []

    def fail_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("device is full")
        return training_step(*args, **kwargs)

    trainer.training_step = fail_at_the_second
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step(*tiny_rollouts())
    trainer.step(*tiny_rollouts())
    assert trainer.running_scores.state_dict() == expected.running_scores.state_dict()
    parameters = dict(trainer.model.named_parameters())
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(parameters[name], parameter)


def test_bfloat16_autocast_trains_with_float32_values_and_logprobs(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model(scale=1.0), bf16=True)
    torch.nn.init.normal_(trainer.model.value_model.head.out.weight)
    stats = trainer.step(*tiny_rollouts())
    assert abs(stats["objective/kl"]) < 1e-4
    plain = tiny_trainer(tmp_path, tiny_model(scale=1.0))
    queries, responses, scores = tiny_rollouts()
    batch = trainer._collect(queries, responses, scores, None)[0].micro_batch(range(4), 0)
    seen = []
    trainer.model.value_model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        outputs = trainer.model_wrapped(**trainer._model_inputs(batch))
        exact = plain.model(**plain._model_inputs(batch))
    assert seen == [torch.float32] and outputs["logprobs"].dtype == torch.float32
    assert all(np.isfinite(value).all() for value in stats.values())
    mask = batch["response_mask"]
    assert float((outputs["logprobs"] - exact["logprobs"])[mask].abs().max()) < 0.5
    assert len(trainer.generate(queries, return_prompt=False, max_new_tokens=3)) == 4


@pytest.mark.parametrize(
    ("options", "generated", "elsewhere"),
    [({}, 1, 2), ({"exact_kl": False}, 1, 1), ({"loss_type": "awr"}, 1, 2), ({"loss_type": "ppo"}, 2, 2)],
)
def test_only_responses_from_elsewhere_and_ppo_need_a_forward_of_the_old_policy(
    tmp_path, options, generated, elsewhere
):
    """Forward passes of the policy in one step of one epoch: the update's own, and one more."""
    trainer = tiny_trainer(tmp_path, **options, max_completion_length=7)
    queries, responses, scores = tiny_rollouts()
    for given, expected in ((trainer.generate(queries, return_prompt=False), generated), (responses, elsewhere)):
        calls = []
        handle = trainer.model.policy.base_model.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        trainer.step(queries, given, scores)
        handle.remove()
        assert len(calls) == expected


def test_the_number_of_optimizer_steps_and_the_schedule(tmp_path):
    """2 epochs of 8 rollouts in mini-batches of 2 x 2: four updates; the rate falls once a step, to 0 after four."""
    options = {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 2}
    trainer = tiny_trainer(tmp_path, lr_scheduler_type="linear", steps=32, learning_rate=1e-3, **options)
    rates = []
    for number in range(1, 5):
        rates.append(trainer.step(*tiny_rollouts(8))["apa/learning_rate"])
        assert trainer.state.global_step == 4 * number
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_a_callers_optimizer_and_scheduler_also_train_the_value_model(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=2)
    trainer = tiny_trainer(tmp_path, model, {"optimizer": optimizer, "lr_scheduler": scheduler})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    rates = [trainer.step(*tiny_rollouts())["apa/learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.0, 0.05, 0.1])
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("policy.") for name in moved)
    assert any(name.startswith("value_model.") for name in moved)


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_the_value_model_can_learn_at_its_own_rate(tmp_path, own_optimizer):
    model = tiny_model()
    kwargs = {"optimizer": torch.optim.SGD(model.parameters(), lr=1e-3)} if own_optimizer else {}
    trainer = tiny_trainer(tmp_path, model, kwargs, learning_rate=1e-3, value_learning_rate=5e-2)
    trainer.step(*tiny_rollouts())
    rate_of = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rate_of[id(p)] for p in trainer.model.value_model.parameters()} == {5e-2}
    assert {rate_of[id(p)] for p in trainer.model.policy.parameters()} == {1e-3}


def test_a_scheduler_of_the_callers_and_a_value_rate_exclude_each_other(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=2)
    kwargs = {"optimizer": optimizer, "lr_scheduler": scheduler}
    with pytest.raises(ValueError, match="value_learning_rate"):
        tiny_trainer(tmp_path, model, kwargs, value_learning_rate=1e-2)


def dataset(num_rows=10):
    rows = [{"input_ids": list(range(2, 3 + i)), "query": f"q{i}", "unused": i} for i in range(num_rows)]
    return datasets.Dataset.from_list(rows)


def test_the_dataloader_is_shuffled_by_the_seed_and_drops_what_nobody_reads(tmp_path):
    def batches(**options):
        trainer = APATrainer(tiny_config(tmp_path, **options), tiny_model(), None, tiny_tokenizer(), dataset())
        return list(trainer.dataloader)

    first = batches()
    assert [len(batch["query"]) for batch in first] == [4, 4]
    assert first[0].keys() == {"input_ids", "query"}
    assert all(isinstance(ids, torch.Tensor) and ids.dim() == 1 for ids in first[0]["input_ids"])
    assert [batch["query"] for batch in batches()] == [batch["query"] for batch in first]
    assert [batch["query"] for batch in batches(seed=7)] != [batch["query"] for batch in first]
    assert "unused" in batches(remove_unused_columns=False)[0]
    assert tiny_trainer(tmp_path).dataloader is None


def test_a_callers_collator_is_used(tmp_path):
    def collator(rows):
        return {"texts": [row["query"].upper() for row in rows]}

    trainer = APATrainer(
        tiny_config(tmp_path), tiny_model(), None, tiny_tokenizer(), dataset(), data_collator=collator
    )
    assert all(text.startswith("Q") for text in next(iter(trainer.dataloader))["texts"])


def test_the_readme_loop_runs(tmp_path):
    trainer = APATrainer(tiny_config(tmp_path), tiny_model(), tokenizer=tiny_tokenizer(), dataset=dataset())
    for batch in trainer.dataloader:
        responses = trainer.generate(batch["input_ids"], return_prompt=False, max_new_tokens=5)
        batch["response"] = trainer.tokenizer.batch_decode(responses)
        scores = [torch.tensor(float(len(text))) for text in batch["response"]]
        stats = trainer.step(batch["input_ids"], responses, scores)
        trainer.log_stats(stats, batch, scores)
    assert len(trainer.state.log_history) == 2


def test_a_model_card_is_written_where_the_caller_says(tmp_path):
    trainer = tiny_trainer(tmp_path / "out")
    trainer.create_model_card(tmp_path / "new" / "folder", model_name="aligned")
    card = (tmp_path / "new" / "folder" / "README.md").read_text()
    assert "2306.02231" in card and "aligned" in card
    assert trainer.args.output_dir == str(tmp_path / "out")


def test_no_dataset_is_worth_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="no dataset: dataloader is None, and step takes lists of .* = 4"):
        tiny_trainer(tmp_path)


def test_push_to_hub_uploads_policy_value_model_and_card(tmp_path, monkeypatch):
    uploaded = {}

    class Repo:
        repo_id = "me/aligned"

    class Api:
        def create_repo(self, repo_id, **kwargs):
            uploaded["repo"] = repo_id
            return Repo()

        def upload_folder(self, **kwargs):
            uploaded.update(kwargs)
            return "done"

    # Newer transformers ask a client for these, older ones import them as functions.
    monkeypatch.setattr("transformers.trainer.hf_api", Api, raising=False)
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(f"transformers.trainer.{name}", getattr(Api(), name), raising=False)
    trainer = tiny_trainer(tmp_path / "out")
    assert trainer.push_to_hub("me/aligned") == "done"
    assert (uploaded["repo"], uploaded["repo_id"]) == ("me/aligned", "me/aligned")
    assert uploaded["folder_path"] == str(tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"model.safetensors", "README.md", "value_model/value_head.safetensors", "tokenizer.json"} <= files
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2306.02231" in card and "Advantage-Induced Policy Alignment" in card


def test_no_telemetry_is_sent(tmp_path, monkeypatch):
    def sent(*args, **kwargs):
        raise AssertionError("telemetry")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", sent)
    tiny_trainer(tmp_path)
