import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_apa.algorithms.advantages import (
    batch_advantages,
    gae,
    group_advantages,
    leave_one_out_advantages,
    log_mean_exp_advantages,
    turn_gae,
)
from trl_apa.algorithms.rewards import token_rewards


def ragged(seed, rows=4, columns=7):
    """Random float64 rewards and values and a mask with gaps."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    values = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    return rewards, values, mask


def naive_gae(rewards, values, mask, gamma, gae_lambda):
    """The defining sum, Adv_t = sum_l (gamma gae_lambda)^l delta_t+l, on the counted tokens of each row."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        at = [t for t in range(rewards.shape[1]) if mask[row, t]]
        v = [values[row, t].item() for t in at] + [0.0]
        delta = [rewards[row, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            advantages[row, t] = sum((gamma * gae_lambda) ** k * delta[i + k] for k in range(len(at) - i))
    return advantages


def test_hand_worked():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 99.0]])
    values = torch.tensor([[0.5, 0.25, 0.75, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    # delta_2 = 1 + 0.5 * 0 - 0.75 = 0.25
    # delta_1 = 0 + 0.5 * 0.75 - 0.25 = 0.125
    # delta_0 = 0 + 0.5 * 0.25 - 0.5 = -0.375
    # Adv_2 = 0.25; Adv_1 = 0.125 + 0.25 * 0.25 = 0.1875; Adv_0 = -0.375 + 0.25 * 0.1875 = -0.328125
    assert advantages.tolist() == [[-0.328125, 0.1875, 0.25, 0.0]]
    # returns: -0.328125 + 0.5, 0.1875 + 0.25, 0.25 + 0.75
    assert returns.tolist() == [[0.171875, 0.4375, 1.0, 0.0]]


def test_a_gap_is_skipped_hand_worked():
    rewards = torch.tensor([[0.0, 7.0, 1.0]])
    values = torch.tensor([[0.5, 9.0, 0.25]])
    mask = torch.tensor([[True, False, True]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=1.0)
    # the successor of token 0 is token 2, one discount away: delta_0 = 0 + 0.5 * 0.25 - 0.5 = -0.375
    # delta_2 = 1 - 0.25 = 0.75; Adv_0 = -0.375 + 0.5 * 0.75 = 0
    assert advantages.tolist() == [[0.0, 0.0, 0.75]]
    assert returns.tolist() == [[0.5, 0.0, 1.0]]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (0.5, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_equals_the_defining_sum(gamma, gae_lambda):
    rewards, values, mask = ragged(0)
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    expected = naive_gae(rewards, values, mask, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0), rtol=0, atol=1e-13)


def test_lambda_one_is_return_minus_value():
    # a terminal score and no discount: the return is the score on every counted token, whatever the values
    _, values, mask = ragged(1)
    mask[:, 0] = True
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    advantages, returns = gae(token_rewards(scores, mask), values, mask, gamma=1.0, gae_lambda=1.0)
    everywhere = scores[:, None].expand_as(mask)
    torch.testing.assert_close(returns, torch.where(mask, everywhere, 0.0), rtol=0, atol=1e-13)
    torch.testing.assert_close(advantages, torch.where(mask, everywhere - values, 0.0), rtol=0, atol=1e-13)


def test_lambda_zero_is_the_one_step_error():
    rewards, values, _ = ragged(2)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    successors = torch.cat([values[:, 1:], torch.zeros(len(values), 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * successors - values, rtol=0, atol=1e-14)


def test_true_values_leave_no_advantage():
    # V(s_t) = discounted sum of the rewards to come: nothing is better than expected, whatever gae_lambda
    rewards, _, mask = ragged(3)
    _, true_values = gae(rewards, torch.zeros_like(rewards), mask, gamma=0.8, gae_lambda=1.0)
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages, returns = gae(rewards, true_values, mask, 0.8, gae_lambda)
        assert advantages.abs().max().item() < 1e-14
        torch.testing.assert_close(returns, true_values, rtol=0, atol=1e-14)


def test_linear_in_rewards_and_values():
    first, second = ragged(4), ragged(5)
    mask = first[2]
    both, _ = gae(2 * first[0] + second[0], 2 * first[1] + second[1], mask, 0.9, 0.7)
    apart = 2 * gae(first[0], first[1], mask, 0.9, 0.7)[0] + gae(second[0], second[1], mask, 0.9, 0.7)[0]
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-13)


# Turns of two tokens and of one, with two tokens of a tool between them, and padding.
TWO_TURNS = torch.tensor([[True, True, False, False, True, False]])
TURN_REWARDS = torch.tensor([[0.0, 0.5, 99.0, 99.0, 1.0, 99.0]])
TURN_VALUES = torch.tensor([[0.5, 0.25, 99.0, 99.0, 0.75, 99.0]])


def test_turn_discount_hand_worked():
    advantages, returns = gae(TURN_REWARDS, TURN_VALUES, TWO_TURNS, gamma=0.5, gae_lambda=0.5, turn_discount=0.5)
    # delta_4 = 1 - 0.75 = 0.25; delta_1 = 0.5 + 0.5 * 0.5 * 0.75 - 0.25 = 0.4375, across turns
    # delta_0 = 0.5 * 0.25 - 0.5 = -0.375, inside a turn
    # Adv_4 = 0.25; Adv_1 = 0.4375 + 0.5 * 0.5 * 0.5 * 0.25 = 0.46875; Adv_0 = -0.375 + 0.5 * 0.5 * 0.46875
    assert advantages.tolist() == [[-0.2578125, 0.46875, 0.0, 0.0, 0.25, 0.0]]
    assert returns.tolist() == [[0.2421875, 0.71875, 0.0, 0.0, 1.0, 0.0]]


def test_gae_over_turns_hand_worked():
    advantages, returns = turn_gae(TURN_REWARDS, TURN_VALUES, TWO_TURNS, gamma=0.5, gae_lambda=0.5, turn_discount=0.5)
    # delta of turn 2 = 1 - 0.75 = 0.25 = Adv
    # delta of turn 1 = 0 + 0.5 * 0.5 + 0.5^2 * 0.5 * 0.75 - 0.5 = -0.15625
    # Adv of turn 1 = -0.15625 + 0.5^2 * 0.5 * 0.5 * 0.25 = -0.140625
    assert advantages.tolist() == [[-0.140625, -0.140625, 0.0, 0.0, 0.25, 0.0]]
    # return of token 4: 1; of token 1: 0.5 + 0.5 * 0.5 * (0.75 + 0.5 * 0.25) = 0.71875; of token 0: 0.5 * 0.71875
    assert returns.tolist() == [[0.359375, 0.71875, 0.0, 0.0, 1.0, 0.0]]
    assert returns[0, 0] == advantages[0, 0] + TURN_VALUES[0, 0]


def turns_of(kept):
    """The columns of each turn of a row, in order."""
    turns = []
    for column, counted in enumerate(kept):
        if counted and (column == 0 or not kept[column - 1]):
            turns.append([])
        if counted:
            turns[-1].append(column)
    return turns


def naive_turn_discount(rewards, values, mask, gamma, gae_lambda, turn_discount):
    """Adv_t = sum_l w_l gae_lambda^l delta_t+l, w_l the product of all discounts on the way."""
    advantages = torch.zeros_like(rewards)
    for row, turns in enumerate(map(turns_of, mask.tolist())):
        at = [t for turn in turns for t in turn]
        ends = {turn[-1] for turn in turns}
        discount = [gamma * (turn_discount if t in ends else 1.0) for t in at]
        v = [values[row, t].item() for t in at] + [0.0]
        delta = [rewards[row, t].item() + discount[i] * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            terms = range(len(at) - i)
            advantages[row, t] = sum(math.prod(discount[i : i + k]) * gae_lambda**k * delta[i + k] for k in terms)
    return advantages, torch.where(mask, advantages + values, 0.0)


def naive_turn_gae(rewards, values, mask, gamma, gae_lambda, turn_discount):
    """Plain GAE of the turns' summed rewards and first values; of each token's return what is left of its turn."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row, turns in enumerate(map(turns_of, mask.tolist())):
        ahead_value = ahead_advantage = 0.0
        for turn in reversed(turns):
            r = [rewards[row, t].item() for t in turn]
            for i, t in enumerate(turn):
                left = sum(gamma**j * reward for j, reward in enumerate(r[i:]))
                then = gamma ** len(r[i:]) * turn_discount
                returns[row, t] = left + then * (ahead_value + gae_lambda * ahead_advantage)
            ahead_value = values[row, turn[0]].item()
            ahead_advantage = returns[row, turn[0]].item() - ahead_value
            advantages[row, turn] = ahead_advantage
    return advantages, returns


OVER = {gae: naive_turn_discount, turn_gae: naive_turn_gae}
DISCOUNTS = [(1.0, 0.95, 1.0), (0.9, 0.8, 0.7), (0.9, 0.8, 1.0), (1.0, 0.5, 0.0), (0.5, 0.0, 0.9), (1.0, 1.0, 0.5)]


@pytest.mark.parametrize("over", OVER, ids=lambda over: over.__name__)
@pytest.mark.parametrize(("gamma", "gae_lambda", "turn_discount"), DISCOUNTS)
def test_credit_over_turns_equals_a_slow_loop(over, gamma, gae_lambda, turn_discount):
    rewards, values, mask = ragged(12, rows=6, columns=12)
    mask[1], mask[2] = False, True
    found = over(rewards, values, mask, gamma, gae_lambda, turn_discount)
    expected = OVER[over](rewards, values, mask, gamma, gae_lambda, turn_discount)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_a_response_of_one_turn_does_not_depend_on_the_discount_of_turns():
    rewards, values, mask = ragged(13)
    contiguous = torch.arange(7) < torch.tensor([[7], [1], [4], [0]])
    for dtype in (torch.float32, torch.float64):
        given = rewards.to(dtype), values.to(dtype), contiguous, 0.9, 0.8
        for one, other in zip(gae(*given), gae(*given, turn_discount=0.3), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(gae(rewards, values, mask, 0.9, 0.8)[0], gae(rewards, values, mask, 0.9, 0.8, 0.3)[0])


def plain_gae(rewards, values, mask, gamma, gae_lambda):
    """GAE token by token as it is without turns, in the tensors' own arithmetic."""
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * gae_lambda * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, torch.zeros(()))
    return advantages


def test_without_a_discount_of_turns_gae_is_the_plain_one_to_the_bit():
    rewards, values, mask = ragged(14, rows=16, columns=40)
    given = torch.where(mask, rewards, 0.0).float(), torch.where(mask, values, 0.0).float(), mask, 0.93, 0.95
    assert torch.equal(gae(*given)[0], plain_gae(*given))


def bi_level_gae(rewards, values, mask, gamma, gae_lambda, turn_discount):
    """Two recursions as in arXiv 2510.16907: over the last tokens of turns, then in each turn up to what that gave."""
    advantages = torch.zeros_like(rewards)
    for row, turns in enumerate(map(turns_of, mask.tolist())):
        next_value = of_turn = 0.0
        for turn in reversed(turns):
            r, v = rewards[row, turn].tolist(), values[row, turn].tolist()
            of_turn = r[-1] + turn_discount * next_value - v[-1] + turn_discount * gae_lambda * of_turn
            next_value = v[-1]
            inside = of_turn
            advantages[row, turn[-1]] = of_turn
            for i in reversed(range(len(turn) - 1)):
                inside = r[i] + gamma * v[i + 1] - v[i] + gamma * gae_lambda * inside
                advantages[row, turn[i]] = inside
    return advantages


def test_undiscounted_inside_turns_and_with_lambda_one_it_is_bi_level_gae():
    rewards, values, mask = ragged(15, rows=6, columns=12)
    ends = torch.zeros_like(mask)
    for row, turns in enumerate(map(turns_of, mask.tolist())):
        ends[row, [turn[-1] for turn in turns]] = True
    rewards = torch.where(ends, rewards, 0.0)
    expected = bi_level_gae(rewards, values, mask, 1.0, 1.0, 0.8)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0, 0.8)[0], expected, rtol=0, atol=1e-13)


def test_with_lambda_one_a_turn_s_first_token_has_the_same_advantage_over_tokens_and_over_turns():
    rewards, values, mask = ragged(16, rows=6, columns=12)
    firsts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    over_tokens, over_turns = (over(rewards, values, mask, 0.9, 1.0, 0.7) for over in (gae, turn_gae))
    torch.testing.assert_close(over_turns[0][firsts], over_tokens[0][firsts], rtol=0, atol=1e-13)
    torch.testing.assert_close(over_turns[1], over_tokens[1], rtol=0, atol=1e-13)


def test_with_a_token_a_turn_both_are_the_same():
    rewards, values, _ = ragged(17, rows=4, columns=9)
    mask = (torch.arange(9) % 2 == 0).expand(4, -1)
    for one, other in zip(gae(rewards, values, mask, 0.9, 0.6, 0.7), turn_gae(rewards, values, mask, 0.9, 0.6, 0.7),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("over", OVER, ids=lambda over: over.__name__)
def test_credit_over_turns_depends_neither_on_padding_nor_on_other_rows_nor_on_what_is_masked(over):
    rewards, values, mask = ragged(18, rows=6, columns=9)
    whole = over(rewards, values, mask, 0.9, 0.8, 0.7)
    behind = [torch.where(mask, x, math.nan) for x in (rewards, values)]
    wide = [
        torch.nn.functional.pad(x, (2, 3), value=fill) for x, fill in [*((x, math.inf) for x in behind), (mask, 0)]
    ]
    for one, other in zip(whole, over(*wide, 0.9, 0.8, 0.7), strict=True):
        assert torch.equal(one, other[:, 2:-3]) and other[:, :2].eq(0).all() and other[:, -3:].eq(0).all()
    parts = [over(rewards[i : i + 2], values[i : i + 2], mask[i : i + 2], 0.9, 0.8, 0.7) for i in (0, 2, 4)]
    for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(pieces))
    longer_gaps = [torch.repeat_interleave(x, torch.tensor([1, 2] * 4 + [1]), dim=1) for x in (rewards, values)]
    apart = (torch.arange(9) % 2 == 0).expand(6, -1)
    wider = torch.repeat_interleave(apart, torch.tensor([1, 2] * 4 + [1]), dim=1)
    for one, other in zip(over(rewards, values, apart, 0.9, 0.8, 0.7), over(*longer_gaps, wider, 0.9, 0.8, 0.7),
                          strict=True):  # fmt: skip
        assert torch.equal(one[apart], other[wider])


@pytest.mark.parametrize("over", OVER, ids=lambda over: over.__name__)
def test_credit_over_turns_refuses_what_it_cannot_read_and_has_no_gradient(over):
    rewards, values, mask = ragged(19)
    with pytest.raises(ValueError, match=r"turn_discount is 1.1, it should be in \[0, 1\]"):
        over(rewards, values, mask, 1.0, 0.95, 1.1)
    with pytest.raises(ValueError, match="gae_lambda is -1"):
        over(rewards, values, mask, 1.0, -1.0, 0.9)
    with pytest.raises(ValueError, match="values_BR has shape"):
        over(rewards, values[:, 1:], mask, 1.0, 0.95, 0.9)
    found = over(rewards.requires_grad_(), values.bfloat16().requires_grad_(), mask, 1.0, 0.95, 0.9)
    assert not any(x.requires_grad for x in found) and found[0].dtype == torch.float64
    empty = torch.zeros(2, 0)
    assert [x.shape for x in over(empty, empty, empty.bool(), 1.0, 0.95, 0.9)] == [(2, 0), (2, 0)]
    on_meta = [x.detach().to("meta") for x in ragged(10)]
    assert over(*on_meta, 1.0, 0.95, 0.9)[0].shape == on_meta[0].shape


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), places=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_masked_columns_anywhere_change_nothing(seed, places):
    # left padding, right padding and gaps, full of garbage
    rewards, values, _ = ragged(seed, rows=2, columns=5)
    advantages, returns = gae(rewards, values, torch.ones(2, 5, dtype=torch.bool), 0.9, 0.8)
    source = list(range(5))
    for place in sorted(places, reverse=True):
        source.insert(place, -1)
    counted = torch.tensor([column >= 0 for column in source])

    def widen(x):
        wide = torch.full((2, len(source)), math.nan, dtype=torch.float64)
        wide[:, counted] = x
        return wide

    wide_advantages, wide_returns = gae(widen(rewards), widen(values), counted.expand(2, -1), 0.9, 0.8)
    assert torch.equal(wide_advantages[:, counted], advantages)
    assert torch.equal(wide_returns[:, counted], returns)
    assert wide_advantages[:, ~counted].eq(0).all()
    assert wide_returns[:, ~counted].eq(0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e300])
def test_garbage_behind_the_mask_changes_nothing(garbage):
    rewards, values, mask = ragged(6)
    clean = gae(rewards, values, mask, 0.9, 0.8)
    dirty = gae(rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage), mask, 0.9, 0.8)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


