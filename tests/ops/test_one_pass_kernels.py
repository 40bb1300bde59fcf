# SPDX-License-Identifier: Apache-2.0
"""Triton's one pass = the reference's two, for everything above the threshold; in the interpreter, or on a GPU."""

import math

import pytest
import torch
from torch import Tensor

from eloftr_kernels import backend, dual_softmax_best, dual_softmax_lse
from eloftr_kernels.dual_softmax import cpu, op
from support.ops import poisoned_buffers, spy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURE = 0.5
Masks = tuple[Tensor | None, Tensor | None]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def alike(B: int, L: int, S: int, C: int, *, spread: float, whole: bool) -> tuple[Tensor, Tensor]:
    """Cells of image 1 are those of image 0 in another order, with noise. Whole numbers have exact products."""
    g = torch.Generator().manual_seed(L + S)
    f0 = spread * torch.randn(B, L, C, generator=g)
    f1 = f0[:, torch.randperm(max(L, S), generator=g)[:S] % L] + 0.2 * spread * torch.randn(B, S, C, generator=g)
    return tuple((f.round() if whole else f).to(DEVICE) for f in (f0, f1))  # type: ignore[return-value]


def some(B: int, L: int, S: int) -> Masks:
    g = torch.Generator().manual_seed(1)
    masks = [torch.rand(B, n, generator=g) > 0.3 for n in (L, S)]
    return masks[0].to(DEVICE), masks[1].to(DEVICE)


def accepted(found: tuple[Tensor, ...], threshold: float, masks: Masks) -> tuple[list[tuple[int, ...]], Tensor]:
    """(pair, cell 0, cell 1) of mutual best cells above the threshold that are not masked, and their scores."""
    _, _, best1, best0, score1 = found
    assert best1.dtype == best0.dtype == torch.int64
    chosen = (best0.gather(1, best1) == torch.arange(best1.shape[1], device=DEVICE)) & (score1 > math.log(threshold))
    if masks[0] is not None:
        chosen &= masks[0]
    if masks[1] is not None:
        chosen &= masks[1].gather(1, best1)
    batch, cells = chosen.nonzero(as_tuple=True)
    columns = (batch, cells, best1[batch, cells])
    return list(zip(*(c.tolist() for c in columns), strict=True)), score1[batch, cells]


def two_passes(f0: Tensor, f1: Tensor, masks: Masks) -> tuple[Tensor, ...]:
    f0, f1 = f0.double(), f1.double()
    lse = cpu.dual_softmax_lse(f0, f1, TEMPERATURE, *masks)
    return *lse, *cpu.mutual_best(f0, f1, TEMPERATURE, *lse, *masks)


