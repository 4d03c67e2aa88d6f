"""Gradients are clipped: both networks together, or with `value_max_grad_norm` each by itself."""

import math

import pytest
import torch

from tests.test_update import assert_same, parameters_after_step
from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_trainer


KINDS = ("separate", "head", "adapter")


def plain_descent(tmp_path, kind, **config):
    """A trainer whose one update moves each weight by its clipped gradient."""
    model, kwargs = tiny_model(), {"value_model": kind}
    if kind == "adapter":
        kwargs["peft_config"] = lora_config()
    torch.manual_seed(2)
    trainer = tiny_trainer(tmp_path, model, kwargs, optim="sgd", learning_rate=1.0, mini_batch_size=2, **config)
    for parameter in trainer.model.value_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return trainer


def distances(trainer):
    """How far `step` moves each network, and the norms that it reports."""
    before = {name: [p.detach().clone() for p in ps] for name, ps in trainer.model.trainable_parameters().items()}
    stats = trainer.step(*tiny_rollouts())
    after = trainer.model.trainable_parameters()
    moved = {name: math.dist(flat(after[name]), flat(old)) for name, old in before.items()}
    return moved, {name: stats[f"apa/grad_norm/{name}"] for name in ("policy", "value", "total")}


def flat(parameters):
    return torch.cat([parameter.detach().flatten() for parameter in parameters]).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limits", [(0.25, 0.5), (math.inf, 0.125), (0.125, math.inf)])
def test_each_network_moves_by_its_own_limit(tmp_path, kind, limits):
    """A gradient of norm g is scaled to min(g, limit), whatever the other network's is."""
    accumulated = {"gradient_accumulation_steps": 2}  # one update of all rollouts
    trainer = plain_descent(tmp_path, kind, max_grad_norm=limits[0], value_max_grad_norm=limits[1], **accumulated)
    moved, norms = distances(trainer)
    for name, limit in zip(("policy", "value"), limits, strict=True):
        assert norms[name] > 0.5, "no gradient that would be clipped"
        assert moved[name] == pytest.approx(min(norms[name], limit), rel=1e-4)
    assert norms["total"] == pytest.approx(math.hypot(norms["policy"], norms["value"]), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_it_both_are_scaled_alike(tmp_path, kind):
    moved, norms = distances(plain_descent(tmp_path, kind, max_grad_norm=0.25, gradient_accumulation_steps=2))
    assert math.hypot(*moved.values()) == pytest.approx(0.25, rel=1e-4)
    assert moved["policy"] / moved["value"] == pytest.approx(norms["policy"] / norms["value"], rel=1e-4)


def test_limits_that_nothing_reaches_change_nothing(tmp_path):
    options = {"max_grad_norm": 1e6, "gradient_accumulation_steps": 2}
    together = parameters_after_step(plain_descent(tmp_path, "separate", **options), *tiny_rollouts())
    apart = plain_descent(tmp_path, "separate", value_max_grad_norm=1e6, **options)
    assert_same(parameters_after_step(apart, *tiny_rollouts()), together, tolerance=1e-30)


@pytest.mark.parametrize("none", [None, 0.0])
def test_it_wants_a_limit_of_the_policy(tmp_path, none):
    with pytest.raises(ValueError, match=r"value_max_grad_norm=1.0 needs max_grad_norm for .*inf"):
        tiny_config(tmp_path, max_grad_norm=none, value_max_grad_norm=1.0)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_is_positive(tmp_path, limit):
    with pytest.raises(ValueError, match="value_max_grad_norm"):
        tiny_config(tmp_path, value_max_grad_norm=limit)