def test_rows_do_not_meet():
    rewards, values, mask = ragged(7)
    whole, _ = gae(rewards, values, mask, 0.9, 0.8)
    parts = [gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], 0.9, 0.8)[0] for i in range(len(rewards))]
    assert torch.equal(torch.cat(parts), whole)


def test_inputs_are_left_alone_and_results_are_constants():
    rewards, values, mask = ragged(8)
    kept = rewards.clone(), values.clone(), mask.clone()
    advantages, returns = gae(rewards.requires_grad_(), values.requires_grad_(), mask, 0.9, 0.8)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert torch.equal(rewards, kept[0])
    assert torch.equal(values, kept[1])
    assert torch.equal(mask, kept[2])


def test_dtypes():
    rewards, values, mask = ragged(9)
    assert gae(rewards.float(), values.bfloat16(), mask, 1.0, 0.95)[0].dtype == torch.float32
    assert gae(rewards.bfloat16(), values.double(), mask, 1.0, 0.95)[1].dtype == torch.float64


def test_no_value_is_read_on_the_host():
    # a meta tensor has no data: reading a number of it raises
    rewards, values, mask = (x.to("meta") for x in ragged(10))
    assert gae(rewards, values, mask, 1.0, 0.95)[0].shape == rewards.shape


def test_nothing_to_do():
    empty = torch.zeros(2, 0)
    assert gae(empty, empty, empty.bool(), 1.0, 0.95)[0].shape == (2, 0)
    nothing_counted, _ = gae(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), 1.0, 0.95)
    assert nothing_counted.eq(0).all()


