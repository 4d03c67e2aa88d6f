"""
Theorem 1 on a tree of tokens small enough to enumerate, and what taking Z(s) for 1 does.

Write r(s,a) = log pi(a|s) - log pi_init(a|s) - Adv(s,a) / lambda for the residual and w(a|s) for the behaviour policy.
The population APA loss is sum_s d(s) sum_a w(a|s) r(s,a)^2. Its derivative by the logit of action a in state s is,
times 2 d(s),

    w(a|s) r(s,a) - pi(a|s) sum_b w(b|s) r(s,b),

and pi* = pi_init exp(Adv / lambda) / Z, the maximiser (3), has r(s,a) = -log Z(s) for every a. Therefore:

1. If Z(s) = 1, pi* has loss 0: it is the minimiser, whatever behaviour policy covers all actions.
2. If the data follow the policy (w = pi), the derivative is that of 2 KL(pi || pi*): the policy goes to pi*, whatever
   Z is. The constant stays in the loss, as log(Z)^2, and out of the policy.
3. If they do not (w = pi_init, say) and Z > 1, the derivative vanishes where r = -c pi / w with a c > 0: the mass that
   exp(Adv / lambda) has in excess is taken most from the actions that pi prefers most over w, and the policy stays
   behind pi*. The difference in log pi is of order (Adv / lambda)^3, hence KL(pi || pi*) of order (Adv / lambda)^6,
   and closes where Z ~ 1: the regime that Appendix A of the paper argues for.
"""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trl_apa.algorithms.advantages import gae
from trl_apa.algorithms.kl import kl_full
from trl_apa.algorithms.losses import apa_loss
from trl_apa.algorithms.rewards import token_rewards


VOCABULARY = 3
EOS = 0
DEPTH = 3
KL_COEF = 0.5


@dataclass
class Tree:
    """Every response over {EOS, 1, 2} of at most 3 tokens: N = 15, and the S = 7 states in which a token is chosen."""

    state_NR: Tensor
    token_NR: Tensor
    mask_NR: Tensor
    scores_N: Tensor
    init_SV: Tensor  # log pi_init
    advantages_NR: Tensor
    advantages_SV: Tensor


def enumerate_responses(prefix=()):
    if len(prefix) == DEPTH or (prefix and prefix[-1] == EOS):
        return [prefix]
    return [response for token in range(VOCABULARY) for response in enumerate_responses((*prefix, token))]


@pytest.fixture(scope="module")
def tree() -> Tree:
    """Random pi_init and scores; one-step errors of its true values are the exact Adv, as transitions are certain."""
    responses = enumerate_responses()
    states = sorted({response[:t] for response in responses for t in range(len(response))})
    generator = torch.Generator().manual_seed(0)
    init_SV = (0.5 * torch.randn(len(states), VOCABULARY, dtype=torch.float64, generator=generator)).log_softmax(-1)
    scores_N = 0.5 * torch.randn(len(responses), dtype=torch.float64, generator=generator)

    def value(prefix):
        if prefix in responses:
            return scores_N[responses.index(prefix)]
        pi_V = init_SV[states.index(prefix)].exp()
        return sum(pi_V[token] * value((*prefix, token)) for token in range(VOCABULARY))

    state_NR = torch.zeros(len(responses), DEPTH, dtype=torch.long)
    token_NR, mask_NR = torch.zeros_like(state_NR), torch.zeros_like(state_NR, dtype=torch.bool)
    for n, response in enumerate(responses):
        for t, token in enumerate(response):
            state_NR[n, t], token_NR[n, t], mask_NR[n, t] = states.index(response[:t]), token, True
    values_NR = torch.stack([value(state) for state in states])[state_NR]
    advantages_NR, _ = gae(token_rewards(scores_N, mask_NR), values_NR, mask_NR, gamma=1.0, gae_lambda=0.0)
    advantages_SV = torch.zeros_like(init_SV)
    advantages_SV[state_NR[mask_NR], token_NR[mask_NR]] = advantages_NR[mask_NR]
    return Tree(state_NR, token_NR, mask_NR, scores_N, init_SV, advantages_NR, advantages_SV)


