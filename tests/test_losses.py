import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trl_apa.algorithms.losses import apa_loss, awr_loss, log_normalizer, ppo_loss, value_loss


KL_COEF = 0.5
CLIPRANGE = 0.2


@dataclass
class Case:
    """A loss as a function of (trained, anchor, advantages, mask, num_tokens), and what it is on one token."""

    loss: Callable
    # (trained, anchor, advantage) of one token -> its loss, the derivative by `trained`, its statistics
    one_token: Callable


def apa_token(logprob, ref_logprob, advantage):
    residual = logprob - ref_logprob - advantage / KL_COEF
    stats = {"residual": residual, "residual_sq": residual**2, "log_ratio": logprob - ref_logprob}
    stats["target_sq"] = (advantage / KL_COEF) ** 2
    return residual**2, 2 * residual, stats


def awr_token(logprob, _, advantage):
    weight = math.exp(advantage / KL_COEF)
    return -weight * logprob, -weight, {"weight": weight, "weight_sq": weight**2}


def ppo_token(logprob, old_logprob, advantage):
    log_ratio = logprob - old_logprob
    ratio = math.exp(log_ratio)
    # a better token gains nothing above 1 + eps, a worse one nothing below 1 - eps
    clipped = ratio > 1 + CLIPRANGE if advantage > 0 else ratio < 1 - CLIPRANGE
    bound = 1 + CLIPRANGE if advantage > 0 else 1 - CLIPRANGE
    stats = {"approxkl": log_ratio**2 / 2, "policykl": -log_ratio, "ratio": ratio, "clipfrac": float(clipped)}
    if clipped:
        return -advantage * bound, 0.0, stats
    return -advantage * ratio, -advantage * ratio, stats


def value_token(value, _, target):
    error = value - target
    return error**2 / 2, error, {"error": error**2, "clipfrac": 0.0}


def clipped_value_token(value, old_value, target):
    held = min(max(value, old_value - CLIPRANGE), old_value + CLIPRANGE)
    error, held_error = value - target, held - target
    clipped = held_error**2 > error**2
    loss = max(error**2, held_error**2) / 2
    return loss, 0.0 if clipped else error, {"error": error**2, "clipfrac": float(clipped)}


