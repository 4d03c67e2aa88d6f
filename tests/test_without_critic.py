"""`advantage_estimator`: advantages without a value model, in `step` and `train`, and what is refused or warns."""

import copy
import dataclasses
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.test_advantages import naive_baselines
from tests.test_docs import extension
from tests.test_training import PROMPTS, StopAt, logged, parameters, trainer_for
from tests.test_update import SPLITS, assert_same, row_logprobs
from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer, AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl_apa.algorithms.estimators import ESTIMATORS, AdvantageEstimator
from trl_apa.rollout import shared_prompts
from trl_apa.rollout.batch import Layout, Rollouts
from trl_apa.trainer.checkpoints import problem_with
from trl_apa.trainer.statistics import equal_scores_share


WITHOUT_VALUES = ("group", "leave_one_out", "batch")
HERE = "tests.test_without_critic"


def grouped_rollouts(seed=0):
    """Eight rollouts of three prompts: four, two and two responses, not side by side."""
    queries, responses, scores = tiny_rollouts(8, seed)
    return [queries[number] for number in (0, 1, 0, 2, 0, 1, 2, 0)], responses, scores


def learner(tmp_path, model=None, trainer_kwargs=None, **config):
    """Its updates are linear in the gradient; a group's baseline, the same in each test."""
    options = {"optim": "sgd", "learning_rate": 0.1, "batch_size": 8, "mini_batch_size": 8, **config}
    return tiny_trainer(tmp_path, model, trainer_kwargs, **{"advantage_estimator": "group", **options})