def test_errors():
    rewards, values, mask = ragged(11)
    with pytest.raises(ValueError, match="rewards_BR has shape"):
        gae(rewards[:, 1:], values, mask, 1.0, 0.95)
    with pytest.raises(ValueError, match="values_BR has shape"):
        gae(rewards, values[0], mask, 1.0, 0.95)
    with pytest.raises(ValueError, match="response_mask_BR has dtype"):
        gae(rewards, values, mask.float(), 1.0, 0.95)
    with pytest.raises(ValueError, match="response_mask_BR has shape"):
        gae(rewards[0], values[0], mask[0], 1.0, 0.95)
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma is"):
            gae(rewards, values, mask, gamma, 0.95)
    with pytest.raises(ValueError, match="gae_lambda is 2"):
        gae(rewards, values, mask, 1.0, 2.0)


# Four rows of a prompt 7, three of a prompt 3, of which one was skipped; rewards token by token, NaN behind the mask.
NAN = math.nan
DENSE = torch.tensor([[1.0, 2.0, NAN], [0.0, NAN, 1.0], [4.0, 5.0, NAN], [NAN, 5.0, NAN], [0.0, 0.0, 2.0]])
COUNTED = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1]]).bool()
SKIPPED = torch.tensor([[9.0, 9.0, 9.0]]), torch.zeros(1, 3).bool()
PROMPTS = torch.tensor([7, 7, 3, 7, 3, 3])