def random_logits(tree: Tree) -> Tensor:
    return torch.randn(tree.init_SV.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def response_probabilities(tree: Tree, pi_SV: Tensor) -> Tensor:
    return torch.where(tree.mask_NR, pi_SV[tree.state_NR, tree.token_NR], 0.0).sum(1).exp()


def shares_of(tree: Tree, behaviour: str, pi_SV: Tensor) -> Tensor:
    """How often each response is sampled: by a uniform choice of all, by `"pi_init"`, or by the `"policy"` itself."""
    if behaviour == "uniform":
        return torch.ones_like(tree.scores_N) / len(tree.scores_N)
    return response_probabilities(tree, {"pi_init": tree.init_SV, "policy": pi_SV}[behaviour])


def state_probabilities(tree: Tree, pi_SV: Tensor) -> Tensor:
    """d(s): the probability that a response of the policy passes through each state."""
    passing_NR = torch.where(tree.mask_NR, response_probabilities(tree, pi_SV)[:, None], 0.0)
    return pi_SV.new_zeros(len(pi_SV)).index_add(0, tree.state_NR.flatten(), passing_NR.flatten())


def log_normalizers(tree: Tree, kl_coef: float) -> Tensor:
    """log Z(s) = log sum_a pi_init(a|s) exp(Adv(s,a) / lambda)."""
    return (tree.init_SV + tree.advantages_SV / kl_coef).logsumexp(-1)


def optimal_policy(tree: Tree, kl_coef: float) -> Tensor:
    """log pi* of (3)."""
    return (tree.init_SV + tree.advantages_SV / kl_coef).log_softmax(-1)


def residuals(tree: Tree, pi_SV: Tensor, kl_coef: float) -> Tensor:
    return pi_SV - tree.init_SV - tree.advantages_SV / kl_coef


def population_loss(tree: Tree, pi_SV: Tensor, weight_N: Tensor, kl_coef: float, advantages_NR: Tensor) -> Tensor:
    """
    Eq. (9) over all responses, response n counted w_n times, by `apa_loss`.

    The loss is homogeneous of degree 2 in its three inputs together: a row times sqrt(w_n) counts w_n times.
    """
    root_N1 = weight_N.sqrt()[:, None]
    logprobs_NR, ref_logprobs_NR = pi_SV[tree.state_NR, tree.token_NR], tree.init_SV[tree.state_NR, tree.token_NR]
    rows = root_N1 * logprobs_NR, root_N1 * ref_logprobs_NR, root_N1 * advantages_NR
    return apa_loss(*rows, tree.mask_NR, kl_coef, num_tokens=1)[0]


def descend(tree: Tree, weights, kl_coef: float, advantages_NR: Tensor, steps: int, lr: float) -> Tensor:
    """Gradient descent on the logits from pi_init; `weights(pi)` weighs the responses at each step. Gives log pi."""
    logits_SV = tree.init_SV.clone().requires_grad_()
    for _ in range(steps):
        pi_SV = logits_SV.log_softmax(-1)
        loss = population_loss(tree, pi_SV, weights(pi_SV.detach()), kl_coef, advantages_NR)
        (gradient,) = torch.autograd.grad(loss, logits_SV)
        logits_SV = (logits_SV - lr * gradient).detach().requires_grad_()
    return logits_SV.detach().log_softmax(-1)


def off_policy_minimiser(tree: Tree, kl_coef: float) -> Tensor:
    behaviour_N = response_probabilities(tree, tree.init_SV)
    return descend(tree, lambda pi: behaviour_N, kl_coef, tree.advantages_NR, steps=800, lr=1.0)


def advantages_with_z_one(tree: Tree) -> Tensor:
    """Adv - lambda log Z(s): the same pi*, and Z = 1."""
    excess_NR = KL_COEF * log_normalizers(tree, KL_COEF)[tree.state_NR]
    return torch.where(tree.mask_NR, tree.advantages_NR - excess_NR, 0.0)


def test_the_tree_is_what_it_should_be(tree):
    assert tree.mask_NR.sum(1).tolist().count(1) == 1
    assert tree.mask_NR.shape == (15, DEPTH)
    assert response_probabilities(tree, tree.init_SV).sum().item() == pytest.approx(1.0, abs=1e-14)
    # Adv(s,a) = mean score of the responses that go on with a in s, minus the mean score of those that pass through s
    probability_N = response_probabilities(tree, tree.init_SV)
    for state in range(len(tree.init_SV)):
        passes_NR = tree.mask_NR & (tree.state_NR == state)
        through_N = passes_NR.any(1) * probability_N
        for token in range(VOCABULARY):
            with_token_N = (passes_NR & (tree.token_NR == token)).any(1) * probability_N
            q = (with_token_N * tree.scores_N).sum() / with_token_N.sum()
            v = (through_N * tree.scores_N).sum() / through_N.sum()
            assert tree.advantages_SV[state, token].item() == pytest.approx((q - v).item(), abs=1e-14)


def test_a_weight_counts_a_response_that_many_times(tree):
    pi_SV = random_logits(tree).log_softmax(-1)
    times_N = torch.arange(len(tree.state_NR)) % 4
    weighted = population_loss(tree, pi_SV, times_N.double(), KL_COEF, tree.advantages_NR)
    rows = torch.arange(len(times_N)).repeat_interleave(times_N)
    state_NR, token_NR = tree.state_NR[rows], tree.token_NR[rows]
    repeated, _ = apa_loss(
        pi_SV[state_NR, token_NR],
        tree.init_SV[state_NR, token_NR],
        tree.advantages_NR[rows],
        tree.mask_NR[rows],
        KL_COEF,
        num_tokens=1,
    )
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-12)