def plain_step(policy, config, queries, responses, scores, masks=None):
    """One full-batch update per epoch, row by row, with baselines of a slow loop and torch's SGD."""
    masks = [[True] * len(r) for r in responses] if masks is None else [m.bool().tolist() for m in masks]
    kind = "std" if config.group_normalization == "std" else config.advantage_estimator
    keys = [tuple(query.tolist()) for query in queries]
    advantages = naive_baselines([[float(s)] for s in scores], [[True]] * len(scores), keys, kind)[:, 0].tolist()
    flat = torch.tensor([a for a, mask in zip(advantages, masks, strict=True) for kept in mask if kept])
    if config.whiten_advantages:
        advantages = [(a - flat.mean()) / (flat.var() + 1e-8).sqrt() for a in advantages]
    reference, optimizer = copy.deepcopy(policy), torch.optim.SGD(policy.parameters(), lr=config.learning_rate)
    for _ in range(config.num_epochs_per_batch):
        loss = 0.0
        for query, response, mask, advantage in zip(queries, responses, masks, advantages, strict=True):
            kept = torch.tensor(mask)
            logprobs = row_logprobs(policy, query, response, 1.0)[kept]
            log_ratio = logprobs - row_logprobs(reference, query, response, 1.0)[kept].detach()
            if config.loss_type == "apa":
                terms = (log_ratio - advantage / config.kl_coef) ** 2
            elif config.loss_type == "awr":
                terms = -torch.exp(torch.as_tensor(advantage / config.kl_coef)) * logprobs
            else:  # the first rollouts are those of pi_init, so that PPO's penalty is 0
                ratio = log_ratio.exp()
                terms = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            loss = loss + terms.sum()
        (loss / len(flat)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


CASES = [
    *[(loss_type, name, "llama", {}) for loss_type in ("apa", "awr", "ppo") for name in WITHOUT_VALUES],
    ("apa", "group", "t5", {}),
    ("apa", "group", "gpt2", {"group_normalization": "std", "whiten_advantages": False}),
]


@pytest.mark.parametrize(("loss_type", "name", "family", "more"), CASES)
def test_step_equals_a_plain_autograd_script_of_the_formulas(tmp_path, loss_type, name, family, more):
    split = {"mini_batch_size": 2, "gradient_accumulation_steps": 4, "ppo_epochs": 2}
    options = {"loss_type": loss_type, "advantage_estimator": name, **split, **more}
    trainer = learner(tmp_path, tiny_model(family, dtype=torch.float64), **options)
    policy = copy.deepcopy(trainer.model.policy)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer.step(*grouped_rollouts())
    plain_step(policy, trainer.config, *grouped_rollouts())
    expected = {name: p.detach() for name, p in policy.named_parameters()}
    assert max(float((expected[name] - before[name]).abs().max()) for name in before) > 1e-3
    assert_same({name: p.detach() for name, p in trainer.model.policy.named_parameters()}, expected, tolerance=1e-8)


def test_masked_tokens_change_neither_the_group_nor_the_loss(tmp_path):
    trainer = learner(tmp_path, tiny_model(dtype=torch.float64))
    policy = copy.deepcopy(trainer.model.policy)
    queries, _, scores = grouped_rollouts()
    responses = [torch.arange(2, 7) + i for i in range(8)]
    masks = [torch.tensor([1, 0, 0, 1, 1]), torch.tensor([0, 1, 0, 1, 0])] * 4
    trainer.step(queries, responses, scores, masks)
    plain_step(policy, trainer.config, queries, responses, scores, masks)
    expected = {name: p.detach() for name, p in policy.named_parameters()}
    assert_same({name: p.detach() for name, p in trainer.model.policy.named_parameters()}, expected, tolerance=1e-8)


@pytest.mark.parametrize("name", WITHOUT_VALUES)
def test_split_row_order_and_layout_do_not_matter(tmp_path, name):
    """Micro-batches of any size; rows in another order; padded, packed, and with a common prompt read once."""
    rollouts = grouped_rollouts()
    trainers = [learner(tmp_path, advantage_estimator=name, ppo_epochs=2, **split) for split in SPLITS]
    results = [(parameters(trainer), trainer.step(*rollouts)) for trainer in trainers]
    results = [(parameters(trainer), stats) for trainer, (_, stats) in zip(trainers, results, strict=True)]
    for weights, stats in results[1:]:
        assert_same(weights, results[0][0])
        for statistic in stats:
            if not statistic.startswith("time/"):
                expected = pytest.approx(results[0][1][statistic], rel=2e-4, abs=2e-5)
                assert stats[statistic] == expected, statistic
    seen = []

    def noting(self, rows, pad_token_id, layout, original=Rollouts.micro_batch):
        seen.append(layout)
        return original(self, rows, pad_token_id, layout)

    def after(order=range(8), **options):
        trainer = learner(tmp_path, advantage_estimator=name, mini_batch_size=8, ppo_epochs=2, **options)
        trainer.step(*[[column[row] for row in order] for column in rollouts])
        return parameters(trainer)

    assert_same(after([5, 2, 7, 0, 3, 1, 6, 4]), results[0][0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "micro_batch", noting)
        assert_same(after(padding_free=False), results[0][0])
        patch.setattr(shared_prompts, "SHORTEST", 1)
        patch.setattr(shared_prompts, "SMALLEST_SHARE", 0.0)
        assert_same(after(shuffle="groups"), results[0][0])
    assert {Layout.PADDED, Layout.SHARED} <= set(seen)


@pytest.mark.parametrize("lora", [False, True])
def test_there_is_no_value_model_anywhere(tmp_path, lora):
    """Not in the module, the optimizer, the passes, the statistics or the saved folder, which plain libraries load."""
    options = {"value_max_grad_norm": 0.5, "gradient_checkpointing": True, "exact_kl": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = learner(tmp_path, trainer_kwargs={"peft_config": lora_config()} if lora else None, **options)
    passes = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(kwargs), with_kwargs=True)
    stats = trainer.step(*grouped_rollouts())
    module = trainer.model
    assert module.value_model is None and list(module.networks()) == [module.policy]
    assert module.trainable_parameters()["value"] == []
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.policy.parameters() if p.requires_grad}
    gradients = [call for call in passes if "with_entropy" in call]
    # One pass for the update; with LoRA one more for pi_init, the base; none for values.
    assert len(gradients) == 1 and len(passes) == 1 + lora
    assert [name for name in stats if "/val/" in name or "returns" in name or name.endswith("/value")] == []
    assert stats["apa/loss/total"] == stats["apa/loss/policy"] == pytest.approx(stats["apa/policy/residual_sq"])
    assert stats["apa/grad_norm/total"] == pytest.approx(stats["apa/grad_norm/policy"])
    trainer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "value_model").exists()
    queries, responses, _ = grouped_rollouts()
    with torch.no_grad():
        answer = module.policy(torch.cat([queries[0], responses[0]])[None]).logits
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved") if lora else None
        loaded = loaded or AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(loaded(torch.cat([queries[0], responses[0]])[None]).logits, answer)


