import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests._two_processes import run_in_two_processes
from trl_apa.algorithms.kl import kl_estimate
from trl_apa.algorithms.rewards import (
    RunningMoments,
    kl_penalized_rewards,
    shape_scores,
    shaped_token_rewards,
    token_rewards,
)


finite_scores = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8)


def test_running_moments_hand_worked():
    running = RunningMoments()
    # 1, 3: mean 2, squares 1 + 1 = 2, std sqrt(2 / 1)
    assert running.update(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, math.sqrt(2)))
    # 5, 7 merge with them: delta = 6 - 2 = 4, n = 4, mean 2 + 4 * 2 / 4 = 4, squares 2 + 2 + 16 * 2 * 2 / 4 = 20
    assert running.update(torch.tensor([5.0, 7.0])) == pytest.approx((6.0, math.sqrt(2)))
    assert (running.count, running.mean) == (4, 4.0)
    assert running.std == pytest.approx(math.sqrt(20 / 3))


@settings(max_examples=25)
@given(batches=st.lists(finite_scores, min_size=1, max_size=4))
def test_running_moments_equal_one_pass_over_all_scores(batches):
    running = RunningMoments()
    for batch in batches:
        batch_mean, batch_std = running.update(torch.tensor(batch, dtype=torch.float64))
        assert batch_mean == pytest.approx(statistics.fmean(batch), abs=1e-9)
        assert batch_std == pytest.approx(statistics.stdev(batch) if len(batch) > 1 else 0.0, abs=1e-6)
    scores = [score for batch in batches for score in batch]
    assert running.count == len(scores)
    assert running.mean == pytest.approx(statistics.fmean(scores), abs=1e-9)
    assert running.std == pytest.approx(statistics.stdev(scores) if len(scores) > 1 else 0.0, abs=1e-6)


def test_running_moments_keep_a_small_spread_on_a_large_mean():
    # squares of 1e6 eat the digits of a spread of 1e-3 if the variance is taken as mean square minus squared mean
    running = RunningMoments()
    for sign in (1, -1, 1, -1):
        running.update(torch.tensor([1e6 + sign * 1e-3], dtype=torch.float64))
    assert running.std == pytest.approx(1e-3 * math.sqrt(4 / 3), rel=1e-5)


def test_running_moments_of_few_scores_are_numbers():
    running = RunningMoments()
    assert (running.count, running.mean, running.std) == (0, 0.0, 0.0)
    assert running.update(torch.tensor([2.0])) == (2.0, 0.0)
    assert running.std == 0.0


def test_running_moments_continue_from_their_state():
    first, second = torch.tensor([1.0, 4.0, 2.0]), torch.tensor([0.5, -3.0])
    straight, stopped, resumed = RunningMoments(), RunningMoments(), RunningMoments()
    straight.update(first)
    straight.update(second)
    stopped.update(first)
    resumed.load_state_dict(stopped.state_dict())
    resumed.update(second)
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.std == straight.std


def test_running_moments_refuse_what_would_spoil_them():
    running = RunningMoments()
    running.update(torch.tensor([1.0, 3.0]))
    before = running.state_dict()
    for spoiled in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="scores_B"):
            running.update(torch.tensor([0.0, spoiled]))
    with pytest.raises(ValueError, match="scores_B"):
        running.update(torch.tensor([]))
    assert running.state_dict() == before


def _update_on_rank(rank, scores):
    running = RunningMoments(distributed=True)
    batches = [running.update(scores[0][:1] if rank == 0 else scores[0][1:]), running.update(scores[1][rank::2])]
    try:
        # one rank alone has a score that is not finite: both must refuse, or the other one waits for ever
        running.update(torch.tensor([math.nan if rank == 0 else 1.0]))
    except ValueError as error:
        refused = str(error)
    return batches, running.state_dict(), refused


def test_two_ranks_hold_the_moments_of_all_scores():
    scores = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    whole = RunningMoments()
    expected = [whole.update(batch) for batch in scores]
    ranks = run_in_two_processes(_update_on_rank, scores)
    for batches, state, refused in ranks:
        for batch, one_process in zip(batches, expected, strict=True):
            assert batch == pytest.approx(one_process, abs=1e-14)
        assert state == pytest.approx(whole.state_dict(), abs=1e-13)
        assert "scores_B" in refused
    assert ranks[0][1] == ranks[1][1]


