"""`normalizer="learned"`: log Z(s) regressed on the policy's hidden states: the fit, and what `step` makes of it."""

import copy
import math

import pytest
import torch

from tests.test_normalizers import descend, distance
from tests.test_response_regression import optimum, response_logprobs
from tests.test_theorem1 import KL_COEF, log_normalizers, tree
from tests.test_training import StopAt, parameters, trainer_for
from tests.test_update import assert_same, parameters_after_step, row_logprobs
from tests.test_without_critic import grouped_rollouts
from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa.algorithms.learned_normalizers import (
    KEPT,
    PENALTIES,
    LearnedNormalizer,
    moments_of,
    ridge_coefficients,
    squared_error,
    state_residuals,
)
from trl_apa.models.logprobs import last_hidden_states
from trl_apa.rollout import shared_prompts
from trl_apa.rollout.batch import Layout, Rollouts
from trl_apa.trainer.run_state import RunState


__all__ = ["tree"]  # the fixture
STATISTICS = {f"apa/normalizer/{name}" for name in ("log_normalizer", "error", "unexplained")}


# ---- the fit ----


def test_residuals_hand_worked():
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    advantages = torch.tensor([[1.0, 3.0], [9.0, -3.0], [7.0, 7.0]], requires_grad=True)
    log_ratio = torch.tensor([[0.5, -1.0], [math.nan, 2.0], [5.0, 5.0]], requires_grad=True)
    # lambda 2: 1 - 1 and -2 - 3; 4 + 3
    residual, states = state_residuals(advantages, log_ratio, mask, 2.0)
    torch.testing.assert_close(residual[mask], torch.tensor([0.0, -5.0, 7.0]))
    assert torch.equal(states, mask) and not residual.requires_grad
    # of responses, in the state before the first token, whether it counts or not: 2 * -0.5 - 2 and 2 * 2 + 3
    residual, states = state_residuals(advantages, log_ratio, mask, 2.0, of_responses=True)
    assert torch.equal(states, torch.tensor([[True, False], [True, False], [False, False]]))
    torch.testing.assert_close(residual[states], torch.tensor([-3.0, 7.0]))


