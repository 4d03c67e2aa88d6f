"""Offline losses, on hand-worked numbers and on the tree of `test_theorem1`, where the right answer is known."""

import math

import pytest
import torch
from torch import Tensor

from tests import test_theorem1
from tests.test_response_regression import optimum, response_logprobs
from tests.test_theorem1 import (
    KL_COEF,
    VOCABULARY,
    Tree,
    log_normalizers,
    optimal_policy,
    response_probabilities,
    shares_of,
)
from trl_apa.algorithms.losses import apa_loss
from trl_apa.algorithms.rewards import token_rewards
from trl_apa.offline.losses import dro_loss, expectile_loss, ilql_loss, state_normaliser_loss


tree = test_theorem1.tree  # the fixture


def expectile_by_bisection(values: list[float], weights: list[float], tau: float) -> float:
    """The point at which tau times what lies above balances 1 - tau times what lies below."""
    low, high = min(values), max(values)
    for _ in range(200):
        middle = (low + high) / 2
        pulls = [w * (v - middle) * (tau if v > middle else 1 - tau) for v, w in zip(values, weights, strict=True)]
        low, high = (middle, high) if sum(pulls) > 0 else (low, middle)
    return (low + high) / 2


# ---- hand-worked ----


def test_an_expectile_hand_worked():
    values, targets = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 0.0])
    # above by 2: 0.8 * 4; below by 1: 0.2 * 1
    torch.testing.assert_close(expectile_loss(values, targets, 0.8), torch.tensor([3.2, 0.2]))
    assert expectile_by_bisection([0.0, 1.0], [1, 1], 0.5) == pytest.approx(0.5)
    # 0.8 (1 - x) = 0.2 x
    assert expectile_by_bisection([0.0, 1.0], [1, 1], 0.8) == pytest.approx(0.8)
    for tau in (0.0, 1.0):
        with pytest.raises(ValueError, match="expectile is"):
            expectile_loss(values, targets, tau)


def test_ilql_hand_worked():
    """Two tokens, a vocabulary of two: r = (0, 2), V = (1, 3), Q^ = (2, 1), gamma = 0.5."""
    q1 = torch.tensor([[[1.0, 0.0], [0.0, 4.0]]])
    q2 = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    arguments = {
        "target_q_BR": torch.tensor([[2.0, 1.0]]),
        "values_BR": torch.tensor([[1.0, 3.0]]),
        "actions_BR": torch.tensor([[0, 1]]),
        "rewards_BR": torch.tensor([[0.0, 2.0]]),
        "response_mask_BR": torch.tensor([[True, True]]),
    }
    loss, stats = ilql_loss((q1, q2), **arguments, gamma=0.5, expectile=0.75, cql_coef=0.0)
    # Targets of Q: 0 + 0.5 * 3 = 1.5, and 2 + 0 = 2. First token (1.5 - 1)^2 + (1.5 - 2)^2, second (2 - 4)^2 + 0.
    assert stats["q_error"].item() == pytest.approx((0.5 + 4.0) / 2)
    # V: 2 is above 1, 0.75 * 1; 1 is below 3, 0.25 * 4
    assert stats["value_error"].item() == pytest.approx((0.75 + 1.0) / 2)
    assert loss.item() == pytest.approx(2.25 + 0.875)
    assert (stats["q"].item(), stats["value"].item()) == (1.5, 2.0)
    with_cql, stats = ilql_loss((q1, q2), **arguments, gamma=0.5, expectile=0.75, cql_coef=0.1)
    # log(1 + e^-d) for the leads 1, 2, 4 and 2 of the tokens that were taken
    expected = sum(torch.log1p(torch.exp(torch.tensor(-d))).item() for d in (1.0, 2.0, 4.0, 2.0)) / 2
    assert stats["cql"].item() == pytest.approx(expected)
    assert with_cql.item() == pytest.approx(3.125 + 0.1 * expected)


