# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the window matches; formulas in ``reference.py``, launches in ``launch.py``.

One program per match: both windows are interpolated from the half-resolution maps into registers, correlated,
and reduced to a few numbers; no window is stored. The backward leaves the gradient of each match's 6x6
half-resolution patches in a workspace, which ``_patches_to_map`` adds up per map position in a fixed order:
no atomics.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eloftr_kernels import dispatch

_FLOAT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WINDOW = tl.constexpr(8)  # pixels per side of the window of image 0
SIDE = tl.constexpr(10)  # with the ring, of image 1
PIXELS = tl.constexpr(64)
RING_PIXELS = tl.constexpr(128)  # 10 * 10, padded to a power of two
PATCH = tl.constexpr(6)  # half-resolution positions per side that a window is interpolated from


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand type of the products; the interpreter has none for bfloat16."""
    return tl.float32 if dtype == torch.bfloat16 and dispatch.interpreting() else _FLOAT[dtype]


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
def _interpolation_transposed(
    row, column, H, W, SIDE_: tl.constexpr, RING: tl.constexpr, COUNT: tl.constexpr
):
    """(64, COUNT); built anew where it is used: registers are scarcer than arithmetic."""
    pixel = tl.arange(0, COUNT)
    source_y, inside_y = _sources(row, pixel // SIDE_, H, RING)
    source_x, inside_x = _sources(column, pixel % SIDE_, W, RING)
    _, y, x = _patch_positions(row, column)
    along_y = tl.maximum(1.0 - tl.abs(source_y[None, :] - y[:, None]), 0.0)
    along_x = tl.maximum(1.0 - tl.abs(source_x[None, :] - x[:, None]), 0.0)
    return tl.where((inside_y & inside_x & (pixel < SIDE_ * SIDE_))[None, :], along_y * along_x, 0.0)


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
def _subpixel(window1, query, index1, scale, SHIFT: tl.constexpr):
    """Probabilities (128,) over the 3x3 neighbourhood of pixel ``index1``, and offsets (x, y)."""
    pixel = tl.arange(0, RING_PIXELS)
    # Index -1 is the last row or column, as Python counts.
    dy = (pixel // SIDE - index1 // WINDOW - SHIFT + 1 + SIDE) % SIDE
    dx = (pixel % SIDE - index1 % WINDOW - SHIFT + 1 + SIDE) % SIDE
    member = (pixel < SIDE * SIDE) & (dy < 3) & (dx < 3)
    scores = tl.sum(window1.to(tl.float32) * query[None, :], 1) * scale
    scores = tl.where(member, scores, float("-inf"))
    weight = tl.exp(scores - tl.max(scores, 0))
    return weight / tl.sum(weight, 0), (dx - 1).to(tl.float32), (dy - 1).to(tl.float32)


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
    b, cell0, cell1 = tl.load(batch_ptr + m), tl.load(cells0_ptr + m), tl.load(cells1_ptr + m)
    channel = tl.arange(0, BLOCK_D)
    row0, column0 = (cell0 // (W0 // 4) * 4).to(tl.int32), (cell0 % (W0 // 4) * 4).to(tl.int32)
    row1, column1 = (cell1 // (W1 // 4) * 4).to(tl.int32), (cell1 % (W1 // 4) * 4).to(tl.int32)
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
    joint, _, _ = _log_joint(scores)

    value, ring_index = tl.max(joint, 1, return_indices=True, return_indices_tie_break_left=True)
    top, index0 = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    pixel = tl.arange(0, PIXELS)
    ring_index = tl.sum(tl.where(pixel == index0, ring_index, 0), 0)
    y1, x1 = ring_index // SIDE - 1, ring_index % SIDE - 1
    tl.store(best_ptr + m, (index0 * PIXELS + y1 * WINDOW + x1).to(tl.int64))
    tl.store(pixel0_ptr + 2 * m, index0 % WINDOW - 3.5)
    tl.store(pixel0_ptr + 2 * m + 1, index0 // WINDOW - 3.5)
    tl.store(pixel1_ptr + 2 * m, x1 - 3.5)
    tl.store(pixel1_ptr + 2 * m + 1, y1 - 3.5)

    query = tl.sum(tl.where((pixel == index0)[:, None], window0, 0.0).to(tl.float32), 0)
    query = tl.where(channel >= coarse_channels, query, 0.0)
    weight, dx, dy = _subpixel(window1, query, y1 * WINDOW + x1, subpixel_scale, SHIFT)
    tl.store(subpixel_ptr + 2 * m, tl.sum(weight * dx, 0))
    tl.store(subpixel_ptr + 2 * m + 1, tl.sum(weight * dy, 0))
    if SOFT:
        probability = tl.exp((joint - top) * soft_scale)
        over_pixels0, over_pixels1 = tl.sum(probability, 1), tl.sum(probability, 0)
        total = tl.sum(over_pixels0, 0)
        ring = tl.arange(0, RING_PIXELS)
        tl.store(expected0_ptr + 2 * m, tl.sum(over_pixels0 * (pixel % WINDOW - 3.5), 0) / total)
        tl.store(expected0_ptr + 2 * m + 1, tl.sum(over_pixels0 * (pixel // WINDOW - 3.5), 0) / total)
        tl.store(expected1_ptr + 2 * m, tl.sum(over_pixels1 * (ring % SIDE - 4.5), 0) / total)
        tl.store(expected1_ptr + 2 * m + 1, tl.sum(over_pixels1 * (ring // SIDE - 4.5), 0) / total)


@triton.jit
def _power_of_2_below(x):
    """The power of two at or below the largest magnitude in ``x`` (1 for zero): dividing by it is exact."""
    bits = tl.max(tl.max(tl.abs(x), 1), 0).to(tl.int32, bitcast=True) & 0x7F800000
    unit = bits.to(tl.float32, bitcast=True)
    return tl.where(unit > 0, unit, 1.0)


@triton.jit
def _store_patch(
    grad, out_ptr, row, column, H, W, channel, D,
    SIDE_: tl.constexpr, RING: tl.constexpr, COUNT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transpose of ``_load_window``: gradient of the 6x6 patch from that of the window."""
    unit = _power_of_2_below(grad)
    rounded = (grad / unit).to(out_ptr.dtype.element_ty).to(DOT)
    weights = _interpolation_transposed(row, column, H, W, SIDE_, RING, COUNT)
    patch = tl.dot(weights.to(DOT), rounded, input_precision=PRECISION) * unit
    tap = tl.arange(0, 64)
    mask = (tap < PATCH * PATCH)[:, None] & (channel < D)[None, :]
    tl.store(out_ptr + tap[:, None] * D + channel[None, :], patch.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_scores(scores, pull0, pull1, soft_scale):
    """Gradient of the expectations to the scores, (64, 128); ``pull0``, ``pull1`` weigh the pixels."""
    joint, over0, over1 = _log_joint(scores)
    probability = tl.exp((joint - tl.max(tl.max(joint, 1), 0)) * soft_scale)
    of_pixels0, of_pixels1 = tl.sum(probability, 1), tl.sum(probability, 0)
    total = tl.sum(of_pixels0, 0)
    mean = (tl.sum(of_pixels0 * pull0, 0) + tl.sum(of_pixels1 * pull1, 0)) / total
    grad = probability * (pull0[:, None] + (pull1 - mean)[None, :]) * (soft_scale / total)
    through0, through1 = tl.sum(grad, 0), tl.sum(grad, 1)
    grad = 2 * grad - tl.exp(scores - over0[None, :]) * through0[None, :]
    return grad - tl.exp(scores - over1[:, None]) * through1[:, None]


@triton.jit
def _window_match_bwd(
    map0_ptr,
    map1_ptr,
    batch_ptr,
    cells0_ptr,
    cells1_ptr,
    best_ptr,
    grad_subpixel_ptr,  # (M, 2) float32, as the two that follow
    grad_expected0_ptr,
    grad_expected1_ptr,
    patches_ptr,  # (M, 36, D) of map OF
    stride0_b,
    stride0_c,
    stride0_y,
    stride0_x,
    stride1_b,
    stride1_c,
    stride1_y,
    stride1_x,
    H0,
    W0,
    H1,
    W1,
    D,
    coarse_channels,
    subpixel_scale,
    soft_scale,
    OF: tl.constexpr,
    SHIFT: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of each match's 6x6 patch of map ``OF`` (both would not fit the registers); grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    b, cell0, cell1 = tl.load(batch_ptr + m), tl.load(cells0_ptr + m), tl.load(cells1_ptr + m)
    channel = tl.arange(0, BLOCK_D)
    is_coarse = channel < coarse_channels
    row0, column0 = (cell0 // (W0 // 4) * 4).to(tl.int32), (cell0 % (W0 // 4) * 4).to(tl.int32)
    row1, column1 = (cell1 // (W1 // 4) * 4).to(tl.int32), (cell1 % (W1 // 4) * 4).to(tl.int32)
    window0 = _load_window(
        map0_ptr + b * stride0_b, row0, column0, H0, W0, stride0_c, stride0_y, stride0_x, channel, D,
        WINDOW, 0, PIXELS, DOT, PRECISION,
    )  # fmt: skip
    window1 = _load_window(
        map1_ptr + b * stride1_b, row1, column1, H1, W1, stride1_c, stride1_y, stride1_x, channel, D,
        SIDE, 1, RING_PIXELS, DOT, PRECISION,
    )  # fmt: skip

    pixel, ring = tl.arange(0, PIXELS), tl.arange(0, RING_PIXELS)
    out = tl.zeros((PIXELS if OF == 0 else RING_PIXELS, BLOCK_D), tl.float32)
    if SOFT:
        coarse0 = tl.where(is_coarse[None, :], window0, 0.0).to(DOT)
        pull0 = (pixel % WINDOW - 3.5) * tl.load(grad_expected0_ptr + 2 * m)
        pull0 += (pixel // WINDOW - 3.5) * tl.load(grad_expected0_ptr + 2 * m + 1)
        pull1 = (ring % SIDE - 4.5) * tl.load(grad_expected1_ptr + 2 * m)
        pull1 += (ring // SIDE - 4.5) * tl.load(grad_expected1_ptr + 2 * m + 1)
        scores = tl.dot(coarse0, tl.trans(window1), input_precision=PRECISION) / D
        grad = _grad_scores(scores, pull0, pull1, soft_scale)
        grad = tl.where((ring < SIDE * SIDE)[None, :], grad, 0.0) / D
        unit = _power_of_2_below(grad)
        grad = (grad / unit).to(map0_ptr.dtype.element_ty).to(DOT)
        if OF == 0:
            out = tl.where(is_coarse[None, :], tl.dot(grad, window1, input_precision=PRECISION) * unit, 0.0)
        else:
            out = tl.dot(tl.trans(grad), coarse0, input_precision=PRECISION) * unit

    best = tl.load(best_ptr + m).to(tl.int32)
    at_query = pixel == best // PIXELS
    query = tl.sum(tl.where(at_query[:, None], window0, 0.0).to(tl.float32), 0)
    query = tl.where(is_coarse, 0.0, query)
    weight, dx, dy = _subpixel(window1, query, best % PIXELS, subpixel_scale, SHIFT)
    pull = dx * tl.load(grad_subpixel_ptr + 2 * m) + dy * tl.load(grad_subpixel_ptr + 2 * m + 1)
    grad_neighbours = weight * (pull - tl.sum(weight * pull, 0)) * subpixel_scale
    patches_ptr += m * (PATCH * PATCH) * D
    if OF == 0:
        grad_query = tl.sum(window1.to(tl.float32) * grad_neighbours[:, None], 0)
        out += tl.where(at_query[:, None] & ~is_coarse[None, :], grad_query[None, :], 0.0)
        _store_patch(out, patches_ptr, row0, column0, H0, W0, channel, D, WINDOW, 0, PIXELS, DOT, PRECISION)
    else:
        out += grad_neighbours[:, None] * query[None, :]
        _store_patch(
            out, patches_ptr, row1, column1, H1, W1, channel, D, SIDE, 1, RING_PIXELS, DOT, PRECISION
        )


@triton.jit
def _patches_to_map(
    patches_ptr,  # (M, 36, D)
    order_ptr,  # (M,) int64: matches in order of their cell
    start_ptr,  # (B * cells + 1,) int64: where each cell's matches begin in that order
    out_ptr,  # (B, D, H, W)
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    H,
    W,
    D,
    BLOCK_D: tl.constexpr,
):
    """Sum of all patches over one 4x4 tile of the map, which only 3x3 cells reach; grid (B * tiles,)."""
    tile_rows, tile_columns = tl.cdiv(H, 4), tl.cdiv(W, 4)
    b = (tl.program_id(0) // (tile_rows * tile_columns)).to(tl.int64)
    tile = tl.program_id(0) % (tile_rows * tile_columns)
    row, column = tile // tile_columns, tile % tile_columns
    y, x = tl.arange(0, 16) // 4, tl.arange(0, 16) % 4
    channel = tl.arange(0, BLOCK_D)
    total = tl.zeros((16, BLOCK_D), tl.float32)
    for near in range(9):
        cell_row, cell_column = row + near // 3 - 1, column + near % 3 - 1
        is_cell = (cell_row >= 0) & (cell_row < H // 4) & (cell_column >= 0) & (cell_column < W // 4)
        cell = (b * (H // 4) + cell_row) * (W // 4) + cell_column
        first = tl.load(start_ptr + cell, mask=is_cell, other=0)
        last = tl.load(start_ptr + cell + 1, mask=is_cell, other=0)
        tap_y, tap_x = y - 4 * (near // 3 - 1) + 1, x - 4 * (near % 3 - 1) + 1
        reached = (tap_y >= 0) & (tap_y < PATCH) & (tap_x >= 0) & (tap_x < PATCH)
        offsets = (tap_y * PATCH + tap_x)[:, None] * D + channel[None, :]
        mask = reached[:, None] & (channel < D)[None, :]
        for k in range(first, last):
            patch = patches_ptr + tl.load(order_ptr + k) * (PATCH * PATCH) * D
            total += tl.load(patch + offsets, mask=mask, other=0.0).to(tl.float32)
    y, x = (4 * row + y).to(tl.int64), (4 * column + x).to(tl.int64)
    offsets = (y * stride_y + x * stride_x)[:, None] + channel.to(tl.int64)[None, :] * stride_c
    mask = ((y < H) & (x < W))[:, None] & (channel < D)[None, :]
    tl.store(out_ptr + b * stride_b + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)