def test_ppo_and_early_stopping_still_read_the_old_policy_and_apa_reads_nothing_more(tmp_path):
    for options, count in (({"loss_type": "ppo"}, 2), ({"early_stopping": True}, 2), ({}, 1)):
        trainer, passes = learner(tmp_path, exact_kl=False, **options), []
        trainer.model.register_forward_pre_hook(lambda *given, passes=passes: passes.append(given))
        trainer.step(*grouped_rollouts())
        assert len(passes) == count, options


def test_the_kl_that_ppo_charges_token_by_token_counts_as_a_sum(tmp_path):
    """RLOO's reward: the score less beta times the log-ratio of the response, compared within the prompt."""
    trainer = learner(tmp_path, loss_type="ppo", kl_coef=0.5, whiten_advantages=False, adap_kl_ctrl=False)
    queries, responses, scores = grouped_rollouts()
    trainer.step(*grouped_rollouts(seed=1))
    stats = trainer.step(queries, responses, scores)
    kl_B = torch.tensor(stats["objective/kl_dist"])
    assert float(kl_B.abs().max()) > 0.01
    keys = [tuple(query.tolist()) for query in queries]
    rewards = [[float(score) - 0.5 * float(kl)] for score, kl in zip(scores, kl_B, strict=True)]
    expected = naive_baselines(rewards, [[True]] * 8, keys, "group")[:, 0]
    lengths = torch.tensor([len(response) for response in responses])
    torch.testing.assert_close(
        torch.tensor(stats["apa/policy/advantages"]).double(),
        expected.repeat_interleave(lengths),
        atol=1e-5,
        rtol=1e-5,
    )


def run(tmp_path, **options):
    defaults = {"advantage_estimator": "group", "num_generations": 2, "max_steps": 4}
    return trainer_for(tmp_path, **{**defaults, **options})


@pytest.mark.parametrize(
    ("name", "loss_type", "stop"), [("group", "apa", 3), ("leave_one_out", "ppo", 4), ("batch", "apa", 3)]
)
def test_a_run_resumes_from_any_optimizer_step_as_if_it_had_not_stopped(tmp_path, name, loss_type, stop):
    """In the middle of an iteration too, with accumulation; its checkpoints are complete without a value model."""
    options = {"advantage_estimator": name, "loss_type": loss_type, "save_strategy": "steps", "save_steps": 1}
    options |= {"mini_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6}
    unbroken = run(tmp_path / "unbroken", **options)
    unbroken.train()
    folder = tmp_path / "stopped"
    run(folder, callbacks=[StopAt(stop)], **options).train()
    assert problem_with(folder / f"checkpoint-{stop}") is None
    assert not (folder / f"checkpoint-{stop}" / "value_model").exists()
    resumed = run(folder, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed), parameters(unbroken), tolerance=1e-12)
    assert logged(resumed, "train_loss")[:-1] == logged(unbroken, "train_loss")[:-1]