def test_the_normaliser_s_residual_is_that_of_apa_with_its_advantage_lowered():
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs, advantages, h = torch.randn(4, 3, 5, generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.7
    policy, _ = apa_loss(logprobs, ref_logprobs, advantages - h, mask, 0.2)
    h = h.requires_grad_()
    loss, stats = state_normaliser_loss(h, logprobs, ref_logprobs, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(policy.item(), rel=1e-6)
    assert stats["log_normalizer"].item() == pytest.approx((h[mask].mean() / 0.2).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, h)
    residual = logprobs - ref_logprobs - (advantages - h.detach()) / 0.2
    torch.testing.assert_close(gradient, torch.where(mask, 2 * residual / 0.2 / mask.sum(), 0.0))


# ---- independent reference, masks, splits ----


def random_batch(seed=0, rows=3, width=4, vocabulary=5):
    generator = torch.Generator().manual_seed(seed)
    q1, q2 = torch.randn(2, rows, width, vocabulary, generator=generator, dtype=torch.float64)
    target_q, values, rewards = torch.randn(3, rows, width, generator=generator, dtype=torch.float64)
    actions = torch.randint(vocabulary, (rows, width), generator=generator)
    mask = torch.arange(width) < torch.tensor([[4], [1], [3]])
    mask[0, 1] = False  # a gap
    return (q1, q2), (target_q, values, actions, rewards, mask)


def test_ilql_equals_a_naive_loop():
    (q1, q2), (target_q, values, actions, rewards, mask) = random_batch()
    total = 0.0
    for b in range(3):
        counted = [t for t in range(4) if mask[b, t]]
        for place, t in enumerate(counted):
            following = values[b, counted[place + 1]].item() if place + 1 < len(counted) else 0.0
            a, error = actions[b, t], target_q[b, t].item() - values[b, t].item()
            total += (0.3 if error < 0 else 0.7) * error**2
            for q in (q1, q2):
                total += (rewards[b, t].item() + 0.9 * following - q[b, t, a].item()) ** 2
                total += 0.2 * (q[b, t].exp().sum().log() - q[b, t, a]).item()
    loss, _ = ilql_loss((q1, q2), target_q, values, actions, rewards, mask, 0.9, 0.7, 0.2)
    assert loss.item() == pytest.approx(total / mask.sum().item(), rel=1e-12)


def test_micro_batches_add_up_and_garbage_behind_the_mask_changes_nothing():
    qs, tensors = random_batch()
    whole, _ = ilql_loss(qs, *tensors, 0.9, 0.7, 0.2)
    count = tensors[-1].sum()
    parts = [
        ilql_loss(tuple(q[rows] for q in qs), *(x[rows] for x in tensors), 0.9, 0.7, 0.2, num_tokens=count)[0]
        for rows in ([0], [1, 2])
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)
    mask = tensors[-1]
    dirty = [torch.where(mask, x, 999 if x.dtype == torch.long else torch.nan) for x in tensors[:-1]]
    dirty_qs = [torch.where(mask[..., None], q, torch.nan).requires_grad_() for q in qs]
    loss, _ = ilql_loss(tuple(dirty_qs), *dirty, mask, 0.9, 0.7, 0.2)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    loss.backward()
    assert all(q.grad[mask].isfinite().all() for q in dirty_qs)


def test_the_cql_term_takes_q_for_logits_and_no_other_gradient_leaks():
    qs, (target_q, values, actions, rewards, mask) = random_batch()
    qs = [q.requires_grad_() for q in qs]
    target_q, values = target_q.requires_grad_(), values.requires_grad_()
    gradients = []
    for cql_coef in (0.0, 1.0):
        loss, _ = ilql_loss(tuple(qs), target_q, values, actions, rewards, mask, 0.9, 0.7, cql_coef)
        gradients.append(torch.autograd.grad(loss, [*qs, values, target_q], allow_unused=True))
    for index, q in enumerate(qs):
        taken = torch.nn.functional.one_hot(actions, 5)
        expected = torch.where(mask[..., None], (q.softmax(-1) - taken) / mask.sum(), 0.0)
        torch.testing.assert_close(gradients[1][index] - gradients[0][index], expected.detach())
    # V learns from Q^ alone, and Q^ from nothing
    expected = -2 * torch.where(target_q < values, 0.3, 0.7) * (target_q - values) / mask.sum()
    torch.testing.assert_close(gradients[0][2], torch.where(mask, expected, 0.0).detach())
    assert gradients[0][3] is None


def test_what_does_not_fit_is_refused():
    qs, tensors = random_batch()
    with pytest.raises(ValueError, match="cql_coef is -1"):
        ilql_loss(qs, *tensors, 0.9, 0.7, -1.0)
    with pytest.raises(ValueError, match=r"q_logits\[1\] without its last axis has shape \(3, 3\)"):
        ilql_loss((qs[0], qs[1][:, :3]), *tensors, 0.9, 0.7, 0.1)
    with pytest.raises(ValueError, match="kl_coef is 0"):
        state_normaliser_loss(*(torch.zeros(1, 1),) * 4, torch.ones(1, 1, dtype=torch.bool), 0)


# ---- on the tree ----


def learn_q(tree: Tree, weight_N: Tensor, tau: float, steps: int) -> tuple[Tensor, Tensor]:
    """Tabular ILQL without CQL: Q and V after semi-gradient steps from 0, response n counted w_n times.

    Without CQL the loss is homogeneous of degree 2 in its inputs: a row times sqrt(w_n) counts w_n times.
    """
    states = len(tree.init_SV)
    q_2SV = torch.zeros(2, states, VOCABULARY, dtype=torch.float64)
    values_S = torch.zeros(states, dtype=torch.float64)
    rewards_NR = token_rewards(tree.scores_N, tree.mask_NR)
    root_N1 = weight_N.sqrt()[:, None]
    # Each entry's own curvature, so that what is seldom visited is learned as fast.
    visits_NR = torch.where(tree.mask_NR, weight_N[:, None], 0.0)
    visits_SV = torch.zeros(states, VOCABULARY, dtype=torch.float64)
    visits_SV.index_put_((tree.state_NR, tree.token_NR), visits_NR, accumulate=True)
    rates = (0.4 / visits_SV, 0.4 / visits_SV.sum(1))
    for _ in range(steps):
        q_2SV.requires_grad_(), values_S.requires_grad_()
        rows = root_N1[..., None] * q_2SV[:, tree.state_NR]
        target_NR = q_2SV.detach().min(0).values[tree.state_NR, tree.token_NR]
        loss, _ = ilql_loss(
            (rows[0], rows[1]),
            root_N1 * target_NR,
            root_N1 * values_S[tree.state_NR],
            tree.token_NR,
            root_N1 * rewards_NR,
            tree.mask_NR,
            gamma=1.0,
            expectile=tau,
            cql_coef=0.0,
            num_tokens=1,
        )
        gradients = torch.autograd.grad(loss, [q_2SV, values_S])
        q_2SV, values_S = ((x - r * g).detach() for x, r, g in zip((q_2SV, values_S), rates, gradients, strict=True))
    return q_2SV, values_S


def values_by_recursion(tree: Tree, weight_N: Tensor, tau: float) -> dict[tuple[int, ...], float]:
    """V of each prefix: the expectile, over the responses that pass, of the score or the next prefix's V."""
    responses = [tuple(t[m].tolist()) for t, m in zip(tree.token_NR, tree.mask_NR, strict=True)]
    scores, weights = dict(zip(responses, tree.scores_N.tolist(), strict=True)), weight_N.tolist()

    def value(prefix: tuple[int, ...]) -> float:
        if prefix in scores:
            return scores[prefix]
        after = [(*prefix, token) for token in range(VOCABULARY)]
        shares = [sum(w for r, w in zip(responses, weights, strict=True) if r[: len(p)] == p) for p in after]
        return expectile_by_bisection([value(p) for p in after], shares, tau)

    return {r[:t]: value(r[:t]) for r in responses for t in range(len(r))}


@pytest.mark.parametrize("tau", [0.5, 0.8])
def test_ilql_finds_the_values_that_a_recursion_over_the_tree_gives(tree, tau):
    weight_N = 1.0 + torch.arange(15).double() % 3
    q_2SV, values_S = learn_q(tree, weight_N, tau, steps=200)
    expected = values_by_recursion(tree, weight_N, tau)
    for n in range(15):
        for t in range(int(tree.mask_NR[n].sum())):
            prefix = tuple(tree.token_NR[n, :t].tolist())
            assert values_S[tree.state_NR[n, t]].item() == pytest.approx(expected[prefix], abs=1e-6)
            after = (*prefix, int(tree.token_NR[n, t]))
            q = expected.get(after, tree.scores_N[n].item())
            assert q_2SV[:, tree.state_NR[n, t], tree.token_NR[n, t]].tolist() == pytest.approx([q, q], abs=1e-6)
    root = values_S[tree.state_NR[0, 0]].item()
    mean = (weight_N * tree.scores_N).sum() / weight_N.sum()
    # 0.5 evaluates the behaviour policy; more looks for what is better than it
    assert root == pytest.approx(mean.item(), abs=1e-6) if tau == 0.5 else root > mean + 0.1


@pytest.mark.slow
def test_a_large_expectile_finds_the_best_response_in_the_data(tree):
    best = tree.scores_N.argmax()
    # the data hold the best response, but ever so seldom
    weight_N = torch.ones(15).double()
    weight_N[best] = 0.5
    q_2SV, values_S = learn_q(tree, weight_N, tau=0.98, steps=400)
    state, response = tree.state_NR[0, 0], []
    following = {
        tuple(t[:k].tolist()): s
        for t, s_R in zip(tree.token_NR, tree.state_NR, strict=True)
        for k, s in enumerate(s_R)
    }
    while True:
        response.append(int((q_2SV[:, state].min(0).values - values_S[state]).argmax()))
        if tuple(response) not in following or response[-1] == 0 or len(response) == 3:
            break
        state = following[tuple(response)]
    assert response == tree.token_NR[best][tree.mask_NR[best]].tolist()


def test_shifting_pi_init_by_the_advantages_of_its_own_data_is_the_optimum_of_the_objective(tree):
    q_2SV, values_S = learn_q(tree, response_probabilities(tree, tree.init_SV), tau=0.5, steps=100)
    shifted_SV = (tree.init_SV + (q_2SV.min(0).values - values_S[:, None]) / KL_COEF).log_softmax(-1)
    torch.testing.assert_close(shifted_SV, optimal_policy(tree, KL_COEF), rtol=0, atol=1e-6)


def test_off_policy_apa_with_a_learned_normaliser_reaches_the_optimum(tree):
    """Where plain APA does not: `test_theorem1.test_off_policy_the_constant_holds_the_policy_back`."""
    weight_N = response_probabilities(tree, tree.init_SV)
    root_N1 = weight_N.sqrt()[:, None]
    logits_SV, h_S = tree.init_SV.clone(), torch.zeros(len(tree.init_SV), dtype=torch.float64)
    for _ in range(800):
        logits_SV.requires_grad_(), h_S.requires_grad_()
        pi_SV = logits_SV.log_softmax(-1)
        logprobs, ref_logprobs = (root_N1 * x[tree.state_NR, tree.token_NR] for x in (pi_SV, tree.init_SV))
        advantages, h = root_N1 * tree.advantages_NR, root_N1 * h_S[tree.state_NR]
        common = (tree.mask_NR, KL_COEF, 1)
        loss, _ = apa_loss(logprobs, ref_logprobs, advantages - h.detach(), *common)
        h_loss, _ = state_normaliser_loss(h, logprobs, ref_logprobs, advantages, *common)
        gradients = torch.autograd.grad(loss + h_loss, [logits_SV, h_S])
        # h is in units of the advantage, where its curvature is 1 / lambda^2
        rates = (0.5, 0.5 * KL_COEF**2)
        logits_SV, h_S = ((x - r * g).detach() for x, r, g in zip((logits_SV, h_S), rates, gradients, strict=True))
    torch.testing.assert_close(logits_SV.log_softmax(-1), optimal_policy(tree, KL_COEF), rtol=0, atol=1e-6)
    torch.testing.assert_close(h_S / KL_COEF, log_normalizers(tree, KL_COEF), rtol=0, atol=1e-6)
    assert (loss + h_loss).item() < 1e-10


# ---- DRO ----


def dro_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logprobs, ref_logprobs = (torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    values, rewards = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 2, 0, 3])[:, None]
    return logprobs, ref_logprobs, values, rewards, mask


def test_dro_hand_worked():
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]])
    ref_logprobs = torch.tensor([[-2.0, -2.5], [-1.0, math.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    policy_loss, value_loss, stats = dro_loss(
        logprobs, ref_logprobs, torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.0]), mask, 0.5
    )
    # log-ratios 1.5 and -2: 0.75 - (2 - 1) and -1 - (0 + 1) are -0.25 and -2; squares 0.0625 and 4, mean 2.03125
    assert policy_loss.item() == pytest.approx(2.03125 / (2 * 0.5))
    assert value_loss.item() == pytest.approx(2.03125 / 2)
    expected = {"residual": -1.125, "residual_sq": 2.03125, "target_sq": 1.0, "log_ratio": -0.25, "value": 0.0}
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_dro_has_the_gradients_of_the_papers_algorithm(seed):
    """- (r - V) grad log pi + tau / 2 grad (log ratio)^2 and (V - r + tau log ratio) grad V, of each response."""
    logprobs, ref_logprobs, values, rewards, mask = dro_batch(seed)
    logprobs.requires_grad_(), values.requires_grad_()
    policy_loss, value_loss, _ = dro_loss(logprobs, ref_logprobs, values, rewards, mask, 0.3)
    assert torch.autograd.grad(policy_loss, values, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(value_loss, logprobs, allow_unused=True, retain_graph=True) == (None,)
    found = torch.autograd.grad(policy_loss + value_loss, [logprobs, values])
    expected_policy, expected_value = torch.zeros_like(logprobs), torch.zeros_like(values)
    for row in (0, 1, 3):  # of three responses with a token
        length = int(mask[row].sum())
        ratio = sum((logprobs[row, t] - ref_logprobs[row, t]).item() for t in range(length))
        expected_policy[row, :length] = (-(float(rewards[row]) - float(values[row])) + 0.3 * ratio) / 3
        expected_value[row] = (float(values[row]) - float(rewards[row]) + 0.3 * ratio) / 3
    torch.testing.assert_close(found[0], expected_policy)
    torch.testing.assert_close(found[1], expected_value)


def test_dro_adds_up_over_micro_batches_and_names_what_does_not_fit():
    logprobs, ref_logprobs, values, rewards, mask = dro_batch()
    together = dro_loss(logprobs, ref_logprobs, values, rewards, mask, 0.3)
    parts = [
        dro_loss(*(x[rows] for x in (logprobs, ref_logprobs, values, rewards, mask)), 0.3, 3)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    for index in (0, 1):
        torch.testing.assert_close(parts[0][index] + parts[1][index], together[index])
    for name in together[2]:
        torch.testing.assert_close(parts[0][2][name] + parts[1][2][name], together[2][name])
    garbage = torch.where(mask, logprobs, math.nan)
    torch.testing.assert_close(dro_loss(garbage, ref_logprobs, values, rewards, mask, 0.3)[:2], together[:2])
    with pytest.raises(ValueError, match=r"values_B has shape \(4, 1\), it should be \(4,\)"):
        dro_loss(logprobs, ref_logprobs, values[:, None], rewards, mask, 0.3)
    with pytest.raises(ValueError, match=r"kl_coef is 0\.0"):
        dro_loss(logprobs, ref_logprobs, values, rewards, mask, 0.0)


@pytest.mark.parametrize("behaviour", ["uniform", "pi_init", "policy"])
def test_dro_reaches_the_optimum_and_its_value_whoever_sampled(tree, behaviour):
    best_N, tau_log_z = optimum(tree)
    logits_SV, value = tree.init_SV.clone(), torch.zeros(1, dtype=torch.float64)
    for _ in range(700):
        logits_SV.requires_grad_(), value.requires_grad_()
        pi_SV = logits_SV.log_softmax(-1)
        root_N = shares_of(tree, behaviour, pi_SV.detach()).sqrt()  # the losses are homogeneous of degree 2
        rows = (root_N[:, None] * x[tree.state_NR, tree.token_NR] for x in (pi_SV, tree.init_SV))
        read = (*rows, root_N * value, root_N * tree.scores_N, tree.mask_NR, KL_COEF, 1)
        policy_loss, value_loss, _ = dro_loss(*read)
        gradients = torch.autograd.grad(policy_loss + value_loss, [logits_SV, value])
        logits_SV, value = ((x - 1.0 * g).detach() for x, g in zip((logits_SV, value), gradients, strict=True))
    learned_N = response_logprobs(tree, logits_SV.log_softmax(-1))
    # on its own samples it learns of rare responses last
    torch.testing.assert_close(learned_N.exp(), best_N.exp(), rtol=0, atol=1e-3)
    assert value.item() == pytest.approx(tau_log_z.item(), abs=1e-3)
    assert (policy_loss + value_loss).item() < 1e-3
