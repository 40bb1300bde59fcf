# SPDX-License-Identifier: Apache-2.0
"""Window matches: scalar oracle = float64 reference ~ kernels in the interpreter (or on a GPU)."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.dispatch import backend
from eloftr_kernels.window_match import WindowMatches, cpu, naive, op, why_not, window_match
from support.ops import assert_as_accurate, checked_gradcheck, poisoned_buffers, spy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIELDS = ("subpixel1", "expected0", "expected1")  # those that carry gradients
# The kernels round gradients of scores and windows to the maps' type before a product, the reference keeps scores in
# float32. On a GPU, float32 products of the forward are three of TF32: numbers keep 22 bits, and the product of the
# lower halves is left out, so that an error may be 12 times half a step of float32.
RATIO = {torch.float32: 3.0 if DEVICE.type == "cpu" else 12.0, torch.float16: 3.0, torch.bfloat16: 3.0}
DTYPES = list(RATIO)


class Scene(NamedTuple):
    map0: Tensor
    map1: Tensor
    batch: Tensor
    cells0: Tensor
    cells1: Tensor


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def scene(
    M: int = 5,
    D: int = 24,
    dtype: torch.dtype = torch.float64,
    grid0: tuple[int, int] = (2, 3),
    grid1: tuple[int, int] = (3, 2),
    B: int = 2,
) -> Scene:
    """Random maps; matches with a repeated cell and cells at every border."""
    g = torch.Generator().manual_seed(3)
    maps = [torch.randn(B, D, 4 * h, 4 * w, generator=g) * 1.5 for h, w in (grid0, grid1)]
    cells = [torch.randint(h * w, (M,), generator=g) for h, w in (grid0, grid1)]
    if M > 1:
        cells[0][1], cells[1][1] = cells[0][0], cells[1][0]
    batch = torch.arange(M) // 2 % B
    return Scene(*(m.to(DEVICE, dtype) for m in maps), *(i.to(DEVICE) for i in (batch, *cells)))


def values_and_gradients(s: Scene, seed: int = 7, size: float = 1.0, **options: Any) -> dict[str, Tensor]:
    arguments = {"subpixel_channels": 8, "subpixel_temperature": 0.7, **options}
    leaves = [m.detach().requires_grad_() for m in (s.map0, s.map1)]
    out = window_match(*leaves, *s[2:], **arguments)
    assert not out.pixel0.requires_grad
    assert not out.pixel1.requires_grad
    g = torch.Generator().manual_seed(seed)
    wanted = [getattr(out, name) for name in FIELDS if getattr(out, name) is not None]
    cotangents = [(torch.randn(t.shape, generator=g, dtype=torch.float64) * size).to(t) for t in wanted]
    grads = torch.autograd.grad(wanted, leaves, cotangents)
    values = {name: t.detach() for name, t in out._asdict().items() if t is not None}
    return {**values, "map0": grads[0], "map1": grads[1]}


# Oracle


def scalar_match(
    s: Scene, m: int, d: int, temperature: float, centred: bool, soft_temperature: float
) -> dict[str, list[float]]:
    """One match by loops over pixels of the upsampled maps."""
    b = int(s.batch[m])
    up0, up1 = (F.interpolate(x[b : b + 1], scale_factor=2.0, mode="bilinear")[0] for x in s[:2])
    D = up0.shape[0]

    def pixel(up: Tensor, y: int, x: int) -> list[float]:
        inside = 0 <= y < up.shape[1] and 0 <= x < up.shape[2]
        return up[:, y, x].tolist() if inside else [0.0] * D

    tops = []
    for up, cell in ((up0, int(s.cells0[m])), (up1, int(s.cells1[m]))):
        columns = up.shape[2] // 8
        tops.append((cell // columns * 8, cell % columns * 8))
    (y0, x0), (y1, x1) = tops
    window0 = [pixel(up0, y0 + i, x0 + j) for i in range(8) for j in range(8)]
    window1 = [pixel(up1, y1 + i - 1, x1 + j - 1) for i in range(10) for j in range(10)]
    inner = [(i + 1) * 10 + j + 1 for i in range(8) for j in range(8)]
    scores = [[sum(p * q for p, q in zip(a[: D - d], c[: D - d], strict=True)) / D for c in window1] for a in window0]
    over_rows = [sum(math.exp(v) for v in row) for row in scores]
    over_columns = [sum(math.exp(row[r]) for row in scores) for r in range(100)]
    joint = {
        (i, k): math.exp(2 * scores[i][r]) / over_rows[i] / over_columns[r]
        for i in range(64)
        for k, r in enumerate(inner)
    }
    i, k = max(joint, key=lambda key: (joint[key], -key[0], -key[1]))
    shift = 1 if centred else 0
    weights = {}
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            r = (k // 8 + shift + dy) % 10 * 10 + (k % 8 + shift + dx) % 10
            dot = sum(p * q for p, q in zip(window0[i][D - d :], window1[r][D - d :], strict=True))
            weights[dx, dy] = math.exp(dot / (math.sqrt(d) * temperature))
    total = sum(weights.values())
    tempered = {key: p ** (1 / soft_temperature) for key, p in joint.items()}
    mass = sum(tempered.values())
    offset = [(n % 8 - 3.5, n // 8 - 3.5) for n in range(64)]
    return {
        "pixel0": list(offset[i]),
        "pixel1": list(offset[k]),
        "subpixel1": [sum(w * key[a] for key, w in weights.items()) / total for a in (0, 1)],
        "expected0": [sum(p * offset[key[0]][a] for key, p in tempered.items()) / mass for a in (0, 1)],
        "expected1": [sum(p * offset[key[1]][a] for key, p in tempered.items()) / mass for a in (0, 1)],
    }


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("module", [naive, cpu], ids=["naive", "cpu"])
def test_pytorch_is_the_scalar_oracle(module, centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_CPU", 2)
    s = scene(M=4, D=6)
    out = module.window_match(*s, 2, 0.7, centred, 0.8)
    for m in range(4):
        for name, expected in scalar_match(s, m, 2, 0.7, centred, 0.8).items():
            torch.testing.assert_close(getattr(out, name)[m].tolist(), expected, rtol=1e-10, atol=1e-10)


def test_reference_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scene(M=3, D=5, grid0=(1, 2), grid1=(2, 1), B=1)

    def fields(map0: Tensor, map1: Tensor) -> Tensor:
        out = cpu.window_match(map0, map1, *s[2:], 2, 0.7, False, 0.8)
        return torch.cat([getattr(out, name) for name in FIELDS])

    checked_gradcheck(fields, s[:2])
    whole = fields(*s[:2])
    dense = naive.window_match(*s, 2, 0.7, False, 0.8)
    torch.testing.assert_close(torch.cat([getattr(dense, name) for name in FIELDS]), whole)
    monkeypatch.setattr(cpu, "CHUNK_CPU", 2)
    torch.testing.assert_close(fields(*s[:2]), whole)
    checked_gradcheck(fields, s[:2])


# Kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (24, {"soft_temperature": 1.0}),
        (64, {"soft_temperature": 0.5, "centred_subpixel": True}),
        (20, {"subpixel_channels": 3}),
    ],
    ids=["small", "full centred", "hard"],
)
def test_kernels_are_as_accurate_as_the_reference(channels: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    # Every case takes the same way through matches and tiles, of which one has many and the others few.
    many = channels == 24 and dtype == torch.float32
    fewer: dict[str, Any] = {} if many else {"M": 3, "grid0": (1, 2), "grid1": (2, 1)}
    s = scene(D=channels, dtype=dtype, **fewer)
    exact = values_and_gradients(Scene(s.map0.double(), s.map1.double(), *s[2:]), **options)
    with backend("reference"):
        same = values_and_gradients(s, **options)
    with backend("triton"), poisoned_buffers(), spy(cpu, "window_match") as calls:
        actual = values_and_gradients(s, **options)
    assert calls["window_match"] == 0
    assert actual.keys() == same.keys()
    for name, value in actual.items():
        if name.startswith("pixel"):
            assert torch.equal(value.double(), exact[name]), name
        else:
            assert_as_accurate(name, value, same[name], exact[name], RATIO[dtype])


def test_maps_that_end_within_a_cell_and_one_cell() -> None:
    """Rows and columns past the last whole cell still take part in the interpolation at its border."""
    s = scene(M=2, D=16, grid0=(1, 1), grid1=(2, 2), B=1)
    s = s._replace(map1=s.map1[:, :, :7, :6], cells1=torch.zeros_like(s.cells1))
    exact = values_and_gradients(s, soft_temperature=1.0)
    single = s._replace(map0=s.map0.float(), map1=s.map1.float())
    with backend("reference"):
        same = values_and_gradients(single, soft_temperature=1.0)
    with backend("triton"), poisoned_buffers():
        actual = values_and_gradients(single, soft_temperature=1.0)
    for name, value in actual.items():
        assert_as_accurate(name, value, same[name], exact[name], RATIO[torch.float32])


def test_ties_go_to_the_lowest_pixel() -> None:
    s = scene(M=2, D=16, dtype=torch.float32)
    flat = s._replace(map0=torch.ones_like(s.map0), map1=torch.zeros_like(s.map1))
    for name in ("reference", "triton"):
        with backend(name):  # type: ignore[arg-type]
            out = window_match(*flat, 4, 1.0)
        assert torch.equal(out.pixel0, torch.full_like(out.pixel0, -3.5)), name
        assert torch.equal(out.pixel1, torch.full_like(out.pixel1, -3.5)), name


def test_strides_and_reruns_change_no_bit() -> None:
    s = scene(M=2, D=16, dtype=torch.float32, grid0=(1, 2), grid1=(2, 1), B=1)
    last = s.map0.contiguous(memory_format=torch.channels_last)
    sliced = torch.cat([s.map1, s.map1], 3)[..., : s.map1.shape[3]]
    with backend("triton"):
        dense = values_and_gradients(s, soft_temperature=1.0)
        again = values_and_gradients(s, soft_temperature=1.0)
        strided = values_and_gradients(s._replace(map0=last, map1=sliced), soft_temperature=1.0)
    for name, value in dense.items():
        assert torch.equal(again[name], value), name
        assert torch.equal(strided[name], value), name


def test_matches_do_not_depend_on_their_company() -> None:
    s = scene(D=16, dtype=torch.float16)
    with backend("triton"):
        together = window_match(*s, 4, 1.0, soft_temperature=1.0)
        alone = [window_match(*s[:2], *(i[m : m + 1] for i in s[2:]), 4, 1.0, False, 1.0) for m in range(5)]
    for name in WindowMatches._fields:
        assert torch.equal(getattr(together, name), torch.cat([getattr(a, name) for a in alone])), name


def test_small_gradients_survive_half_precision() -> None:
    """The scores' gradient lies far below float16's range: only the result is rounded to it."""
    s = scene(M=3, D=16, dtype=torch.float16, grid0=(1, 2), grid1=(2, 1), B=1)
    exact = values_and_gradients(Scene(s.map0.double(), s.map1.double(), *s[2:]), size=1e-4, soft_temperature=1.0)
    with backend("triton"):
        actual = values_and_gradients(s, size=1e-4, soft_temperature=1.0)
    for name in ("map0", "map1"):
        step = 2.0**-24  # of float16's subnormal numbers; patches are rounded before they are added
        error = (actual[name].double() - exact[name]).abs().max()
        assert error <= 3 * step + 4e-3 * exact[name].abs().max(), name


@pytest.mark.parametrize("name", ["auto", "triton"])
@pytest.mark.parametrize("B", [0, 2])
def test_no_match(name: str, B: int) -> None:
    s = scene(M=0, D=16, dtype=torch.float32, grid0=(1, 2), grid1=(1, 1), B=max(B, 1))
    s = s._replace(map0=s.map0[:B], map1=s.map1[:B])
    with backend(name):  # type: ignore[arg-type]
        out = values_and_gradients(s, soft_temperature=1.0)
    for field in WindowMatches._fields:
        assert out[field].shape == (0, 2)
    for gradient, fine_map in ((out["map0"], s.map0), (out["map1"], s.map1)):
        assert torch.equal(gradient, torch.zeros_like(fine_map))


OUTSIDE = {"batch": (-1, 2), "cells0": (-1, 2), "cells1": (-1, 2**40)}


@pytest.mark.parametrize("name", list(OUTSIDE))
def test_indices_outside_the_maps_raise(name: str) -> None:
    s = Scene(*(t.cpu() for t in scene(M=2, D=16, dtype=torch.float32, grid0=(1, 2), grid1=(2, 1))))
    for value in OUTSIDE[name]:
        bad = s._replace(**{name: torch.tensor([0, value])})
        # Triton takes tensors of a CPU in its interpreter alone.
        for choice in ("reference", "triton") if DEVICE.type == "cpu" else ("reference",):
            with backend(choice), pytest.raises(IndexError, match=f"{name}: expected 0 to 1, got"):  # type: ignore[arg-type]
                window_match(*bad, 4, 1.0)


def test_kernels_give_nan_and_no_gradient_for_indices_outside_the_maps() -> None:
    """Called below the checks, which do not read indices on a GPU: the match in the middle alone counts."""
    s = scene(M=5, D=16, dtype=torch.float32, grid0=(1, 2), grid1=(2, 1))
    bad = s._replace(
        batch=torch.tensor([-1, 2, 1, 0, 0], device=DEVICE),
        cells0=torch.tensor([0, 0, 1, 2, 0], device=DEVICE),
        cells1=torch.tensor([0, 0, 1, 0, 2**40], device=DEVICE),
    )
    middle = Scene(*s[:2], *(index[2:3] for index in bad[2:]))
    options = (4, 1.0, False, 1.0)
    *fields, best = op._forward(*bad, *options)
    *wanted, only = op._forward(*middle, *options)
    for field, one in zip(fields, wanted, strict=True):
        assert field[[0, 1, 3, 4]].isnan().all()
        assert torch.equal(field[2:3], one)
    ones = [torch.ones(5, 2, device=DEVICE) for _ in range(3)]
    grads = op._backward(best, ones, *bad, *options)
    alone = op._backward(only, [t[:1] for t in ones], *middle, *options)
    for gradient, one in zip(grads, alone, strict=True):
        assert torch.equal(gradient, one)


def test_an_index_into_no_map_raises() -> None:
    s = scene(M=1, D=16, dtype=torch.float32, B=1)
    with pytest.raises(IndexError, match="batch: expected no index"):
        window_match(s.map0[:0], s.map1[:0], *s[2:], 4, 1.0)


# Registration, dispatch, errors


def test_opcheck() -> None:
    s = scene(M=1, D=16, dtype=torch.float32, grid0=(1, 1), grid1=(1, 2), B=1)
    last = s.map0.contiguous(memory_format=torch.channels_last)
    sliced = torch.cat([s.map1, s.map1], 3)[..., : s.map1.shape[3]]
    options = (4, 1.0, False, 1.0)
    leaves = [m.detach().requires_grad_() for m in (last, sliced)]
    torch.library.opcheck(op._forward.registered, (*leaves, *s[2:], *options))
    torch.library.opcheck(
        op._forward.registered, (*s, 4, 1.0, True, None), test_utils=("test_schema", "test_faketensor")
    )
    *_, best = op._forward(*s, *options)
    grads = [torch.randn(1, 2, device=DEVICE) for _ in range(3)]
    torch.library.opcheck(op._backward.registered, (best, grads, last, sliced, *s[2:], *options))


def test_one_graph_under_compile() -> None:
    s = scene(M=1, D=16, dtype=torch.float32, grid0=(1, 1), grid1=(1, 1), B=1)

    def matched(map0: Tensor, map1: Tensor) -> WindowMatches:
        return window_match(map0, map1, *s[2:], 4, 1.0, soft_temperature=1.0)

    compiled = torch.compile(matched, fullgraph=True, backend="aot_eager")
    for name in ("auto", "triton"):
        with backend(name):  # type: ignore[arg-type]
            torch.testing.assert_close(tuple(compiled(*s[:2])), tuple(matched(*s[:2])))


def test_outputs_stay_float32_under_autocast() -> None:
    s = scene(M=2, D=16, dtype=torch.bfloat16)
    for name in ("reference", "triton"):
        with backend(name):  # type: ignore[arg-type]
            plain = window_match(*s, 4, 1.0, soft_temperature=1.0)
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                cast = window_match(*s, 4, 1.0, soft_temperature=1.0)
        for a, b in zip(plain, cast, strict=True):
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_the_kernels_have_no_second_derivative_and_say_so() -> None:
    s = scene(M=1, D=16, dtype=torch.float32, grid0=(1, 1), grid1=(1, 1), B=1)
    leaves = [m.requires_grad_() for m in s[:2]]
    with backend("triton"):
        out = window_match(*leaves, *s[2:], 4, 1.0)
    (first,) = torch.autograd.grad(out.subpixel1.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="window_match_backward"):
        torch.autograd.grad(first.sum(), leaves[1])


def test_reasons_against_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scene(M=1, D=16, dtype=torch.float32)
    meta = torch.empty(1, 16, 4, 4, device="meta")
    wide = torch.empty(1, 65, 4, 4, device=DEVICE)
    if DEVICE.type == "cpu":
        assert "faster than Triton's interpreter" in str(why_not(*s[:2]))
    with backend("triton"):
        assert why_not(*s[:2]) is None
        assert "device type meta" in str(why_not(meta, meta))
        assert "map0 is torch.float64" in str(why_not(s.map0.double(), s.map1.double()))
        assert "65 channels are more than the 64" in str(why_not(wide, wide))
        huge = torch.empty(1, 16, 4, 4, device=DEVICE).expand(2**23, 16, 4, 4)
        assert "2^31 elements" in str(why_not(huge, huge))
        with pytest.raises(RuntimeError, match=r"window_match: backend .*float64"):
            window_match(s.map0.double(), s.map1.double(), *s[2:], 4, 1.0)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if DEVICE.type == "cpu":
            assert "interpreter is off" in str(why_not(*s[:2]))


BAD: list[tuple[type[Exception], str, dict[str, object]]] = [
    (ValueError, "map0: expected", {"map0": torch.zeros(16, 4, 4)}),
    (ValueError, "map0: expected at least 4 rows", {"map0": torch.zeros(1, 16, 3, 4)}),
    (ValueError, "map1: expected", {"map1": torch.zeros(1, 8, 4, 4)}),
    (TypeError, "map1: expected torch.float32", {"map1": torch.zeros(1, 16, 4, 4).half()}),
    (ValueError, "map1: expected the device", {"map1": torch.zeros(1, 16, 4, 4, device="meta")}),
    (ValueError, "batch: expected", {"batch": torch.zeros(2, 1, dtype=torch.int64)}),
    (ValueError, "cells0: expected", {"cells0": torch.zeros(3, dtype=torch.int64)}),
    (TypeError, "cells1: expected torch.int64", {"cells1": torch.zeros(2)}),
    (ValueError, "cells1: expected the device", {"cells1": torch.zeros(2, dtype=torch.int64, device="meta")}),
    (ValueError, "subpixel_channels: expected 1 to D - 1 = 15", {"subpixel_channels": 16}),
    (ValueError, "subpixel_channels: expected 1 to D - 1 = 15", {"subpixel_channels": 0}),
    (ValueError, "subpixel_temperature: expected a positive", {"subpixel_temperature": 0.0}),
    (ValueError, "soft_temperature: expected a positive", {"soft_temperature": -1.0}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[f"{i} {b[1]}" for i, b in enumerate(BAD)])
def test_bad_input(error: type[Exception], message: str, change: dict[str, object]) -> None:
    index = torch.zeros(2, dtype=torch.int64)
    good: dict[str, object] = {
        "map0": torch.zeros(1, 16, 4, 4),
        "map1": torch.zeros(1, 16, 4, 4),
        "batch": index,
        "cells0": index,
        "cells1": index,
        "subpixel_channels": 4,
        "subpixel_temperature": 1.0,
    }
    with pytest.raises(error, match=message):
        window_match(**{**good, **change})  # type: ignore[arg-type]


def test_integer_maps_are_refused() -> None:
    index = torch.zeros(2, dtype=torch.int64)
    maps = torch.zeros(1, 16, 4, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match="map0: expected a floating-point"):
        window_match(maps, maps, index, index, index, 4, 1.0)
