# SPDX-License-Identifier: Apache-2.0
"""What is equal but for rounding is a tie, and the lowest index wins, in whatever order sums are made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eloftr_kernels import backend, dual_softmax_best, window_match
from eloftr_kernels.arithmetic import TIE, first_best
from eloftr_kernels.dual_softmax import cpu, naive
from eloftr_kernels.window_match import naive as dense_windows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


def turned(features: Tensor, seed: int) -> Tensor:
    """In other axes: all products are the same numbers, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(features.shape[2], features.shape[2], dtype=torch.float64, generator=generator))
    return (features.double() @ axes.Q).to(features.dtype)


def repeated(count: int, distinct: int, channels: int, seed: int) -> Tensor:
    """(1, count, channels): features that recur, as those of a periodic image do."""
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(1, distinct, channels, generator=generator)[:, torch.arange(count) % distinct]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    cells=st.sampled_from([(24, 40), (64, 64), (130, 70)]),
    distinct=st.sampled_from([1, 3, 8]),
    normalised=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_recurring_cells_have_the_first_as_their_best(
    cells: tuple[int, int], distinct: int, normalised: bool, whole: bool, seed: int
) -> None:
    f0, f1 = (repeated(n, distinct, 24, seed) for n in cells)
    module = naive if whole else cpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK_ELEMENTS", 1 << 9)
        patch.setattr(cpu, "BLOCK_COLUMNS", 32)
        for a, b in ((f0, f1), (turned(f0, seed), turned(f1, seed))):
            lse = module.dual_softmax_lse(a, b, 0.5) if normalised else (None, None)
            best1, best0, _ = module.mutual_best(a, b, 0.5, *lse)
            assert torch.equal(best1[0], torch.arange(cells[0]) % distinct)
            assert torch.equal(best0[0], torch.arange(cells[1]) % distinct)


def test_one_pass_and_two_have_the_same_ties() -> None:
    """Twelve different cells, each three times, with a confidence of 1 / 9 a pair."""
    f0, f1 = (turned(repeated(36, 12, 24, 0), 1) for _ in "01")
    with torch.no_grad():
        one = dual_softmax_best(f0, f1, 0.5, 0.01)
    two = dual_softmax_best(f0, f1, 0.5, 0.01)  # gradients are recorded: two passes
    for a, b in zip(one[2:4], two[2:4], strict=True):
        assert torch.equal(a[0], torch.arange(36) % 12)
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["naive", "reference", "triton"])
def test_windows_of_stripes_match_at_the_first_pixel(name: str) -> None:
    """Maps that change along x only: every row of a window ties with every other, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    stripes = 3 * torch.randn(1, 16, 1, 8, generator=generator)
    rows = 1 + EPS * (2 * torch.rand(2, 1, 1, 8, 1, generator=generator) - 1)
    map0, map1 = (stripes.expand(1, 16, 8, 8) * r for r in rows)
    cells = torch.tensor([0, 1, 2, 3])
    arguments = map0.to(DEVICE), map1.to(DEVICE), (0 * cells).to(DEVICE), cells.to(DEVICE), cells.to(DEVICE), 4, 1.0
    if name == "naive":
        found = dense_windows.window_match(*arguments)
    else:
        with backend(name):  # type: ignore[arg-type]
            found = window_match(*arguments)
    edge = torch.tensor([False, False, True, True])  # rows at a border see the ring beyond it
    assert torch.equal(found.pixel0[edge.to(DEVICE), 1].cpu(), torch.full((2,), -3.5))
    assert torch.equal(found.pixel1[edge.to(DEVICE), 1].cpu(), torch.full((2,), -3.5))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.sampled_from([3, 32, 60, 64, 256]),
    magnitude=st.sampled_from([0.0, 1.0, 3e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_first_within_rounding(size: int, magnitude: float, dtype: torch.dtype, seed: int) -> None:
    """The definition, in Python: the first that is at most ``TIE`` roundings of the magnitude below the largest."""
    generator = torch.Generator().manual_seed(seed)
    rounding = torch.finfo(dtype).eps * magnitude
    x = torch.randint(12, (4, size), generator=generator).to(dtype) * (rounding or 1.0)
    values, first = first_best(x, 1, x.new_full((4,), magnitude))
    for row, value, index in zip(x.tolist(), values.tolist(), first.tolist(), strict=True):
        assert value == max(row)
        assert index == next(i for i, v in enumerate(row) if v >= value - TIE * rounding)