@pytest.mark.parametrize(("then", "now"), [("group", "leave_one_out"), ("batch", "group"), ("gae", "group")])
def test_a_checkpoint_of_another_estimator_is_refused_by_name(tmp_path, then, now):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run(tmp_path, advantage_estimator=then, callbacks=[StopAt(1)], **options).train()
    with pytest.raises(ValueError, match=f"advantage_estimator was '{then}', is '{now}'"):
        run(tmp_path, advantage_estimator=now, **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_lost_its_value_model_is_still_incomplete(tmp_path):
    run(tmp_path, advantage_estimator="gae", save_strategy="steps", save_steps=2, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    for file in (folder / "value_model").iterdir():
        file.unlink()
    assert "value_model/" in problem_with(folder)


@pytest.mark.parametrize("name", ["group", *(pytest.param(n, marks=pytest.mark.slow) for n in WITHOUT_VALUES[1:])])
def test_a_run_learns_without_a_critic(tmp_path, name):
    """Reward 1 for every 'w5'; the same task as with GAE, `test_ten_steps_raise_the_rewarded_token`."""
    trainer = learner(
        tmp_path,
        tiny_model(scale=1.0),
        **{"advantage_estimator": name, "batch_size": 16, "mini_batch_size": 8, "ppo_epochs": 2},
        **{"optim": "adamw_torch", "learning_rate": 1e-2},
    )
    queries, shares = [torch.tensor([2, 3]), torch.tensor([4])] * 8, []
    for _ in range(12):
        responses = trainer.generate(queries, return_prompt=False, batch_size=16, max_new_tokens=8)
        scores = [(response == 5).float().mean() for response in responses]
        shares.append(float(torch.stack(scores).mean()))
        trainer.step(queries, responses, scores)
    assert sum(shares[-3:]) / 3 > 0.3 > 0.15 > shares[0]


def test_in_train_a_prompt_that_the_data_repeats_is_one_group_as_in_step(tmp_path):
    """Eight rows of two prompts and two answers each: two groups of four, whatever the rows' order."""
    trainer = run(tmp_path, dataset=[PROMPTS[0], PROMPTS[1]] * 2, batch_size=8, max_steps=1, whiten_advantages=False)
    kept, prepare = [], trainer._prepare_iteration
    trainer._prepare_iteration = lambda rollouts, *rest: (prepare(rollouts, *rest), kept.append(rollouts))
    trainer.train()
    (rollouts,) = kept
    keys = [tuple(query.tolist()) for query in rollouts.queries]
    assert sorted(keys.count(key) for key in set(keys)) == [4, 4]
    rewards = [[float(score)] for score in rollouts.scores_B]
    expected = naive_baselines(rewards, [[True]] * 8, keys, "group")[:, 0].float()
    torch.testing.assert_close(rollouts.advantages_BR[:, 0], expected)


def half_unscored(completions, **kwargs):
    return [None if row % 2 else float(len(text)) for row, text in enumerate(completions)]


def test_a_response_that_was_not_scored_is_no_member_of_its_group(tmp_path):
    """One of two answers is left: it has no baseline, and its advantage is 0."""
    trainer = run(tmp_path, reward_funcs=half_unscored, skip_unscored=True, max_steps=2, ppo_epochs=1)
    kept, prepare = [], trainer._prepare_iteration
    trainer._prepare_iteration = lambda rollouts, *rest: (prepare(rollouts, *rest), kept.append(rollouts))
    trainer.train()
    assert kept and all(bool((rollouts.advantages_BR == 0).all()) for rollouts in kept)
    assert not any(bool(rollouts.response_mask_BR[1::2].any()) for rollouts in kept)


# ---- refused, or told ----


def test_prompts_whose_responses_have_equal_scores_are_counted(tmp_path):
    """Of scores as they enter the rewards: clipping can make them equal; responses that were left out do not count."""
    scores = torch.tensor([1.0, -2.0, 1.0, 3.0, 1.0, -2.5, 5.0, 1.0])  # of prompts 0, 1, 0, 2, 0, 1, 2, 0
    queries, responses, _ = grouped_rollouts()
    for clip, expected in ((None, 1 / 3), (2.0, 1.0), (4.0, 1 / 3), (3.0, 2 / 3)):
        trainer = learner(tmp_path, score_clip=clip)
        assert trainer.step(queries, responses, list(scores))["apa/equal_scores_share"] == pytest.approx(expected)
    assert equal_scores_share(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([-7, -7, 3])) == 1.0
    assert equal_scores_share(torch.tensor([0.0, -1e-9, 1.0]), torch.tensor([-7, -7, 3])) == 0.5
    by_batch = learner(tmp_path, advantage_estimator="batch")
    assert "apa/equal_scores_share" not in by_batch.step(queries, responses, list(scores))


def test_a_prompt_with_one_row_is_refused_by_name_before_any_pass(tmp_path):
    queries, responses, scores = grouped_rollouts()
    for name in ("group", "leave_one_out"):
        trainer, passes = learner(tmp_path, advantage_estimator=name), []
        trainer.model.register_forward_pre_hook(lambda *given, passes=passes: passes.append(given))
        before = parameters(trainer)
        lone = [*queries[:7], torch.tensor([9, 9, 9])]
        text = (
            r"queries has 4 different prompts in 8 rows, 1 of them in one row only \(the first: queries\[7\], "
            rf"'w9 w9 w9'\), but advantage_estimator='{name}' .* give step each query twice or more"
        )
        with pytest.raises(ValueError, match=text):
            trainer.step(lone, responses, scores)
        assert passes == [] and trainer.run_state.iteration is None
        assert_same(parameters(trainer), before, tolerance=1e-12)
        trainer.step(queries, responses, scores)
    learner(tmp_path, advantage_estimator="batch").step(lone, responses, scores)
    with pytest.raises(ValueError, match=r"num_generations=1, but advantage_estimator='group' compares"):
        run(tmp_path, num_generations=1).train()


@pytest.mark.parametrize(
    ("option", "name", "text"),
    [
        ({"vf_coef": 0.3}, "group", "there is no value model"),
        ({"cliprange_value": 0.3}, "batch", "there is no value model"),
        ({"value_learning_rate": 1e-3}, "leave_one_out", "there is no value model"),
        ({"value_max_grad_norm": 1.0}, "group", "there is no value model"),
        ({"gamma": 0.9}, "group", "only 'gae' reads it"),
        ({"lam": 0.9}, "batch", "only 'gae' reads it"),
        ({"group_normalization": "std"}, "leave_one_out", "only 'group' reads it"),
        ({"group_normalization": "none"}, "gae", "only 'group' reads it"),
    ],
)
def test_options_that_nothing_reads_warn(tmp_path, option, name, text):
    ((given, value),) = option.items()
    ours = {"lam": "gae_lambda"}.get(given, given)
    expected = f"{ours}={value!r} has no effect with advantage_estimator='{name}': {text}"
    with pytest.warns(UserWarning, match=expected):
        tiny_config(tmp_path, advantage_estimator=name, **option)
    later = tiny_config(tmp_path, advantage_estimator=name)
    with pytest.warns(UserWarning, match=expected):
        setattr(later, given, value)


@pytest.mark.parametrize("config", [tiny_config, lambda path, **kwargs: PPOConfig(output_dir=str(path), **kwargs)])
@pytest.mark.filterwarnings("error")
def test_defaults_do_not_warn_and_are_filled_in(tmp_path, config):
    for name in ESTIMATORS:
        made = config(tmp_path, advantage_estimator=name)
        assert made.group_normalization == ("none" if name == "group" else None)
        assert not made.reads("vf_coef") or name == "gae"
    changed = config(tmp_path, advantage_estimator="group")
    changed.group_normalization = "std"
    with pytest.raises(ValueError, match="advantage_estimator='gae' is set after the config was made"):
        changed.advantage_estimator = "gae"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"advantage_estimator": "rloo"},
            "it should be one of gae, group, leave_one_out, .*, quantile, optimal_value, or module:name of an ",
        ),
        ({"advantage_estimator": f"{HERE}:NOTHING"}, "cannot be imported"),
        (
            {"advantage_estimator": AdvantageEstimator(len)},
            "it should be one of gae, group, leave_one_out, group_log_mean_exp, batch, quantile, optimal_value, or ",
        ),
        (
            {"loss_type": ["apa"]},
            r"loss_type=\['apa'\]: it should be one of apa, awr, ppo, .* or module:name of an Algo",
        ),
        ({"advantage_estimator": f"{HERE}:HERE"}, "is a str: it should be an AdvantageEstimator"),
        ({"advantage_estimator": f"{HERE}:UNKNOWN_OPTION"}, r"has options \['beta'\]: it should have some of gamma, "),
        (
            {"group_normalization": "batch", "advantage_estimator": "group"},
            "group_normalization='batch': it should be",
        ),
        ({"scale_rewards": "group"}, "group_normalization='std' and 'none', with advantage_estimator='group'"),
    ],
)
def test_mistakes_are_named(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        tiny_config(tmp_path, **options)


UNKNOWN_OPTION = AdvantageEstimator(lambda rows, args: (rows.rewards_BR, None), options=("beta",))
NO_PAIR = AdvantageEstimator(lambda rows, args: rows.rewards_BR)
NARROW = AdvantageEstimator(lambda rows, args: (rows.rewards_BR[:, :1], None))
NO_RETURNS = AdvantageEstimator(lambda rows, args: (rows.rewards_BR, None), needs_values=True)
MONTE_CARLO = AdvantageEstimator(
    lambda rows, args: (
        rows.rewards_BR.flip(1).cumsum(1).flip(1) - rows.values_BR,
        rows.rewards_BR.flip(1).cumsum(1).flip(1),
    ),
    needs_values=True,
    row_by_row=True,
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NO_PAIR", "returned no pair"),
        ("NARROW", r"returned advantages \(8, 1\); they should be a tensor \(8, 7\)"),
        ("NO_RETURNS", r"returned returns NoneType; they should be"),
    ],
)
def test_an_estimator_that_returns_something_else_is_named(tmp_path, name, text):
    trainer = learner(tmp_path, advantage_estimator=f"{HERE}:{name}")
    with pytest.raises(ValueError, match=f"advantage_estimator='{HERE}:{name}' {text}"):
        trainer.step(*grouped_rollouts())


