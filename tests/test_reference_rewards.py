"""QRPO and A*-PO, which compare a response with those of pi_init: against arithmetic, slow loops and TRL."""

import copy
import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl.experimental.a2po import A2POTrainer

from tests.test_response_regression import descend, loss_of, response_logprobs
from tests.test_theorem1 import KL_COEF, response_probabilities, tree
from tests.test_training import PROMPTS, StopAt, logged, parameters, trainer_for
from tests.test_update import assert_same, parameters_after_step, row_logprobs
from tests.tiny import EOS, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa.algorithms.advantages import group_advantages
from trl_apa.algorithms.estimators import AdvantageEstimator
from trl_apa.algorithms.reference_rewards import (
    log_quantile_partition,
    optimal_value_advantages,
    optimal_values,
    quantile_advantages,
)
from trl_apa.algorithms.regression import response_regression_loss
from trl_apa.distributed.processes import Processes
from trl_apa.rollout.prompts import PromptSource
from trl_apa.trainer.reference_rewards import ReferenceSampling, find_ref_rewards


__all__ = ["tree"]  # the fixture
NAN = math.nan
MASK = torch.tensor([[True, True], [True, False], [False, False]])
REWARDS = torch.tensor([[0.25, 0.5], [2.0, NAN], [7.0, 7.0]])  # 0.75, 2, and a row that does not count
REF_REWARDS = torch.tensor([[0.0, 1.0, 0.75, 0.5], [2.0, 2.5, NAN, NAN], [1.0, NAN, NAN, NAN]])
METHODS = ("qrpo", "astar_po")
each_method = pytest.mark.parametrize("loss_type", METHODS)


