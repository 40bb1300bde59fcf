# SPDX-License-Identifier: Apache-2.0
"""Second moments of fine windows, against sums written out on the whole upsampled maps."""

import math

import pytest
import torch
from torch import Tensor

from eloftr_kernels.window_match import WindowMoments, moments, naive, window_match, window_moments
from support.ops import checked_gradcheck

CHANNELS, TEMPERATURE = 4, 0.7


def problem(M: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    maps = [
        (torch.randn(2, 12, 4 * h, 4 * w, generator=g, dtype=torch.float64) * 2).to(dtype) for h, w in ((2, 3), (3, 2))
    ]
    cells = [torch.randint(6, (M,), generator=g) for _ in range(2)]
    return *maps, torch.arange(M) % 2, *cells


def measured(*inputs: Tensor, centred: bool = True) -> WindowMoments:
    found = window_match(*inputs, CHANNELS, TEMPERATURE, centred)
    return window_moments(*inputs, found.pixel0, found.pixel1, CHANNELS, TEMPERATURE, centred)


@pytest.mark.parametrize("centred", [True, False])
def test_moments_are_sums_over_pixels(centred: bool) -> None:
    map0, map1, batch, cells0, cells1 = inputs = problem()
    found, measures = window_match(*inputs, CHANNELS, TEMPERATURE, centred), measured(*inputs, centred=centred)
    windows0 = naive.dense_windows(map0, batch, cells0, ring=0)
    windows1 = naive.dense_windows(map1, batch, cells1, ring=1)
    side, inside = range(8), [10 * (y + 1) + x + 1 for y in range(8) for x in range(8)]
    place = [(x - 3.5, y - 3.5) for y in side for x in side]
    for m in range(len(batch)):
        a, b = windows0[m, :, :-CHANNELS], windows1[m, :, :-CHANNELS]
        scores = a @ b.T / 12
        joint = (scores.softmax(0) * scores.softmax(1))[:, inside]
        assert math.isclose(float(joint.sum().log()), float(measures.log_mass[m]), abs_tol=1e-9)
        i, r = (place.index(tuple(p[m].tolist())) for p in (found.pixel0, found.pixel1))
        for got, row, centre in ((measures.pixel1, joint[i], place[r]), (measures.pixel0, joint[:, r], place[i])):
            expected = torch.zeros(2, 2, dtype=torch.float64)
            for p, (x, y) in zip(row / row.sum(), place, strict=True):
                d = torch.tensor([x - centre[0], y - centre[1]], dtype=torch.float64)
                expected += p * torch.outer(d, d)
            assert torch.allclose(got[m], expected, atol=1e-9)
        query, keys = windows0[m, i, -CHANNELS:], windows1[m, :, -CHANNELS:]
        shift = 1 if centred else 0
        square = torch.zeros(2, 2, dtype=torch.float64)
        weights, steps = [], []
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                y, x = (r // 8 + shift + dy) % 10, (r % 8 + shift + dx) % 10
                weights.append(float(query @ keys[10 * y + x]) / (CHANNELS**0.5 * TEMPERATURE))
                steps.append(torch.tensor([dx, dy], dtype=torch.float64))
        shares = torch.tensor(weights, dtype=torch.float64).softmax(0)
        mean = sum(p * s for p, s in zip(shares, steps, strict=True))
        for p, s in zip(shares, steps, strict=True):
            square += p * torch.outer(s - mean, s - mean)
        assert torch.allclose(mean, found.subpixel1[m], atol=1e-9)
        assert torch.allclose(measures.subpixel1[m], square, atol=1e-9)


def test_gradients() -> None:
    map0, map1, *rest = problem(M=2)
    checked_gradcheck(lambda a, b: torch.cat([x.flatten() for x in measured(a, b, *rest)]), (map0, map1))


def test_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(M=7)
    whole = measured(*inputs)
    monkeypatch.setattr(moments, "CHUNK_CPU", 3)
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    parts = measured(*leaves, *inputs[2:])
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    parts.pixel1.sum().backward()
    assert all(x.grad is not None and bool(x.grad.any()) for x in leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float32(dtype: torch.dtype) -> None:
    assert all(x.dtype == torch.float32 for x in measured(*problem(dtype=dtype)))
    assert measured(*problem(M=0, dtype=dtype)).pixel0.shape == (0, 2, 2)