@pytest.fixture
def to_go(tmp_path, monkeypatch):
    with extension(1, tmp_path, monkeypatch) as config:
        yield config.advantage_estimator


def test_an_estimator_of_the_users_credits_each_token_with_the_rewards_from_it_on(tmp_path, to_go):
    """PPO's KL is charged token by token, and the rest is whitened over all tokens: REINFORCE++."""
    options = {"loss_type": "ppo", "kl_coef": 0.5, "adap_kl_ctrl": False}
    trainer = learner(tmp_path, advantage_estimator=to_go, **options)
    assert trainer.model.value_model is None
    trainer.step(*grouped_rollouts(seed=1))
    stats = trainer.step(*grouped_rollouts())
    kl_BR = torch.tensor(stats["objective/logprobs"] - stats["objective/ref_logprobs"]).double()
    raw = []
    for row, (response, score) in enumerate(zip(*grouped_rollouts()[1:], strict=True)):
        rewards = [-0.5 * float(kl) for kl in kl_BR[row, : len(response)]]
        rewards[-1] += float(score)
        raw += [sum(rewards[t:]) for t in range(len(rewards))]
    raw = torch.tensor(raw)
    expected = (raw - raw.mean()) / (raw.var() + 1e-8).sqrt()
    torch.testing.assert_close(torch.tensor(stats["apa/policy/advantages"]), expected, atol=1e-5, rtol=1e-4)