def ref_rewards_for(queries, seed=0):
    """One to five rewards a query."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + number % 5, generator=generator) for number, _ in enumerate(queries)]


# ---- the functions ----


def test_quantiles_hand_worked():
    # 0, 0.75 and 0.5 of four are at most 0.75, one of two at most 2; beta 1: log Z = log(e - 1)
    expected = torch.tensor([[0.75, 0.75], [0.5, 0.5], [0.0, 0.0]]) - math.log(math.e - 1)
    found = quantile_advantages(REWARDS, MASK, REF_REWARDS, kl_coef=1.0)
    torch.testing.assert_close(found, torch.where(MASK, expected, 0.0))
    assert not quantile_advantages(REWARDS.requires_grad_(), MASK, REF_REWARDS, 1.0).requires_grad


def test_optimal_value_hand_worked():
    # beta log 2: exp(r / beta) = 2^r: log2 of the mean of 1, 2, 2^0.75, 2^0.5, and of 4 and 2^2.5
    values = [math.log2((1 + 2 + 2**0.75 + 2**0.5) / 4), math.log2((4 + 2**2.5) / 2), 1.0]
    beta = 1 / math.log(2)
    torch.testing.assert_close(optimal_values(REF_REWARDS, beta), torch.tensor(values))
    expected = torch.tensor([[0.75 - values[0]] * 2, [2 - values[1], 0.0], [0.0, 0.0]])
    torch.testing.assert_close(optimal_value_advantages(REWARDS, MASK, REF_REWARDS, beta), expected)
    # between the mean, for a large beta, and the best, for a small one
    torch.testing.assert_close(optimal_values(REF_REWARDS, 1e4), torch.tensor([0.5625, 2.25, 1.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(optimal_values(REF_REWARDS, 1e-4), torch.tensor([1.0, 2.5, 1.0]), atol=1e-3, rtol=0)
    assert optimal_values(torch.tensor([[1e3, -1e3]]), 1e-3).isfinite().all()


@pytest.mark.parametrize("kl_coef", [1e-4, 3e-3, 0.1, 0.5, 1.0, 30.0])
def test_the_partition_function_is_the_integral_over_uniform_quantiles(kl_coef):
    q = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    expected = ((q / kl_coef).logsumexp(0) - math.log(len(q))).item()
    assert log_quantile_partition(kl_coef) == pytest.approx(expected, rel=1e-3)
    if kl_coef <= 0.1:  # the authors' simplification
        assert log_quantile_partition(kl_coef) == pytest.approx(math.log(kl_coef) + 1 / kl_coef, abs=5e-5)


@pytest.mark.parametrize("seed", range(3))
def test_equal_a_slow_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(-2, 3, (6, 4), generator=generator).float()
    mask = torch.rand(6, 4, generator=generator) < 0.6
    ref = torch.randint(-4, 5, (6, 5), generator=generator).float()
    for row, count in enumerate((5, 1, 2, 3, 5, 4)):
        ref[row, count:] = NAN
    for row in range(6):
        total = sum(float(rewards[row, t]) for t in range(4) if mask[row, t])
        others = [float(r) for r in ref[row] if not math.isnan(r)]
        quantile = sum(r <= total for r in others) / len(others)
        value = 0.3 * math.log(sum(math.exp(r / 0.3) for r in others) / len(others))
        log_z = math.log(0.3 * (math.exp(1 / 0.3) - 1))
        for t in range(4):
            expected = (quantile - 0.3 * log_z, total - value) if mask[row, t] else (0.0, 0.0)
            found = [
                f(rewards, mask, ref, 0.3)[row, t].item() for f in (quantile_advantages, optimal_value_advantages)
            ]
            assert found == pytest.approx(expected, abs=1e-5)


def test_what_is_wrong_is_named():
    for function in (quantile_advantages, optimal_value_advantages):
        with pytest.raises(ValueError, match=r"ref_rewards_BN has shape \(2, 4\), it should be \(3, N\)"):
            function(REWARDS, MASK, REF_REWARDS[:2], 1.0)
        for kl_coef in (0.0, math.inf):
            with pytest.raises(ValueError, match=f"kl_coef is {kl_coef}"):
                function(REWARDS, MASK, REF_REWARDS, kl_coef)


def test_the_loss_is_that_of_the_authors_of_qrpo():
    """(q - beta log Z - beta log ratio)^2 of each response, with the quantiles that their README defines."""
    logprobs, ref_logprobs = (torch.randn(5, 4, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4])[:, None]
    scores, ref_rewards = torch.randn(5, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    rewards = torch.zeros(5, 4, dtype=torch.float64)
    rewards[:, 0] = scores
    loss, _ = response_regression_loss(
        logprobs, ref_logprobs, quantile_advantages(rewards, mask, ref_rewards, 0.05), mask, 0.05
    )
    log_ratio = ((logprobs - ref_logprobs) * mask).sum(1)
    quantile = (ref_rewards <= scores[:, None]).double().mean(1)
    log_z = math.log(0.05) + 1 / 0.05
    assert loss.item() == pytest.approx(((quantile - 0.05 * log_z - 0.05 * log_ratio) ** 2).mean().item(), abs=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_value_and_loss_of_astar_po_are_trls(binary):
    """TRL's trainer takes rewards of 0 and 1; its formulas do not depend on that."""
    generator = torch.Generator().manual_seed(3)
    beta_1, beta_2, samples = 0.5, 0.07, 6
    ref = torch.randn(5, samples, generator=generator)
    scores = torch.randn(5, generator=generator)
    ref, scores = ((ref > 0).float(), (scores > 0).float()) if binary else (ref, scores)
    logprobs, ref_logprobs = (torch.randn(5, 4, generator=generator) for _ in range(2))
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4])[:, None]
    # what its first stage computes of sampled rewards
    trls_value = beta_1 * (torch.logsumexp(ref / beta_1, dim=1) - math.log(samples))
    torch.testing.assert_close(optimal_values(ref, beta_1), trls_value, atol=1e-6, rtol=0)
    leaf, trls = (logprobs.clone().requires_grad_() for _ in range(2))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(beta2=beta_2),
        _metrics={"train": defaultdict(list)},
        _get_sequence_logps=lambda *_: (trls * mask).sum(1),
    )
    inputs = dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep"))
    inputs |= {"ref_logps": (ref_logprobs * mask).sum(1), "rewards": scores, "v_star": trls_value}
    expected = A2POTrainer.compute_loss(trainer, None, inputs)
    expected.backward()
    rewards = torch.zeros(5, 4)
    rewards[:, 0] = scores
    advantages = optimal_value_advantages(rewards, mask, ref, beta_1)
    loss, _ = response_regression_loss(leaf, ref_logprobs, advantages, mask, beta_2)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(leaf.grad, trls.grad, atol=1e-6, rtol=0)


