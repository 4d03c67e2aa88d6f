"""One warning when the policy is so far from the initial model that its text is probably broken."""

import warnings

import pytest
import torch

from tests.tiny import tiny_rollouts, tiny_trainer
from trl_apa.trainer.drift import DriftWatch, drift_message


def statistics(kl, per_token, unexplained=None):
    stats = {"objective/kl": kl, "objective/kl_per_token": per_token}
    return stats if unexplained is None else {**stats, "apa/policy/unexplained": unexplained}


@pytest.mark.parametrize(
    ("stats", "warns"),
    [
        (statistics(41.0, 2.6, 0.99), True),  # SmolLM2, "I love me. I love me"
        (statistics(38.0, 2.4), True),  # AWR there, "perfect, perfect, perfect"
        (statistics(9.7, 0.6, 1.03), False),  # readable
        (statistics(300.0, 0.6, 0.99), False),  # a long response whose tokens have hardly changed
        (statistics(6.0, 6.0, 0.99), False),  # an answer of one word, which the policy has become sure of
        (statistics(41.0, 2.6, 0.5), False),  # as far as lambda says
        (statistics(-30.0, -2.0), False),
        (statistics(float("nan"), float("nan")), False),
    ],
)
def test_it_warns_of_text_that_is_probably_broken(stats, warns):
    assert (drift_message(stats, "kl_coef=0.1") is not None) == warns


def test_the_message_names_what_was_seen_and_what_to_do():
    message = drift_message(statistics(41.2, 2.61, 0.987), "kl_coef=0.1")
    for part in ("41 nats per response", "2.6 per token", "99% of the initial model's", "raise kl_coef=0.1"):
        assert part in message
    assert "its loss" not in drift_message(statistics(41.2, 2.61), "kl_coef=0.1")


def test_it_warns_once():
    watch = DriftWatch("kl_coef=0.1")
    watch.look(statistics(1.0, 0.1))
    with pytest.warns(UserWarning, match="the policy is 41 nats"):
        watch.look(statistics(41.0, 2.6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look(statistics(80.0, 5.0))


def long_rollouts():
    queries, _, scores = tiny_rollouts()
    torch.manual_seed(4)
    return queries, [torch.randint(2, 20, (24,)) for _ in queries], scores


@pytest.mark.parametrize(
    "loss_type", ["apa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("awr", "ppo"))]
)
def test_a_run_that_memorizes_its_responses_is_told(tmp_path, loss_type):
    """Trained on the same long responses again and again, which have become over a nat likelier a token."""
    options = {"apa": {"kl_coef": 0.01}, "awr": {}, "ppo": {"adap_kl_ctrl": False, "kl_coef": 0.0, "cliprange": 0.9}}
    trainer = tiny_trainer(
        tmp_path, loss_type=loss_type, learning_rate=0.02, ppo_epochs=20, whiten_advantages=False, **options[loss_type]
    )
    queries, responses, _ = long_rollouts()
    scores = [torch.tensor(30.0)] * len(queries)
    name = "init_kl_coef" if loss_type == "ppo" else "kl_coef"
    with pytest.warns(UserWarning, match=rf"nats per response from the initial model.*raise {name}="):
        for _ in range(6):
            stats = trainer.step(queries, responses, scores)
    assert stats["objective/kl_per_token"] > 1 and trainer.drift.warned


def test_the_share_that_is_not_explained_is_one_at_first_and_falls_where_the_policy_fits(tmp_path):
    """With advantages that one update after the other can fit: the same rollouts, and a lambda within their reach."""
    options = {"kl_coef": 2.0, "learning_rate": 0.02, "value_learning_rate": 1e-12}
    trainer = tiny_trainer(tmp_path, **options)
    stats = [trainer.step(*tiny_rollouts()) for _ in range(15)]
    assert stats[0]["apa/policy/unexplained"] == pytest.approx(1.0, abs=1e-5)
    assert stats[0]["apa/policy/target_sq"] == pytest.approx(1 / 2.0**2, rel=0.1)
    assert stats[-1]["apa/policy/unexplained"] < 0.5
    for row in stats:
        ratio = row["apa/policy/residual_sq"] / row["apa/policy/target_sq"]
        assert row["apa/policy/unexplained"] == pytest.approx(ratio)
