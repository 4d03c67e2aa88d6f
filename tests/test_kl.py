import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_apa.algorithms.kl import AdaptiveKLController, FixedKLController, kl_estimate, kl_full, kl_k1, kl_k2, kl_k3


def random_log_softmax(seed, *shape):
    logits = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return logits.log_softmax(-1)


def test_hand_worked():
    # pi = 1/2, pi_init = 1/4: x = log 2. k1 = log 2; k2 = log(2)^2 / 2; k3 = exp(-log 2) - 1 + log 2 = log 2 - 1/2
    pi, init = torch.tensor([[math.log(0.5)]]).double(), torch.tensor([[math.log(0.25)]]).double()
    assert kl_k1(pi, init).item() == pytest.approx(math.log(2))
    assert kl_k2(pi, init).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(pi, init).item() == pytest.approx(math.log(2) - 0.5)
    # the other way round x = -log 2: k1 changes its sign, k2 does not, k3 = 2 - 1 - log 2
    assert kl_k1(init, pi).item() == pytest.approx(-math.log(2))
    assert kl_k2(init, pi).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(init, pi).item() == pytest.approx(1 - math.log(2))


def test_full_hand_worked():
    # pi = (1/2, 1/2), pi_init = (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3)
    pi = torch.tensor([[[0.5, 0.5]]]).double().log()
    init = torch.tensor([[[0.25, 0.75]]]).double().log()
    assert kl_full(pi, init).item() == pytest.approx(0.5 * math.log(4 / 3))


def test_full_equals_a_naive_loop():
    pi, init = random_log_softmax(0, 2, 3, 5), random_log_softmax(1, 2, 3, 5)
    result = kl_full(pi, init)
    assert result.shape == (2, 3)
    for b in range(2):
        for r in range(3):
            pairs = zip(pi[b, r].tolist(), init[b, r].tolist(), strict=True)
            assert result[b, r].item() == pytest.approx(sum(math.exp(p) * (p - q) for p, q in pairs), abs=1e-14)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    # every token of the vocabulary, weighted by its probability under the policy: the expectation without sampling
    pi, init = random_log_softmax(2, 1, 1, 6), random_log_softmax(3, 1, 1, 6)
    exact = kl_full(pi, init)
    torch.testing.assert_close((pi.exp() * kl_k1(pi, init)).sum(-1), exact, rtol=0, atol=1e-14)
    torch.testing.assert_close((pi.exp() * kl_k3(pi, init)).sum(-1), exact, rtol=0, atol=1e-14)
    assert abs((pi.exp() * kl_k2(pi, init)).sum(-1) - exact).item() > 0.01


def test_equal_policies_have_no_kl():
    pi = random_log_softmax(4, 2, 3, 5)
    for estimator in (kl_k1, kl_k2, kl_k3):
        assert estimator(pi, pi).eq(0).all()
    assert kl_full(pi, pi).eq(0).all()


@settings(max_examples=50)
@given(x=st.floats(-20, 20), reference=st.floats(-30, 0))
def test_k2_and_k3_are_never_negative_and_k3_is_above_k1_where_k1_is_negative(x, reference):
    init = torch.tensor([reference], dtype=torch.float64)
    pi = init + x
    assert kl_k2(pi, init).item() >= 0
    assert kl_k3(pi, init).item() >= 0
    # k3 - k1 = exp(-x) - 1
    assert (kl_k3(pi, init) > kl_k1(pi, init)).item() == (pi - init < 0).item()


def test_k3_of_a_tiny_ratio_is_not_rounded_away():
    # x = 1e-4: k3 = x^2/2 - x^3/6 = 4.99983e-9, but float32 exp(-x) - 1 + x would leave a multiple of 6e-8
    result = kl_k3(torch.tensor([1e-4]), torch.tensor([0.0])).item()
    assert result == pytest.approx(4.99983e-9, rel=1e-2)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_full_is_never_negative(seed):
    assert kl_full(random_log_softmax(seed, 2, 2, 7), random_log_softmax(seed + 1, 2, 2, 7)).min().item() > 0


def test_full_with_tokens_outside_the_support():
    # the policy never takes token 1: 1 log(1 / 0.25) = log 4, and no NaN from 0 (-inf)
    pi = torch.tensor([[[0.0, -math.inf]]], requires_grad=True)
    init = torch.tensor([[[math.log(0.25), math.log(0.75)]]])
    result = kl_full(pi, init)
    assert result.item() == pytest.approx(math.log(4))
    result.backward()
    assert pi.grad.isfinite().all()
    # neither model takes it: the same, with init = (1, 0)
    assert kl_full(pi, torch.tensor([[[0.0, -math.inf]]])).item() == 0.0
    # the policy takes what the reference excludes
    assert kl_full(init, pi.detach()).item() == math.inf


def test_gradcheck():
    pi = random_log_softmax(5, 2, 2, 3).requires_grad_()
    init = random_log_softmax(6, 2, 2, 3).requires_grad_()
    for estimator in (kl_k1, kl_k2, kl_k3, kl_full):
        assert torch.autograd.gradcheck(estimator, (pi, init))