def test_shape_scores_hand_worked():
    scores = torch.tensor([1.0, 4.0, -5.0])
    assert shape_scores(scores).tolist() == [1.0, 4.0, -5.0]
    assert shape_scores(scores, std=2.0).tolist() == [0.5, 2.0, -2.5]
    # (1 - 1) / 2, (4 - 1) / 2, (-5 - 1) / 2
    assert shape_scores(scores, mean=1.0, std=2.0).tolist() == [0.0, 1.5, -3.0]
    # the clip comes last
    assert shape_scores(scores, mean=torch.tensor(1.0), std=torch.tensor(2.0), clip=1.0).tolist() == [0.0, 1.0, -1.0]
    assert shape_scores(torch.tensor([3, -3]), clip=2).tolist() == [2.0, -2.0]


def test_shape_scores_by_running_moments_normalise():
    scores = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 7 + 3
    running = RunningMoments()
    running.update(scores)
    shaped = shape_scores(scores, std=running.std, mean=running.mean)
    assert shaped.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert shaped.std().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("scores", [[0.1], [0.1] * 7, [0.0, 0.0], [-3e8] * 3])
def test_scores_without_spread_are_not_blown_up(scores):
    # in float64 the mean of 7 times 0.1 misses 0.1, and leaves a standard deviation of 1e-17
    for dtype in (torch.float32, torch.float64):
        scores_B = torch.tensor(scores, dtype=dtype)
        running = RunningMoments()
        running.update(scores_B)
        assert torch.equal(shape_scores(scores_B, std=running.std), scores_B)


def test_a_small_scale_is_a_scale():
    assert shape_scores(torch.tensor([1e-12, -2e-12]), std=1e-12).tolist() == pytest.approx([1.0, -2.0])


def test_shape_scores_errors():
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clip is"):
            shape_scores(torch.zeros(2), clip=clip)


def test_token_rewards_hand_worked():
    mask = torch.tensor(
        [
            [True, True, False],
            [True, False, True],
            [False, True, False],
            [False, False, False],
        ]
    )
    result = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert result.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]
    assert result.dtype == torch.float32


@settings(max_examples=25)
@given(rows=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_token_rewards_equal_a_naive_loop(rows):
    mask = torch.tensor(rows)
    scores = torch.arange(1.0, len(rows) + 1)
    expected = torch.zeros(mask.shape)
    for b, row in enumerate(rows):
        counted = [t for t, is_counted in enumerate(row) if is_counted]
        if counted:
            expected[b, counted[-1]] = scores[b]
    assert torch.equal(token_rewards(scores, mask), expected)


def test_token_rewards_errors():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="scores_B has shape"):
        token_rewards(torch.zeros(3), mask)
    with pytest.raises(ValueError, match="scores_B has shape"):
        token_rewards(torch.zeros(2, 1), mask)
    with pytest.raises(ValueError, match="response_mask_BR has dtype"):
        token_rewards(torch.zeros(2), mask.int())
    with pytest.raises(ValueError, match="response_mask_BR has shape"):
        token_rewards(torch.zeros(2), mask[0])


def test_shaped_token_rewards_hand_worked():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    given = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 0.0, math.nan]])
    scores = torch.tensor([10.0, -8.0])  # 4 more for row 0, 4 less for row 1, at the end
    assert shaped_token_rewards(scores, mask).tolist() == [[0.0, 0.0, 10.0], [0.0, -8.0, 0.0]]
    assert shaped_token_rewards(scores, mask, given).tolist() == [[1.0, 2.0, 7.0], [-4.0, -4.0, 0.0]]
    # less a mean of 2, over 2: 4 and -5
    scaled = shaped_token_rewards(scores, mask, given, mean=2.0, std=2.0)
    assert scaled.tolist() == [[0.5, 1.0, 2.5], [-2.0, -3.0, 0.0]]
    # clipped at 2: half of row 0, 2/5 of row 1
    clipped = shaped_token_rewards(scores, mask, given, mean=2.0, std=2.0, clip=2.0)
    assert clipped[0].tolist() == [0.25, 0.5, 1.25]
    assert clipped[1].tolist() == pytest.approx([-0.8, -1.2, 0.0])