# ---- where the optimum is known ----


@pytest.mark.parametrize("behaviour", ["uniform", "policy"])
def test_with_v_star_the_fixed_point_is_the_optimum_whoever_sampled(tree, behaviour):
    """V* of all responses of pi_init is tau log Z; responses of pi_init come in the shares of their probability."""
    probabilities = response_probabilities(tree, tree.init_SV)
    counts = (probabilities * 4000).round().long().clamp(min=1)
    ref = tree.scores_N.repeat_interleave(counts).expand(len(tree.scores_N), -1)
    rewards_NR = torch.zeros_like(tree.advantages_NR)
    rewards_NR[:, 0] = tree.scores_N
    advantages_N = optimal_value_advantages(rewards_NR, tree.mask_NR, ref, KL_COEF)[:, 0]
    count = len(tree.scores_N)
    uniform = torch.full((count,), 1 / count, dtype=torch.float64)
    learned_SV = descend(
        tree,
        lambda pi: uniform if behaviour == "uniform" else response_probabilities(tree, pi),
        advantages_N,
        lr=4.0 if behaviour == "uniform" else 8.0,
    )
    best_N = response_logprobs(tree, tree.init_SV) + tree.scores_N / KL_COEF
    torch.testing.assert_close(response_logprobs(tree, learned_SV), best_N.log_softmax(0), rtol=0, atol=3e-3)
    assert loss_of(tree, learned_SV, uniform, advantages_N).item() < 1e-5


def test_on_its_own_samples_qrpo_goes_to_the_optimum_for_quantile_rewards(tree):
    """With 15 responses quantiles are far from uniform, so that log Z is another; it has no part in this gradient."""
    probabilities = response_probabilities(tree, tree.init_SV)
    quantile_N = (probabilities * (tree.scores_N <= tree.scores_N[:, None])).sum(1)
    rewards_NR = torch.zeros_like(tree.advantages_NR)
    rewards_NR[:, 0] = 100 * tree.scores_N**3  # any increasing function of the reward has the same quantiles
    counts = (probabilities * 4000).round().long().clamp(min=1)
    ref = (100 * tree.scores_N**3).repeat_interleave(counts).expand(len(tree.scores_N), -1)
    advantages_N = quantile_advantages(rewards_NR, tree.mask_NR, ref, KL_COEF)[:, 0]
    learned_SV = descend(tree, lambda pi: response_probabilities(tree, pi), advantages_N)
    best_N = (response_logprobs(tree, tree.init_SV) + quantile_N / KL_COEF).log_softmax(0)
    torch.testing.assert_close(response_logprobs(tree, learned_SV), best_N, rtol=0, atol=3e-3)


@pytest.mark.parametrize("kl_coef", [0.05, 0.3])
def test_with_many_responses_qrpos_loss_is_zero_at_the_optimum_whoever_sampled(kl_coef):
    """Then quantiles are uniform, log Z is right, and KL(pi* || pi_init) = -1 - log beta for a small beta."""
    count = 20_000
    rewards = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    quantile = (rewards.argsort().argsort() + 1).double() / count
    advantages = quantile - kl_coef * log_quantile_partition(kl_coef)
    found = quantile_advantages(rewards[:5, None], torch.ones(5, 1).bool(), rewards.expand(5, -1), kl_coef)
    torch.testing.assert_close(found[:, 0], advantages[:5], rtol=0, atol=1e-9)
    log_ratio = (quantile / kl_coef).log_softmax(0) + math.log(count)
    mask = torch.ones(count, 1).bool()
    zeros = torch.zeros(count, 1, dtype=torch.float64)
    loss, _ = response_regression_loss(log_ratio[:, None], zeros, advantages[:, None], mask, kl_coef)
    assert loss.item() < 1e-6
    if kl_coef < 0.1:
        kl = ((log_ratio - math.log(count)).exp() * log_ratio).sum().item()
        assert kl == pytest.approx(-1 - math.log(kl_coef), abs=1e-2)