def test_ridge_hand_worked():
    # States 0 and 2 with residuals 1 and 5: means 1 and 3, deviation 1, sum of squares 2, of products 4. With a
    # penalty of 2 w = 4 / (2 + 2) and b = 3 - 1; without, 4 / 2; with an infinite one the mean alone.
    moments = moments_of(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(moments, torch.tensor([[4.0, 2, 10], [2, 2, 6], [10, 6, 26]], dtype=torch.float64))
    for penalty, expected in ((2.0, [1.0, 2.0]), (1e-12, [2.0, 1.0]), (math.inf, [0.0, 3.0])):
        coefficients = ridge_coefficients(moments, penalty)
        torch.testing.assert_close(coefficients, torch.tensor(expected, dtype=torch.float64))
    # predicts 2 and 4, off by 1 each
    assert squared_error(moments, torch.tensor([1.0, 2.0], dtype=torch.float64)).item() == pytest.approx(2.0)
    # the deviation is the unit: ten times the states, a tenth of the weight
    moments = moments_of(torch.tensor([[0.0], [20.0]]), torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(ridge_coefficients(moments, 2.0), torch.tensor([0.1, 2.0], dtype=torch.float64))


def penalized_least_squares(states, residuals, penalty, weights=None):
    """The same by torch's least squares on rows, with a row for each entry's penalty."""
    weights = torch.ones(len(states), dtype=torch.float64) if weights is None else weights
    share = weights / weights.sum()
    centred = states - share @ states
    deviation = (share @ centred.square()).sqrt()
    if math.isinf(penalty):
        return torch.cat([torch.zeros_like(deviation), (share @ residuals)[None]])
    rows = torch.cat([states, torch.ones(len(states), 1, dtype=torch.float64)], dim=1) * weights.sqrt()[:, None]
    of_penalty = torch.diag(deviation * math.sqrt(penalty * len(deviation)))
    rows = torch.cat([rows, torch.nn.functional.pad(of_penalty, (0, 1))])
    targets = torch.cat([residuals * weights.sqrt(), torch.zeros_like(deviation)])
    return torch.linalg.lstsq(rows, targets[:, None]).solution[:, 0]


def samples(count, width=5, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, width, dtype=torch.float64, generator=generator) * torch.arange(1.0, width + 1) + 40.0
    truth = torch.linspace(-1, 1, width, dtype=torch.float64)
    return states, (states - 40) @ truth + 3 + noise * torch.randn(count, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 30.0, math.inf])
@pytest.mark.parametrize("count", [3, 50])
def test_ridge_equals_least_squares_on_rows(count, penalty):
    """Also with fewer states than entries, and with moments that were added up."""
    states, residuals = samples(count)
    moments = sum(moments_of(states[part], residuals[part]) for part in (slice(1), slice(1, 3), slice(3, None)))
    expected = penalized_least_squares(states, residuals, penalty)
    torch.testing.assert_close(ridge_coefficients(moments, penalty), expected, rtol=1e-6, atol=1e-8)
    errors = residuals - states @ expected[:-1] - expected[-1]
    assert squared_error(moments, expected).item() == pytest.approx(errors.square().sum().item(), rel=1e-7, abs=1e-6)


def test_entries_that_never_change_get_no_weight_and_one_state_gives_its_residual():
    states, residuals = samples(20)
    states[:, 2] = 1000.1
    coefficients = ridge_coefficients(moments_of(states, residuals), 1.0)
    assert coefficients[2] == 0 and coefficients.isfinite().all()
    others = [0, 1, 3, 4, 5]
    expected = penalized_least_squares(states[:, [0, 1, 3, 4]], residuals, 1.0)
    torch.testing.assert_close(coefficients[others], expected, rtol=1e-6, atol=1e-8)
    alone = ridge_coefficients(moments_of(states[:1], residuals[:1]), 0.1)
    torch.testing.assert_close(alone, torch.tensor([0.0] * 5 + [residuals[0].item()], dtype=torch.float64))


def test_it_learns_as_a_slow_loop_over_all_states_does():
    """Old states count for less; of the penalties the one with the least error on what came after each fit."""
    learned, rows, errors = LearnedNormalizer(), [], [0.0] * len(PENALTIES)
    chosen = set()
    for iteration in range(6):
        states, residuals = samples(4 if iteration < 3 else 40, seed=iteration, noise=10.0)
        before = learned(states)
        fits = fits_of(rows)
        if fits:
            seen = [(residuals - states @ fit[:-1] - fit[-1]).square().sum().item() for fit in fits]
            best = chosen_by(errors)
            chosen.add(best)
            expected = states @ fits[best][:-1] + fits[best][-1]
            errors = [KEPT * old + new for old, new in zip(errors, seen, strict=True)]
        else:
            expected = torch.zeros_like(residuals)
        torch.testing.assert_close(before.double(), expected, rtol=1e-6, atol=1e-8)
        stats = learned.learn(moments_of(states, residuals), kl_coef=0.5)
        error = (residuals - expected).square().mean().item() / 0.25
        assert stats["error"] == pytest.approx(error, rel=1e-6)
        assert stats["log_normalizer"] == pytest.approx(-expected.mean().item() / 0.5, rel=1e-6)
        assert stats["unexplained"] == pytest.approx(error * 0.25 / residuals.var(correction=0).item(), rel=1e-6)
        rows = [(old, targets, KEPT * weight) for old, targets, weight in rows] + [(states, residuals, 1.0)]
    assert len(chosen) > 1 and chosen != {0}


def chosen_by(errors):
    """The first, hence the most cautious, of those that are as good as the best."""
    return next(number for number, error in enumerate(errors) if error <= 1.001 * min(errors))


def fits_of(rows):
    if not rows:
        return []
    states, residuals = (torch.cat([row[part] for row in rows]) for part in (0, 1))
    weights = torch.cat([torch.full((len(row[0]),), row[2], dtype=torch.float64) for row in rows])
    return [penalized_least_squares(states, residuals, penalty, weights) for penalty in PENALTIES]


def test_with_many_states_it_finds_what_is_there_and_with_few_no_more_than_their_mean():
    many, few = LearnedNormalizer(), LearnedNormalizer()
    for iteration in range(4):
        many.learn(moments_of(*samples(2000, seed=iteration)), 1.0)
        states, residuals = samples(3, width=200, seed=iteration, noise=1e3)
        few.learn(moments_of(states, residuals), 1.0)
    states, residuals = samples(1000, seed=99, noise=0.0)
    assert (many(states) - residuals).abs().max() < 0.2
    assert few(samples(50, width=200, seed=9)[0]).std() < 100  # of noise of 1000


def test_no_gradient_goes_through_it_and_what_is_not_finite_is_not_learned():
    states, residuals = (x.requires_grad_() for x in samples(20))
    learned = LearnedNormalizer()
    assert torch.equal(learned(states), torch.zeros(20)) and learned.coefficients is None
    learned.learn(moments_of(states, residuals), 1.0)
    assert not learned(states).requires_grad and not moments_of(states, residuals).requires_grad
    before = learned(states)
    for moments in (moments_of(states * math.nan, residuals), moments_of(states[:0], residuals[:0])):
        assert learned.learn(moments, 1.0) == {}
    assert torch.equal(learned(states), before)
    # in the precision of a policy, with the numbers of its rounded states
    assert torch.equal(learned(states.bfloat16()), learned(states.bfloat16().double()).float())


def test_its_state_comes_back():
    learned, other = LearnedNormalizer(), LearnedNormalizer()
    learned.load_state_dict(other.state_dict())
    for iteration in range(3):
        learned.learn(moments_of(*samples(20, seed=iteration)), 1.0)
    other.load_state_dict(copy.deepcopy(learned.state_dict()))
    for iteration in range(3, 5):
        moments = moments_of(*samples(20, seed=iteration))
        assert learned.learn(moments, 1.0) == other.learn(moments, 1.0)
    assert torch.equal(learned(samples(9)[0]), other(samples(9)[0]))


# ---- where it leads ----


@pytest.mark.parametrize("behaviour", ["pi_init", "uniform"])
def test_of_tokens_it_reaches_the_optimum_off_policy_where_a_constant_for_the_prompt_does_not(tree, behaviour):
    """Where a state's hidden state tells it from all others. Without it 0.02 nats are left, with a constant 0.009."""
    assert distance(tree, descend(tree, behaviour, normalizer="learned")) < 1e-9
    assert distance(tree, descend(tree, behaviour, normalizer="group")) > 5e-3


@pytest.mark.parametrize("behaviour", ["pi_init", "uniform"])
def test_of_responses_it_reaches_the_optimum_off_policy(tree, behaviour):
    best_N, _ = optimum(tree)
    learned_SV = descend(tree, behaviour, of_responses=True, normalizer="learned", lr=4.0, steps=600)
    torch.testing.assert_close(response_logprobs(tree, learned_SV), best_N, rtol=0, atol=1e-3)


def test_on_its_own_samples_the_policy_reaches_the_optimum(tree):
    assert distance(tree, descend(tree, "policy", normalizer="learned", steps=700, lr=2.0)) < 1e-8
    best_N, _ = optimum(tree)
    learned_SV = descend(tree, "policy", of_responses=True, normalizer="learned", lr=4.0, steps=2000)
    torch.testing.assert_close(response_logprobs(tree, learned_SV), best_N, rtol=0, atol=1e-3)


def test_what_it_learns_is_log_z(tree):
    """At pi*, of whichever responses: the mean over the states that they visit."""
    optimal_SV = (tree.init_SV + tree.advantages_SV / KL_COEF).log_softmax(-1)
    moved = (optimal_SV - tree.init_SV)[tree.state_NR, tree.token_NR]
    residual, states = state_residuals(tree.advantages_NR, moved, tree.mask_NR, KL_COEF)
    hidden = torch.nn.functional.one_hot(tree.state_NR[states], 7).double()
    learned = LearnedNormalizer()
    for _ in range(3):
        stats = learned.learn(moments_of(hidden, residual[states]).mul(1000), KL_COEF)
    log_z_S = log_normalizers(tree, KL_COEF)
    torch.testing.assert_close(-learned(torch.eye(7).double()) / KL_COEF, log_z_S, rtol=0, atol=1e-3)
    assert stats["log_normalizer"] == pytest.approx(log_z_S[tree.state_NR[states]].mean().item(), abs=1e-4)


# ---- in the trainer ----


def learner(tmp_path, loss_type, model=None, trainer_kwargs=None, **options):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "kl_coef": 0.4, **options}
    options = {"batch_size": 8, "mini_batch_size": 8, "advantage_estimator": "group", **options}
    return tiny_trainer(
        tmp_path, model, trainer_kwargs, **{"loss_type": loss_type, "normalizer": "learned", **options}
    )


