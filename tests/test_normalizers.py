"""
`normalizer="group"`: a constant for each prompt in place of log Z(s), on the tree of `test_theorem1` and in `step`.

Where the constant is c(s) = - mean residual over the behaviour policy w in s, the derivative of the loss by the logits
of s is 2 d(s) w(a|s) (r(s,a) + c(s)): it is 0 where the residual is constant, which is pi*, and nowhere else. That is
exact where a prompt has one state: for complete responses. Token by token one constant for all states of a prompt
leaves log Z(s) minus its mean. There a response's own tokens are left out of its constant.
"""

import copy
import math

import pytest
import torch

from tests.test_response_regression import optimum, response_logprobs
from tests.test_theorem1 import (
    KL_COEF,
    optimal_policy,
    random_logits,
    response_probabilities,
    shares_of,
    state_probabilities,
    tree,
)
from tests.test_training import parameters, trainer_for
from tests.test_update import assert_same, parameters_after_step, row_logprobs
from tests.test_without_critic import grouped_rollouts
from tests.tiny import tiny_config, tiny_model, tiny_pairs, tiny_rollouts, tiny_trainer
from trl_apa.algorithms.kl import kl_full
from trl_apa.algorithms.learned_normalizers import LearnedNormalizer, moments_of, state_residuals
from trl_apa.algorithms.losses import apa_loss
from trl_apa.algorithms.normalizers import group_normalized_advantages
from trl_apa.algorithms.regression import response_regression_loss


__all__ = ["tree"]  # the fixture
MASK = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
ADVANTAGES = torch.tensor([[1.0, 2.0], [-3.0, 9.0], [0.5, 1.5], [7.0, 7.0]])
LOG_RATIO = torch.tensor([[0.5, -1.0], [2.0, math.nan], [1.0, 0.0], [5.0, 5.0]])
PROMPTS = torch.tensor([4, 4, -1, 4])


def test_hand_worked():
    # lambda 2: of prompt 4 the tokens have 1 - 1, -2 - 2 and 4 + 3: 0 and -4 of the first response, mean -2, and 7 of
    # the second; each is shifted by the other's. Prompt -1 has no other response.
    expected = torch.tensor([[8.0, 9.0], [-5.0, 0.0], [0.5, 1.5], [0.0, 0.0]])
    found = group_normalized_advantages(ADVANTAGES.requires_grad_(), LOG_RATIO, MASK, PROMPTS, kl_coef=2.0)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    # responses: 2 * -0.5 - 1.5 and 2 * 2 + 3: mean 2.25; 2 * 1 - 1
    found = group_normalized_advantages(ADVANTAGES, LOG_RATIO, MASK, PROMPTS, kl_coef=2.0, of_responses=True)
    torch.testing.assert_close(found, torch.tensor([[3.25, 4.25], [-0.75, 0.0], [1.5, 2.5], [0.0, 0.0]]))