def test_the_derivative_is_the_one_in_the_docstring(tree):
    logits_SV = random_logits(tree).requires_grad_()
    pi_SV = logits_SV.log_softmax(-1)
    weight_N = response_probabilities(tree, tree.init_SV)
    (gradient,) = torch.autograd.grad(
        population_loss(tree, pi_SV, weight_N, KL_COEF, tree.advantages_NR), logits_SV, retain_graph=True
    )
    weighted_SV = tree.init_SV.exp() * residuals(tree, pi_SV, KL_COEF)
    d_S1 = state_probabilities(tree, tree.init_SV)[:, None]
    expected = 2 * d_S1 * (weighted_SV - pi_SV.exp() * weighted_SV.sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("behaviour", "lr"), [("uniform", 0.1), ("pi_init", 1.0)])
def test_with_z_one_the_minimiser_is_exactly_the_optimal_policy(tree, behaviour, lr):
    advantages_NR = advantages_with_z_one(tree)
    count = len(tree.state_NR)
    weight_N = {"uniform": torch.ones(count).double(), "pi_init": response_probabilities(tree, tree.init_SV)}[
        behaviour
    ]
    learned_SV = descend(tree, lambda pi: weight_N, KL_COEF, advantages_NR, steps=800, lr=lr)
    torch.testing.assert_close(learned_SV, optimal_policy(tree, KL_COEF), rtol=0, atol=1e-9)
    assert population_loss(tree, learned_SV, weight_N, KL_COEF, advantages_NR).item() < 1e-18


def test_the_theorem_speaks_of_the_support_of_the_behaviour_policy_only(tree):
    # only responses that begin with token 1
    weight_N = (tree.token_NR[:, 0] == 1).double()
    learned_SV = descend(tree, lambda pi: weight_N, KL_COEF, advantages_with_z_one(tree), steps=800, lr=0.2)
    optimal_SV = optimal_policy(tree, KL_COEF)
    root = tree.state_NR[0, 0]
    visited = tree.state_NR[(weight_N[:, None] > 0) & tree.mask_NR].unique()
    below_root = visited[visited != root]
    assert len(below_root) == 3
    torch.testing.assert_close(learned_SV[below_root], optimal_SV[below_root], rtol=0, atol=1e-9)
    assert learned_SV[root, 1].item() == pytest.approx(optimal_SV[root, 1].item(), abs=1e-9)
    # the two tokens that were never seen share the rest, but not as pi* does
    assert abs(learned_SV[root, 0] - optimal_SV[root, 0]).item() > 0.1
    unvisited = torch.ones(len(optimal_SV), dtype=torch.bool)
    unvisited[visited] = False
    torch.testing.assert_close(learned_SV[unvisited], tree.init_SV[unvisited], rtol=0, atol=1e-14)