@pytest.mark.parametrize("loss_type", ["apa", "response_apa"])
def test_step_equals_a_plain_autograd_script_of_the_formulas(tmp_path, loss_type):
    """Four steps, in which the penalty changes. Split into micro-batches or not; policy and fit see constants."""
    options = {"whiten_advantages": False, "ppo_epochs": 2}
    model = tiny_model(dtype=torch.float64)
    splits = ({"mini_batch_size": 8}, {"mini_batch_size": 2, "gradient_accumulation_steps": 4})
    trainers = [learner(tmp_path, loss_type, copy.deepcopy(model), **options, **split) for split in splits]
    policy, reference = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    fits, errors, seen, shifts = [], [0.0] * len(PENALTIES), [], []
    for seed in range(4):
        queries, responses, scores = grouped_rollouts(seed=seed)
        stats = [trainer.step(queries, responses, scores) for trainer in trainers]
        keys = [tuple(query.tolist()) for query in queries]
        groups = [[row for row in range(8) if keys[row] == key] for key in keys]
        targets = [
            float(scores[row]) - sum(float(scores[i]) for i in groups[row]) / len(groups[row]) for row in range(8)
        ]
        rows = list(zip(queries, responses, targets, strict=True))

        def log_ratio(query, response):
            return row_logprobs(policy, query, response, 1.0) - row_logprobs(reference, query, response, 1.0).detach()

        hidden = [row_hidden(policy, *row[:2]).detach() for row in rows]
        before = [log_ratio(*row[:2]).detach() for row in rows]
        if loss_type == "response_apa":
            states = torch.stack([row[0] for row in hidden])
            residuals = torch.stack([0.4 * x.sum() - row[2] for x, row in zip(before, rows, strict=True)])
        else:
            states = torch.cat(hidden)
            residuals = torch.cat([0.4 * x - row[2] for x, row in zip(before, rows, strict=True)])
        shift = torch.zeros_like(residuals)
        if fits:
            best = chosen_by(errors)
            shift = states @ fits[best][:-1] + fits[best][-1]
            missed = [(residuals - states @ fit[:-1] - fit[-1]).square().sum().item() for fit in fits]
            errors = [KEPT * old + new for old, new in zip(errors, missed, strict=True)]
        shifts.append(float(shift.abs().max()))
        assert stats[0]["apa/normalizer/error"] == pytest.approx(
            float((residuals - shift).square().mean() / 0.16), rel=1e-4
        )
        seen = [(old, y, KEPT * weight) for old, y, weight in seen] + [(states, residuals, 1.0)]
        fits = fits_of(seen)
        of_rows = shift if loss_type == "response_apa" else shift.split([len(row) for row in responses])
        for _ in range(2):
            if loss_type == "response_apa":
                terms = [0.4 * log_ratio(q, r).sum() - a - h for (q, r, a), h in zip(rows, of_rows, strict=True)]
                loss = torch.stack(terms).square().mean()
            else:
                terms = [log_ratio(q, r) - (a + h) / 0.4 for (q, r, a), h in zip(rows, of_rows, strict=True)]
                loss = torch.cat(terms).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = {f"policy.{name}": p.detach() for name, p in policy.named_parameters()}
        for trainer in trainers:
            assert_same(parameters(trainer), expected, tolerance=2e-6)
    assert shifts[0] == 0 and max(shifts[1:]) > 1e-2