def dense_rows():
    """Rewards of sum 3, 1, 9, 5, 2 and a skipped row; prompts 7, 7, 3, 7, 3, 3."""
    return torch.cat([DENSE, SKIPPED[0]]), torch.cat([COUNTED, SKIPPED[1]]), PROMPTS


def on_tokens(numbers, mask):
    return torch.where(mask, torch.tensor(numbers)[:, None], torch.zeros(()))


def test_group_hand_worked():
    rewards, mask, prompts = dense_rows()
    # Prompt 7: sums 3, 1, 5, mean 3. Prompt 3: sums 9, 2, mean 5.5; the skipped row is no member.
    expected = on_tokens([0.0, -2.0, 3.5, 2.0, -3.5, 0.0], mask)
    assert torch.equal(group_advantages(rewards, mask, prompts), expected)
    # Unbiased standard deviations: sqrt((0 + 4 + 4) / 2) = 2, and sqrt(2 * 3.5^2 / 1) = 3.5 sqrt(2).
    divisors = torch.tensor([2.0, 2.0, 3.5 * math.sqrt(2), 2.0, 3.5 * math.sqrt(2), 1.0])[:, None] + 1e-4
    torch.testing.assert_close(group_advantages(rewards, mask, prompts, "std"), expected / divisors)


