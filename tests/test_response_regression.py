"""
Where the squared error on complete responses leads, on the tree of `test_theorem1`.

pi*(y) = pi_anchor(y) exp(r(y) / tau) / Z maximises E[r] - tau KL(pi || pi_anchor). With A = r - tau log Z its loss is
0, so it is the minimiser for every behaviour policy that covers all responses. With another baseline b in place of
tau log Z the residual at pi* is the constant b - tau log Z: on the policy's own samples a constant has no gradient and
pi* stays the fixed point; on others' it does not.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.test_theorem1 import KL_COEF, Tree, random_logits, response_probabilities, shares_of, tree
from trl_apa.algorithms.regression import pairwise_regression_loss, response_regression_loss


__all__ = ["tree"]  # the fixture


def response_logprobs(tree: Tree, pi_SV: Tensor) -> Tensor:
    return torch.where(tree.mask_NR, pi_SV[tree.state_NR, tree.token_NR], 0.0).sum(1)


def optimum(tree: Tree) -> tuple[Tensor, Tensor]:
    """log pi* of each response, and tau log Z."""
    unnormalized_N = response_logprobs(tree, tree.init_SV) + tree.scores_N / KL_COEF
    log_z = unnormalized_N.logsumexp(0)
    return unnormalized_N - log_z, KL_COEF * log_z


def loss_of(tree: Tree, pi_SV: Tensor, weight_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Response n counts w_n times: the loss is homogeneous of degree 2 in its three inputs together."""
    root_N1 = weight_N.sqrt()[:, None]
    rows = pi_SV[tree.state_NR, tree.token_NR], tree.init_SV[tree.state_NR, tree.token_NR]
    advantages_NR = advantages_N[:, None].expand_as(tree.mask_NR)
    tensors = (root_N1 * x for x in (*rows, advantages_NR))
    return response_regression_loss(*tensors, tree.mask_NR, KL_COEF, num_responses=1)[0]


def descend(tree: Tree, weights, advantages_N: Tensor, steps: int = 2000, lr: float = 4.0) -> Tensor:
    logits_SV = random_logits(tree).requires_grad_()
    for _ in range(steps):
        pi_SV = logits_SV.log_softmax(-1)
        loss = loss_of(tree, pi_SV, weights(pi_SV.detach()), advantages_N)
        (gradient,) = torch.autograd.grad(loss, logits_SV)
        logits_SV = (logits_SV - lr * gradient).detach().requires_grad_()
    return logits_SV.detach().log_softmax(-1)


@pytest.mark.parametrize("behaviour", ["uniform", "pi_init", "policy"])
def test_with_log_z_the_fixed_point_is_the_optimum_whoever_sampled(tree, behaviour):
    best_N, baseline = optimum(tree)
    weights = partial(shares_of, tree, behaviour)
    learned_SV = descend(tree, weights, tree.scores_N - baseline)
    torch.testing.assert_close(response_logprobs(tree, learned_SV), best_N, rtol=0, atol=1e-4)
    assert loss_of(tree, learned_SV, weights(learned_SV), tree.scores_N - baseline).item() < 1e-9


def test_with_the_mean_score_it_is_the_optimum_on_own_samples_alone(tree):
    best_N, baseline = optimum(tree)
    anchor_N = response_probabilities(tree, tree.init_SV)
    mean = (anchor_N * tree.scores_N).sum()
    assert (baseline - mean).item() > 0.1  # Jensen: tau log Z lies above the mean
    own = descend(tree, lambda pi: response_probabilities(tree, pi), tree.scores_N - mean)
    torch.testing.assert_close(response_logprobs(tree, own), best_N, rtol=0, atol=1e-4)
    others = response_logprobs(tree, descend(tree, lambda pi: anchor_N, tree.scores_N - mean))
    gap = (best_N.exp() * (best_N - others)).sum()
    assert gap.item() > 1e-3


def test_the_group_estimates_log_z_better_the_larger_it_is(tree):
    """tau log mean exp(r / tau) over G samples of the anchor: below tau log Z on average, less so if G is large."""
    _, baseline = optimum(tree)
    anchor_N = response_probabilities(tree, tree.init_SV)
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for size in (2, 8, 32):
        groups = torch.multinomial(anchor_N.expand(4000, -1), size, replacement=True, generator=generator)
        log_mean = (tree.scores_N[groups] / KL_COEF).logsumexp(1) - torch.tensor(float(size)).log()
        gaps.append((baseline - KL_COEF * log_mean.mean()).item())
    assert gaps[0] > gaps[1] > gaps[2] > -0.01


def test_rebel_needs_no_log_z(tree):
    """Over all pairs of responses its loss is 0 at pi*, whatever the baseline, and the gradient leads there."""
    best_N, _ = optimum(tree)
    groups_N = torch.zeros(len(tree.scores_N), dtype=torch.long)
    advantages_NR = (tree.scores_N + 5.0)[:, None].expand_as(tree.mask_NR)
    init_NR = tree.init_SV[tree.state_NR, tree.token_NR]
    logits_SV = random_logits(tree).requires_grad_()
    for _ in range(2000):
        pi_SV = logits_SV.log_softmax(-1)
        rows = pi_SV[tree.state_NR, tree.token_NR], init_NR, advantages_NR, tree.mask_NR
        loss, _ = pairwise_regression_loss(*rows, groups_N, KL_COEF)
        (gradient,) = torch.autograd.grad(loss, logits_SV)
        logits_SV = (logits_SV - 0.2 * gradient).detach().requires_grad_()
    learned_N = response_logprobs(tree, logits_SV.detach().log_softmax(-1))
    torch.testing.assert_close(learned_N, best_N, rtol=0, atol=1e-3)
    assert loss.item() < 1e-6