def row_hidden(policy, query, response):
    """Last hidden states that predict a response's tokens, of the row alone."""
    output = policy(input_ids=torch.cat([query, response])[None], output_hidden_states=True)
    return last_hidden_states(output)[0, len(query) - 1 : -1]


@pytest.mark.parametrize("loss_type", ["apa", "response_apa"])
def test_the_first_update_is_that_without_it_to_the_bit_and_later_ones_are_not(tmp_path, loss_type):
    trainers = [learner(tmp_path, loss_type, normalizer=normalizer) for normalizer in ("none", "learned")]
    names = [[name for name, _ in trainer.model.named_parameters()] for trainer in trainers]
    assert names[0] == names[1]
    first = [parameters_after_step(trainer, *grouped_rollouts()) for trainer in trainers]
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    for seed in (1, 2):
        later = [parameters_after_step(trainer, *grouped_rollouts(seed=seed)) for trainer in trainers]
    assert max(float((later[0][name] - later[1][name]).abs().max()) for name in first[0]) > 1e-5


@pytest.mark.parametrize("loss_type", ["apa", "response_apa"])
def test_split_row_order_and_layout_do_not_matter(tmp_path, loss_type):
    seen = []

    def noting(self, rows, pad_token_id, layout, original=Rollouts.micro_batch):
        seen.append(layout)
        return original(self, rows, pad_token_id, layout)

    def after(order=range(8), **options):
        trainer = learner(tmp_path, loss_type, ppo_epochs=2, **options)
        for seed in range(3):
            rollouts = grouped_rollouts(seed=seed)
            stats = trainer.step(*[[column[row] for row in order] for column in rollouts])
        return parameters(trainer), {name: stats[name] for name in STATISTICS}

    expected, expected_stats = after()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "micro_batch", noting)
        others = [
            after([5, 2, 7, 0, 3, 1, 6, 4]),
            after(padding_free=False),
            after(mini_batch_size=2, gradient_accumulation_steps=4),
            after(tokens_per_micro_batch=20),
            after(local_rollout_forward_batch_size=3),
        ]
        patch.setattr(shared_prompts, "SHORTEST", 1)
        patch.setattr(shared_prompts, "SMALLEST_SHARE", 0.0)
        others.append(after(shuffle="groups"))
    assert {Layout.PADDED, Layout.PACKED, Layout.SHARED} <= set(seen)
    for weights, stats in others:
        assert_same(weights, expected, tolerance=1e-5)
        assert stats == {name: pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in expected_stats.items()}


