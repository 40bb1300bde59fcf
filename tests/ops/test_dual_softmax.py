# SPDX-License-Identifier: Apache-2.0
"""Streaming dual softmax: scalar oracle = float64 reference ~ kernels in the interpreter (or on a GPU)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eloftr_kernels.dispatch import backend
from eloftr_kernels.dual_softmax import cpu, dual_softmax_lse, mutual_best, naive, op, pair_scores, why_not
from support.ops import assert_as_accurate, checked_gradcheck, poisoned_buffers, spy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURE = 0.5
# The backward recomputes scores. Where they round as in the forward, as on a GPU, the rounding cancels in
# exp(s - lse); the interpreter's matrix products sum in an order that depends on the tile. In half precision
# the kernels also round the weights of the second product, in which rows and columns pull against each other.
GRADIENT_RATIO = {torch.float32: 8.0, torch.float16: 6.0, torch.bfloat16: 6.0}
# (B, L, S, C), masks: odd sizes, one cell, more channels than a tile holds, more columns than a program walks
# over
CASES = [
    ((2, 70, 45, 24), True),
    ((1, 70, 45, 24), False),
    ((1, 1, 9, 96), False),
    ((1, 33, 1, 8), True),
    ((1, 20, 40, 300), True),
    ((1, 5, 600, 16), False),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def features(
    B: int, L: int, S: int, C: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scale = (6 / C**0.5) ** 0.5  # scores of magnitude 6 / TEMPERATURE
    return tuple((torch.randn(B, n, C, generator=g) * scale).to(DEVICE, dtype) for n in (L, S))  # type: ignore[return-value]


def masks_for(B: int, L: int, S: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    masks = [torch.rand(B, n, generator=g) > 0.3 for n in (L, S)]
    for mask in masks:
        mask[:, 0] = True
    return masks[0].to(DEVICE), masks[1].to(DEVICE)


def joined(*masks: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Both normalisers as one tensor."""
    return lambda f0, f1: torch.cat(dual_softmax_lse(f0, f1, TEMPERATURE, *masks), 1)


def with_gradients(
    function: Callable[[Tensor, Tensor], Tensor], f0: Tensor, f1: Tensor, size: float = 1.0
) -> list[Tensor]:
    leaves = [f.detach().requires_grad_() for f in (f0, f1)]
    out = function(*leaves)
    g = torch.Generator().manual_seed(5)
    cotangent = (torch.randn(out.shape, generator=g, dtype=torch.float64) * size).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


# Oracle


def scalar_scores(f0: Tensor, f1: Tensor, m0: Tensor | None, m1: Tensor | None) -> list[list[list[float]]]:
    scores = []
    for b in range(len(f0)):
        rows = []
        for i, x in enumerate(f0[b].tolist()):
            row = []
            for j, y in enumerate(f1[b].tolist()):
                valid = (m0 is None or bool(m0[b, i])) and (m1 is None or bool(m1[b, j]))
                dot = sum(p * q for p, q in zip(x, y, strict=True)) / TEMPERATURE
                row.append(dot if valid else -1e9)
            rows.append(row)
        scores.append(rows)
    return scores