def test_gradient_of_the_full_kl_in_the_logits():
    # d KL / d logit_a = pi(a) (log pi(a) - log pi_init(a) - KL)
    logits = torch.randn(1, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7), requires_grad=True)
    init = random_log_softmax(8, 1, 1, 5)
    pi = logits.log_softmax(-1)
    exact = kl_full(pi, init)
    (gradient,) = torch.autograd.grad(exact.sum(), logits)
    expected = pi.exp() * (pi - init - exact[..., None])
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-14)


def test_half_precision_is_raised():
    pi, init = random_log_softmax(9, 1, 2, 3).bfloat16(), random_log_softmax(10, 1, 2, 3).bfloat16()
    for estimator in (kl_k1, kl_k2, kl_k3, kl_full):
        result = estimator(pi, init)
        assert result.dtype == torch.float32
        assert torch.equal(result, estimator(pi.float(), init.float()))


def test_estimates_by_name():
    pi, init = random_log_softmax(11, 2, 3), random_log_softmax(12, 2, 3)
    x = pi - init
    assert torch.equal(kl_estimate(pi, init, "kl"), x)
    assert torch.equal(kl_estimate(pi, init, "abs"), x.abs())
    assert torch.equal(kl_estimate(pi, init, "mse"), 0.5 * x**2)
    torch.testing.assert_close(kl_estimate(pi, init, "k3"), torch.exp(-x) - 1 + x, rtol=0, atol=1e-14)
    for name in ("full", "k4", ""):
        with pytest.raises(ValueError, match="kl_penalty is"):
            kl_estimate(pi, init, name)


def test_full_needs_equal_shapes():
    with pytest.raises(ValueError, match="ref_logprobs_BRV has shape"):
        kl_full(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


def test_adaptive_controller_hand_worked():
    controller = AdaptiveKLController(0.1, target=6.0, horizon=10_000)
    # KL 6.6 is 10 % above 6: 0.1 * (1 + 0.1 * 64 / 10000) = 0.1 * 1.00064
    controller.update(6.6, 64)
    assert controller.value == pytest.approx(0.1 * 1.00064, rel=1e-12)
    # KL 60 is 900 % above, clipped to 20 %: times 1 + 0.2 * 0.0064 = 1.00128
    controller.update(60.0, 64)
    assert controller.value == pytest.approx(0.1 * 1.00064 * 1.00128, rel=1e-12)
    # KL -3 is 150 % below, clipped to -20 %: times 1 - 0.00128
    controller.update(-3.0, 64)
    assert controller.value == pytest.approx(0.1 * 1.00064 * 1.00128 * 0.99872, rel=1e-12)


@settings(max_examples=50)
@given(current=st.floats(0, 100), n_steps=st.integers(1, 1000))
def test_adaptive_controller_moves_the_right_way_by_at_most_a_fifth(current, n_steps):
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    controller.update(current, n_steps)
    factor = controller.value / 0.2
    assert abs(factor - 1) <= 0.2 * n_steps / 1000 + 1e-12
    if current == 6.0:
        assert controller.value == 0.2
    elif abs(current - 6.0) > 1e-6:
        assert (factor > 1) == (current > 6.0)


def test_adaptive_controller_holds_a_target():
    # a system whose KL falls with the coefficient: KL = 3 / value; the target 6 is met at 0.5
    controller = AdaptiveKLController(0.05, target=6.0, horizon=640)
    for _ in range(500):
        controller.update(3.0 / controller.value, 64)
    assert controller.value == pytest.approx(0.5, rel=1e-6)


def test_fixed_controller_stays():
    controller = FixedKLController(0.3)
    controller.update(100.0, 64)
    assert controller.value == 0.3


def test_controllers_continue_from_their_state():
    straight, stopped = (AdaptiveKLController(0.1, 6.0, 1000) for _ in range(2))
    for current in (9.0, 4.0):
        straight.update(current, 64)
    stopped.update(9.0, 64)
    resumed = AdaptiveKLController(0.7, 6.0, 1000)
    resumed.load_state_dict(stopped.state_dict())
    resumed.update(4.0, 64)
    assert resumed.value == straight.value
    fixed = FixedKLController(0.5)
    fixed.load_state_dict(FixedKLController(0.2).state_dict())
    assert fixed.value == 0.2


def test_controller_errors():
    with pytest.raises(ValueError, match="kl_coef is -0"):
        FixedKLController(-0.1)
    with pytest.raises(ValueError, match="init_kl_coef is nan"):
        AdaptiveKLController(math.nan, 6.0, 10_000)
    with pytest.raises(ValueError, match="target is 0"):
        AdaptiveKLController(0.1, 0.0, 10_000)
    with pytest.raises(ValueError, match="horizon is -1"):
        AdaptiveKLController(0.1, 6.0, -1)
    controller = AdaptiveKLController(0.1, 6.0, 100)
    with pytest.raises(ValueError, match="current is nan"):
        controller.update(math.nan, 10)
    # 1 - 0.2 * 500 / 100 = 0: the coefficient would vanish, and beyond that turn negative
    for n_steps in (500, -1):
        with pytest.raises(ValueError, match="n_steps is"):
            controller.update(0.0, n_steps)
    assert controller.value == 0.1