CASES = {
    "GAE and a value network": ({"advantage_estimator": "gae"}, {}, "llama"),
    "GAE and a head": ({"advantage_estimator": "gae"}, {"value_model": "head"}, "llama"),
    "GAE and networks on one base": (
        {"advantage_estimator": "gae", "gradient_checkpointing": True},
        {"value_model": "adapter", "peft_config": lora_config()},
        "llama",
    ),
    "LoRA": ({"gradient_checkpointing": True}, {"peft_config": lora_config()}, "gpt2"),
    "an encoder-decoder": ({}, {}, "t5"),
    "leave one out": ({"advantage_estimator": "leave_one_out"}, {}, "gpt_neox"),
    "autocast": ({"bf16": True, "advantage_estimator": "batch"}, {}, "llama"),
    "no exact KL": ({"exact_kl": False}, {}, "llama"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_reads_the_states_of_the_policy_itself_whatever_is_beside_it(tmp_path, name):
    """Its statistics are those of the advantages and of hidden states of each row alone."""
    config, given, family = CASES[name]
    trainer = learner(tmp_path, "apa", tiny_model(family), given, **config)
    for seed in range(3):
        trainer.step(*grouped_rollouts(seed=seed))
    fit = trainer.run_state.normalizer.coefficients
    policy = copy.deepcopy(trainer.model.policy)
    queries, responses, scores = grouped_rollouts(seed=3)
    stats = trainer.step(queries, responses, scores)
    rollouts = trainer.run_state.iteration.rollouts
    shifts = [
        alone_hidden(policy, query, response).double() @ fit[:-1] + fit[-1]
        for query, response in zip(queries, responses, strict=True)
    ]
    mean = float(torch.cat(shifts).mean())
    assert abs(mean) > 1e-4
    tolerance = 0.05 if config.get("bf16") else 1e-4
    assert stats["apa/normalizer/log_normalizer"] == pytest.approx(-mean / 0.4, rel=tolerance)
    advantages = rollouts.advantages_BR[rollouts.response_mask_BR]
    if trainer.args.whiten_advantages:  # of mean 0 before the shift
        assert float(advantages.mean()) == pytest.approx(mean, rel=tolerance, abs=1e-5)
    assert stats["objective/kl"] == pytest.approx(float(rollouts_kl(rollouts)), rel=1e-4)


def alone_hidden(policy, query, response):
    if not policy.config.is_encoder_decoder:
        with torch.no_grad():
            return row_hidden(policy, query, response)
    start = torch.tensor([policy.config.decoder_start_token_id])
    inputs = {"input_ids": query[None], "decoder_input_ids": torch.cat([start, response[:-1]])[None]}
    with torch.no_grad():
        return last_hidden_states(policy(**inputs, output_hidden_states=True))[0]


def rollouts_kl(rollouts):
    moved = torch.where(rollouts.response_mask_BR, rollouts.old_logprobs_BR - rollouts.ref_logprobs_BR, 0.0)
    return moved.sum(dim=1).mean()


def test_a_step_that_fails_leaves_nothing_in_the_next_one(tmp_path):
    def after(fails):
        trainer = learner(tmp_path, "apa")
        trainer.step(*grouped_rollouts())
        if fails:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(trainer), "_update", lambda self: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    trainer.step(*grouped_rollouts(seed=5))
        return parameters_after_step(trainer, *grouped_rollouts(seed=1))

    expected, found = after(False), after(True)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


RUN = {"normalizer": "learned", "save_strategy": "steps", "save_steps": 1, "max_steps": 20, "num_generations": 2}


@pytest.mark.parametrize("loss_type", ["apa", "response_apa"])
@pytest.mark.parametrize("step", [10, 12])
def test_a_run_resumes_with_the_same_bits(tmp_path, loss_type, step):
    """From within an iteration of four optimizer steps, and from between two."""
    estimator = {"advantage_estimator": "gae"} if loss_type == "apa" else {}
    options = {**RUN, "loss_type": loss_type, **estimator}
    complete = trainer_for(tmp_path / "complete", **options)
    complete.train()
    estimates = [row.get("apa/normalizer/log_normalizer", 0.0) for row in complete.state.log_history]
    assert max(map(abs, estimates[12:])) > 1e-3
    stopped = trainer_for(tmp_path / "stopped", callbacks=[StopAt(step)], **options)
    stopped.train()
    resumed = trainer_for(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed), parameters(complete), tolerance=1e-30)
    assert torch.equal(resumed.run_state.normalizer.coefficients, complete.run_state.normalizer.coefficients)


def test_a_checkpoint_without_it_goes_on_as_before_and_can_go_on_with_it(tmp_path, monkeypatch):
    options, original = {**RUN, "max_steps": 4}, RunState.state_dict
    with monkeypatch.context() as patch:  # as it was written before there was this option
        patch.setattr(
            RunState, "state_dict", lambda state: {k: v for k, v in original(state).items() if k != "normalizer"}
        )
        trainer_for(tmp_path / "plain", **{**options, "normalizer": "none"}).train()
    trainer_for(tmp_path / "plain", **{**options, "normalizer": "none", "max_steps": 6}).train(
        resume_from_checkpoint=True
    )
    with pytest.raises(ValueError, match="normalizer was 'none', is 'learned'"):
        trainer_for(tmp_path / "plain", **{**options, "max_steps": 8}).train(resume_from_checkpoint=True)
    allowed = trainer_for(tmp_path / "plain", **{**options, "max_steps": 8, "resume_anyway": ["normalizer"]})
    allowed.train(resume_from_checkpoint=True)
    assert allowed.run_state.normalizer.coefficients is not None


def test_it_may_be_set_between_two_steps(tmp_path):
    trainer = learner(tmp_path, "apa", normalizer="none")
    assert not STATISTICS & trainer.step(*grouped_rollouts()).keys()
    trainer.args.normalizer = "learned"
    assert STATISTICS <= trainer.step(*grouped_rollouts()).keys()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"normalizer='learnt': it should be 'none', 'group' or 'learned'"):
        tiny_config(tmp_path, normalizer="learnt")
    with pytest.warns(UserWarning, match="normalizer='learned' has no effect with loss_type='rebel': only 'apa' and"):
        made = tiny_config(tmp_path, loss_type="rebel", normalizer="learned")
    assert not made.learns_normalizer
    # one response to a prompt is enough
    tiny_trainer(tmp_path, normalizer="learned").step(*tiny_rollouts())


