# SPDX-License-Identifier: Apache-2.0
"""Both log-sum-exps of a matrix from one exponential, at any spread of the scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eloftr_kernels.arithmetic import first_best, two_way_logsumexp


def relative_errors(scores: torch.Tensor) -> list[float]:
    exact = scores.double()
    expected = (torch.logsumexp(exact, 2), torch.logsumexp(exact, 1))
    pairs = zip(two_way_logsumexp(scores), expected, strict=True)
    return [float(((got - want).abs() / want.abs().clamp(min=1)).max()) for got, want in pairs]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1e-3, 1.0, 30.0, 300.0, 1e4]), st.integers(0, 99))
def test_agrees_with_torch_in_float64(rows: int, columns: int, spread: float, seed: int) -> None:
    scores = spread * torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    # A sum of n terms in float32, then a logarithm: n eps at the very most, and eps of the maximum added to it.
    assert max(relative_errors(scores)) < (max(rows, columns) + 4) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [40.0, 90.0, 700.0, 1e6])
def test_columns_far_below_the_largest_score(dtype: torch.dtype, gap: float) -> None:
    """Where the shared exponential underflows, the columns are summed from their own maxima."""
    scores = torch.randn(1, 6, 8, dtype=dtype)
    scores[..., 4:] -= gap
    assert max(relative_errors(scores)) < 12 * torch.finfo(dtype).eps


def test_rows_far_apart() -> None:
    scores = torch.randn(1, 6, 8) + 200 * torch.arange(6.0)[:, None]
    scores[0, :, 3] -= 900  # best in its lowest row's reach only
    assert max(relative_errors(scores)) < 12 * torch.finfo(torch.float32).eps


def test_scratch_is_used_and_the_scores_are_kept() -> None:
    scores, scratch = torch.randn(1, 5, 7), torch.full((1, 5, 7), torch.nan)
    kept = scores.clone()
    first = two_way_logsumexp(scores, scratch)
    assert torch.equal(scores, kept)
    assert torch.isfinite(scratch).all()
    for a, b in zip(first, two_way_logsumexp(scores), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_known_to_be_small_or_not(dtype: torch.dtype) -> None:
    """Up to the bound at which the plain sums take over, and beyond it, where they would overflow or vanish."""
    switch = math.log(torch.finfo(dtype).max) - 2 - math.log(12)
    for bound in (1.0, switch - 1e-3, switch + 1e-3, 4 * switch):
        scores = torch.rand(2, 9, 12, dtype=dtype) * 2 * bound - bound
        scores[0] = bound
        scores[1, 2:] = -bound
        for got, want in zip(
            two_way_logsumexp(scores, bound=bound),
            (torch.logsumexp(scores, 2), torch.logsumexp(scores, 1)),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=(12 + bound) * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bound", [math.inf, 5.0, math.nan])
def test_nan_is_not_hidden(bound: float) -> None:
    scores = torch.zeros(1, 3, 3)
    scores[0, 1, 1] = torch.nan
    rows, columns = two_way_logsumexp(scores, bound=bound)
    assert rows[0, 1].isnan()
    assert columns[0, 1].isnan()


@pytest.mark.parametrize("shape", [(1, 0, 3), (1, 3, 0), (2, 0, 0), (0, 3, 3)])
def test_sums_of_nothing(shape: tuple[int, int, int]) -> None:
    scores = torch.zeros(shape)
    for got, want in zip(
        two_way_logsumexp(scores), (torch.logsumexp(scores, 2), torch.logsumexp(scores, 1)), strict=True
    ):
        assert torch.equal(got, want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.sampled_from([1, 3, 31, 32, 60, 64, 96, 256]),
    dim=st.sampled_from([0, 1, -1]),
    values=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_first_of_equal_maxima(size: int, dim: int, values: int, seed: int) -> None:
    """Few different values, so that nearly every maximum has equals; whole groups and others."""
    shape = [2, 3, 5]
    shape[dim] = size
    x = torch.randint(values, shape, generator=torch.Generator().manual_seed(seed)).float()
    maxima, first = first_best(x, dim, torch.zeros_like(x.amax(dim)))
    assert torch.equal(maxima, x.amax(dim))
    assert first.tolist() == x.numpy().argmax(dim).tolist()  # numpy promises the first