def scalar_lse(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("module", [naive, cpu], ids=["naive", "cpu"])
def test_pytorch_is_the_scalar_oracle(module, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", 20)  # several blocks of rows
    f0, f1 = features(2, 7, 5, 4)
    m0, m1 = masks_for(2, 7, 5) if masked else (None, None)
    row, col = module.dual_softmax_lse(f0, f1, TEMPERATURE, m0, m1)
    best1, best0, score1 = module.mutual_best(f0, f1, TEMPERATURE, row, col, m0, m1)
    raw1, raw0, raw_score1 = module.mutual_best(f0, f1, TEMPERATURE, None, None, m0, m1)
    for b, s in enumerate(scalar_scores(f0, f1, m0, m1)):
        columns = list(zip(*s, strict=True))
        r, c = [scalar_lse(x) for x in s], [scalar_lse(list(x)) for x in columns]
        torch.testing.assert_close(row[b].tolist(), r)
        torch.testing.assert_close(col[b].tolist(), c)
        for i in range(7):
            log_confidence = [2 * s[i][j] - r[i] - c[j] for j in range(5)]
            if m0 is None or m0[b, i]:
                assert best1[b, i] == max(range(5), key=lambda j: (log_confidence[j], -j))
                assert score1[b, i] == pytest.approx(max(log_confidence))
                assert raw1[b, i] == max(range(5), key=lambda j: (s[i][j], -j))
                assert raw_score1[b, i] == pytest.approx(max(s[i]))
        for j in range(5):
            if m1 is None or m1[b, j]:
                assert best0[b, j] == max(range(7), key=lambda i: (2 * s[i][j] - r[i] - c[j], -i))
                assert raw0[b, j] == max(range(7), key=lambda i: (s[i][j], -i))
        pairs = torch.tensor([[b, i, j] for i in range(7) for j in range(5)], device=DEVICE).unbind(1)
        expected = [2 * s[i][j] - r[i] - c[j] for i in range(7) for j in range(5)]
        if not masked:
            torch.testing.assert_close(pair_scores(f0, f1, TEMPERATURE, *pairs, row, col).tolist(), expected)
            torch.testing.assert_close(
                pair_scores(f0, f1, TEMPERATURE, *pairs).tolist(), [x for line in s for x in line]
            )


@pytest.mark.parametrize("masked", [False, True])
def test_the_naive_gradient_is_that_of_the_blocks(masked: bool) -> None:
    masks = masks_for(2, 7, 5) if masked else (None, None)
    found = []
    for module in (naive, cpu):
        leaves = [f.requires_grad_() for f in features(2, 7, 5, 4)]
        row, col = module.dual_softmax_lse(*leaves, TEMPERATURE, *masks)
        found.append(torch.autograd.grad(row.sin().sum() + col.cos().sum(), leaves))
    for got, wanted in zip(*found, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_reference_gradient(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", 20)
    masks = masks_for(1, 7, 5) if masked else (None, None)
    f0, f1 = features(1, 7, 5, 4)
    batch, cells0, cells1 = torch.tensor([[0, 0, 0], [0, 0, 3], [0, 4, 3]], device=DEVICE)

    def log_confidence(a: Tensor, b: Tensor) -> Tensor:
        lse = dual_softmax_lse(a, b, TEMPERATURE, *masks)
        return pair_scores(a, b, TEMPERATURE, batch, cells0, cells1, *lse)

    if not masked:
        checked_gradcheck(joined(), [f0, f1])
        checked_gradcheck(log_confidence, [f0, f1])
        leaves = [f.requires_grad_() for f in (f0, f1)]
        assert torch.autograd.gradgradcheck(joined(), leaves, fast_mode=True)
        return
    # around -1e9 finite differences see nothing: leave masked normalisers out
    keep = torch.cat(masks, 1)
    checked_gradcheck(lambda a, b: joined(*masks)(a, b)[keep], [f0, f1])


# Kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "masked"), CASES, ids=str)
def test_kernels_are_as_accurate_as_the_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype, masked: bool
) -> None:
    f0, f1 = features(*shape, dtype)
    masks = masks_for(*shape[:3]) if masked else (None, None)
    valid = torch.cat(masks, 1) if masked else torch.ones(shape[0], shape[1] + shape[2], dtype=torch.bool)
    exact = with_gradients(joined(*masks), f0.double(), f1.double())
    with backend("reference"):
        same = with_gradients(joined(*masks), f0, f1)
    with backend("triton"), poisoned_buffers(), spy(cpu, "dual_softmax_lse") as calls:
        actual = with_gradients(joined(*masks), f0, f1)
    assert calls["dual_softmax_lse"] == 0
    lse = [values[0][valid.to(DEVICE)] for values in (actual, same, exact)]
    assert_as_accurate("lse", *lse)
    assert (actual[0][~valid.to(DEVICE)] < -9e8).all()
    for name, a, s, e in zip(("features0", "features1"), actual[1:], same[1:], exact[1:], strict=True):
        assert_as_accurate(name, a, s, e, GRADIENT_RATIO[dtype])
    for gradient, mask in zip(actual[1:], masks, strict=True):
        if mask is not None:
            assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "normalised"), CASES, ids=str)
def test_best_partners_are_the_reference_s(
    shape: tuple[int, int, int, int], dtype: torch.dtype, normalised: bool
) -> None:
    f0, f1 = features(*shape, dtype)
    masks = masks_for(*shape[:3])
    lse = dual_softmax_lse(f0, f1, TEMPERATURE, *masks) if normalised else (None, None)
    expected = cpu.mutual_best(f0, f1, TEMPERATURE, *lse, *masks)
    with backend("triton"), poisoned_buffers(), spy(cpu, "mutual_best") as calls:
        actual = mutual_best(f0, f1, TEMPERATURE, *lse, *masks)
    assert calls["mutual_best"] == 0
    # Random scores do not tie, and a margin below rounding is unlikely: no exception is needed at this seed.
    for a, e, mask in zip(actual[:2], expected[:2], masks, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a[mask], e[mask])
    torch.testing.assert_close(actual[2][masks[0]], expected[2][masks[0]], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_ties_go_to_the_lowest_index(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", 500)
    f0, f1 = (torch.ones(1, n, 16, device=DEVICE) for n in (140, 130))
    with backend(name):  # type: ignore[arg-type]
        for best in mutual_best(f0, f1, 1.0)[:2]:
            assert torch.equal(best, torch.zeros_like(best))


def test_many_launches_and_programs_agree_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from eloftr_kernels.dual_softmax import launch

    f0, f1 = features(1, 300, 150, 16, torch.float32)
    with backend("triton"):
        once = dual_softmax_lse(f0, f1, TEMPERATURE)
        best = mutual_best(f0, f1, TEMPERATURE, *once)
        monkeypatch.setattr(launch, "ROWS_PER_LAUNCH", 128)
        monkeypatch.setattr(launch, "SPAN", 64)
        with poisoned_buffers():
            often = dual_softmax_lse(f0, f1, TEMPERATURE)
            best_often = mutual_best(f0, f1, TEMPERATURE, *once)
    torch.testing.assert_close(often, once)
    for a, b in zip(best_often, best, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_tiles_of_gpus_with_little_shared_memory_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from eloftr_kernels.dual_softmax import launch

    f0, f1 = features(1, 140, 40, 24, torch.float16)
    with backend("triton"):
        large = with_gradients(joined(), f0, f1)
        monkeypatch.setattr(launch, "room", lambda device: 64 * 1024)
        with poisoned_buffers():
            small = with_gradients(joined(), f0, f1)
    torch.testing.assert_close(small[0], large[0])
    for a, b in zip(small[1:], large[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-3 * float(b.abs().max()))  # a few steps of float16


def test_a_batch_is_its_pairs_bit_by_bit() -> None:
    f0, f1 = features(3, 40, 30, 24, torch.float16)
    with backend("triton"):
        together = with_gradients(joined(), f0, f1)
        out = torch.cat([joined()(f0[b : b + 1], f1[b : b + 1]) for b in range(3)])
        again = with_gradients(joined(), f0, f1)
    assert torch.equal(together[0], out)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))


def test_strided_features_and_masks() -> None:
    f0, f1 = features(2, 30, 20, 24, torch.float32)
    m0, m1 = masks_for(2, 30, 20)
    channel_first = f0.mT.contiguous().mT
    sliced = torch.cat([f1, f1 + 1], 2)[:, :, :24]
    spread = torch.stack([m0, ~m0], 2)[:, :, 0]
    with backend("triton"):
        dense = with_gradients(joined(m0, m1), f0, f1)
        strided = with_gradients(joined(spread, m1), channel_first, sliced)
        best = mutual_best(f0, f1, TEMPERATURE, None, None, m0, m1)
        best_strided = mutual_best(channel_first, sliced, TEMPERATURE, None, None, spread, m1)
    assert not channel_first.is_contiguous()
    assert not sliced.is_contiguous()
    for a, b in zip([*strided, *best_strided], [*dense, *best], strict=True):
        assert torch.equal(a, b)


def test_small_gradients_survive_half_precision() -> None:
    """A cotangent far below float16's range: only the result is rounded to it."""
    f0, f1 = features(1, 40, 30, 16, torch.float16)
    exact = with_gradients(joined(), f0.double(), f1.double(), size=1e-5)
    with backend("triton"):
        actual = with_gradients(joined(), f0, f1, size=1e-5)
    for a, e in zip(actual[1:], exact[1:], strict=True):
        step = 2.0**-24  # of float16's subnormal numbers
        assert (a.double() - e).abs().max() <= 0.5 * step + 4e-3 * e.abs().max()


@pytest.mark.parametrize("name", ["auto", "triton"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 16), (1, 0, 4, 16), (1, 3, 0, 16), (2, 3, 4, 0)], ids=str)
def test_empty_inputs(shape: tuple[int, int, int, int], name: str) -> None:
    B, L, S, C = shape
    f0, f1 = (torch.zeros(B, n, C, device=DEVICE, requires_grad=True) for n in (L, S))
    with backend(name):  # type: ignore[arg-type]
        row, col = dual_softmax_lse(f0, f1, TEMPERATURE)
        best1, best0, score1 = mutual_best(f0, f1, TEMPERATURE, row, col)
    (row[row > -9e8].sum() + col[col > -9e8].sum()).backward()
    assert (row.shape, col.shape, best1.shape, best0.shape) == ((B, L), (B, S), (B, L), (B, S))
    expected_row, expected_col = (math.log(n) if n else -math.inf for n in (S, L))
    torch.testing.assert_close(row.detach(), torch.full_like(row, expected_row))
    torch.testing.assert_close(col.detach(), torch.full_like(col, expected_col))
    assert not best1.any()
    assert not best0.any()
    if not S:
        assert (score1 == -math.inf).all()
    for f in (f0, f1):
        assert f.grad is not None
        assert torch.equal(f.grad, torch.zeros_like(f))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of lanes that are masked afterwards
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_fully_masked_image_has_finite_values_and_zero_gradients(name: str) -> None:
    f0, f1 = features(1, 6, 5, 16, torch.float32)
    nothing = torch.zeros(1, 6, dtype=torch.bool, device=DEVICE)
    with backend(name):  # type: ignore[arg-type]
        out, *grads = with_gradients(joined(nothing, None), f0, f1)
    assert torch.isfinite(out).all()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


# Registration, dispatch, memory, errors


def test_opcheck() -> None:
    f0, f1 = features(2, 20, 17, 24, torch.float32)
    masks = masks_for(2, 20, 17)
    lse = cpu.dual_softmax_lse(f0, f1, TEMPERATURE)
    channel_first, sliced = f0.mT.contiguous().mT, torch.cat([f1, f1], 2)[:, :, :24]
    leaves = [t.detach().requires_grad_() for t in (channel_first, sliced)]
    torch.library.opcheck(op._lse_op.registered, (*leaves, TEMPERATURE, *masks, torch.float32))
    strided = (channel_first, sliced)
    torch.library.opcheck(
        op._lse_backward_op.registered, (*lse, *strided, *lse, TEMPERATURE, None, None, torch.float32)
    )
    torch.library.opcheck(op._best_op.registered, (*strided, TEMPERATURE, *lse, *masks, torch.float32))


def test_one_graph_under_compile() -> None:
    f0, f1 = features(1, 12, 10, 16, torch.float32)

    def both(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        lse = dual_softmax_lse(a, b, TEMPERATURE)
        return (*lse, *mutual_best(a, b, TEMPERATURE, *lse))

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for name in ("auto", "triton"):
        with backend(name):  # type: ignore[arg-type]
            torch.testing.assert_close(compiled(f0, f1), both(f0, f1))


def test_autocast_changes_nothing_in_pytorch() -> None:
    f0, f1 = features(1, 12, 10, 16, torch.float32)
    with backend("reference"):
        plain = dual_softmax_lse(f0, f1, TEMPERATURE)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            cast = dual_softmax_lse(f0, f1, TEMPERATURE)
    torch.testing.assert_close(cast, plain)


def test_the_kernels_have_no_second_derivative_and_say_so() -> None:
    f0, f1 = (f.requires_grad_() for f in features(1, 4, 3, 16, torch.float32))
    with backend("triton"):
        row, _ = dual_softmax_lse(f0, f1, TEMPERATURE)
    (first,) = torch.autograd.grad(row.sum(), f0, create_graph=True)
    with pytest.raises(RuntimeError, match="dual_softmax_lse_backward"):
        torch.autograd.grad(first.sum(), f1)


def test_best_partners_carry_no_gradient() -> None:
    f0, f1 = (f.requires_grad_() for f in features(1, 4, 3, 16, torch.float32))
    for name in ("auto", "triton"):
        with backend(name):  # type: ignore[arg-type]
            assert not mutual_best(f0, f1, TEMPERATURE)[2].requires_grad


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_no_tensor_of_all_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    L, S, C = 200, 150, 8
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", 16 * S)
    f0, f1 = features(1, L, S, C, torch.float32)
    with backend(name), _LargestTensor() as largest:  # type: ignore[arg-type]
        with_gradients(joined(), f0, f1)
        mutual_best(f0, f1, TEMPERATURE, *dual_softmax_lse(f0, f1, TEMPERATURE))
    assert 0 < largest.elements <= 2 * (L + S) * C < L * S / 4


def test_reasons_against_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    f0, f1 = features(1, 4, 3, 16, torch.float32)
    meta = torch.empty(1, 4, 16, device="meta")
    if DEVICE.type == "cpu":
        assert "faster than Triton's interpreter" in str(why_not(f0, f1))
    with backend("triton"):
        assert why_not(f0, f1) is None
        assert "device type meta" in str(why_not(meta, meta))
        assert "features0 is torch.float64" in str(why_not(f0.double(), f1.double()))
        with pytest.raises(RuntimeError, match=r"dual_softmax_lse: backend .*float64"):
            dual_softmax_lse(f0.double(), f1.double(), TEMPERATURE)
        with pytest.raises(RuntimeError, match=r"mutual_best: backend .*float64"):
            mutual_best(f0.double(), f1.double(), TEMPERATURE)
        huge = torch.empty(1, 1, 16, device=DEVICE).expand(2**27, 1, 16)
        assert "2^31 elements" in str(why_not(huge, huge))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if DEVICE.type == "cpu":
            assert "interpreter is off" in str(why_not(f0, f1))


BAD: list[tuple[type[Exception], str, dict[str, object]]] = [
    (ValueError, "features0: expected", {"features0": torch.zeros(4, 16)}),
    (ValueError, "features1: expected", {"features1": torch.zeros(1, 3, 8)}),
    (ValueError, "features1: expected", {"features1": torch.zeros(2, 3, 16)}),
    (TypeError, "features1: expected torch.float32", {"features1": torch.zeros(1, 3, 16).half()}),
    (ValueError, "features1: expected the device", {"features1": torch.zeros(1, 3, 16, device="meta")}),
    (ValueError, "mask0: expected", {"mask0": torch.ones(1, 3, dtype=torch.bool)}),
    (TypeError, "mask1: expected torch.bool", {"mask1": torch.ones(1, 3)}),
    (ValueError, "mask1: expected the device", {"mask1": torch.ones(1, 3, dtype=torch.bool, device="meta")}),
    (ValueError, "temperature: expected a positive", {"temperature": 0.0}),
    (ValueError, "temperature: expected a positive", {"temperature": math.nan}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[b[1] for b in BAD])
def test_bad_input(error: type[Exception], message: str, change: dict[str, object]) -> None:
    good: dict[str, object] = {
        "features0": torch.zeros(1, 4, 16),
        "features1": torch.zeros(1, 3, 16),
        "temperature": 0.1,
    }
    for function in (dual_softmax_lse, mutual_best):
        with pytest.raises(error, match=message):
            function(**{**good, **change})  # type: ignore[operator]


@pytest.mark.parametrize("name", ["batch", "cells0", "cells1"])
def test_a_pair_outside_the_features_raises_or_gives_nan(name: str) -> None:
    f0, f1 = (f.requires_grad_() for f in features(2, 4, 3, 16, torch.float32))
    good = {key: torch.ones(3, dtype=torch.int64, device=DEVICE) for key in ("batch", "cells0", "cells1")}
    bad = {**good, name: torch.tensor([-1, 1, 4], device=DEVICE)}
    if DEVICE.type == "cpu":
        with pytest.raises(IndexError, match=f"{name}: expected 0 to .*, got -1 to 4"):
            pair_scores(f0, f1, TEMPERATURE, **bad)
    compiled = torch.compile(pair_scores, backend="aot_eager", fullgraph=True)  # traced: no index is read
    scores = compiled(f0, f1, TEMPERATURE, **bad)
    assert scores.isnan().tolist() == [True, False, True]
    expected = pair_scores(f0, f1, TEMPERATURE, **{key: index[:1] for key, index in good.items()})
    torch.testing.assert_close(scores[1:2], expected)
    got, wanted = (torch.autograd.grad(t.sum(), f0)[0] for t in (scores[1:2], expected))
    torch.testing.assert_close(got, wanted)
    with pytest.raises(IndexError, match="cells0: expected no index"):
        pair_scores(f0[:, :0], f1, TEMPERATURE, **good)


def test_bad_input_of_one_function() -> None:
    f0, f1 = torch.zeros(1, 4, 16), torch.zeros(1, 3, 16)
    index = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="col_lse: expected both"):
        mutual_best(f0, f1, 0.1, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="row_lse: expected both"):
        pair_scores(f0, f1, 0.1, index, index, index, None, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="row_lse: expected"):
        mutual_best(f0, f1, 0.1, torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"row_lse: expected torch\.float32"):
        mutual_best(f0, f1, 0.1, torch.zeros(1, 4).half(), torch.zeros(1, 3))
    with pytest.raises(TypeError, match="features0: expected a floating-point"):
        mutual_best(f0.long(), f1.long(), 0.1)
    with pytest.raises(TypeError, match=r"cells1: expected torch.int64"):
        pair_scores(f0, f1, 0.1, index, index, index.int())
    with pytest.raises(ValueError, match="cells0: expected"):
        pair_scores(f0, f1, 0.1, index, index[:1], index)
    assert pair_scores(f0, f1, 0.1, index[:0], index[:0], index[:0]).shape == (0,)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (0, 0)])
def test_images_without_cells(rows: int, columns: int) -> None:
    row_lse, col_lse = dual_softmax_lse(torch.rand(1, rows, 4), torch.rand(1, columns, 4), 0.1)
    assert row_lse.tolist() == [[-math.inf] * rows]
    assert col_lse.tolist() == [[-math.inf] * columns]


# A common part of all features, in products of few bits


def with_a_common_part(dtype: torch.dtype, size: float = 40.0) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Features whose scores are about 50,000 with differences of about one, float32."""
    f0, f1 = features(2, 40, 70, 24)
    common = size * torch.randn(24, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    return (f0 + common).to(dtype), (f1 + common).to(dtype), masks_for(2, 40, 70)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_take_the_common_part_out_of_rounded_products(dtype: torch.dtype) -> None:
    """The error is that of the rounded differences: far below that of rounded features."""
    f0, f1, masks = with_a_common_part(torch.float32)

    def of(*leaves: Tensor) -> Tensor:
        return torch.cat(dual_softmax_lse(*leaves, TEMPERATURE, *masks, product_dtype=dtype), 1)

    exact = with_gradients(joined(*masks), f0.double(), f1.double())
    rounded = with_gradients(joined(*masks), *(f.to(dtype).double() for f in (f0, f1)))
    with backend("triton"), poisoned_buffers():
        found = with_gradients(of, f0, f1)
    for name, x, far, truth in zip(("lse", "gradient 0", "gradient 1"), found, rounded, exact, strict=True):
        assert x.dtype == torch.float32
        valid = truth.abs() < 1e8  # masked cells hold -1e9
        error, without = ((y.double() - truth)[valid].norm() for y in (x, far))
        assert error < 0.1 * without, f"{name}: {error:.2e}, rounded features {without:.2e}"


def test_best_partners_with_a_common_part() -> None:
    f0, f1, masks = with_a_common_part(torch.float32)
    lse = dual_softmax_lse(f0, f1, TEMPERATURE, *masks)
    expected = mutual_best(f0, f1, TEMPERATURE, *lse, *masks)
    with backend("triton"), poisoned_buffers():
        found = mutual_best(f0, f1, TEMPERATURE, *lse, *masks, product_dtype=torch.float16)
    for x, y, mask in zip(found[:2], expected[:2], masks, strict=True):
        assert (x == y)[mask].float().mean() > 0.95
    torch.testing.assert_close(found[2][masks[0]], expected[2][masks[0]], rtol=0, atol=0.3)


def test_products_of_another_dtype_are_refused() -> None:
    f0, f1 = features(1, 3, 4, 8, torch.float32)
    with backend("triton"), pytest.raises(ValueError, match="product_dtype: expected float32, float16"):
        dual_softmax_lse(f0, f1, TEMPERATURE, product_dtype=torch.float64)