@settings(max_examples=50)
@given(
    rows=st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=5), min_size=2, max_size=4),
    at_the_end=st.floats(-50, 50),
    options=st.fixed_dictionaries(
        {"std": st.sampled_from([None, 0.5, 7.0]), "clip": st.sampled_from([None, 0.3, 5.0])}
    ),
    mean=st.sampled_from([None, -20.0, 40.0]),
)
def test_shaped_token_rewards_add_up_to_the_shaped_score(rows, at_the_end, options, mean):
    """Also where a large centred score is given token by token: the clip bounds the total, and the mean stays off."""
    width = max(map(len, rows))
    given = torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64)
    mask = ~given.isnan()
    scores = torch.tensor([sum(row) + at_the_end for row in rows], dtype=torch.float64)
    rewards = shaped_token_rewards(scores, mask, given, mean=mean, **options)
    expected = shape_scores(scores, mean=mean, **options)
    torch.testing.assert_close(rewards.sum(dim=1), expected, rtol=1e-9, atol=1e-9)
    assert (rewards[~mask] == 0).all()
    # Each token before the last keeps its sign and its share of what was given.
    unclipped = shaped_token_rewards(scores, mask, given, mean=mean, std=options["std"])
    for one, other in zip(rewards, unclipped, strict=True):
        torch.testing.assert_close(one * other.norm(), other * one.norm(), rtol=1e-6, atol=1e-6)


def test_shaped_token_rewards_errors():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="given_BR has shape"):
        shaped_token_rewards(torch.zeros(2), mask, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="clip is"):
        shaped_token_rewards(torch.zeros(2), mask, torch.zeros(2, 3), clip=0.0)


def test_kl_penalized_rewards_hand_worked():
    rewards = torch.tensor([[0.0, 1.0, 0.0]])
    logprobs = torch.tensor([[-1.0, -3.0, math.nan]])
    ref_logprobs = torch.tensor([[-2.0, -1.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    # k1: -1 + 2 = 1 and -3 + 1 = -2; rewards 0 - 0.5 * 1 = -0.5 and 1 + 0.5 * 2 = 2
    k1, absolute, k2 = (kl_estimate(logprobs, ref_logprobs, name) for name in ("kl", "abs", "mse"))
    assert kl_penalized_rewards(rewards, k1, mask, 0.5).tolist() == [[-0.5, 2.0, 0.0]]
    # absolute values 1 and 2: -0.5 and 1 - 1 = 0
    assert kl_penalized_rewards(rewards, absolute, mask, 0.5).tolist() == [[-0.5, 0.0, 0.0]]
    # half squares 0.5 and 2: -0.25 and 1 - 1 = 0
    assert kl_penalized_rewards(rewards, k2, mask, 0.5).tolist() == [[-0.25, 0.0, 0.0]]
    assert kl_penalized_rewards(rewards, k1, mask, 0.0).tolist() == [[0.0, 1.0, 0.0]]


def test_kl_penalties_of_a_response_add_up_to_its_sequence_kl():
    generator = torch.Generator().manual_seed(2)
    logprobs, ref_logprobs = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False], [True, False, False, False, False]])
    scores = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    result = kl_penalized_rewards(token_rewards(scores, mask), logprobs - ref_logprobs, mask, 0.3)
    for b in range(3):
        sequence_kl = sum((logprobs[b, t] - ref_logprobs[b, t]).item() for t in range(5) if mask[b, t])
        assert result[b].sum().item() == pytest.approx(scores[b].item() - 0.3 * sequence_kl, abs=1e-13)


def test_kl_penalized_rewards_carry_no_gradient():
    kl = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert not kl_penalized_rewards(torch.zeros(1, 2), kl, mask, 0.1).requires_grad


def test_kl_penalized_rewards_errors():
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for kl_coef in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="kl_coef is"):
            kl_penalized_rewards(zeros, zeros, mask, kl_coef)
    with pytest.raises(ValueError, match="kl_penalty_BR has shape"):
        kl_penalized_rewards(zeros, zeros[:, 1:], mask, 0.1)