@pytest.mark.parametrize("of_responses", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_slow_loop(seed, of_responses):
    """Of tokens over the other responses to the prompt, of responses over all of them; one alone is not shifted."""
    generator = torch.Generator().manual_seed(seed)
    advantages, log_ratio = (torch.randn(7, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.rand(7, 4, generator=generator) < 0.7
    prompts = torch.randint(0, 3, (7,), generator=generator)
    prompts[6] = 9
    found = group_normalized_advantages(advantages, log_ratio, mask, prompts, 0.4, of_responses)
    residuals = []
    for row in range(7):
        of_tokens = [0.4 * float(log_ratio[row, t]) - float(advantages[row, t]) for t in range(4) if mask[row, t]]
        of_row = [0.4 * float(log_ratio[row][mask[row]].sum()) - float(advantages[row][mask[row]].mean())]
        residuals.append(of_row if of_responses and of_tokens else of_tokens)
    for row in range(7):
        group = [other for other in range(7) if prompts[other] == prompts[row] and (of_responses or other != row)]
        read = [residual for other in group for residual in residuals[other]]
        shift = sum(read) / len(read) if read else 0.0
        torch.testing.assert_close(found[row][mask[row]], advantages[row][mask[row]] + shift)
    assert (found[~mask] == 0).all()
    assert of_responses or torch.equal(found[6][mask[6]], advantages[6][mask[6]])
    for prompt in prompts.unique().tolist() if of_responses else ():
        rows = prompts == prompt
        ratio = log_ratio[rows]
        _, stats = response_regression_loss(ratio, torch.zeros_like(ratio), found[rows], mask[rows], 0.4)
        assert stats["residual"].item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_at_the_optimum_the_expected_gradient_of_a_group_of_the_policys_own_samples_is_zero(tree, size):
    """Over all groups that can be sampled. With a response's own tokens in its constant it would be 0.1 for two."""
    optimal_SV = optimal_policy(tree, KL_COEF)
    probabilities = response_probabilities(tree, optimal_SV)
    groups = torch.cartesian_prod(*[torch.arange(len(probabilities))] * size)  # (15^size, size)
    rows, prompts = groups.flatten(), torch.arange(len(groups)).repeat_interleave(size)
    root_N1 = probabilities[groups].prod(dim=1).sqrt().repeat_interleave(size)[:, None]
    states, tokens, mask_NR = tree.state_NR[rows], tree.token_NR[rows], tree.mask_NR[rows]
    logits_SV = optimal_SV.clone().requires_grad_()
    logprobs_NR, ref_logprobs_NR = logits_SV.log_softmax(-1)[states, tokens], tree.init_SV[states, tokens]
    advantages_NR = tree.advantages_NR[rows]
    shifted_NR = group_normalized_advantages(
        advantages_NR, logprobs_NR.detach() - ref_logprobs_NR, mask_NR, prompts, KL_COEF
    )
    assert float((shifted_NR - advantages_NR)[mask_NR].abs().max()) > 0.1
    scaled = root_N1 * logprobs_NR, root_N1 * ref_logprobs_NR, root_N1 * shifted_NR
    loss, _ = apa_loss(*scaled, mask_NR, KL_COEF, num_tokens=size)
    (gradient,) = torch.autograd.grad(loss, logits_SV)
    assert gradient.norm().item() < 1e-12


def descend(tree, behaviour, of_responses=False, normalizer="group", kl_coef=KL_COEF, steps=400, lr=1.0):
    """Gradient descent where the responses are all there are, each in the share that the behaviour gives it."""
    logits_SV = tree.init_SV.clone() if behaviour != "policy" else random_logits(tree)
    count, learned = len(tree.scores_N), LearnedNormalizer()
    prompts_N = torch.zeros(count, dtype=torch.long)
    advantages_NR = tree.scores_N[:, None].expand_as(tree.mask_NR) if of_responses else tree.advantages_NR
    for _ in range(steps):
        logits_SV.requires_grad_()
        pi_SV = logits_SV.log_softmax(-1)
        shares = shares_of(tree, behaviour, pi_SV.detach())
        logprobs_NR, ref_logprobs_NR = (x[tree.state_NR, tree.token_NR] for x in (pi_SV, tree.init_SV))
        # copies in proportion to the shares, at least one; the group of the prompt has about 600 responses
        copies = (shares * 600).round().long().clamp(min=1)
        every, first = torch.arange(count).repeat_interleave(copies), copies.cumsum(0) - copies
        moved = logprobs_NR.detach() - ref_logprobs_NR
        of_group = advantages_NR[every], moved[every], tree.mask_NR[every]
        shifted_NR = advantages_NR
        if normalizer == "group":
            shifted_NR = group_normalized_advantages(*of_group, prompts_N[every], kl_coef, of_responses)[first]
        elif normalizer == "learned":
            shift = shift_of_tables(learned, of_group, tree.state_NR[every], kl_coef, of_responses)
            shifted_NR = advantages_NR + shift[first]
        root_N1 = shares.sqrt()[:, None]  # the losses are homogeneous of degree 2
        rows = root_N1 * logprobs_NR, root_N1 * ref_logprobs_NR, root_N1 * shifted_NR
        loss = (response_regression_loss if of_responses else apa_loss)(*rows, tree.mask_NR, kl_coef, 1)[0]
        (gradient,) = torch.autograd.grad(loss, logits_SV)
        logits_SV = (logits_SV - lr * gradient).detach()
    return logits_SV.log_softmax(-1)


def shift_of_tables(learned, of_group, state_NR, kl_coef, of_responses):
    """What is added to the advantages, of a regression that can give every state a number of its own."""
    residual_NR, states_NR = state_residuals(*of_group, kl_coef, of_responses)
    hidden = torch.nn.functional.one_hot(state_NR[states_NR], int(state_NR.max()) + 1).double()
    shift_NR = torch.zeros_like(residual_NR)
    shift_NR[states_NR] = learned(hidden).to(shift_NR)
    learned.learn(moments_of(hidden, residual_NR[states_NR]), kl_coef)
    return shift_NR[:, :1].expand_as(shift_NR) if of_responses else shift_NR


def distance(tree, learned_SV, kl_coef=KL_COEF):
    """KL to pi*, nats a response."""
    apart_S = kl_full(learned_SV, optimal_policy(tree, kl_coef))
    return (state_probabilities(tree, learned_SV) * apart_S).sum().item()


@pytest.mark.parametrize("behaviour", ["uniform", "pi_init"])
def test_of_responses_the_group_reaches_the_optimum_off_policy_where_the_mean_score_does_not(tree, behaviour):
    best_N, _ = optimum(tree)
    learned_N = response_logprobs(tree, descend(tree, behaviour, of_responses=True, lr=4.0, steps=500))
    torch.testing.assert_close(learned_N, best_N, rtol=0, atol=5e-3)
    without_N = response_logprobs(
        tree, descend(tree, behaviour, of_responses=True, normalizer="none", lr=4.0, steps=500)
    )
    assert (best_N.exp() * (best_N - without_N)).sum().item() > 0.01


@pytest.mark.parametrize(
    ("behaviour", "known_without", "known_grouped"), [("pi_init", 0.023, 0.009), ("uniform", 0.024, 0.017)]
)
def test_of_tokens_the_group_comes_closer_to_the_optimum_off_policy(tree, behaviour, known_without, known_grouped):
    """Not all the way: log Z(s) is another one in each state. The numbers are those of `docs/algorithm.md`."""
    without = distance(tree, descend(tree, behaviour, normalizer="none"))
    grouped = distance(tree, descend(tree, behaviour))
    assert without == pytest.approx(known_without, abs=5e-4)
    assert grouped == pytest.approx(known_grouped, abs=5e-4)


def test_on_its_own_samples_the_policy_reaches_the_optimum_with_and_without_it(tree):
    for normalizer in ("none", "group"):
        assert distance(tree, descend(tree, "policy", normalizer=normalizer, steps=700, lr=2.0)) < 1e-4


def test_it_takes_noise_from_the_gradient_on_the_policys_own_samples(tree):
    """At pi*, where the expected gradient is 0, of groups of eight sampled responses."""
    optimal_SV = optimal_policy(tree, KL_COEF)
    probabilities = response_probabilities(tree, optimal_SV)
    generator = torch.Generator().manual_seed(0)
    squares = {"none": 0.0, "group": 0.0}
    for _ in range(300):
        rows = torch.multinomial(probabilities, 8, replacement=True, generator=generator)
        logits_SV = optimal_SV.clone().requires_grad_()
        logprobs_NR = logits_SV.log_softmax(-1)[tree.state_NR[rows], tree.token_NR[rows]]
        ref_logprobs_NR, mask_NR = tree.init_SV[tree.state_NR[rows], tree.token_NR[rows]], tree.mask_NR[rows]
        advantages_NR = tree.advantages_NR[rows]
        moved, prompts = logprobs_NR.detach() - ref_logprobs_NR, torch.zeros(8, dtype=torch.long)
        for normalizer in squares:
            shifted = advantages_NR
            if normalizer == "group":
                shifted = group_normalized_advantages(advantages_NR, moved, mask_NR, prompts, KL_COEF)
            loss, _ = apa_loss(logprobs_NR, ref_logprobs_NR, shifted, mask_NR, KL_COEF)
            (gradient,) = torch.autograd.grad(loss, logits_SV, retain_graph=True)
            squares[normalizer] += gradient.square().sum().item()
    assert squares["group"] < 0.5 * squares["none"]


# ---- in the trainer ----


def learner(tmp_path, loss_type, model=None, **options):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "kl_coef": 0.4, **options}
    return tiny_trainer(tmp_path, model, loss_type=loss_type, normalizer="group", **options)


@pytest.mark.parametrize("loss_type", ["apa", "response_apa"])
def test_step_equals_a_plain_autograd_script_of_the_formulas(tmp_path, loss_type):
    """The second step, before which the policy has moved from pi_init. Split into micro-batches or not."""
    options = {"advantage_estimator": "group", "whiten_advantages": False, "batch_size": 8, "ppo_epochs": 2}
    model = tiny_model(dtype=torch.float64)
    splits = ({"mini_batch_size": 8}, {"mini_batch_size": 2, "gradient_accumulation_steps": 4})
    trainers = [learner(tmp_path, loss_type, copy.deepcopy(model), **options, **split) for split in splits]
    for trainer in trainers:
        trainer.step(*grouped_rollouts(seed=1))
    policy, reference = copy.deepcopy(trainers[0].model.policy), copy.deepcopy(model)
    queries, responses, scores = grouped_rollouts()
    stats = [trainer.step(queries, responses, scores) for trainer in trainers]
    keys = [tuple(query.tolist()) for query in queries]

    def log_ratios():
        pairs = zip(queries, responses, strict=True)
        return [row_logprobs(policy, q, r, 1.0) - row_logprobs(reference, q, r, 1.0).detach() for q, r in pairs]

    def residual(ratio, target):
        return 0.4 * ratio.sum() - target if loss_type == "response_apa" else ratio - target / 0.4

    groups = [[row for row in range(8) if keys[row] == key] for key in keys]
    targets = [float(scores[row]) - sum(float(scores[i]) for i in groups[row]) / len(groups[row]) for row in range(8)]
    ratios = [ratio.detach() for ratio in log_ratios()]
    before = [residual(ratio, target).reshape(-1) for ratio, target in zip(ratios, targets, strict=True)]
    of_all = loss_type == "response_apa"
    others = [[i for i in group if of_all or i != row] for row, group in enumerate(groups)]
    means = [torch.cat([before[i] for i in group]).mean() for group in others]
    assert max(abs(float(mean)) for mean in means) > 0.01
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for _ in range(2):
        rows = zip(log_ratios(), targets, means, strict=True)
        errors = torch.cat([(residual(ratio, target) - mean).reshape(-1) for ratio, target, mean in rows])
        errors.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {f"policy.{name}": p.detach() for name, p in policy.named_parameters()}
    for trainer in trainers:
        assert_same(parameters(trainer), expected, tolerance=1e-6)
    assert stats[0]["apa/policy/residual_sq"] == pytest.approx(stats[1]["apa/policy/residual_sq"], rel=1e-5)


def test_log_probs_that_generate_noted_serve_as_well(tmp_path):
    options = {"advantage_estimator": "group", "exact_kl": False, "max_completion_length": 5}
    trainers = [learner(tmp_path, "apa", **options) for _ in range(2)]
    for trainer in trainers:
        trainer.step(*tiny_pairs())
    queries, _, scores = tiny_pairs(seed=1)
    responses = trainers[0].generate(queries, return_prompt=False)
    noted, read = (parameters_after_step(trainer, queries, responses, scores) for trainer in trainers)
    assert trainers[0].run_state.iteration.rollouts.old_logprobs_BR is None
    assert trainers[1].run_state.iteration.rollouts.old_logprobs_BR is not None
    assert_same(noted, read, tolerance=1e-5)


def test_it_is_off_by_default_and_changes_the_update_with_a_value_model_too(tmp_path):
    assert {tiny_config(tmp_path, loss_type=name).normalizer for name in ("apa", "response_apa", "rebel")} == {None}
    plain, grouped = (tiny_trainer(tmp_path, normalizer=normalizer) for normalizer in ("none", "group"))
    default = parameters_after_step(tiny_trainer(tmp_path), *tiny_pairs())
    assert_same(parameters_after_step(plain, *tiny_pairs()), default, tolerance=1e-30)
    changed = parameters_after_step(grouped, *tiny_pairs())
    assert max(float((changed[name] - default[name]).abs().max()) for name in default) > 1e-4


def test_mistakes_are_named(tmp_path):
    with pytest.warns(
        UserWarning, match="normalizer='group' has no effect with loss_type='awr': only 'apa' and 'resp"
    ):
        made = tiny_config(tmp_path, loss_type="awr", normalizer="group")
    assert not made.needs_groups
    trainer = learner(tmp_path, "apa")
    with pytest.raises(
        ValueError, match=r"but normalizer='group' compares the responses to a prompt.*leave normalizer"
    ):
        trainer.step(*tiny_rollouts())
    with pytest.raises(ValueError, match="num_generations=1, but normalizer='group' compares the responses"):
        trainer_for(tmp_path, normalizer="group").train()


def test_a_run_resumes_with_the_same_bits(tmp_path):
    options = {"normalizer": "group", "num_generations": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    complete = trainer_for(tmp_path / "complete", **options)
    complete.train()
    resumed = trainer_for(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "complete" / "checkpoint-3"))
    assert_same(parameters(resumed), parameters(complete), tolerance=1e-12)
    with pytest.raises(ValueError, match="normalizer was 'group', is 'none'"):
        other = trainer_for(tmp_path / "other", **{**options, "normalizer": "none"})
        other.train(resume_from_checkpoint=str(tmp_path / "complete" / "checkpoint-3"))