def test_on_policy_the_gradient_is_that_of_the_objective(tree):
    # -2 / lambda times the gradient of (2), with the visited states held: APA on its own samples climbs (2)
    logits_SV = random_logits(tree).requires_grad_()
    pi_SV = logits_SV.log_softmax(-1)
    weight_N = response_probabilities(tree, pi_SV.detach())
    loss = population_loss(tree, pi_SV, weight_N, KL_COEF, tree.advantages_NR)
    (gradient,) = torch.autograd.grad(loss, logits_SV, retain_graph=True)
    objective_S = (pi_SV.exp() * tree.advantages_SV).sum(-1) - KL_COEF * kl_full(pi_SV, tree.init_SV)
    d_S = state_probabilities(tree, pi_SV.detach())
    (ascent,) = torch.autograd.grad((d_S * objective_S).sum(), logits_SV)
    torch.testing.assert_close(gradient, -2 / KL_COEF * ascent, rtol=0, atol=1e-13)


def test_on_policy_the_constant_stays_in_the_loss_and_out_of_the_policy(tree):
    def on_policy(pi_SV):
        return response_probabilities(tree, pi_SV)

    learned_SV = descend(tree, on_policy, KL_COEF, tree.advantages_NR, steps=2000, lr=2.0)
    optimal_SV = optimal_policy(tree, KL_COEF)
    log_z_S = log_normalizers(tree, KL_COEF)
    # far from Z = 1, and still pi*: no action is preferred for the constant
    assert log_z_S.max().item() > 0.7
    torch.testing.assert_close(learned_SV, optimal_SV, rtol=0, atol=1e-8)
    expected_residual_SV = -log_z_S[:, None].expand_as(learned_SV)
    torch.testing.assert_close(residuals(tree, learned_SV, KL_COEF), expected_residual_SV, rtol=0, atol=1e-8)
    loss = population_loss(tree, learned_SV, on_policy(learned_SV), KL_COEF, tree.advantages_NR)
    expected_loss = (state_probabilities(tree, optimal_SV) * log_z_S.square()).sum()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-8)


def test_off_policy_the_constant_holds_the_policy_back(tree):
    learned_SV, optimal_SV = off_policy_minimiser(tree, KL_COEF), optimal_policy(tree, KL_COEF)
    behaviour_N = response_probabilities(tree, tree.init_SV)
    # residual -c pi / w, one c > 0 for each state
    preference_SV = (learned_SV - tree.init_SV).exp()
    c_SV = -residuals(tree, learned_SV, KL_COEF) / preference_SV
    torch.testing.assert_close(c_SV, c_SV[:, :1].expand_as(c_SV), rtol=0, atol=1e-10)
    assert c_SV.min().item() > 0
    # it is a lower loss than that of pi*, whose residual is the constant itself
    loss = population_loss(tree, learned_SV, behaviour_N, KL_COEF, tree.advantages_NR)
    loss_of_optimum = population_loss(tree, optimal_SV, behaviour_N, KL_COEF, tree.advantages_NR)
    squared_log_z = (state_probabilities(tree, tree.init_SV) * log_normalizers(tree, KL_COEF).square()).sum()
    assert loss_of_optimum.item() == pytest.approx(squared_log_z.item(), rel=1e-12)
    assert loss.item() < 0.7 * loss_of_optimum.item()
    # and another policy: the action it prefers most over pi_init is taken less often than under pi*, in every state
    favourite_S1 = preference_SV.argmax(-1, keepdim=True)
    assert (learned_SV.gather(-1, favourite_S1) < optimal_SV.gather(-1, favourite_S1)).all()
    assert kl_full(learned_SV, optimal_SV).max().item() > 0.03
    assert (kl_full(learned_SV, tree.init_SV) < kl_full(optimal_SV, tree.init_SV)).all()


def test_off_policy_the_gap_closes_where_z_is_near_one(tree):
    gaps = []
    for kl_coef in (0.5, 2.0, 4.0, 8.0):
        learned_SV, optimal_SV = off_policy_minimiser(tree, kl_coef), optimal_policy(tree, kl_coef)
        gaps.append(kl_full(learned_SV, optimal_SV).max().item())
    assert all(after < before / 8 for before, after in pairwise(gaps))
    # half of Adv / lambda leaves 2^-6 of the gap, and lambda = 8 less than a ten-millionth of a nat
    assert gaps[-2] / gaps[-1] == pytest.approx(64, rel=0.05)
    assert gaps[-1] < 1e-7
