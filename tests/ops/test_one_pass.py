# SPDX-License-Identifier: Apache-2.0
"""One pass over the scores = the normalisers, then the best partners, for everything above the threshold."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eloftr_kernels import dual_softmax_best
from eloftr_kernels.dual_softmax import cpu, one_pass
from support.ops import spy

TEMPERATURE = 0.5


def two_passes(f0: Tensor, f1: Tensor, masks: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    lse = cpu.dual_softmax_lse(f0, f1, TEMPERATURE, *masks)
    return *lse, *cpu.mutual_best(f0, f1, TEMPERATURE, *lse, *masks)


def matches(result: tuple[Tensor, ...], threshold: float, masks: tuple[Tensor | None, ...]) -> list[tuple]:
    """(pair, cell 0, cell 1, score) of mutual best cells above the threshold that are not masked."""
    _, _, best1, best0, score1 = result
    own = torch.arange(best1.shape[1])
    accepted = (best0.gather(1, best1) == own) & (score1 > math.log(threshold))
    if masks[0] is not None:
        accepted &= masks[0]
    if masks[1] is not None:
        accepted &= masks[1].gather(1, best1)
    batch, cells = accepted.nonzero(as_tuple=True)
    columns = (batch, cells, best1[batch, cells], score1[batch, cells])
    return list(zip(*(c.tolist() for c in columns), strict=True))


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", 1 << 9)
    monkeypatch.setattr(cpu, "BLOCK_COLUMNS", 32)
    # In blocks this small, lists are long beside them: without limits there is never a second pass.
    monkeypatch.setattr(one_pass, "MOST_GROUPS", 1.0)
    monkeypatch.setattr(one_pass, "MOST_CANDIDATES", 1 << 20)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    cells=st.sampled_from([(1, 1), (7, 5), (64, 64), (40, 128), (33, 1), (96, 48)]),
    threshold=st.sampled_from([1e-5, 0.01, 0.05, 0.2, 0.5, 0.99, 1.0]),
    spread=st.sampled_from([0.0, 0.3, 2.0, 30.0]),
    offset=st.sampled_from([0.0, 40.0]),
    masked=st.sampled_from(["", "0", "1", "01"]),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_same_matches_bit_for_bit(
    cells: tuple[int, int],
    threshold: float,
    spread: float,
    offset: float,
    masked: str,
    whole: bool,
    seed: int,
) -> None:
    """Whole numbers for ties; a common offset for scores that are large beside their differences."""
    generator = torch.Generator().manual_seed(seed)
    f0 = spread * torch.randn(2, cells[0], 4, generator=generator)
    f1 = f0[:, torch.arange(cells[1]) % cells[0]] + 0.3 * torch.randn(2, cells[1], 4, generator=generator)
    f0, f1 = f0 + offset, f1 + offset
    if whole:
        f0, f1 = f0.round(), f1.round()
    masks = tuple(
        torch.rand(2, n, generator=generator) > 0.4 if side in masked else None
        for side, n in zip("01", cells, strict=True)
    )
    expected = two_passes(f0, f1, masks)
    with mock.patch.object(one_pass, "mutual_best") as second:
        got = one_pass.dual_softmax_best(f0, f1, TEMPERATURE, threshold, *masks)
    assert second.call_count == 0
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert matches(got, threshold, masks) == matches(expected, threshold, masks)


def test_there_is_something_to_find() -> None:
    """The law above is not about empty lists."""
    f0 = torch.nn.functional.normalize(torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    f0 = 4 * f0  # scores of 32 with itself, less with others
    found = matches(one_pass.dual_softmax_best(f0, f0.roll(3, 1), TEMPERATURE, 0.2), 0.2, masks=(None, None))
    assert len(found) > 90
    assert all(j == (i + 3) % 64 for _, i, j, _ in found)


def second_passes(f0: Tensor, f1: Tensor, threshold: float) -> int:
    with spy(one_pass, "mutual_best") as calls:
        got = one_pass.dual_softmax_best(f0, f1, TEMPERATURE, threshold)
    expected = two_passes(f0, f1, (None, None))
    assert matches(got, threshold, (None, None)) == matches(expected, threshold, (None, None))
    return calls["mutual_best"]


def test_too_many_candidates_are_left_to_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK_COLUMNS", 128)
    f0 = 2 * torch.randn(1, 128, 8, generator=torch.Generator().manual_seed(0))
    alike = torch.zeros(1, 128, 8)
    for groups, candidates, expected in ((1.0, 200, (0, 0)), (1.0, 8, (0, 1)), (0.9, 200, (0, 1))):
        monkeypatch.setattr(one_pass, "MOST_GROUPS", groups)
        monkeypatch.setattr(one_pass, "MOST_CANDIDATES", candidates)
        assert (second_passes(f0, f0, 0.2), second_passes(alike, alike, 1e-5)) == expected


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_cells_that_are_all_alike(value: float) -> None:
    """Each of the 64 x 64 pairs has confidence 64 ** -2: none is above any threshold that is allowed here."""
    f = torch.full((1, 64, 8), value)
    assert not matches(one_pass.dual_softmax_best(f, f, TEMPERATURE, 0.01), 0.01, (None, None))


def test_masked_cells_are_no_candidates() -> None:
    f = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    nothing, everything = torch.zeros(1, 16, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool)
    for masks in ((nothing, None), (None, nothing), (nothing, nothing), (everything, nothing)):
        score1 = one_pass.dual_softmax_best(f, f, TEMPERATURE, 0.01, *masks)[4]
        assert (score1 == -torch.inf).all()


def test_not_a_number_gives_no_match() -> None:
    f = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    f[0, 3, 2] = torch.nan
    assert not matches(one_pass.dual_softmax_best(f, f, TEMPERATURE, 0.01), 0.01, (None, None))


def test_which_way_is_taken() -> None:
    f0, f1 = torch.randn(1, 8, 16), torch.randn(1, 12, 16)

    def ways(*arguments: object) -> tuple[int, int]:
        with spy(one_pass, "dual_softmax_best") as one, spy(cpu, "mutual_best") as two:
            dual_softmax_best(*arguments)
        return one["dual_softmax_best"], two["mutual_best"]

    assert ways(f0, f1, TEMPERATURE, 0.2) == (0, 1)  # gradients are recorded
    with torch.no_grad():
        assert ways(f0, f1, TEMPERATURE, 0.2) == (1, 0)
        assert ways(f0, f1, TEMPERATURE, 0.0) == (0, 1)
        assert ways(f0[:, :0], f1, TEMPERATURE, 0.2) == (0, 1)


def test_the_gradient_of_the_normalisers_is_theirs() -> None:
    f0, f1 = (torch.randn(1, n, 4, requires_grad=True) for n in (6, 5))
    row_lse, col_lse, *best = dual_softmax_best(f0, f1, TEMPERATURE, 0.2)
    got = torch.autograd.grad(row_lse.sum() + 2 * col_lse.sum(), (f0, f1))
    expected = cpu.dual_softmax_lse(f0, f1, TEMPERATURE)
    wanted = torch.autograd.grad(expected[0].sum() + 2 * expected[1].sum(), (f0, f1))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not any(x.requires_grad for x in best)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="features1"):
        dual_softmax_best(torch.randn(1, 8, 4), torch.randn(2, 8, 4), TEMPERATURE, 0.2)
