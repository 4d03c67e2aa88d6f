"""GRPO, CISPO and RLOO: against arithmetic, slow loops and TRL's own losses; then in the trainer."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from tests.test_losses import make_batch
from tests.test_training import trainer_for
from tests.test_update import assert_same, parameters_after_step
from tests.tiny import tiny_config, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.algorithms import ALGORITHMS, Algorithm
from trl_apa.algorithms.kl import kl_estimate
from trl_apa.algorithms.losses import ppo_loss
from trl_apa.algorithms.policy_gradient import aggregated, cispo_loss, grpo_loss, kl_loss, rloo_loss
from trl_apa.algorithms.regression import pairwise_regression_loss, response_regression_loss
from trl_apa.rollout.shared_prompts import groups_of_equal_size


MAX_LENGTH = 8
TRUE = torch.ones(2, 2, dtype=torch.bool)


def grpo(aggregation):
    def loss(x, y, a, mask, tokens=None, responses=None):
        return grpo_loss(x, y, a, mask, 0.1, 0.2, aggregation, tokens, responses, MAX_LENGTH)

    return loss


LOSSES = {
    "grpo as dapo": grpo("dapo"),
    "grpo": grpo("grpo"),
    "dr_grpo": grpo("dr_grpo"),
    "cispo": lambda x, y, a, mask, tokens=None, responses=None: cispo_loss(x, y, a, mask, 0.2, tokens),
    "rloo": lambda x, y, a, mask, tokens=None, responses=None: rloo_loss(x, y, a, mask, 0.1, 0.2, tokens, responses),
    "regression": lambda x, y, a, mask, tokens=None, responses=None: response_regression_loss(
        x, y, a, mask, 0.5, responses
    ),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def differentiated(loss, trained, *rest):
    leaf = trained.clone().requires_grad_()
    value, stats = loss(leaf, *rest)
    value.backward()
    return value.detach(), stats, leaf.grad


def test_aggregations_hand_worked():
    per_token = torch.tensor([[1.0, 3.0, 5.0], [7.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # 16 over 4 tokens; (9 / 3 + 7) over 2 responses; 16 / (2 responses of at most 8 tokens); 16 over 2 responses
    assert aggregated(per_token, mask, "dapo").item() == 4.0
    assert aggregated(per_token, mask, "grpo").item() == 5.0
    assert aggregated(per_token, mask, "dr_grpo", max_length=8).item() == 1.0
    assert aggregated(per_token, mask, "sum").item() == 8.0


def test_grpo_hand_worked():
    # ratios 1.5 and 0.5 in each row, eps 0.2 below and 0.3 above, advantages 1 and -1
    logprobs = torch.tensor([[1.5, 0.5], [1.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    loss, stats = grpo_loss(logprobs, torch.zeros(2, 2), advantages, TRUE, 0.2, 0.3)
    # -min(1.5, 1.3), -min(0.5, 0.8), then max(1.5, 1.3), max(0.5, 0.8)
    assert loss.item() == pytest.approx((-1.3 - 0.5 + 1.5 + 0.8) / 4)
    assert stats["clipfrac"].item() == 0.5
    loss.backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx([0.0, -0.5 / 4, 1.5 / 4, 0.0])


def test_cispo_hand_worked():
    logprobs = torch.tensor([[3.0, 0.5]]).log().requires_grad_()
    loss, stats = cispo_loss(logprobs, torch.zeros(1, 2), torch.tensor([[2.0, -1.0]]), TRUE[:1], cliprange_high=1.0)
    # weights min(3, 1 + 1) = 2 and 0.5: -(2 * 2 * log 3 - 0.5 * 1 * log 0.5) / 2
    assert loss.item() == pytest.approx(-(4 * math.log(3) - 0.5 * math.log(0.5)) / 2)
    assert stats["clipfrac"].item() == 0.5
    loss.backward()
    # the clipped token keeps a gradient, of the bounded weight
    assert logprobs.grad.flatten().tolist() == pytest.approx([-4 / 2, 0.5 / 2])


def test_rloo_hand_worked():
    # ratios of complete responses 2 * 0.75 = 1.5 and 0.5 * 1 = 0.5, with advantages 1 and -2, eps 0.2
    logprobs = torch.tensor([[2.0, 0.75], [0.5, 1.0]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0], [-2.0, -2.0]])
    loss, stats = rloo_loss(logprobs, torch.zeros(2, 2), advantages, TRUE, 0.2)
    # -min(1.5, 1.2) = -1.2 clipped; -min(-1, -1.6) = 1.6 clipped
    assert loss.item() == pytest.approx((-1.2 + 1.6) / 2)
    assert stats["clipfrac"].item() == 1.0
    loss.backward()
    assert logprobs.grad.abs().max().item() == 0.0


def test_regression_hand_worked():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    anchor = torch.tensor([[-2.0, -2.5], [-1.0, -1.0]])
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([[1.0, 1.0], [-0.5, 7.0]])
    loss, stats = response_regression_loss(logprobs, anchor, advantages, mask, kl_coef=0.4)
    # log-ratios 1 + 0.5 and 0.5; residuals 0.4 * 1.5 - 1 = -0.4 and 0.4 * 0.5 + 0.5 = 0.7; squares 0.16 and 0.49
    assert loss.item() == pytest.approx(0.65 / 2)
    assert stats["residual"].item() == pytest.approx(0.3 / 2)
    assert stats["target_sq"].item() == pytest.approx((1 + 0.25) / 2)
    assert stats["log_ratio"].item() == pytest.approx(1.0)
    loss.backward()
    # 2 * 0.4 * residual / 2 responses
    assert logprobs.grad.flatten().tolist() == pytest.approx([-0.16, -0.16, 0.28, 0.0])


def test_rebel_hand_worked():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    anchor = torch.tensor([[-2.0, -2.5], [-1.0, -1.0]])
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([[1.0, 1.0], [-0.5, 7.0]])
    loss, stats = pairwise_regression_loss(logprobs, anchor, advantages, mask, torch.tensor([3, 3]), kl_coef=0.4)
    # log-ratios 1.5 and 0.5, advantages 1 and -0.5: (0.4 * 1 - 1.5)^2 = 1.21; at the anchor 1.5^2
    assert loss.item() == pytest.approx(1.21)
    assert stats["target_sq"].item() == pytest.approx(2.25)
    loss.backward()
    # 2 * 0.4 * -1.1, and the opposite for the other response
    assert logprobs.grad.flatten().tolist() == pytest.approx([-0.88, -0.88, 0.88, 0.0])
    # a response without another one to be compared with counts for nothing
    alone, _ = pairwise_regression_loss(logprobs, anchor, advantages, mask, torch.tensor([3, 4]), kl_coef=0.4)
    assert alone.item() == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_rebel_equals_a_slow_loop_over_pairs(seed):
    trained, anchor, advantages, mask = make_batch(seed, rows=9)
    mask[4] = False
    groups = torch.tensor([5, 5, 2, 2, 2, 5, 2, 5, 9])  # of four, of three that count, and one alone

    def loss(*tensors):
        return pairwise_regression_loss(*tensors, groups, 0.4)

    def u(row):
        counted = mask[row]
        return 0.4 * (trained - anchor)[row, counted].sum() - advantages[row, counted].mean()

    total, rows = 0.0, [row for row in range(9) if mask[row].any()]
    for group in (5, 2):
        members = [row for row in rows if groups[row] == group]
        pairs = [(u(i) - u(j)).square() for i in members for j in members if i < j]
        total += len(members) * float(sum(pairs)) / len(pairs)
    value, _, _ = differentiated(loss, trained, anchor, advantages, mask)
    assert value.item() == pytest.approx(total / len(rows), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: loss(x, anchor, advantages, mask)[0], (trained.requires_grad_(),))
    # a baseline of each prompt drops out
    shifted = advantages + torch.where(groups == 5, 3.0, -2.0)[:, None]
    assert loss(trained, anchor, shifted, mask)[0].item() == pytest.approx(value.item(), rel=1e-9)


def test_rebel_adds_up_over_micro_batches_of_complete_groups():
    *inputs, mask = make_batch(7, rows=6)
    groups, counts = torch.tensor([0, 0, 1, 1, 2, 2]), mask.any(dim=1).sum()
    value, _ = pairwise_regression_loss(*inputs, mask, groups, 0.4)
    parts = [
        pairwise_regression_loss(*(x[rows] for x in (*inputs, mask, groups)), 0.4, counts)[0]
        for rows in (slice(0, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "cispo", "rloo", "regression"])
def test_equals_a_slow_loop(kind, seed):
    trained, anchor, advantages, mask = make_batch(seed)
    mask[-1] = False  # a response without a counted token is none
    loss = LOSSES["grpo as dapo" if kind == "dapo" else kind](trained, anchor, advantages, mask)[0]
    per_row = []
    for b in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[b, t]]
        if not tokens:
            continue
        log_ratios = [float(trained[b, t] - anchor[b, t]) for t in tokens]
        own = [float(advantages[b, t]) for t in tokens]
        mean = sum(own) / len(own)
        if kind == "rloo":
            ratio = math.exp(sum(log_ratios))
            per_row.append([-min(ratio * mean, min(max(ratio, 0.9), 1.2) * mean)])
        elif kind == "regression":
            per_row.append([(0.5 * sum(log_ratios) - mean) ** 2])
        elif kind == "cispo":
            weights = [min(math.exp(r), 1.2) for r in log_ratios]
            per_row.append([-w * a * float(trained[b, t]) for w, a, t in zip(weights, own, tokens, strict=True)])
        else:
            pairs = zip(map(math.exp, log_ratios), own, strict=True)
            per_row.append([-min(r * a, min(max(r, 0.9), 1.2) * a) for r, a in pairs])
    flat = [x for row in per_row for x in row]
    expected = {
        "grpo": sum(sum(row) / len(row) for row in per_row) / len(per_row),
        "dr_grpo": sum(flat) / (len(per_row) * MAX_LENGTH),
    }.get(kind, sum(flat) / len(flat))
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@each_loss
def test_gradcheck(loss):
    trained, anchor, advantages, mask = make_batch(3)
    if loss is LOSSES["cispo"]:  # its weight has no gradient: keep it clipped, where it is constant
        trained = anchor + 0.5 + 0.1 * advantages.abs()
    leaf = trained.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, anchor, advantages, mask)[0], (leaf,))


@each_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
def test_garbage_behind_the_mask_changes_nothing(loss, garbage):
    *inputs, mask = make_batch(4)
    value, stats, gradient = differentiated(loss, *inputs, mask)
    spoiled = differentiated(loss, *(tensor.masked_fill(~mask, garbage) for tensor in inputs), mask)
    assert torch.equal(value, spoiled[0]) and torch.equal(gradient, spoiled[2])
    assert all(torch.equal(stats[name], spoiled[1][name]) for name in stats)


@each_loss
def test_micro_batches_sum_to_the_step(loss):
    *inputs, mask = make_batch(5, rows=5)
    mask[3] = False
    value, stats, gradient = differentiated(loss, *inputs, mask)
    counts = mask.sum(), mask.any(dim=1).sum()
    parts = [
        differentiated(loss, *(tensor[rows] for tensor in (*inputs, mask)), *counts)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), value, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), gradient, rtol=1e-13, atol=1e-15)
    for name in stats:
        torch.testing.assert_close(sum(part[1][name] for part in parts), stats[name], rtol=1e-12, atol=1e-14)


@each_loss
def test_half_precision_is_raised_and_nothing_is_read_on_the_host(loss):
    *inputs, mask = make_batch(9)
    halves = [tensor.bfloat16() for tensor in inputs]
    assert torch.equal(loss(*halves, mask)[0], loss(*(tensor.float() for tensor in halves), mask)[0])
    meta = [tensor.to("meta") for tensor in (*inputs, mask)]
    assert loss(*meta, meta[-1].sum(), meta[-1].any(dim=1).sum())[0].shape == ()


def test_grpo_over_tokens_with_one_clip_range_is_ppo():
    *inputs, mask = make_batch(6)
    ours, theirs = grpo_loss(*inputs, mask, 0.2), ppo_loss(*inputs, mask, 0.2)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()


class StandIn(SimpleNamespace):
    """What `_compute_loss` of TRL's trainers reads of `self`, with given log-probs in place of a model's."""

    def __init__(self, logprobs: Tensor, **options):
        super().__init__(
            model=SimpleNamespace(training=True),
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
            accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
            current_gradient_accumulation_steps=1,
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level="token",
            use_vllm=False,
            vllm_importance_sampling_correction=False,
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
            max_completion_length=MAX_LENGTH,
            **options,
        )
        self.logprobs = logprobs

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.logprobs, torch.zeros_like(self.logprobs), None


def trls(trainer_class, trained, anchor, advantages_B, mask, ref=None, **options) -> tuple[Tensor, Tensor]:
    """TRL's own loss on the same tensors, and its gradient."""
    leaf = trained.clone().requires_grad_()
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids}
    inputs |= {"completion_mask": mask.long(), "advantages": advantages_B, "num_items_in_batch": mask.sum()}
    inputs |= {"old_per_token_logps": anchor, "old_logps": (anchor * mask).sum(1), "ref_per_token_logps": ref}
    loss = trainer_class._compute_loss(StandIn(leaf, **options), None, inputs)
    loss.backward()
    return loss.detach(), leaf.grad