# ---- in the trainer ----


def learner(tmp_path, loss_type, model=None, **options):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "kl_coef": 0.3, "ppo_epochs": 2, **options}
    return tiny_trainer(tmp_path, model, loss_type=loss_type, **options)


@each_method
def test_step_equals_a_plain_autograd_script_of_the_formulas(tmp_path, loss_type):
    split = {"mini_batch_size": 1, "gradient_accumulation_steps": 4}
    more = {"value_kl_coef": 0.8} if loss_type == "astar_po" else {}
    trainer = learner(tmp_path, loss_type, tiny_model(dtype=torch.float64), **split, **more)
    assert trainer.model.value_model is None
    policy = copy.deepcopy(trainer.model.policy)
    reference, before = copy.deepcopy(policy), parameters(trainer)
    queries, responses, scores = tiny_rollouts()
    ref_rewards = ref_rewards_for(queries)
    stats = trainer.step(queries, responses, scores, ref_rewards=ref_rewards)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for _ in range(2):
        loss = 0.0
        for query, response, score, others in zip(queries, responses, scores, ref_rewards, strict=True):
            ratio = (
                row_logprobs(policy, query, response, 1.0).sum() - row_logprobs(reference, query, response, 1.0).sum()
            )
            value = 0.8 * math.log(sum(math.exp(float(r) / 0.8) for r in others) / len(others))
            target = float(score) - value
            if loss_type == "qrpo":
                target = sum(float(r <= score) for r in others) / len(others)
                target -= 0.3 * math.log(0.3 * (math.exp(1 / 0.3) - 1))
            loss = loss + (0.3 * ratio - target) ** 2 / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {f"policy.{name}": p.detach() for name, p in policy.named_parameters()}
    assert max(float((expected[name] - before[name]).abs().max()) for name in expected) > 1e-3
    assert_same(parameters(trainer), expected, tolerance=1e-7)
    means = [float(others.mean()) for others in ref_rewards]
    assert stats["apa/mean_ref_scores"] == pytest.approx(sum(means) / 4, abs=1e-6)


@each_method
def test_split_and_row_order_do_not_matter(tmp_path, loss_type):
    rollouts = *tiny_rollouts(), None, ref_rewards_for(range(4))
    expected = parameters_after_step(learner(tmp_path, loss_type), *rollouts)
    for split in ((1, 4), (2, 2)):
        options = dict(zip(("mini_batch_size", "gradient_accumulation_steps"), split, strict=True))
        assert_same(
            parameters_after_step(learner(tmp_path, loss_type, **options), *rollouts), expected, tolerance=1e-5
        )
    moved = [None if column is None else [column[row] for row in (2, 0, 3, 1)] for column in rollouts]
    assert_same(parameters_after_step(learner(tmp_path, loss_type), *moved), expected, tolerance=1e-5)


def test_reference_rewards_are_scaled_and_clipped_as_the_scores_are(tmp_path):
    """A score equal to the only reference reward has advantage 0 in A*-PO, whatever its scale."""
    options = {"scale_rewards": True, "center_rewards": True, "score_clip": 0.5}
    trainer = learner(tmp_path, "astar_po", **options)
    queries, responses, _ = tiny_rollouts()
    scores = [torch.tensor(score) for score in (3.0, 5.0, 9.0, -40.0)]
    for _ in range(2):
        stats = trainer.step(queries, responses, scores, ref_rewards=[[float(score)] for score in scores])
        assert stats["apa/policy/target_sq"] == pytest.approx(0.0, abs=1e-10)
    shifted = trainer.step(queries, responses, scores, ref_rewards=[[float(score) - 1.0] for score in scores])
    assert shifted["apa/policy/target_sq"] > 1e-4
    assert shifted["apa/mean_ref_scores"] == pytest.approx(-23 / 4 - 1)