def test_a_matrix_that_rounding_has_spoilt_leaves_the_mean_residual():
    """Entries of mean 1000 deviations: in float32 their moments hold no variance, and the matrix has no root."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(30000, 64, generator=generator)
    states[:, ::2] = 50 + 0.05 * states[:, ::2]
    residuals = torch.randn(30000, generator=generator) + 2
    rows = torch.cat([states, torch.ones(30000, 1), residuals[:, None]], dim=1)
    spoilt = ridge_coefficients(rows.T @ rows, 0.1)
    torch.testing.assert_close(spoilt, torch.cat([torch.zeros(64), residuals.mean()[None]]), rtol=1e-4, atol=1e-4)
    assert ridge_coefficients(moments_of(states, residuals), 0.1)[:-1].abs().min() > 0


def test_what_was_learned_with_another_lambda_is_forgotten():
    states, residuals = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50.0)
    normalizer = LearnedNormalizer()
    normalizer.use(0.1)
    normalizer.learn(moments_of(states, residuals), 0.1)
    again = LearnedNormalizer()
    again.load_state_dict(normalizer.state_dict())
    for learned in (normalizer, again):
        learned.use(0.1)
        assert (learned(states) != 0).all()
        learned.use(0.2)
        assert (learned(states) == 0).all()