def trl_batch(seed=0):
    """As `make_batch`, with one advantage a response, no gap in a response and at least one token in each."""
    trained, anchor, advantages, mask = make_batch(seed, rows=6)
    mask = torch.arange(mask.shape[1]) < mask.sum(1).clamp(min=1)[:, None]
    return trained, anchor, advantages[:, 0], mask


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo"])
def test_grpo_is_trls(aggregation, beta):
    trained, anchor, advantages_B, mask = trl_batch()
    ref = anchor - 0.2 * advantages_B[:, None]
    expected, expected_gradient = trls(
        GRPOTrainer,
        *(trained, anchor, advantages_B, mask, ref),
        **{"loss_type": aggregation, "beta": beta, "epsilon_low": 0.1, "epsilon_high": 0.2},
    )

    def loss(x, *rest):
        value, stats = grpo_loss(x, *rest, 0.1, 0.2, aggregation, max_length=MAX_LENGTH)
        return value + beta * kl_loss(x, ref, mask, "k3", aggregation, max_length=MAX_LENGTH), stats

    value, _, gradient = differentiated(loss, trained, anchor, advantages_B[:, None].expand_as(trained), mask)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6)


def test_cispo_and_rloo_are_trls():
    trained, anchor, advantages_B, mask = trl_batch(1)
    advantages = advantages_B[:, None].expand_as(trained)
    # TRL's epsilon_high of CISPO is the bound itself
    options = {"loss_type": "cispo", "beta": 0.0, "epsilon_low": 0.1, "epsilon_high": 1.2}
    expected, expected_gradient = trls(GRPOTrainer, trained, anchor, advantages_B, mask, **options)
    value, _, gradient = differentiated(LOSSES["cispo"], trained, anchor, advantages, mask)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6)
    expected, expected_gradient = trls(
        RLOOTrainer, trained, anchor, advantages_B, mask, epsilon_low=0.1, epsilon_high=0.2
    )
    value, _, gradient = differentiated(LOSSES["rloo"], trained, anchor, advantages, mask)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6)