# Cells, channels, threshold: one cell; ragged tiles; more channels than a tile holds, more columns than a span.
CASES = [
    ((1, 1, 1, 16), 0.2),
    ((2, 140, 40, 24), 0.2),
    ((2, 33, 1, 8), 0.05),
    ((1, 20, 96, 300), 0.2),
    ((1, 9, 600, 16), 0.03),
]


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, True), (torch.float16, False)], ids=str)
@pytest.mark.parametrize(("shape", "threshold"), CASES, ids=str)
def test_the_matches_of_two_passes(
    shape: tuple[int, int, int, int], threshold: float, masked: bool, dtype: torch.dtype
) -> None:
    f0, f1 = (f.to(dtype) for f in alike(*shape, spread=3 / shape[3] ** 0.5, whole=False))
    masks = some(*shape[:3]) if masked else (None, None)
    with torch.no_grad(), backend("triton"), poisoned_buffers(), spy(op, "_one_pass_op", "_lse_op") as calls:
        found = dual_softmax_best(f0, f1, TEMPERATURE, threshold, *masks)
    assert calls == {"_one_pass_op": 1, "_lse_op": 0}
    exact = two_passes(f0, f1, masks)
    for got, wanted in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)
    (pairs, scores), (expected, truth) = (accepted(x, threshold, masks) for x in (found, exact))
    assert pairs == expected
    assert len(pairs) >= min(shape[1:3]) // 3
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=1e-4)
    assert ((found[2] >= 0) & (found[2] < shape[2])).all()
    assert ((found[3] >= 0) & (found[3] < shape[1])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_of_equal_cells_the_first_wins(dtype: torch.dtype) -> None:
    """Each cell twice in either image: four equal pairs, of which the lowest indices are each other's best."""
    half = 3 * torch.eye(48, device=DEVICE, dtype=dtype)[None]
    f0, f1 = half.repeat(1, 2, 1), half.flip(1).repeat(1, 2, 1)
    with torch.no_grad(), backend("triton"):
        found = dual_softmax_best(f0, f1, 0.5, 0.1)
    pairs, scores = accepted(found, 0.1, (None, None))
    assert pairs == [(0, i, 47 - i) for i in range(48)]
    assert scores.unique().numel() == 1
    assert found[2][0].tolist() == [47 - i % 48 for i in range(96)]
    assert found[3][0].tolist() == [47 - j % 48 for j in range(96)]


def test_columns_far_below_the_rest_keep_their_normaliser() -> None:
    """e^-800 of the largest score of their tile underflows: they are summed from their own maxima."""
    f0, f1 = alike(1, 40, 64, 16, spread=1.0, whole=True)
    f0[..., 0], f1[..., 0] = 20, torch.linspace(-20, 20, 64, device=DEVICE).round()
    with torch.no_grad(), backend("triton"):
        found = dual_softmax_best(f0, f1, TEMPERATURE, 0.2)
    for got, wanted in zip(found[:2], two_passes(f0, f1, (None, None))[:2], strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-4)


def test_cells_without_a_pair_above_the_threshold() -> None:
    """All alike, masked, and no number: cell 0, and a score that is not above."""
    f = torch.ones(1, 40, 16, device=DEVICE)
    odd = alike(1, 40, 40, 16, spread=1.0, whole=False)[0]
    odd[0, 3, 2] = torch.nan
    nothing = torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)
    everything = ~nothing
    with torch.no_grad(), backend("triton"):
        for x, masks in ((f, (None, None)), (odd, (None, None)), (f, (nothing, everything)), (f, (None, nothing))):
            _, _, best1, best0, score1 = dual_softmax_best(x, x, TEMPERATURE, 0.2, *masks)
            assert not best1.any()
            assert not best0.any()
            assert (score1 == -torch.inf).all()


def test_the_gradient_is_that_of_the_normalisers() -> None:
    f0, f1 = alike(1, 20, 30, 16, spread=0.7, whole=False)
    found = []
    for function in (dual_softmax_lse, lambda *x: dual_softmax_best(*x, 0.2)):
        leaves = [f.clone().requires_grad_() for f in (f0, f1)]
        with backend("triton"):
            row_lse, col_lse, *best = function(*leaves, TEMPERATURE)
            found.append(torch.autograd.grad(row_lse.sin().sum() + col_lse.cos().sum(), leaves))
        assert not any(x.requires_grad for x in best)
    for got, wanted in zip(*found, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # one kernel, compiled twice


def test_the_operator_is_sound_and_compiles() -> None:
    f0, f1 = (f.requires_grad_() for f in alike(1, 20, 30, 16, spread=0.7, whole=False))
    torch.library.opcheck(op._one_pass_op.registered, (f0, f1, 0.5, 0.2, None, None, torch.float32))
    compiled = torch.compile(dual_softmax_best, fullgraph=True, backend="eager")
    with backend("triton"):
        for a, b in zip(compiled(f0, f1, 0.5, 0.2), dual_softmax_best(f0, f1, 0.5, 0.2), strict=True):
            assert torch.equal(a, b)


def test_when_two_passes_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    f0, f1 = torch.randn(1, 8, 16, device=DEVICE), torch.randn(1, 12, 16, device=DEVICE)

    def two(threshold: float, cells: int = 8) -> bool:
        with torch.no_grad(), backend("triton"), spy(op, "_one_pass_op", "_lse_op", "_best_op") as calls:
            dual_softmax_best(f0[:, :cells], f1, TEMPERATURE, threshold)
        assert calls in (
            {"_one_pass_op": 1, "_lse_op": 0, "_best_op": 0},
            {"_one_pass_op": 0, "_lse_op": 1, "_best_op": 1},
        )
        return calls["_lse_op"] == 1

    assert [two(0.0), two(0.01), two(0.02), two(0.2), two(0.2, cells=0)] == [True, True, False, False, True]
    monkeypatch.setattr(op, "_MOST_PAIRS", 95)
    assert two(0.2)