def test_leave_one_out_hand_worked():
    rewards, mask, prompts = dense_rows()
    # Prompt 7: 3 - (1 + 5) / 2 = 0, 1 - (3 + 5) / 2 = -3, 5 - (3 + 1) / 2 = 3. Prompt 3: 9 - 2 and 2 - 9.
    expected = on_tokens([0.0, -3.0, 7.0, 3.0, -7.0, 0.0], mask)
    assert torch.equal(leave_one_out_advantages(rewards, mask, prompts), expected)


def test_log_mean_exp_hand_worked():
    # One prompt, rewards 0 and log 3, tau 1: log((1 + 3) / 2) = log 2
    rewards, mask = torch.tensor([[0.0], [math.log(3)]]), torch.ones(2, 1, dtype=torch.bool)
    found = log_mean_exp_advantages(rewards, mask, torch.tensor([4, 4]), 1.0)
    torch.testing.assert_close(found, torch.tensor([[-math.log(2)], [math.log(1.5)]]))
    # With exact Z, exp(Adv / tau) has mean 1: what makes pi exp(Adv / tau) a policy.
    assert found.exp().mean().item() == pytest.approx(1.0)


def test_log_mean_exp_lies_between_the_mean_and_the_best():
    """A large tau gives the group's difference, a small one the distance to the best. Nothing overflows."""
    rewards, mask, prompts = dense_rows()
    group = group_advantages(rewards, mask, prompts)
    torch.testing.assert_close(log_mean_exp_advantages(rewards, mask, prompts, 1e5), group, rtol=0, atol=1e-3)
    # Prompt 7: best 5. Prompt 3: best 9.
    best = on_tokens([-2.0, -4.0, 0.0, 0.0, -7.0, 0.0], mask)
    torch.testing.assert_close(log_mean_exp_advantages(rewards, mask, prompts, 1e-4), best, rtol=0, atol=1e-3)
    large = log_mean_exp_advantages(1e6 * rewards, mask, prompts, 1.0)
    assert torch.isfinite(large).all()
    for kl_coef in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="kl_coef is"):
            log_mean_exp_advantages(rewards, mask, prompts, kl_coef)