@pytest.mark.parametrize(
    ("ref_rewards", "message"),
    [
        (
            None,
            "ref_rewards is None, but advantage_estimator='quantile' compares the score of a response with those of",
        ),
        ("abcd", "ref_rewards is a str; it should hold a list of numbers a query"),
        ([[1.0]] * 3, "ref_rewards has 3 elements; it should have config.batch_size = 4"),
        (torch.ones(4), r"ref_rewards\[0\] has shape \(\); it should be 1-D, with at least one number"),
        ([[1.0], [], [1.0], [1.0]], r"ref_rewards\[1\] has shape \(0,\)"),
        ([[1.0], [1.0, None], [1.0], [1.0]], r"ref_rewards\[1\] is \[1.0, None\]; it should be a list of numbers"),
        ([[1.0], [1.0], ["1"], [1.0]], r"ref_rewards\[2\] is \['1'\]; it should be a list of numbers"),
        ([[1.0], [1.0], [1.0], [1.0, math.inf]], r"ref_rewards\[3\] holds inf; it should hold finite numbers"),
        ([[1.0], [NAN], [1.0], [1.0]], r"ref_rewards\[1\] holds nan"),
    ],
)
def test_what_step_cannot_compare_with_is_refused_before_any_pass(tmp_path, ref_rewards, message):
    trainer = learner(tmp_path, "qrpo")
    before = parameters(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.step(*tiny_rollouts(), ref_rewards=ref_rewards)
    assert_same(parameters(trainer), before, tolerance=1e-30)
    stats = trainer.step(*tiny_rollouts(), ref_rewards=torch.ones(4, 2))  # also one tensor
    assert stats["apa/mean_ref_scores"] == 1.0


def test_options(tmp_path):
    made = {name: tiny_config(tmp_path, loss_type=name) for name in METHODS}
    assert [(c.advantage_estimator, c.whiten_advantages, c.kl_coef) for c in made.values()] == [
        ("quantile", False, 0.03),
        ("optimal_value", False, 0.2),
    ]
    assert made["qrpo"].num_ref_samples == 8 and made["astar_po"].value_kl_coef is None
    with pytest.warns(UserWarning, match="value_kl_coef=0.5 has no effect with advantage_estimator='quantile': only"):
        tiny_config(tmp_path, loss_type="qrpo", value_kl_coef=0.5)
    with pytest.warns(UserWarning, match="num_ref_samples=4 has no effect with advantage_estimator='group'"):
        tiny_config(tmp_path, loss_type="rebel", num_ref_samples=4)
    trainer = tiny_trainer(tmp_path)
    with pytest.warns(UserWarning, match="ref_rewards has no effect with advantage_estimator='gae'"):
        trainer.step(*tiny_rollouts(), ref_rewards=[[1.0]] * 4)
    for options, message in (
        ({"loss_type": "qrpo", "whiten_rewards": True}, "whiten_rewards=True with advantage_estimator='quantile'"),
        ({"loss_type": "qrpo", "num_ref_samples": 0}, "num_ref_samples=0: it should be greater than 0"),
        ({"loss_type": "astar_po", "value_kl_coef": -1.0}, "value_kl_coef=-1.0: it should be greater than 0"),
        ({"loss_type": "grpo", "advantage_estimator": "quantile"}, "kl_coef=0.0 with advantage_estimator='quantile'"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, **options)
    assert tiny_config(tmp_path, loss_type="grpo", advantage_estimator="optimal_value", value_kl_coef=1.0).kl_coef == 0


def above_the_mean(rows, args):
    """A user's estimator, which does not read kl_coef."""
    above_B = rows.rewards_BR.sum(dim=1) - rows.ref_rewards_BN.nanmean(dim=1)
    return above_B[:, None].expand_as(rows.rewards_BR), None


ABOVE_THE_MEAN = AdvantageEstimator(above_the_mean, row_by_row=True, needs_ref_rewards=True)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "rloo", "ppo"])
def test_a_users_estimator_may_have_a_kl_coef_of_zero(tmp_path, loss_type):
    options = {"loss_type": loss_type, "advantage_estimator": f"{__name__}:ABOVE_THE_MEAN", "kl_coef": 0.0}
    options |= {"optim": "sgd", "learning_rate": 0.1}
    trainer = tiny_trainer(tmp_path, **options)
    before = parameters(trainer)
    trainer.step(*tiny_rollouts(), ref_rewards=[[0.0, 1.0]] * 4)
    after = parameters(trainer)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="whiten_rewards=True with advantage_estimator="):
        tiny_config(tmp_path, **options, whiten_rewards=True)


