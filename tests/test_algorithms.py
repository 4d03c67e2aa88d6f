"""`loss_type`: the algorithms of the package, and those of its users."""

import copy
import dataclasses

import pytest
import torch

from tests.test_docs import extension
from tests.test_training import trainer_for
from tests.test_update import assert_same, learner, parameters_after_step, row_advantages, row_logprobs, row_values
from tests.tiny import tiny_config, tiny_rollouts, tiny_trainer
from trl_apa.algorithms import ALGORITHMS, Algorithm, PolicyTokens
from trl_apa.classic.ppo import PPOConfig


PPO_UNDER_ANOTHER_NAME = dataclasses.replace(ALGORITHMS["ppo"])
NO_ALGORITHM = ALGORITHMS["ppo"].loss
HERE = "tests.test_algorithms"


@pytest.fixture
def reinforce(tmp_path, monkeypatch):
    with extension(0, tmp_path, monkeypatch) as config:
        yield config.loss_type


def test_an_algorithm_of_the_users_steps_as_its_formula_says(tmp_path, reinforce):
    """-Adv log pi + lambda/2 (log pi - log pi_init)^2, row by row, with whitened advantages of a fresh value model."""
    model_options = {"loss_type": reinforce, "kl_coef": 0.3, "mini_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = learner(tmp_path, **model_options, ppo_epochs=2, max_grad_norm=0.0)
    mine, critic = copy.deepcopy(trainer.model.policy), copy.deepcopy(trainer.model.value_model)
    queries, responses, scores = tiny_rollouts()
    with torch.no_grad():
        reference = [row_logprobs(mine, q, r, 1.0) for q, r in zip(queries, responses, strict=True)]
        values = [row_values(critic, q, r).tolist() for q, r in zip(queries, responses, strict=True)]
    raw = [
        torch.tensor(row_advantages([0.0] * (len(v) - 1) + [float(score)], v, [True] * len(v), 1.0, 0.95))
        for v, score in zip(values, scores, strict=True)
    ]
    flat = torch.cat(raw)
    advantages = [(row - flat.mean()) / (flat.var() + 1e-8).sqrt() for row in raw]
    optimizer = torch.optim.SGD(mine.parameters(), lr=trainer.args.learning_rate)
    for _ in range(2):
        loss = 0.0
        for query, response, ref, advantage in zip(queries, responses, reference, advantages, strict=True):
            logprobs = row_logprobs(mine, query, response, 1.0)
            loss = loss + (-advantage * logprobs + 0.15 * (logprobs - ref) ** 2).sum()
        (loss / len(flat)).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer.step(queries, responses, scores)
    expected = {name: p.detach() for name, p in mine.named_parameters()}
    before = {name: p.detach() for name, p in trainer.ref_model.named_parameters()}
    assert max(float((expected[name] - before[name]).abs().max()) for name in expected) > 1e-3
    assert_same({name: p.detach() for name, p in trainer.model.policy.named_parameters()}, expected, tolerance=1e-5)


def test_its_statistics_are_reported_and_what_it_does_not_read_warns(tmp_path, reinforce):
    stats = tiny_trainer(tmp_path, loss_type=reinforce).step(*tiny_rollouts())
    assert "apa/policy/log_ratio" in stats and "apa/policy/residual" not in stats
    assert stats["ppo/policy/log_ratio"] == stats["apa/policy/log_ratio"]
    config = tiny_config(tmp_path, loss_type=reinforce)
    assert (config.kl_coef, config.cliprange, config.target) == (0.2, None, None)
    with pytest.warns(UserWarning, match=f"cliprange=0.2 has no effect with loss_type='{reinforce}'"):
        tiny_config(tmp_path, loss_type=reinforce, cliprange=0.2)


def test_it_trains_and_resumes_to_the_same_weights(tmp_path, reinforce):
    options = {"loss_type": reinforce, "save_strategy": "steps", "save_steps": 2}
    unbroken = trainer_for(tmp_path / "unbroken", max_steps=4, **options)
    unbroken.train()
    resumed = trainer_for(tmp_path / "resumed", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))
    assert_same(dict(resumed.model.named_parameters()), dict(unbroken.model.named_parameters()), tolerance=1e-30)
    other = trainer_for(tmp_path / "other", max_steps=4, save_strategy="no")
    with pytest.raises(ValueError, match=f"loss_type was '{reinforce}', is 'apa'"):
        other.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))


def test_ppo_as_a_users_algorithm_is_ppo(tmp_path):
    """Also its options, its penalty in the reward, its controller and its statistics."""
    given = {"ppo_epochs": 2, "cliprange": 0.1, "init_kl_coef": 0.4}
    by_name = tiny_trainer(tmp_path, loss_type="ppo", **given)
    by_module = tiny_trainer(tmp_path, loss_type=f"{HERE}:PPO_UNDER_ANOTHER_NAME", **given)
    for trainer in (by_name, by_module):
        trainer.step(*tiny_rollouts())  # the second step is charged for the KL of the first
    expected = parameters_after_step(by_name, *tiny_rollouts())
    assert_same(parameters_after_step(by_module, *tiny_rollouts()), expected, tolerance=1e-30)
    assert by_module.kl_ctl.value == by_name.kl_ctl.value != 0.4
    assert "ppo/mean_non_score_reward" in by_module.step(*tiny_rollouts())


def test_the_penalty_in_the_reward_brings_its_options():
    charged = Algorithm(ALGORITHMS["awr"].loss, kl_in_reward=True, options={"target": 3.0})
    assert charged.options == {"adap_kl_ctrl": True, "target": 3.0, "horizon": 10000.0, "kl_penalty": "kl"}


def test_a_loss_gets_log_probs_of_the_rollout_policy_only_where_it_asks(tmp_path, monkeypatch):
    seen, awr_loss = [], ALGORITHMS["awr"].loss

    def loss(tokens, args):
        seen.append(tokens)
        return awr_loss(tokens, args)

    for asks in (False, True):
        monkeypatch.setitem(ALGORITHMS, "awr", Algorithm(loss, needs_old_logprobs=asks))
        tiny_trainer(tmp_path, loss_type="awr").step(*tiny_rollouts())
        tokens = seen[-1]
        assert isinstance(tokens, PolicyTokens) and (tokens.old_logprobs_BR is not None) == asks
        if asks:  # the first visit of each row is still under the policy that sampled it
            mask = tokens.response_mask_BR
            torch.testing.assert_close(seen[-1].old_logprobs_BR[mask], tokens.logprobs_BR.detach()[mask])


@pytest.mark.parametrize(
    ("loss_type", "message"),
    [
        (
            "dpo",
            "should be one of apa, awr, ppo, .*, response_apa, astar_po, qrpo, or module:name",
        ),
        ("APA", "should be one of apa"),
        ("no_such_module:X", "cannot be imported: No module named 'no_such_module'"),
        (f"{HERE}:MISSING", "cannot be imported: .*MISSING"),
        (f"{HERE}:NO_ALGORITHM", "is a function: it should be an Algorithm"),
        (":", "cannot be imported"),
        (f"{HERE}:", "cannot be imported"),
    ],
)
def test_what_is_no_algorithm_is_refused(tmp_path, loss_type, message):
    with pytest.raises(ValueError, match=f"loss_type='{loss_type}'.*{message}"):
        tiny_config(tmp_path, loss_type=loss_type)


def test_classics_default_of_the_coefficient_is_ppos_alone(tmp_path):
    for loss_type, expected in (("ppo", 0.2), ("apa", 0.1), ("awr", 1.0)):
        assert PPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_type=loss_type).kl_coef == expected