def test_an_estimator_of_the_users_may_have_a_value_model(tmp_path):
    """Monte-Carlo returns are GAE with lambda 1."""
    results = []
    for options in ({"advantage_estimator": f"{HERE}:MONTE_CARLO"}, {"advantage_estimator": "gae", "lam": 1.0}):
        trainer = learner(tmp_path, ppo_epochs=2, mini_batch_size=4, **options)
        trainer.step(*grouped_rollouts())
        results.append(parameters(trainer))
    assert any(name.startswith("value_model") for name in results[0])
    assert_same(*results)


@pytest.mark.parametrize("value_model", ["head", "separate", "adapter:nowhere", "a folder"])
def test_a_value_model_that_is_given_warns_and_is_not_made(tmp_path, value_model):
    with pytest.warns(
        UserWarning, match=f"value_model='{value_model}' has no effect with advantage_estimator='group'"
    ):
        trainer = learner(tmp_path, trainer_kwargs={"value_model": value_model})
    assert trainer.model.value_model is None


def test_classics_head_is_not_trained_and_a_warning_says_so(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead(tiny_model())
    config = PPOConfig(
        **{"output_dir": str(tmp_path), "use_cpu": True, "batch_size": 8, "mini_batch_size": 8},
        **{"advantage_estimator": "leave_one_out", "learning_rate": 1e-2},
    )
    with pytest.warns(
        UserWarning, match="the value head of model is not trained: advantage_estimator='leave_one_out'"
    ):
        trainer = PPOTrainer(config, model, tokenizer=tiny_tokenizer())
    before = [p.detach().clone() for p in model.v_head.parameters()]
    policy = [p.detach().clone() for p in model.pretrained_model.parameters()]
    trainer.step(*grouped_rollouts())
    assert all(torch.equal(a, b) for a, b in zip(before, model.v_head.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(policy, model.pretrained_model.parameters(), strict=True))


# ---- what classic scripts call and override ----


def test_scripts_that_call_the_model_get_no_values(tmp_path):
    trainer = learner(tmp_path)
    queries, responses, _ = grouped_rollouts()
    logits, loss, values = trainer.model(torch.cat([queries[0], responses[0]])[None])
    assert values is None and loss is None and logits.shape[-1] == 32
    inputs = trainer.prepare_model_inputs(queries, responses)
    outputs = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    assert outputs.values is None and outputs.logprobs.shape == outputs.masks.shape
    with pytest.raises(ValueError, match="compute_advantages gets values and no prompts"):
        trainer.compute_advantages(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))


class ByOverrides(APATrainer):
    """Each changes nothing."""

    def loss(self, *args):
        assert args[1] is None and args[3] is None and args[7] is None  # values, vpreds, returns
        return super().loss(*args)

    def record_step_stats(self, kl_coef, **data):
        return super().record_step_stats(kl_coef, **data)


def test_overrides_of_the_loss_and_the_statistics_get_no_values(tmp_path):
    results = []
    for cls in (APATrainer, ByOverrides):
        args = tiny_config(
            tmp_path, batch_size=8, mini_batch_size=4, gradient_accumulation_steps=2, advantage_estimator="group"
        )
        trainer = cls(args, tiny_model(), tokenizer=tiny_tokenizer())
        stats = trainer.step(*grouped_rollouts())
        results.append(parameters(trainer))
    assert_same(*results)
    assert stats["apa/loss/total"] == pytest.approx(stats["apa/loss/policy"])
    assert "apa/loss/value" not in stats or stats["apa/loss/value"] == 0


def test_an_override_of_compute_advantages_is_refused_by_name(tmp_path):
    class OwnAdvantages(APATrainer):
        def compute_advantages(self, values, rewards, mask):
            return values, rewards, rewards

    args = tiny_config(tmp_path, advantage_estimator="batch")
    with pytest.raises(ValueError, match="compute_advantages is overridden, and advantage_estimator='batch'"):
        OwnAdvantages(args, tiny_model(), tokenizer=tiny_tokenizer())


def test_another_config_must_have_the_same_estimator(tmp_path):
    trainer = learner(tmp_path)
    with pytest.raises(ValueError, match="config has advantage_estimator='gae', this trainer 'group'"):
        trainer.config = dataclasses.replace(tiny_config(tmp_path), batch_size=8)