class Counted:
    """A reward function that notes how many responses it was asked about."""

    __name__ = "counted"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **columns):
        self.calls.append(list(prompts))
        return [-float(text.split().count("w9")) + 0.1 * len(text.split()) for text in completions]


def run(tmp_path, loss_type, reward_funcs=None, **options):
    options = {"num_ref_samples": 3, "kl_coef": 0.3, "learning_rate": 1e-3, **options}
    return trainer_for(tmp_path, loss_type=loss_type, reward_funcs=reward_funcs or Counted(), **options)


@each_method
def test_train_samples_pi_init_once_for_each_prompt_and_is_the_classic_loop(tmp_path, loss_type):
    """Two passes over the prompts. The random numbers of training are those of a run without reference samples."""
    asked = Counted()
    options = {"max_steps": 16, "dataset": [{"prompt": prompt} for prompt in PROMPTS[:8]], "ppo_epochs": 2}
    driven = run(tmp_path, loss_type, asked, **options)
    driven.train()
    # two iterations a pass: four responses of the policy, and in the first pass 3 of pi_init to each of four prompts
    assert [len(call) for call in asked.calls] == [4, 12, 4, 12, 4, 4]
    assert all(len(rewards) == 3 for rewards in driven.run_state.ref_rewards.values())
    looped = run(tmp_path, loss_type, **options)
    source = PromptSource(looped.train_dataset, 4, seed=3)
    for iteration in range(4):
        queries = [torch.tensor(tiny_tokenizer()(row["prompt"])["input_ids"]) for row in source.rows(iteration)]
        responses = looped.generate(queries, batch_size=4, return_prompt=False)
        scores = looped.score(queries, responses)
        stats = looped.step(queries, responses, scores, ref_rewards=looped.reference_rewards(queries))
    assert_same(parameters(driven), parameters(looped), tolerance=1e-12)
    last = [row for row in driven.state.log_history if "apa/loss/total" in row][-1]
    assert last["apa/mean_ref_scores"] == pytest.approx(stats["apa/mean_ref_scores"], rel=1e-6)


def test_reference_samples_are_those_of_pi_init_also_after_training(tmp_path):
    queries = [torch.tensor([2, 3]), torch.tensor([4, 5, 6]), torch.tensor([2, 3]), torch.tensor([7])]
    fresh, trained = run(tmp_path, "qrpo"), run(tmp_path, "qrpo", learning_rate=0.1)
    state = torch.get_rng_state()
    expected = fresh.reference_rewards(queries)
    assert torch.equal(torch.get_rng_state(), state)
    for _ in range(3):
        trained.step(*tiny_rollouts(), ref_rewards=[[0.0]] * 4)
    found = trained.reference_rewards(queries)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(trained.run_state.ref_rewards) == 3 and torch.equal(found[0], found[2])
    with pytest.raises(ValueError, match="needs reward_funcs or reward_model"):
        tiny_trainer(tmp_path, loss_type="qrpo").reference_rewards(queries)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("missing_eos_penalty", 5.0),
        ("temperature", 0.3),
        ("max_completion_length", 2),
        ("top_p", 0.2),
        ("top_k", 1),
        ("stop_strings", ["w", "w9"]),
    ],
)
def test_known_rewards_are_dropped_when_what_they_depend_on_changes(tmp_path, option, value):
    """Then they are those of a trainer that had the option from the beginning; and again those of before."""
    queries = [torch.tensor([2, 3]), torch.tensor([4, 5, 6])]
    asked = Counted()
    trainer, other = run(tmp_path, "qrpo", asked), run(tmp_path, "qrpo", **{option: value})
    before, initial = trainer.reference_rewards(queries), getattr(trainer.args, option)
    assert torch.equal(torch.cat(trainer.reference_rewards(queries)), torch.cat(before)) and len(asked.calls) == 1
    setattr(trainer.args, option, value)
    changed = torch.cat(trainer.reference_rewards(queries))
    assert torch.equal(changed, torch.cat(other.reference_rewards(queries))) and len(asked.calls) == 2
    assert not torch.equal(changed, torch.cat(before))
    if isinstance(value, list):
        trainer.args.stop_strings.pop()  # the same list, changed in place
        trainer.reference_rewards(queries)
        assert len(asked.calls) == 3
    setattr(trainer.args, option, initial)
    assert torch.equal(torch.cat(trainer.reference_rewards(queries)), torch.cat(before))


