import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests._two_processes import run_in_two_processes
from trl_apa.algorithms.masking import keep_counted, masked_mean, masked_moments, masked_sum, masked_var, masked_whiten


GARBAGE = [math.nan, math.inf, -math.inf, 1e300]


def ragged(seed, rows=4, columns=7):
    """Random float64 values and a mask with gaps, at least one counted entry."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(rows, columns, dtype=torch.float64, generator=generator) + 1
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    mask[0, 0] = True
    return x, mask


def counted_values(x, mask):
    return [value for value, counted in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if counted]


def test_hand_worked():
    x = torch.tensor([[1.0, 9.0, 4.0], [7.0, 9.0, 9.0]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    # counted: 1, 4, 7. Sum 12, mean 12 / 3 = 4, over 6 tokens 12 / 6 = 2
    assert masked_sum(x, mask).item() == 12.0
    assert masked_mean(x, mask).item() == 4.0
    assert masked_mean(x, mask, 6).item() == 2.0
    # deviations -3, 0, 3: squares add up to 18, over 3 - 1 = 2 gives 9, over 3 gives 6
    assert masked_var(x, mask).item() == 9.0
    assert masked_var(x, mask, unbiased=False).item() == 6.0
    # divided by sqrt(9) = 3: -1, 0, 1; with the mean back 3, 4, 5
    torch.testing.assert_close(masked_whiten(x, mask), torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(
        masked_whiten(x, mask, shift_mean=False), torch.tensor([[3.0, 0.0, 4.0], [5.0, 0.0, 0.0]])
    )


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_naive_loop(seed):
    x, mask = ragged(seed)
    values = counted_values(x, mask)
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    assert masked_sum(x, mask).item() == pytest.approx(sum(values), abs=1e-12)
    assert masked_mean(x, mask).item() == pytest.approx(mean, abs=1e-12)
    assert masked_var(x, mask).item() == pytest.approx(squares / (len(values) - 1), abs=1e-12)
    assert masked_var(x, mask, unbiased=False).item() == pytest.approx(squares / len(values), abs=1e-12)
    count, pooled_mean, pooled_squares = masked_moments(x, mask)
    assert count.item() == len(values)
    assert pooled_mean.item() == pytest.approx(mean, abs=1e-12)
    assert pooled_squares.item() == pytest.approx(squares, abs=1e-11)
    whitened = masked_whiten(x, mask)
    scale = (squares / (len(values) - 1) + 1e-8) ** -0.5
    expected = [(value - mean) * scale for value in values]
    assert counted_values(whitened, mask) == pytest.approx(expected, abs=1e-12)
    assert whitened[~mask].eq(0).all()


def test_gradcheck():
    x, mask = ragged(3)
    x.requires_grad_()
    for reduction in (masked_sum, masked_mean, masked_var, lambda x, mask: masked_mean(x, mask, 40.0)):
        assert torch.autograd.gradcheck(lambda x, reduction=reduction: reduction(x, mask), (x,))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("reduction", [masked_sum, masked_mean, masked_var])
def test_garbage_behind_the_mask_changes_neither_value_nor_gradient(reduction, garbage):
    x, mask = ragged(4)
    clean = x.masked_fill(~mask, 0.0).requires_grad_()
    dirty = x.masked_fill(~mask, garbage).requires_grad_()
    clean_value, dirty_value = reduction(clean, mask), reduction(dirty, mask)
    assert torch.equal(clean_value, dirty_value)
    clean_value.backward()
    dirty_value.backward()
    assert torch.equal(clean.grad, dirty.grad)
    assert dirty.grad[~mask].eq(0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_behind_the_mask_does_not_reach_whitening(garbage):
    x, mask = ragged(5)
    assert torch.equal(masked_whiten(x, mask), masked_whiten(x.masked_fill(~mask, garbage), mask))


def test_micro_batches_of_one_step_add_up():
    x, mask = ragged(6)
    for num_tokens in (float(mask.sum()), int(mask.sum()), mask.sum(), mask.sum().to(torch.float32)):
        parts = [masked_mean(x[row : row + 1], mask[row : row + 1], num_tokens) for row in range(len(x))]
        torch.testing.assert_close(sum(parts), masked_mean(x, mask), rtol=1e-14, atol=0)


def test_float64_denominator_does_not_raise_a_float32_mean():
    x, mask = ragged(6)
    assert masked_mean(x.float(), mask, mask.sum().double()).dtype == torch.float32


def test_nothing_counted_is_zero():
    x, mask = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    for reduction in (masked_sum, masked_mean, masked_var):
        assert reduction(x, mask).item() == 0.0
    assert masked_whiten(x, mask).eq(0).all()
    assert masked_mean(x[:, :0], mask[:, :0]).item() == 0.0


def test_one_counted_token_is_zero_not_nan():
    x, mask = torch.tensor([[5.0, 2.0]]), torch.tensor([[True, False]])
    assert masked_var(x, mask).item() == 0.0
    assert masked_whiten(x, mask).tolist() == [[0.0, 0.0]]
    assert masked_whiten(x, mask, shift_mean=False).tolist() == [[5.0, 0.0]]


def test_equal_entries_are_whitened_to_zero():
    # in float32 the mean of 1000 times 0.1 misses 0.1, and 1 / sqrt(1e-8) = 10^4 would blow the difference up
    x = torch.full((10, 100), 0.1)
    assert masked_whiten(x, torch.ones_like(x, dtype=torch.bool)).abs().max().item() < 1e-9


def test_half_precision_is_summed_in_float32():
    # bfloat16 has 8 bits: 257 is not one of its numbers
    x = torch.ones(257, dtype=torch.bfloat16)
    assert masked_sum(x, torch.ones(257, dtype=torch.bool)).item() == 257.0


def test_whitening_is_idempotent():
    x, mask = ragged(7)
    once = masked_whiten(x, mask)
    torch.testing.assert_close(masked_whiten(once, mask), once, rtol=0, atol=1e-7)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), scale=st.floats(0.5, 100))
def test_whitening_ignores_shift_and_scale(seed, shift, scale):
    x, mask = ragged(seed)
    # two entries that differ, so that there is a variance to divide by
    mask[1:3, 1] = True
    expected = masked_whiten(x, mask)
    torch.testing.assert_close(masked_whiten(scale * x + shift, mask), expected, rtol=0, atol=1e-6)
    assert masked_mean(expected, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert masked_var(expected, mask).item() == pytest.approx(1.0, abs=1e-6)


def test_whitened_values_are_constants():
    x, mask = ragged(8)
    assert not masked_whiten(x.requires_grad_(), mask).requires_grad


def _whiten_rows_of_rank(rank, x, mask):
    # the ranks differ in their number of rows, and in the second pair rank 1 has no counted token at all
    rows = slice(0, 3) if rank == 0 else slice(3, None)
    shifted = masked_whiten(x[rows], mask[rows], distributed=True)
    only_first = mask.clone()
    only_first[3:] = False
    unshifted = masked_whiten(x[rows], only_first[rows], shift_mean=False, distributed=True)
    alone = masked_whiten(x[rows], mask[rows])
    return shifted, unshifted, alone


@pytest.mark.slow
def test_two_ranks_whiten_with_the_statistics_of_the_union():
    x, mask = ragged(9, rows=5)
    ranks = run_in_two_processes(_whiten_rows_of_rank, x, mask)
    torch.testing.assert_close(torch.cat([ranks[0][0], ranks[1][0]]), masked_whiten(x, mask), rtol=0, atol=1e-14)
    only_first = mask.clone()
    only_first[3:] = False
    expected = masked_whiten(x, only_first, shift_mean=False)
    torch.testing.assert_close(torch.cat([ranks[0][1], ranks[1][1]]), expected, rtol=0, atol=1e-14)
    # without distributed each rank keeps to its own rows
    torch.testing.assert_close(ranks[0][2], masked_whiten(x[:3], mask[:3]), rtol=0, atol=1e-14)


def test_distributed_without_a_process_group_is_this_process():
    x, mask = ragged(10)
    assert torch.equal(masked_whiten(x, mask, distributed=True), masked_whiten(x, mask))


def test_no_value_is_read_on_the_host():
    # a meta tensor has no data: reading a number of it raises
    x = torch.empty(3, 4, device="meta")
    mask = torch.ones(3, 4, dtype=torch.bool, device="meta")
    for result in (masked_mean(x, mask), masked_mean(x, mask, mask.sum()), masked_var(x, mask)):
        assert result.shape == ()
    assert masked_whiten(x, mask).shape == x.shape


def test_errors():
    x = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask has dtype"):
        keep_counted(x, mask.long())
    with pytest.raises(ValueError, match=r"mask has shape \(3, 2\)"):
        masked_mean(x, mask.T)
    for number in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="num_tokens is"):
            masked_mean(x, mask, number)
    with pytest.raises(ValueError, match="num_tokens has shape"):
        masked_mean(x, mask, torch.tensor([6.0]))