def test_batch_hand_worked():
    rewards, mask, _ = dense_rows()
    # Sums 3, 1, 9, 5, 2: mean 4 over the five rows that were not skipped.
    assert torch.equal(batch_advantages(rewards, mask), on_tokens([-1.0, -3.0, 5.0, 1.0, -2.0, 0.0], mask))


@pytest.mark.parametrize("estimate", [group_advantages, leave_one_out_advantages])
def test_a_response_whose_siblings_were_skipped_has_no_advantage(estimate):
    rewards, mask = torch.tensor([[5.0], [1.0], [2.0]]), torch.tensor([[True], [False], [True]])
    assert torch.equal(estimate(rewards, mask, torch.tensor([4, 4, 5])), torch.zeros(3, 1))


def naive_baselines(rewards, mask, prompts, kind):
    """Row by row in Python floats."""
    totals = [sum(r for r, m in zip(row, kept, strict=True) if m) for row, kept in zip(rewards, mask, strict=True)]
    rows = range(len(totals))
    advantages = []
    for i in rows:
        same = [j for j in rows if any(mask[j]) and (kind == "batch" or prompts[j] == prompts[i])]
        members = [j for j in same if kind != "leave_one_out" or j != i]
        if not any(mask[i]) or not members:
            advantages.append(0.0)
            continue
        advantage = totals[i] - sum(totals[j] for j in members) / len(members)
        if kind == "log_mean_exp":
            advantage = totals[i] - 0.3 * math.log(sum(math.exp(totals[j] / 0.3) for j in members) / len(members))
        if kind == "std":
            mean = sum(totals[j] for j in same) / len(same)
            variance = sum((totals[j] - mean) ** 2 for j in same) / max(len(same) - 1, 1)
            advantage /= math.sqrt(variance) + 1e-4
        advantages.append(advantage)
    return torch.tensor(advantages, dtype=torch.float64)[:, None] * torch.tensor(mask)


