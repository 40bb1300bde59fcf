# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of the window matches; formulas in ``docs/kernels/window_match.md``, launches in ``launch.py``.

The gradient of each match's 6x6 half-resolution patches goes to a workspace, which ``_patches_to_map`` adds up
per map position in a fixed order: no atomics.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from eloftr_kernels.window_match.kernel_forward import (
    PATCH,
    PIXELS,
    RING_PIXELS,
    SIDE,
    WINDOW,
    _load_match,
    _load_window,
    _log_joint,
    _patch_positions,
    _query,
    _sources,
    _subpixel,
)


@triton.jit
def _interpolation_transposed(row, column, H, W, SIDE_: tl.constexpr, RING: tl.constexpr, COUNT: tl.constexpr):
    """(64, COUNT); built anew where it is used: registers are scarcer than arithmetic."""
    pixel = tl.arange(0, COUNT)
    source_y, inside_y = _sources(row, pixel // SIDE_, H, RING)
    source_x, inside_x = _sources(column, pixel % SIDE_, W, RING)
    _, y, x = _patch_positions(row, column)
    along_y = tl.maximum(1.0 - tl.abs(source_y[None, :] - y[:, None]), 0.0)
    along_x = tl.maximum(1.0 - tl.abs(source_x[None, :] - x[:, None]), 0.0)
    return tl.where((inside_y & inside_x & (pixel < SIDE_ * SIDE_))[None, :], along_y * along_x, 0.0)


@triton.jit
def _power_of_2_below(x):
    """The power of two at or below the largest magnitude in ``x`` (1 for zero): dividing by it is exact."""
    bits = tl.max(tl.max(tl.abs(x), 1), 0).to(tl.int32, bitcast=True) & 0x7F800000
    unit = bits.to(tl.float32, bitcast=True)
    return tl.where(unit > 0, unit, 1.0)


@triton.jit
def _store_patch(
    grad, out_ptr, row, column, H, W, channel, D, valid,
    SIDE_: tl.constexpr, RING: tl.constexpr, COUNT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transpose of ``_load_window``: gradient of the 6x6 patch from that of the window; zero if not ``valid``."""
    grad = tl.where(valid, grad, 0.0)
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
    B,
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
    """Gradient of each match's 6x6 patch of map ``OF``; grid (M,).

    Windows are made ``BLOCK_D`` channels at a time and made again after the scores: whole windows of both
    images beside the scores and their gradient would not fit the registers.
    """
    m = tl.program_id(0).to(tl.int64)
    pixel, ring = tl.arange(0, PIXELS), tl.arange(0, RING_PIXELS)
    best = tl.load(best_ptr + m).to(tl.int32)
    at_query = pixel == best // PIXELS

    scores = tl.zeros((PIXELS, RING_PIXELS), tl.float32)
    subpixel_scores = tl.zeros((RING_PIXELS,), tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=1):
        b, row0, column0, row1, column1, valid = _load_match(batch_ptr, cells0_ptr, cells1_ptr, m, B, H0, W0, H1, W1)
        channel = first + tl.arange(0, BLOCK_D)
        window0 = _load_window(
            map0_ptr + b * stride0_b, row0, column0, H0, W0, stride0_c, stride0_y, stride0_x, channel, D,
            WINDOW, 0, PIXELS, DOT, PRECISION,
        )  # fmt: skip
        window1 = _load_window(
            map1_ptr + b * stride1_b, row1, column1, H1, W1, stride1_c, stride1_y, stride1_x, channel, D,
            SIDE, 1, RING_PIXELS, DOT, PRECISION,
        )  # fmt: skip
        query = _query(window0, at_query, channel, coarse_channels)
        subpixel_scores += tl.sum(window1.to(tl.float32) * query[None, :], 1)
        if SOFT:
            coarse0 = tl.where((channel < coarse_channels)[None, :], window0, 0.0).to(DOT)
            scores = tl.dot(coarse0, tl.trans(window1), scores, input_precision=PRECISION)

    weight, dx, dy = _subpixel(subpixel_scores * subpixel_scale, best % PIXELS, SHIFT)
    pull = dx * tl.load(grad_subpixel_ptr + 2 * m) + dy * tl.load(grad_subpixel_ptr + 2 * m + 1)
    grad_neighbours = weight * (pull - tl.sum(weight * pull, 0)) * subpixel_scale
    if SOFT:
        pull0 = (pixel % WINDOW - 3.5) * tl.load(grad_expected0_ptr + 2 * m)
        pull0 += (pixel // WINDOW - 3.5) * tl.load(grad_expected0_ptr + 2 * m + 1)
        pull1 = (ring % SIDE - 4.5) * tl.load(grad_expected1_ptr + 2 * m)
        pull1 += (ring // SIDE - 4.5) * tl.load(grad_expected1_ptr + 2 * m + 1)
        grad = _grad_scores(scores / D, pull0, pull1, soft_scale)
        grad = tl.where((ring < SIDE * SIDE)[None, :], grad, 0.0) / D
        unit = _power_of_2_below(grad)
        rounded = (grad / unit).to(map0_ptr.dtype.element_ty).to(DOT)

    patches_ptr += m * (PATCH * PATCH) * D
    for first in tl.range(0, D, BLOCK_D, num_stages=1):
        b, row0, column0, row1, column1, valid = _load_match(batch_ptr, cells0_ptr, cells1_ptr, m, B, H0, W0, H1, W1)
        channel = first + tl.arange(0, BLOCK_D)
        is_coarse = channel < coarse_channels
        if OF == 0:
            window1 = _load_window(
                map1_ptr + b * stride1_b, row1, column1, H1, W1, stride1_c, stride1_y, stride1_x, channel, D,
                SIDE, 1, RING_PIXELS, DOT, PRECISION,
            )  # fmt: skip
            grad_query = tl.sum(window1.to(tl.float32) * grad_neighbours[:, None], 0)
            out = tl.where(at_query[:, None] & ~is_coarse[None, :], grad_query[None, :], 0.0)
            if SOFT:
                through = tl.dot(rounded, window1, input_precision=PRECISION) * unit
                out += tl.where(is_coarse[None, :], through, 0.0)
            _store_patch(out, patches_ptr, row0, column0, H0, W0, channel, D, valid, WINDOW, 0, PIXELS, DOT, PRECISION)
        else:
            window0 = _load_window(
                map0_ptr + b * stride0_b, row0, column0, H0, W0, stride0_c, stride0_y, stride0_x, channel, D,
                WINDOW, 0, PIXELS, DOT, PRECISION,
            )  # fmt: skip
            query = _query(window0, at_query, channel, coarse_channels)
            out = grad_neighbours[:, None] * query[None, :]
            if SOFT:
                coarse0 = tl.where(is_coarse[None, :], window0, 0.0).to(DOT)
                out += tl.dot(tl.trans(rounded), coarse0, input_precision=PRECISION) * unit
            _store_patch(
                out,
                patches_ptr,
                row1,
                column1,
                H1,
                W1,
                channel,
                D,
                valid,
                SIDE,
                1,
                RING_PIXELS,
                DOT,
                PRECISION,
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
        if first < last:  # most cells have no match
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