def test_options_of_another_run_drop_what_its_checkpoint_knows(tmp_path):
    """With `resume_anyway`, and of a state that does not say what its rewards were made with."""
    options = {"dataset": [{"prompt": prompt} for prompt in PROMPTS[:8]], "max_steps": 12}
    options |= {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path, "qrpo", callbacks=[StopAt(8)], **options).train()
    asked = Counted()
    resumed = run(tmp_path, "qrpo", asked, **{**options, "temperature": 0.5})
    resumed.train(resume_from_checkpoint=True, resume_anyway=["temperature"])
    assert 12 in [len(call) for call in asked.calls]
    state = resumed.run_state.state_dict()
    assert state["ref_rewards_options"]["temperature"] == 0.5 and state["ref_rewards"]
    del state["ref_rewards_options"]
    resumed.run_state.load_state_dict(state, torch.device("cpu"), 12)
    queries = [torch.tensor(tiny_tokenizer()(PROMPTS[0])["input_ids"])]
    resumed.reference_rewards(queries)
    assert len(asked.calls[-1]) == 3 and len(resumed.run_state.ref_rewards) == 1


@pytest.mark.parametrize(("loss_type", "stop"), [("qrpo", 3), ("astar_po", 8)])
def test_a_run_resumes_with_the_same_bits_and_samples_no_prompt_again(tmp_path, loss_type, stop):
    """In the middle of an iteration, and at the end of a pass over the prompts."""
    options = {"dataset": [{"prompt": prompt} for prompt in PROMPTS[:8]], "max_steps": 12}
    options |= {"save_strategy": "steps", "save_steps": 1}
    complete = run(tmp_path / "complete", loss_type, **options)
    complete.train()
    run(tmp_path / "stopped", loss_type, callbacks=[StopAt(stop)], **options).train()
    asked = Counted()
    resumed = run(tmp_path / "stopped", loss_type, asked, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed), parameters(complete), tolerance=1e-12)
    assert logged(resumed, "train_loss")[:-1] == logged(complete, "train_loss")[:-1]
    assert [len(call) for call in asked.calls] == ([4, 12, 4] if stop == 3 else [4])
    with pytest.raises(ValueError, match="num_ref_samples was 3, is 4"):
        run(tmp_path / "stopped", loss_type, num_ref_samples=4, **options).train(resume_from_checkpoint=True)


def test_a_column_of_the_data_set_takes_the_place_of_samples(tmp_path):
    asked = Counted()
    rows = [{"prompt": prompt, "ref_rewards": [0.1 * number, 1.0]} for number, prompt in enumerate(PROMPTS[:4])]
    trainer = run(tmp_path, "astar_po", asked, dataset=Dataset.from_list(rows), max_steps=4)
    trainer.train()
    assert [len(call) for call in asked.calls] == [4] and not trainer.run_state.ref_rewards
    rollouts = trainer.run_state.iteration.rollouts
    found = sorted(rollouts.ref_rewards_BN[:, 0].tolist())
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3])
    # some rows have them, the others are sampled
    some = [row if number % 2 else {**row, "ref_rewards": None} for number, row in enumerate(rows)]
    mixed = run(tmp_path, "astar_po", asked := Counted(), dataset=some, max_steps=4)
    mixed.train()
    assert [len(call) for call in asked.calls] == [4, 6]
    assert mixed.run_state.iteration.rollouts.ref_rewards_BN.isnan().any(1).sum() == 2
    for wrong, message in ((["a"], "is .'a'.; it should be a list of numbers"), ([], "has shape")):
        with pytest.raises(ValueError, match=f"ref_rewards of row . {message}"):
            run(tmp_path, "astar_po", dataset=[{**row, "ref_rewards": wrong} for row in rows], max_steps=4).train()