BASELINES = {
    "group": group_advantages,
    "std": lambda *rows: group_advantages(*rows, "std"),
    "leave_one_out": leave_one_out_advantages,
    "log_mean_exp": lambda *rows: log_mean_exp_advantages(*rows, 0.3),
    "batch": lambda rewards, mask, prompts: batch_advantages(rewards, mask),
}


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("seed", range(3))
def test_baselines_equal_a_slow_loop(kind, seed):
    rewards, _, mask = ragged(seed, rows=12, columns=4)
    mask[3] = False
    prompts = torch.randint(0, 4, (12,), generator=torch.Generator().manual_seed(seed)) - 2**62
    expected = naive_baselines(rewards.tolist(), mask.tolist(), prompts.tolist(), kind)
    torch.testing.assert_close(BASELINES[kind](rewards, mask, prompts), expected)


@pytest.mark.parametrize("kind", BASELINES)
def test_baselines_do_not_depend_on_padding_row_order_dtype_or_what_is_behind_the_mask(kind):
    rewards, _, mask = ragged(5, rows=8)
    rewards, prompts = rewards.float(), torch.tensor([0, 1, 0, 1, 2, 2, 2, 0])
    expected = BASELINES[kind](rewards, mask, prompts)
    assert expected.dtype == torch.float32 and not expected.requires_grad
    garbage = torch.where(mask, rewards, torch.tensor(torch.inf)).requires_grad_()
    assert torch.equal(BASELINES[kind](garbage, mask, prompts), expected)
    wider = torch.nn.functional.pad(rewards, (0, 3), value=torch.nan), torch.nn.functional.pad(mask, (0, 3))
    assert torch.equal(BASELINES[kind](*wider, prompts)[:, :7], expected)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(BASELINES[kind](rewards[order], mask[order], prompts[order]), expected[order])
    assert BASELINES[kind](rewards.bfloat16(), mask, prompts).dtype == torch.float32


def test_leave_one_out_is_the_group_difference_times_k_over_k_minus_1():
    rewards, _, _ = ragged(1, rows=8, columns=3)
    mask, prompts = torch.ones_like(rewards).bool(), torch.arange(8) // 4
    expected = group_advantages(rewards, mask, prompts) * 4 / 3
    torch.testing.assert_close(leave_one_out_advantages(rewards, mask, prompts), expected)


def test_baselines_refuse_what_they_cannot_read():
    rewards, mask, prompts = dense_rows()
    with pytest.raises(ValueError, match=r"normalization is 'batch', it should be one of none, std"):
        group_advantages(rewards, mask, prompts, "batch")
    for estimate in (group_advantages, leave_one_out_advantages):
        with pytest.raises(ValueError, match=r"prompts_B has shape \(5,\), it should be \(6,\)"):
            estimate(rewards, mask, prompts[:5])
        with pytest.raises(ValueError, match="rewards_BR has shape"):
            estimate(rewards[:, :2], mask, prompts)
    with pytest.raises(ValueError, match="dtype"):
        batch_advantages(rewards, mask.int())