CASES = {
    "apa": Case(lambda x, y, a, mask, n=None: apa_loss(x, y, a, mask, KL_COEF, n), apa_token),
    "awr": Case(lambda x, y, a, mask, n=None: awr_loss(x, a, mask, KL_COEF, n), awr_token),
    "ppo": Case(lambda x, y, a, mask, n=None: ppo_loss(x, y, a, mask, CLIPRANGE, n), ppo_token),
    "value": Case(lambda x, y, a, mask, n=None: value_loss(x, a, mask, num_tokens=n), value_token),
    "clipped value": Case(lambda x, y, a, mask, n=None: value_loss(x, a, mask, y, CLIPRANGE, n), clipped_value_token),
}
each_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_batch(seed, rows=4, columns=6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`trained`, an `anchor` near it (some ratios are clipped and some not), `advantages`, and a mask with gaps."""
    generator = torch.Generator().manual_seed(seed)
    anchor, noise, advantages = torch.randn(3, rows, columns, dtype=torch.float64, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    mask[0, :2] = True
    return anchor - 2 + 0.3 * noise, anchor - 2, advantages, mask


def loss_stats_gradient(case, trained, anchor, advantages, mask, num_tokens=None):
    leaf = trained.clone().requires_grad_()
    loss, stats = case.loss(leaf, anchor, advantages, mask, num_tokens)
    loss.backward()
    return loss.detach(), stats, leaf.grad


def test_apa_hand_worked():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ref_logprobs = torch.tensor([[-1.5, -1.0]])
    advantages = torch.tensor([[0.1, -0.2]])
    loss, stats = apa_loss(logprobs, ref_logprobs, advantages, torch.tensor([[True, True]]), kl_coef=0.1)
    # residuals -1 + 1.5 - 0.1 / 0.1 = -0.5 and -2 + 1 + 0.2 / 0.1 = 1: squares 0.25 and 1, mean 0.625
    assert loss.item() == pytest.approx(0.625)
    assert stats["residual_sq"].item() == pytest.approx(0.625)
    # (0.1 / 0.1)^2 = 1 and (0.2 / 0.1)^2 = 4, mean 2.5
    assert stats["target_sq"].item() == pytest.approx(2.5)
    # mean residual (-0.5 + 1) / 2, mean log ratio (0.5 - 1) / 2
    assert stats["residual"].item() == pytest.approx(0.25)
    assert stats["log_ratio"].item() == pytest.approx(-0.25)
    loss.backward()
    # 2 * residual / 2 tokens
    assert logprobs.grad.tolist() == [pytest.approx([-0.5, 1.0])]


def test_awr_hand_worked():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[0.0, math.log(2)]])
    loss, stats = awr_loss(logprobs, advantages, torch.tensor([[True, True]]), kl_coef=1.0)
    # weights exp(0) = 1 and exp(log 2) = 2: (1 * 1 + 2 * 2) / 2 = 2.5
    assert loss.item() == pytest.approx(2.5)
    assert stats["weight"].item() == pytest.approx(1.5)
    assert stats["weight_sq"].item() == pytest.approx((1 + 4) / 2)
    loss.backward()
    assert logprobs.grad.tolist() == [pytest.approx([-0.5, -1.0])]


def test_ppo_hand_worked():
    # ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -1 and eps = 0.2
    logprobs = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, stats = ppo_loss(logprobs, torch.zeros(1, 4), advantages, torch.ones(1, 4, dtype=torch.bool), cliprange=0.2)
    # max(-1.5, -1.2) = -1.2 clipped; max(1.5, 1.2) = 1.5; max(-0.5, -0.8) = -0.5; max(0.5, 0.8) = 0.8 clipped
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4)
    assert stats["clipfrac"].item() == 0.5
    assert stats["ratio"].item() == pytest.approx(1.0)
    assert stats["policykl"].item() == pytest.approx(-(math.log(1.5) + math.log(0.5)) / 2)
    assert stats["approxkl"].item() == pytest.approx((math.log(1.5) ** 2 + math.log(0.5) ** 2) / 4)
    loss.backward()
    # -advantage * ratio / 4 where it is not clipped
    assert logprobs.grad.tolist() == [pytest.approx([0.0, 1.5 / 4, -0.5 / 4, 0.0])]


def test_value_hand_worked():
    values = torch.tensor([[1.0, 3.0, 9.0]], requires_grad=True)
    returns = torch.tensor([[2.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    loss, stats = value_loss(values, returns, mask)
    # (1 + 4) / 2 tokens, halved
    assert loss.item() == 1.25
    assert stats["error"].item() == 2.5
    assert stats["clipfrac"].item() == 0.0
    loss.backward()
    assert values.grad.tolist() == [[-0.5, 1.0, 0.0]]


def test_clipped_value_hand_worked():
    values = torch.tensor([[1.0, 3.0, 0.1]], requires_grad=True)
    old_values = torch.tensor([[0.5, 3.5, 0.0]])
    returns = torch.tensor([[2.0, 1.0, 1.0]])
    loss, stats = value_loss(values, returns, torch.ones(1, 3, dtype=torch.bool), old_values, cliprange=0.25)
    # 1.0 held at 0.75: 1.25^2 = 1.5625 > 1, clipped; 3.0 held at 3.25: 2.25^2 = 5.0625 > 4, clipped; 0.1 is free: 0.81
    assert loss.item() == pytest.approx(0.5 * (1.5625 + 5.0625 + 0.81) / 3)
    assert stats["error"].item() == pytest.approx((1 + 4 + 0.81) / 3)
    assert stats["clipfrac"].item() == pytest.approx(2 / 3)
    loss.backward()
    assert values.grad.tolist() == [pytest.approx([0.0, 0.0, -0.3])]


@each_loss
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_naive_loop(case, seed):
    trained, anchor, advantages, mask = make_batch(seed)
    loss, stats, gradient = loss_stats_gradient(case, trained, anchor, advantages, mask)
    total, sums, expected_gradient = 0.0, dict.fromkeys(stats, 0.0), torch.zeros_like(trained)
    count = 0
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if not mask[b, t]:
                continue
            x, y, a = trained[b, t].item(), anchor[b, t].item(), advantages[b, t].item()
            token_loss, expected_gradient[b, t], token_stats = case.one_token(x, y, a)
            assert token_stats.keys() == sums.keys()
            total += token_loss
            sums = {name: value + token_stats[name] for name, value in sums.items()}
            count += 1
    assert loss.item() == pytest.approx(total / count, abs=1e-12)
    for name, value in sums.items():
        assert stats[name].item() == pytest.approx(value / count, abs=1e-12), name
    torch.testing.assert_close(gradient, expected_gradient / count, rtol=0, atol=1e-12)


@each_loss
def test_gradcheck(case):
    trained, anchor, advantages, mask = make_batch(3)
    leaf = trained.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: case.loss(x, anchor, advantages, mask)[0], (leaf,))


@each_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_garbage_behind_the_mask_changes_nothing(case, garbage):
    *inputs, mask = make_batch(4)
    loss, stats, gradient = loss_stats_gradient(case, *inputs, mask)
    spoiled = [tensor.masked_fill(~mask, garbage) for tensor in inputs]
    spoiled_loss, spoiled_stats, spoiled_gradient = loss_stats_gradient(case, *spoiled, mask)
    assert torch.equal(loss, spoiled_loss)
    assert torch.equal(gradient, spoiled_gradient)
    assert all(torch.equal(stats[name], spoiled_stats[name]) for name in stats)
    assert gradient[~mask].eq(0).all()


@each_loss
@pytest.mark.parametrize("dim", [0, 1], ids=["by rows", "by columns"])
def test_micro_batches_sum_to_the_whole(case, dim):
    *inputs, mask = make_batch(5, rows=5)
    loss, stats, gradient = loss_stats_gradient(case, *inputs, mask)
    # the last part has no counted token, as a rank that ran out of responses
    inputs = [torch.cat([tensor, torch.full_like(tensor, math.nan)], dim) for tensor in inputs]
    split_mask = torch.cat([mask, torch.zeros_like(mask)], dim)
    width = mask.shape[dim]
    parts = [
        loss_stats_gradient(
            case,
            *(tensor.narrow(dim, start, length) for tensor in inputs),
            split_mask.narrow(dim, start, length),
            mask.sum(),
        )
        for start, length in ((0, 2), (2, width - 2), (width, width))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-13, atol=0)
    for name, value in stats.items():
        torch.testing.assert_close(sum(part[1][name] for part in parts), value, rtol=1e-12, atol=1e-14)
    split_gradient = torch.cat([part[2] for part in parts], dim)
    torch.testing.assert_close(split_gradient.narrow(dim, 0, width), gradient, rtol=1e-13, atol=0)
    assert split_gradient.narrow(dim, width, width).eq(0).all()


@each_loss
def test_the_denominator_may_be_a_number_or_a_tensor(case):
    trained, anchor, advantages, mask = make_batch(6)
    loss, _ = case.loss(trained, anchor, advantages, mask)
    for twice in (2 * int(mask.sum()), 2.0 * int(mask.sum()), 2 * mask.sum()):
        half, _ = case.loss(trained, anchor, advantages, mask, twice)
        assert half.item() == pytest.approx(loss.item() / 2, rel=1e-13)


@each_loss
def test_nothing_counted_is_zero(case):
    trained, anchor, advantages, mask = make_batch(7)
    loss, stats, gradient = loss_stats_gradient(case, trained, anchor, advantages, torch.zeros_like(mask))
    assert loss.item() == 0.0
    assert gradient.eq(0).all()
    assert all(value.item() == 0.0 for value in stats.values())


@each_loss
def test_only_the_trained_argument_carries_gradient(case):
    *inputs, mask = make_batch(8)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    loss, stats = case.loss(*leaves, mask)
    loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None
    assert not any(value.requires_grad for value in stats.values())
    assert all(value.shape == () for value in (loss, *stats.values()))


@each_loss
def test_half_precision_is_raised_and_double_kept(case):
    *inputs, mask = make_batch(9)
    assert case.loss(*inputs, mask)[0].dtype == torch.float64
    halves = [tensor.bfloat16() for tensor in inputs]
    loss, stats = case.loss(*halves, mask)
    raised, _ = case.loss(*(tensor.float() for tensor in halves), mask)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, raised)
    assert all(value.dtype == torch.float32 for value in stats.values())


@each_loss
def test_no_value_is_read_on_the_host(case):
    # a meta tensor has no data: reading a number of it raises
    *inputs, mask = (tensor.to("meta") for tensor in make_batch(10))
    assert case.loss(*inputs, mask, mask.sum())[0].shape == ()
    assert log_normalizer(inputs[2], mask, KL_COEF).shape == ()


@each_loss
def test_inputs_are_left_alone(case):
    inputs = make_batch(11)
    kept = [tensor.clone() for tensor in inputs]
    case.loss(*inputs)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, kept, strict=True))


@given(seed=st.integers(0, 10_000), kl_coef=st.floats(0.05, 10))
def test_apa_is_zero_exactly_where_the_policy_is_the_target(seed, kl_coef):
    _, ref_logprobs, advantages, mask = make_batch(seed)
    target = (ref_logprobs + advantages / kl_coef).requires_grad_()
    loss, _ = apa_loss(target, ref_logprobs, advantages, mask, kl_coef)
    loss.backward()
    assert loss.item() < 1e-24
    assert target.grad.abs().max().item() < 1e-12
    # and nowhere else: one token off by d costs d^2 / N
    moved = target.detach().clone()
    moved[0, 0] += 0.5
    loss, _ = apa_loss(moved, ref_logprobs, advantages, mask, kl_coef)
    assert loss.item() == pytest.approx(0.25 / mask.sum().item(), rel=1e-9)


@given(seed=st.integers(0, 10_000), shift=st.floats(-5, 5))
def test_apa_depends_on_the_log_ratio_and_on_advantage_over_lambda_alone(seed, shift):
    logprobs, ref_logprobs, advantages, mask = make_batch(seed)
    loss, _ = apa_loss(logprobs, ref_logprobs, advantages, mask, 0.5)
    shifted, _ = apa_loss(logprobs + shift, ref_logprobs + shift, advantages, mask, 0.5)
    scaled, _ = apa_loss(logprobs, ref_logprobs, 3 * advantages, mask, 1.5)
    assert shifted.item() == pytest.approx(loss.item(), rel=1e-9)
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-12)


def test_apa_without_advantages_pulls_to_the_anchor():
    # the mean squared log ratio: twice the mean k2 estimate of the KL
    logprobs, ref_logprobs, advantages, mask = make_batch(12)
    loss, _ = apa_loss(logprobs, ref_logprobs, torch.zeros_like(advantages), mask, 0.1)
    assert loss.item() == pytest.approx((logprobs - ref_logprobs)[mask].square().mean().item(), rel=1e-12)


def test_awr_without_advantages_is_the_negative_log_likelihood():
    logprobs, _, advantages, mask = make_batch(13)
    loss, stats = awr_loss(logprobs, torch.zeros_like(advantages), mask, 0.1)
    assert loss.item() == pytest.approx(-logprobs[mask].mean().item(), rel=1e-12)
    assert stats["weight"].item() == 1.0


def test_ppo_at_ratio_one_has_the_policy_gradient():
    logprobs, _, advantages, mask = make_batch(14)
    leaf = logprobs.clone().requires_grad_()
    loss, stats = ppo_loss(leaf, logprobs, advantages, mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, leaf)
    (expected,) = torch.autograd.grad(-(advantages * leaf)[mask].mean(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)
    assert loss.item() == pytest.approx(-advantages[mask].mean().item(), rel=1e-12)
    assert [stats[name].item() for name in ("approxkl", "policykl", "ratio", "clipfrac")] == [0.0, 0.0, 1.0, 0.0]


def test_ppo_with_a_wide_clip_is_the_importance_ratio():
    logprobs, old_logprobs, advantages, mask = make_batch(15)
    loss, stats = ppo_loss(logprobs, old_logprobs, advantages, mask, 1e6)
    expected = -(advantages * (logprobs - old_logprobs).exp())[mask].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert stats["clipfrac"].item() == 0.0


def test_values_within_the_clip_are_free():
    values, old_values, returns, mask = make_batch(16)
    free, _ = value_loss(values, returns, mask)
    wide, stats = value_loss(values, returns, mask, old_values, 1e6)
    assert torch.equal(free, wide)
    assert stats["clipfrac"].item() == 0.0
    # old values alone ask for no clipping
    assert torch.equal(free, value_loss(values, returns, mask, old_values)[0])


@given(seed=st.integers(0, 10_000))
def test_clipping_never_lowers_a_loss(seed):
    trained, anchor, advantages, mask = make_batch(seed)
    wide_ppo, _ = ppo_loss(trained, anchor, advantages, mask, 1e6)
    wide_value, _ = value_loss(trained, advantages, mask)
    assert ppo_loss(trained, anchor, advantages, mask, 0.1)[0] >= wide_ppo - 1e-15
    assert value_loss(trained, advantages, mask, anchor, 0.1)[0] >= wide_value - 1e-15


def test_log_normalizer_hand_worked():
    # exp(log 2) and exp(0): the mean of 2 and 1 is 1.5
    advantages = torch.tensor([[0.5 * math.log(2), 0.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    assert log_normalizer(advantages, mask, 0.5).item() == pytest.approx(math.log(1.5))


def test_log_normalizer_is_the_log_of_the_mean_awr_weight():
    logprobs, _, advantages, mask = make_batch(17)
    weight = awr_loss(logprobs, advantages, mask, KL_COEF)[1]["weight"]
    assert log_normalizer(advantages, mask, KL_COEF).item() == pytest.approx(weight.log().item(), abs=1e-13)


def test_log_normalizer_of_nothing_small_and_large():
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert log_normalizer(torch.ones(1, 4), ~mask, 0.1).item() == 0.0
    assert log_normalizer(torch.zeros(1, 4), mask, 0.1).item() == 0.0
    # exp(5000) is beyond float32, its logarithm is not
    assert log_normalizer(torch.full((1, 4), 500.0), mask, 0.1).item() == pytest.approx(5000.0)


@given(seed=st.integers(0, 10_000))
def test_advantages_of_mean_zero_have_a_normalizer_of_at_least_one(seed):
    # Jensen: log mean exp(A / lambda) >= mean A / lambda = 0, and about var(A / lambda) / 2 for a large lambda
    _, _, advantages, mask = make_batch(seed)
    advantages = advantages - advantages[mask].mean()
    assert log_normalizer(advantages, mask, 0.5).item() >= 0
    half_variance = advantages[mask].square().mean().item() / 2
    assert log_normalizer(advantages, mask, 1000.0).item() * 1000.0**2 == pytest.approx(half_variance, rel=1e-2)


@pytest.mark.parametrize("kl_coef", [0.0, -0.1, math.nan, math.inf])
def test_kl_coef_is_positive(kl_coef):
    x, y, a, mask = make_batch(18)
    for call in (
        lambda: apa_loss(x, y, a, mask, kl_coef),
        lambda: awr_loss(x, a, mask, kl_coef),
        lambda: log_normalizer(a, mask, kl_coef),
    ):
        with pytest.raises(ValueError, match=f"kl_coef is {kl_coef}"):
            call()


@pytest.mark.parametrize("cliprange", [0.0, -0.2, math.nan])
def test_cliprange_is_positive(cliprange):
    x, y, a, mask = make_batch(19)
    with pytest.raises(ValueError, match=f"cliprange is {cliprange}"):
        ppo_loss(x, y, a, mask, cliprange)
    with pytest.raises(ValueError, match=f"cliprange is {cliprange}"):
        value_loss(x, a, mask, y, cliprange)


def test_clipped_values_need_the_old_ones():
    x, _, a, mask = make_batch(20)
    with pytest.raises(ValueError, match="old_values_BR is None"):
        value_loss(x, a, mask, cliprange=0.2)


@each_loss
def test_the_mask_is_bool_and_two_dimensional(case):
    *inputs, mask = make_batch(21)
    with pytest.raises(ValueError, match="response_mask_BR has dtype"):
        case.loss(*inputs, mask.float())
    with pytest.raises(ValueError, match=r"response_mask_BR has shape \(6,\)"):
        case.loss(*(tensor[0] for tensor in inputs), mask[0])
    with pytest.raises(ValueError, match="num_tokens is 0"):
        case.loss(*inputs, mask, 0)


def test_a_wrong_shape_is_named():
    x, y, a, mask = make_batch(22)
    short = x[:, 1:]
    calls = {
        "logprobs_BR": lambda: apa_loss(short, y, a, mask, 0.1),
        "ref_logprobs_BR": lambda: apa_loss(x, short, a, mask, 0.1),
        "advantages_BR": lambda: awr_loss(x, short, mask, 0.1),
        # a shape that would broadcast
        "old_logprobs_BR": lambda: ppo_loss(x, y[:1], a, mask, 0.2),
        "values_BR": lambda: value_loss(short, a, mask),
        "returns_BR": lambda: value_loss(x, a[..., None], mask),
        "old_values_BR": lambda: value_loss(x, a, mask, short, 0.2),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            call()
