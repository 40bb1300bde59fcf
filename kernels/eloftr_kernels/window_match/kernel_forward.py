# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the window matches; formulas in ``naive.py``, launches in ``launch.py``.

One program per match: both windows are interpolated from the half-resolution maps into registers, correlated,
and reduced to a few numbers; no window is stored. ``kernel_backward.py`` has the backward.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eloftr_kernels import dispatch
from eloftr_kernels.kernel_common import TIE
from eloftr_kernels.window_match import naive

WINDOW = tl.constexpr(naive.WINDOW)  # pixels per side of the window of image 0
SIDE = tl.constexpr(naive.WINDOW + 2 * naive.RING)  # with the ring, of image 1
PIXELS = tl.constexpr(naive.WINDOW**2)
RING_PIXELS = tl.constexpr(128)  # 10 * 10, padded to a power of two
PATCH = tl.constexpr(naive.WINDOW // 2 + 2)  # half-resolution positions per side, a window's source


def dot_precision(dtype: torch.dtype) -> str:
    """As for every op, but exact float32 products as three tf32 ones on NVIDIA: FMAs would be unrolled."""
    precision = dispatch.dot_precision(dtype)
    if precision == "ieee" and dtype == torch.float32 and not dispatch.interpreting() and not _on_amd():
        return "tf32x3"
    return precision


def num_warps() -> int:
    """Four where a thread has 512 registers, eight where 255: they hold two windows and their scores."""
    return 4 if not dispatch.interpreting() and _on_amd() else 8


def _on_amd() -> bool:
    return str(triton.runtime.driver.active.get_current_target().backend) == "hip"


@triton.jit
def _sources(start, pixel, size, RING: tl.constexpr):
    """Half-resolution positions along one axis, clamped to the map, and which pixels lie in it."""
    position = 2 * start + pixel - RING
    source = tl.minimum(tl.maximum(position * 0.5 - 0.25, 0.0), (size - 1).to(tl.float32))
    return source, (position >= 0) & (position < 2 * size)


@triton.jit
def _patch_positions(row, column):
    """(y, x) of the 6x6 patch around the cell, padded to 64."""
    tap = tl.arange(0, 64)
    return tap, row - 1 + tap // PATCH, column - 1 + tap % PATCH


@triton.jit
def _interpolation(row, column, H, W, SIDE_: tl.constexpr, RING: tl.constexpr, COUNT: tl.constexpr):
    """(COUNT, 64) bilinear weights of window pixels on the patch: sixteenths, exact in every type."""
    pixel = tl.arange(0, COUNT)
    source_y, inside_y = _sources(row, pixel // SIDE_, H, RING)
    source_x, inside_x = _sources(column, pixel % SIDE_, W, RING)
    _, y, x = _patch_positions(row, column)
    along_y = tl.maximum(1.0 - tl.abs(source_y[:, None] - y[None, :]), 0.0)
    along_x = tl.maximum(1.0 - tl.abs(source_x[:, None] - x[None, :]), 0.0)
    return tl.where((inside_y & inside_x & (pixel < SIDE_ * SIDE_))[:, None], along_y * along_x, 0.0)


@triton.jit
def _load_window(
    map_ptr, row, column, H, W, stride_c, stride_y, stride_x, channel, D,
    SIDE_: tl.constexpr, RING: tl.constexpr, COUNT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(COUNT, channels) window at full resolution, in the map's type; zero outside the map and past it."""
    tap, y, x = _patch_positions(row, column)
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (tap < PATCH * PATCH)
    offsets = (y * stride_y + x * stride_x)[:, None] + (channel * stride_c)[None, :]
    patch = tl.load(map_ptr + offsets, mask=inside[:, None] & (channel < D)[None, :], other=0.0)
    weights = _interpolation(row, column, H, W, SIDE_, RING, COUNT)
    window = tl.dot(weights.to(DOT), patch.to(DOT), input_precision=PRECISION)
    return window.to(map_ptr.dtype.element_ty).to(DOT)


@triton.jit
def _log_joint(scores):
    """(64, 128) log-probabilities, -inf off the inner 8x8 of image 1; the two normalisers."""
    pixel = tl.arange(0, RING_PIXELS)
    y, x = pixel // SIDE, pixel % SIDE
    inner = (y >= 1) & (y <= WINDOW) & (x >= 1) & (x <= WINDOW)
    real = tl.where((pixel < SIDE * SIDE)[None, :], scores, float("-inf"))
    top1 = tl.max(real, 1)
    over1 = top1 + tl.log(tl.sum(tl.exp(real - top1[:, None]), 1))
    top0 = tl.max(scores, 0)
    over0 = top0 + tl.log(tl.sum(tl.exp(scores - top0[None, :]), 0))
    joint = tl.where(inner[None, :], 2 * scores - over0[None, :] - over1[:, None], float("-inf"))
    return joint, over0, over1


@triton.jit
def _subpixel(scores, index1, SHIFT: tl.constexpr):
    """Probabilities (128,) over the 3x3 neighbourhood of pixel ``index1``, and offsets (x, y)."""
    pixel = tl.arange(0, RING_PIXELS)
    # Index -1 is the last row or column, as Python counts.
    dy = (pixel // SIDE - index1 // WINDOW - SHIFT + 1 + SIDE) % SIDE
    dx = (pixel % SIDE - index1 % WINDOW - SHIFT + 1 + SIDE) % SIDE
    member = (pixel < SIDE * SIDE) & (dy < 3) & (dx < 3)
    scores = tl.where(member, scores, float("-inf"))
    weight = tl.exp(scores - tl.max(scores, 0))
    return weight / tl.sum(weight, 0), (dx - 1).to(tl.float32), (dy - 1).to(tl.float32)


@triton.jit
def _load_match(batch_ptr, cells0_ptr, cells1_ptr, m, B, H0, W0, H1, W1):
    """Sample and the top left positions of both cells, forced into the maps; whether they were there.

    Volatile: where it is called again, what follows from it is to be made again, not kept in registers.
    """
    b = tl.load(batch_ptr + m, volatile=True)
    cell0, cell1 = tl.load(cells0_ptr + m, volatile=True), tl.load(cells1_ptr + m, volatile=True)
    columns0, columns1 = W0 // 4, W1 // 4
    valid = (b >= 0) & (b < B)
    valid &= (cell0 >= 0) & (cell0 < (H0 // 4) * columns0) & (cell1 >= 0) & (cell1 < (H1 // 4) * columns1)
    b = tl.where(valid, b, 0)
    cell0, cell1 = tl.where(valid, cell0, 0).to(tl.int32), tl.where(valid, cell1, 0).to(tl.int32)
    row0, column0 = cell0 // columns0 * 4, cell0 % columns0 * 4
    row1, column1 = cell1 // columns1 * 4, cell1 % columns1 * 4
    return b, row0, column0, row1, column1, valid


@triton.jit
def _window_match_fwd(
    map0_ptr,  # (B, D, H0, W0)
    map1_ptr,  # (B, D, H1, W1)
    batch_ptr,  # (M,) int64
    cells0_ptr,
    cells1_ptr,
    pixel0_ptr,  # (M, 2) float32, as the four that follow
    pixel1_ptr,
    subpixel_ptr,
    expected0_ptr,
    expected1_ptr,
    best_ptr,  # (M,) int64: 64 * pixel of image 0 + pixel of image 1
    stride0_b,
    stride0_c,
    stride0_y,
    stride0_x,
    stride1_b,
    stride1_c,
    stride1_y,
    stride1_x,
    B,
    H0,
    W0,
    H1,
    W1,
    D,
    coarse_channels,  # D - d
    subpixel_scale,  # 1 / (sqrt(d) tau)
    soft_scale,  # 1 / T
    SHIFT: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All outputs of one match; grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    b, row0, column0, row1, column1, valid = _load_match(batch_ptr, cells0_ptr, cells1_ptr, m, B, H0, W0, H1, W1)
    channel = tl.arange(0, BLOCK_D)
    window0 = _load_window(
        map0_ptr + b * stride0_b, row0, column0, H0, W0, stride0_c, stride0_y, stride0_x, channel, D,
        WINDOW, 0, PIXELS, DOT, PRECISION,
    )  # fmt: skip
    window1 = _load_window(
        map1_ptr + b * stride1_b, row1, column1, H1, W1, stride1_c, stride1_y, stride1_x, channel, D,
        SIDE, 1, RING_PIXELS, DOT, PRECISION,
    )  # fmt: skip
    coarse0 = tl.where((channel < coarse_channels)[None, :], window0, 0.0).to(DOT)
    scores = tl.dot(coarse0, tl.trans(window1), input_precision=PRECISION) / D
    joint, _, over1 = _log_joint(scores)

    # The first that equals the best but for rounding; with a NaN in the maps there is none, and pixel 0 is as good.
    pixel, ring = tl.arange(0, PIXELS), tl.arange(0, RING_PIXELS)
    top = tl.max(tl.max(joint, 1), 0)
    reached = joint >= top - 2 * TIE * tl.max(tl.abs(over1), 0)
    ring_index = tl.min(tl.where(reached, ring[None, :], RING_PIXELS), 1)
    index0 = tl.min(tl.where(ring_index < RING_PIXELS, pixel, PIXELS), 0)
    index0 = tl.where(index0 < PIXELS, index0, 0)
    ring_index = tl.sum(tl.where(pixel == index0, ring_index, 0), 0)
    ring_index = tl.where(ring_index < RING_PIXELS, ring_index, SIDE + 1)
    y1, x1 = ring_index // SIDE - 1, ring_index % SIDE - 1
    tl.store(best_ptr + m, (index0 * PIXELS + y1 * WINDOW + x1).to(tl.int64))
    known = tl.where(valid, 0.0, float("nan"))  # what is added to every result
    tl.store(pixel0_ptr + 2 * m, index0 % WINDOW - 3.5 + known)
    tl.store(pixel0_ptr + 2 * m + 1, index0 // WINDOW - 3.5 + known)
    tl.store(pixel1_ptr + 2 * m, x1 - 3.5 + known)
    tl.store(pixel1_ptr + 2 * m + 1, y1 - 3.5 + known)

    query = _query(window0, pixel == index0, channel, coarse_channels)
    subpixel_scores = tl.sum(window1.to(tl.float32) * query[None, :], 1) * subpixel_scale
    weight, dx, dy = _subpixel(subpixel_scores, y1 * WINDOW + x1, SHIFT)
    tl.store(subpixel_ptr + 2 * m, tl.sum(weight * dx, 0) + known)
    tl.store(subpixel_ptr + 2 * m + 1, tl.sum(weight * dy, 0) + known)
    if SOFT:
        probability = tl.exp((joint - top) * soft_scale)
        over_pixels0, over_pixels1 = tl.sum(probability, 1), tl.sum(probability, 0)
        total = tl.sum(over_pixels0, 0) + known
        tl.store(expected0_ptr + 2 * m, tl.sum(over_pixels0 * (pixel % WINDOW - 3.5), 0) / total)
        tl.store(expected0_ptr + 2 * m + 1, tl.sum(over_pixels0 * (pixel // WINDOW - 3.5), 0) / total)
        tl.store(expected1_ptr + 2 * m, tl.sum(over_pixels1 * (ring % SIDE - 4.5), 0) / total)
        tl.store(expected1_ptr + 2 * m + 1, tl.sum(over_pixels1 * (ring // SIDE - 4.5), 0) / total)


@triton.jit
def _query(window0, at_query, channel, coarse_channels):
    """The sub-pixel channels of the arg-max pixel of image 0, zero in the others."""
    query = tl.sum(tl.where(at_query[:, None], window0, 0.0).to(tl.float32), 0)
    return tl.where(channel >= coarse_channels, query, 0.0)