def test_expected_gradients_of_the_kl_estimators_in_the_loss():
    """On the policy that sampled: of k1 0, of k2 that of KL(pi || pi_init), of k3 that of KL(pi_init || pi)."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    pi, ref = logits.log_softmax(0), ref_logits.log_softmax(0)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    sampled = pi.detach().exp()  # the expectation over what it samples
    estimates = {name: gradient((sampled * kl_estimate(pi, ref, name)).sum()) for name in ("kl", "mse", "k3")}
    reverse, forward = gradient((pi.exp() * (pi - ref)).sum()), gradient((ref.exp() * (ref - pi)).sum())
    torch.testing.assert_close(estimates["kl"], torch.zeros(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(estimates["mse"], reverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(estimates["k3"], forward, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *x: grpo_loss(*x, 0.0), "cliprange is 0.0"),
        (lambda *x: grpo_loss(*x, 0.2, math.nan), "cliprange_high is nan"),
        (lambda *x: rloo_loss(*x, math.inf), "cliprange is inf"),
        (lambda *x: cispo_loss(*x, -1.0), "cliprange_high is -1.0"),
        (lambda *x: response_regression_loss(*x, 0.0), "kl_coef is 0.0"),
        (lambda *x: grpo_loss(*x, 0.2, aggregation="mean"), "aggregation is 'mean'"),
        (lambda *x: grpo_loss(*x, 0.2, aggregation="dr_grpo"), "max_length is None"),
        (lambda x, y, a, mask: grpo_loss(x, y[:1], a, mask, 0.2), "old_logprobs_BR has shape"),
        (lambda x, y, a, mask: response_regression_loss(x, y[:1], a, mask, 0.2), "anchor_logprobs_BR has shape"),
        (lambda x, y, a, mask: kl_loss(x, y, mask, "k9"), "kl_penalty is 'k9'"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make_batch(1))


# ---- in the trainer ----

NEW = ("grpo", "cispo", "rloo", "mirror_descent", "rebel", "response_apa")


@pytest.mark.parametrize("loss_type", NEW)
def test_the_split_into_micro_batches_changes_nothing(tmp_path, loss_type):
    options = {"loss_type": loss_type, "kl_coef": 0.3, "ppo_epochs": 2, "batch_size": 4, "max_grad_norm": 0.0}
    options |= {"optim": "sgd", "learning_rate": 0.1}
    by_four = tiny_trainer(tmp_path, mini_batch_size=4, **options)
    smaller = {"mini_batch_size": 1, "gradient_accumulation_steps": 4}
    if loss_type == "rebel":  # which compares within a forward pass
        smaller = {"mini_batch_size": 2, "gradient_accumulation_steps": 2}
    by_one = tiny_trainer(tmp_path, **smaller, **options)
    before = {name: p.detach().clone() for name, p in by_four.model.named_parameters()}
    expected = parameters_after_step(by_four, *tiny_pairs())
    assert max(float((expected[name] - before[name]).abs().max()) for name in expected) > 1e-2
    assert_same(parameters_after_step(by_one, *tiny_pairs()), expected, tolerance=1e-5)


def test_ppo_with_its_clip_and_grpo_over_tokens_make_the_same_step(tmp_path):
    """Where nothing else differs: no penalty, the same advantages, the same skipping of mini-batches."""
    options = {"kl_coef": 0.0, "ppo_epochs": 3, "advantage_estimator": "group", "whiten_advantages": True}
    options["group_normalization"] = "std"
    ppo = tiny_trainer(tmp_path, loss_type="ppo", adap_kl_ctrl=False, **options)
    grpo_ = tiny_trainer(tmp_path, loss_type="grpo", **options)
    expected = parameters_after_step(ppo, *tiny_pairs())
    assert_same(parameters_after_step(grpo_, *tiny_pairs()), expected, tolerance=1e-30)


def test_kl_in_the_loss_and_in_the_reward(tmp_path):
    """`kl_coef` and `kl_in` change the update of each policy gradient, from the second step on, when there is KL."""

    def after_two_steps(**options):
        trainer = tiny_trainer(tmp_path, mini_batch_size=4, learning_rate=1e-3, **options)
        trainer.step(*tiny_pairs())
        stats = trainer.step(*tiny_pairs())
        return torch.cat([p.detach().flatten() for p in trainer.model.policy.parameters()]), stats

    for loss_type in ("ppo", "grpo", "cispo", "rloo"):
        free, in_loss, in_reward = (
            after_two_steps(loss_type=loss_type, kl_coef=kl_coef, kl_in=kl_in)
            for kl_coef, kl_in in ((0.0, "loss"), (5.0, "loss"), (5.0, "reward"))
        )
        assert (free[0] - in_loss[0]).abs().max() > 1e-5, loss_type
        assert (free[0] - in_reward[0]).abs().max() > 1e-5, loss_type
        assert (in_loss[0] - in_reward[0]).abs().max() > 1e-5, loss_type
        assert in_loss[1]["apa/policy/kl_loss"] > 0
        assert "apa/policy/kl_loss" not in free[1] and "apa/policy/kl_loss" not in in_reward[1]
        assert in_reward[1]["apa/mean_non_score_reward"] < 0 == in_loss[1]["apa/mean_non_score_reward"]


def made(tmp_path):
    return [(loss_type, tiny_config(tmp_path, loss_type=loss_type)) for loss_type in ALGORITHMS]


def test_options_of_the_policy_gradients(tmp_path):
    config = tiny_config(tmp_path, loss_type="grpo")
    assert (config.kl_coef, config.kl_in, config.kl_penalty, config.loss_aggregation) == (0.0, "loss", "k3", "dapo")
    assert (config.cliprange, config.cliprange_high, config.target) == (0.2, None, None)
    charged = tiny_config(tmp_path, loss_type="grpo", kl_in="reward", kl_coef=0.1)
    assert (charged.kl_penalty, charged.adap_kl_ctrl, charged.init_kl_coef) == ("kl", False, 0.1)
    assert tiny_config(tmp_path, loss_type="rloo").kl_in_reward
    chosen = {name: (c.advantage_estimator, c.group_normalization, c.whiten_advantages) for name, c in made(tmp_path)}
    assert chosen == {
        **dict.fromkeys(("apa", "awr", "ppo"), ("gae", None, True)),
        **dict.fromkeys(("grpo", "cispo"), ("group", "std", False)),
        "rloo": ("leave_one_out", None, False),
        **dict.fromkeys(("mirror_descent", "rebel", "response_apa"), ("group", "none", False)),
        "astar_po": ("optimal_value", None, False),
        "qrpo": ("quantile", None, False),
    }
    own = tiny_config(tmp_path, loss_type="grpo", advantage_estimator="gae", whiten_advantages=True)
    assert (own.advantage_estimator, own.group_normalization, own.whiten_advantages) == ("gae", None, True)
    ppo = tiny_config(tmp_path, loss_type="ppo")
    assert (ppo.kl_in, ppo.kl_penalty, ppo.adap_kl_ctrl) == ("reward", "kl", True)
    with pytest.warns(UserWarning, match="target=3.0 has no effect with kl_in='loss': only kl_in='reward' reads it"):
        tiny_config(tmp_path, loss_type="ppo", kl_in="loss", target=3.0)
    with pytest.warns(UserWarning, match="loss_aggregation='grpo' has no effect with loss_type='ppo': only 'grpo'"):
        tiny_config(tmp_path, loss_type="ppo", loss_aggregation="grpo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "grpo", "loss_aggregation": "sum"}, "loss_aggregation='sum': it should be one of dapo"),
        ({"loss_type": "grpo", "kl_in": "both"}, "kl_in='both': it should be 'reward' or 'loss'"),
        ({"loss_type": "grpo", "kl_penalty": "full"}, "kl_penalty='full' needs kl_in='reward'"),
        ({"loss_type": "ppo", "kl_in": "loss", "kl_penalty": "kl"}, "with kl_in='loss' charges nothing"),
        (
            {"loss_type": "rebel", "shuffle": "rows"},
            "shuffle='rows' draws each response by itself, but loss_type='rebel'",
        ),
        ({"loss_type": "grpo", "cliprange_high": 0.0}, "cliprange_high=0.0: it should be greater than 0"),
        ({"loss_type": "mirror_descent", "kl_coef": 0.0}, "kl_coef=0.0: it should be greater than 0"),
        ({"loss_type": "grpo", "advantage_estimator": "group_log_mean_exp"}, "kl_coef=0.0 has no log mean exp"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **options)


def test_rebel_compares_what_a_forward_pass_holds_or_says_why_it_cannot(tmp_path):
    groups_of = groups_of_equal_size
    assert groups_of([0, 1, 0, 1, 0, 0], 4) == ([0, 1, 0, 1, 2, 2], 2)  # four and two rows: pairs
    assert groups_of([0, 0, 0, 0], 2) == ([0, 0, 1, 1], 2)
    assert groups_of([0, 0, 0], 2)[1] == groups_of([0, 1, 0], 4)[1] == 1
    trainer = tiny_trainer(tmp_path, loss_type="rebel", mini_batch_size=1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    message = "prompts in 2 rows on this process, and mini_batch_size=1, but loss_type='rebel' compares"
    with pytest.raises(ValueError, match=message):
        trainer.step(*tiny_pairs())
    assert_same(dict(trainer.model.named_parameters()), before, tolerance=1e-30)

    def loss(self, *args):
        raise AssertionError("it is never called")

    with pytest.raises(ValueError, match="loss is overridden, and loss_type='rebel' compares responses"):
        mine = type("Mine", (APATrainer,), {"loss": loss})
        mine(tiny_config(tmp_path, loss_type="rebel"), tiny_model(), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="num_generations=3 and per_device_train_batch_size=2: loss_type='rebel'"):
        trainer_for(tmp_path, loss_type="rebel", num_generations=3, batch_size=6, mini_batch_size=2).train()


def test_a_ratio_of_a_response_that_overflows_is_clipped_like_another():
    logprobs = torch.full((2, 100), 1.0, requires_grad=True)
    mask = torch.ones(2, 100, dtype=torch.bool)
    for advantage, gradient in ((1.0, 0.0), (0.0, 0.0)):
        logprobs.grad = None
        loss, _ = rloo_loss(logprobs, torch.zeros(2, 100), torch.full((2, 100), advantage), mask, 0.2)
        loss.backward()
        assert torch.isfinite(loss) and logprobs.grad.abs().max().item() == gradient


@pytest.mark.parametrize(
    ("loss_type", "more"),
    [("rloo", {}), ("mirror_descent", {}), ("response_apa", {}), ("grpo", {"loss_aggregation": "grpo"}), ("ppo", {})],
)
def test_an_override_of_loss_that_changes_nothing_changes_nothing(tmp_path, loss_type, more):
    """Also where the loss is a mean over responses, and micro-batches have other shares of the tokens than of them."""

    class Mine(APATrainer):
        def loss(self, *args):
            return super().loss(*args)

    options = {"loss_type": loss_type, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, **more}
    options |= {"mini_batch_size": 1, "gradient_accumulation_steps": 4, "advantage_estimator": "group"}
    config = tiny_config(tmp_path, **options)
    expected = parameters_after_step(tiny_trainer(tmp_path, **options), *tiny_pairs())
    mine = Mine(config, tiny_model(), tokenizer=tiny_tokenizer())
    assert_same(parameters_after_step(mine, *tiny_pairs()), expected, tolerance=1e-5)


def test_kl_in_belongs_to_a_config_from_the_start(tmp_path):
    config = tiny_config(tmp_path, loss_type="ppo")
    with pytest.raises(ValueError, match=r"kl_in=.loss. is set after .*give it when the config is made"):
        config.kl_in = "loss"
    trainer = tiny_trainer(tmp_path, loss_type="ppo")
    with pytest.raises(ValueError, match="config has kl_in='loss', this trainer 'reward': make a new trainer"):
        trainer.config = tiny_config(tmp_path, loss_type="ppo", kl_in="loss")
    for name in ("init_kl_coef", "kl_estimator"):
        value = 0.3 if name == "init_kl_coef" else "k1"
        with pytest.warns(UserWarning, match=f"{name}=.* has no effect with .*: only kl_in='reward' reads it"):
            made = tiny_config(tmp_path, loss_type="grpo", kl_coef=0.1, **{name: value})
        assert made.kl_penalty == "k3"


def test_what_is_reported_does_not_depend_on_kl_in_the_loss(tmp_path):
    class Mine(APATrainer):
        def compute_rewards(self, *args):
            return super().compute_rewards(*args)

    options = {"loss_type": "grpo", "kl_coef": 0.1, "learning_rate": 0.01}
    stats = []
    for trainer_class in (APATrainer, Mine):
        trainer = trainer_class(tiny_config(tmp_path, **options), tiny_model(), tokenizer=tiny_tokenizer())
        trainer.step(*tiny_pairs())
        stats.append(trainer.step(*tiny_pairs()))
    assert stats[0]["objective/kl"] == pytest.approx(stats[1]["objective/kl"], abs=1e-5)
    assert stats[0]["objective/kl_coef"] == 0.1


def test_an_algorithm_of_the_users_may_let_an_option_say_where_kl_is_charged(tmp_path):
    charged = Algorithm(
        ALGORITHMS["grpo"].loss, options={"kl_in": "loss", "cliprange": 0.2, "loss_aggregation": "dapo"}
    )
    assert charged.options["kl_penalty"] == "kl" and charged.options["target"] == 6.0


@pytest.mark.parametrize("loss_type", ["grpo", "rebel"])
def test_a_run_learns_and_resumes_to_the_same_weights(tmp_path, loss_type):
    """In the middle of an iteration, whose counts and groups the checkpoint has."""
    options = {"loss_type": loss_type, "num_generations": 2, "save_strategy": "steps", "save_steps": 3}
    complete = trainer_for(tmp_path / "complete", max_steps=5, **options)
    complete.train()
    resumed = trainer_for(tmp_path / "resumed", max_steps=5, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "complete" / "checkpoint-3"))
    assert_same(dict(resumed.model.named_parameters()), dict(complete.model.named_parameters()), tolerance=1e-30)