def test_a_sample_that_did_not_end_is_charged_and_one_that_was_not_scored_is_left_out(tmp_path):
    given = itertools.count()

    def every_other(completions, **_):
        return [None if next(given) % 2 else 1.0 for _ in completions]

    queries = [torch.tensor([2, 3]), torch.tensor([4, 5, 6])]
    options = {"num_ref_samples": 4, "missing_eos_penalty": 5.0, "skip_unscored": True, "max_completion_length": 4}
    trainer = run(tmp_path, "qrpo", every_other, **options)
    ended, cut = torch.tensor([5, EOS]), torch.tensor([5, 6, 7, 8])
    trainer._responses_of_reference = lambda *_, **__: [cut, ended, ended, ended, cut, ended, cut, cut]
    found = trainer.reference_rewards(queries)
    assert [rewards.tolist() for rewards in found] == [[-4.0, 1.0], [-4.0, -4.0]]
    nothing = run(tmp_path, "qrpo", lambda completions, **_: [None] * len(completions), **options)
    with pytest.raises(ValueError, match=r"no response of pi_init to the prompt \[2, 3\] was scored"):
        nothing.reference_rewards(queries)


@pytest.mark.parametrize("new", [0, 1])
def test_a_prompt_that_is_asked_only_to_make_as_many_calls_need_not_be_scored(new):
    """One process of several, of which another has three new prompts."""
    queries, known = [torch.tensor([2, 3]), torch.tensor([4, 5, 6])], {}
    asked = []

    def score(rows, queries, responses):
        asked.append(len(queries))
        kept_B = torch.arange(len(queries)) < (2 if good else 0)
        return SimpleNamespace(total_B=torch.ones(len(queries)), kept_B=kept_B)

    def find(rows, new_elsewhere):
        accelerator = SimpleNamespace(
            device="cpu", num_processes=2, gather=lambda count: torch.cat([count, count + new_elsewhere])
        )
        processes = Processes(accelerator)
        processes.together = lambda work: work()
        sampling = ReferenceSampling(lambda queries: [torch.tensor([5, EOS])] * len(queries), score, 2, [EOS], 0.0, 0)
        return find_ref_rewards([{}] * len(rows), rows, known, sampling, processes)

    good = True
    find(queries[:1], 0)
    good = bool(new)
    found = find([queries[0], queries[new]], 3)
    assert asked == [2, 2 * (3 + new)] and [rewards.tolist() for rewards in found] == [[1.0, 1.0]] * 2
    assert len(known) == 1 + new
    good = False
    with pytest.raises(ValueError, match=r"no response of pi_init to the prompt \[7\] was scored"):
        find([torch.tensor([7])], 3)


def test_a_group_of_the_policys_own_responses_is_no_substitute():
    """Once the policy is better than pi_init its own quantiles are uniform again, whatever it has learned."""
    rewards = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    mask = torch.ones(4, 1).bool()
    better = quantile_advantages(rewards + 9.0, mask, rewards[:, 0].expand(4, -1), 0.1)
    own = quantile_advantages(rewards + 9.0, mask, (rewards + 9.0)[:, 0].expand(4, -1), 0.1)
    assert (better[0] == better[3]).all() and own[0] < own[3]
    torch.testing.assert_close(own, quantile_advantages(rewards, mask, rewards[:, 0].expand(4, -1), 0.1))
    assert group_advantages(rewards, mask, torch.zeros(4).long())[0] < 0
