# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the streaming dual softmax; formulas in ``naive.py``, launches in ``launch.py``.

A program owns one tile of rows and walks over ``SPAN`` columns, so that each tile of scores is computed once
and serves both directions: the rows' result is carried along, the columns' result of this row tile is
stored. A second, small kernel reduces what the programs left: no atomics, hence the same bits in every run
and for every batch.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from eloftr_kernels.kernel_common import LN_2, LOG2_E, exp2, log2

# Of a column in powers of two below the tile's maximum: what underflowed there is below rounding.
LEAST_SUM = tl.constexpr(2.0**-96)


@triton.jit
def _load_features(x_ptr, index, size, first_channel, channels, stride_n, stride_c, BLOCK_C: tl.constexpr):
    """(block, BLOCK_C) of the rows ``index`` of a feature matrix; zero outside it."""
    c = first_channel + tl.arange(0, BLOCK_C)
    offsets = index[:, None] * stride_n + c[None, :] * stride_c  # 32-bit: within one image
    return tl.load(x_ptr + offsets, mask=(index < size)[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def _scores(
    own_ptr,
    own,  # (rows, BLOCK_C) already loaded, where WHOLE
    rows,
    L,
    stride_own_l,
    stride_own_c,
    other_ptr,
    columns,
    S,
    stride_other_s,
    stride_other_c,
    C,
    own_valid,
    other_valid,
    own_shift,  # (rows,) and (columns,): what the parts taken out of the features add to the products; or None
    other_shift,
    scale,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(rows, columns) scores in float32, -1e9 for pairs of a masked cell, and the columns' features."""
    if WHOLE:
        other = _load_features(other_ptr, columns, S, 0, C, stride_other_s, stride_other_c, BLOCK_C).to(DOT)
        scores = tl.dot(own, tl.trans(other), input_precision=PRECISION)
    else:
        other = own
        scores = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        for c in range(0, C, BLOCK_C):
            x = _load_features(own_ptr, rows, L, c, C, stride_own_l, stride_own_c, BLOCK_C).to(DOT)
            y = _load_features(other_ptr, columns, S, c, C, stride_other_s, stride_other_c, BLOCK_C).to(DOT)
            scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
    if own_shift is not None:
        scores = scores + own_shift[:, None] + other_shift[None, :]
    return tl.where(own_valid[:, None] & other_valid[None, :], scores * scale, -1e9), other


@triton.jit
def _load_valid(mask_ptr, index, size, stride_n):
    if mask_ptr is None:
        valid = tl.full(index.shape, 1, tl.int1)  # constant: what depends on it folds away
    else:
        valid = tl.load(mask_ptr + index * stride_n, mask=index < size, other=1) != 0
    return valid


@triton.jit
def _load_shift(shift_ptr, index, size):
    """Of the rows ``index``; None where nothing was taken out of the features."""
    return None if shift_ptr is None else tl.load(shift_ptr + index, mask=index < size, other=0.0)


@triton.jit
def _common_part(x_ptr, mask_ptr, size, C, stride_n, stride_c, stride_mask_n, BLOCK_C: tl.constexpr):
    """(BLOCK_C,) mean of 64 valid rows, spread over all of them."""
    rows = (tl.arange(0, 64).to(tl.int64) * size // 64).to(tl.int32)
    valid = _load_valid(mask_ptr, rows, size, stride_mask_n)
    x = _load_features(x_ptr, rows, size, 0, C, stride_n, stride_c, BLOCK_C).to(tl.float32)
    # What lies under a mask is not read as a number: it may be none.
    total = tl.sum(tl.where(valid[:, None], x, 0.0), 0)
    return total / tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)


@triton.jit
def _centre(
    f0_ptr,  # (B, L, C)
    f1_ptr,  # (B, S, C)
    mask0_ptr,  # (B, L) or None
    mask1_ptr,  # (B, S) or None
    g0_ptr,  # (B, L, C) features without their common part, in the type of the products
    g1_ptr,  # (B, S, C)
    shift0_ptr,  # (B, L) float32
    shift1_ptr,  # (B, S)
    common_ptr,  # (2, B, C) float32
    stride_f0_b,
    stride_f0_l,
    stride_f0_c,
    stride_f1_b,
    stride_f1_s,
    stride_f1_c,
    stride_mask0_b,
    stride_mask0_l,
    stride_mask1_b,
    stride_mask1_s,
    L,
    S,
    C,
    tiles,  # of image 0
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """<f0_i, f1_j> = <g0_i, g1_j> + shift0_i + shift1_j; grid (tiles of both images, B).

    g0 = f0 - m0, g1 = f1 - m1, shift0_i = <g0_i, m1>, shift1_j = <m0, f1_j>, for any m0 and m1.
    """
    b = tl.program_id(1).to(tl.int64)
    f0_ptr += b * stride_f0_b
    f1_ptr += b * stride_f1_b
    if mask0_ptr is not None:
        mask0_ptr += b * stride_mask0_b
    if mask1_ptr is not None:
        mask1_ptr += b * stride_mask1_b
    common0 = _common_part(f0_ptr, mask0_ptr, L, C, stride_f0_l, stride_f0_c, stride_mask0_l, BLOCK_C)
    common1 = _common_part(f1_ptr, mask1_ptr, S, C, stride_f1_s, stride_f1_c, stride_mask1_s, BLOCK_C)
    c = tl.arange(0, BLOCK_C)
    tile = tl.program_id(0)
    if tile < tiles:
        rows = tile * BLOCK + tl.arange(0, BLOCK)
        x = _load_features(f0_ptr, rows, L, 0, C, stride_f0_l, stride_f0_c, BLOCK_C).to(tl.float32)
        x -= common0[None, :]
        tl.store(shift0_ptr + b * L + rows, tl.sum(x * common1[None, :], 1), mask=rows < L)
        at = (b * L + rows)[:, None] * C + c[None, :]
        tl.store(g0_ptr + at, x.to(g0_ptr.dtype.element_ty), mask=(rows < L)[:, None] & (c < C)[None, :])
        if tile == 0:
            tl.store(common_ptr + b * C + c, common0, mask=c < C)
            tl.store(common_ptr + (tl.num_programs(1) + b) * C + c, common1, mask=c < C)
    else:
        rows = (tile - tiles) * BLOCK + tl.arange(0, BLOCK)
        x = _load_features(f1_ptr, rows, S, 0, C, stride_f1_s, stride_f1_c, BLOCK_C).to(tl.float32)
        tl.store(shift1_ptr + b * S + rows, tl.sum(x * common0[None, :], 1), mask=rows < S)
        at = (b * S + rows)[:, None] * C + c[None, :]
        x -= common1[None, :]
        tl.store(g1_ptr + at, x.to(g1_ptr.dtype.element_ty), mask=(rows < S)[:, None] & (c < C)[None, :])


@triton.jit
def _load_tile(
    x_ptr, index, size, first_channel, channels, stride_n, stride_c, BLOCK_C: tl.constexpr, EVEN: tl.constexpr
):
    """As ``_load_features``; with EVEN every row and every channel is there."""
    if EVEN:
        c = first_channel + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + index[:, None] * stride_n + c[None, :] * stride_c)
    else:
        x = _load_features(x_ptr, index, size, first_channel, channels, stride_n, stride_c, BLOCK_C)
    return x


@triton.jit
def _dual_softmax_lse_fwd(
    f0_ptr,  # (B, L, C)
    f1_ptr,  # (B, S, C)
    mask0_ptr,  # (B, L) or None
    mask1_ptr,  # (B, S) or None
    shift0_ptr,  # (B, L) of ``_centre``, or None
    shift1_ptr,  # (B, S)
    row_ptr,  # (B, splits, L) log-sum-exp over one span of columns
    col_ptr,  # (B, tiles, S) log-sum-exp over one tile of rows
    top_ptr,  # (B, S / BLOCK_S, L) largest score of every row in each tile of columns; or None
    stride_f0_b,
    stride_f0_l,
    stride_f0_c,
    stride_f1_b,
    stride_f1_s,
    stride_f1_c,
    stride_mask0_b,
    stride_mask0_l,
    stride_mask1_b,
    stride_mask1_s,
    L,
    S,
    C,
    first_row,
    tiles,
    splits,
    scale,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    FLUSH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial row and column log-sum-exps; grid (tiles * splits * B,): neighbours share their columns.

    Both directions share one exponential: with m_i the maximum of row i in a tile and m that of the tile, a column's
    sum is sum_i e^(m_i - m) e^(s_ij - m_i). Where that underflows, far below the tile's maximum, columns get their own.
    With EVEN all tiles of columns are whole.
    """
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    b = (tl.program_id(0) // tiles // splits).to(tl.int64)
    f0_ptr += b * stride_f0_b
    f1_ptr += b * stride_f1_b
    if mask0_ptr is not None:
        mask0_ptr += b * stride_mask0_b
    if mask1_ptr is not None:
        mask1_ptr += b * stride_mask1_b
    if shift0_ptr is not None:
        shift0_ptr += b * L
        shift1_ptr += b * S
    rows = first_row + tile * BLOCK_L + tl.arange(0, BLOCK_L)
    f0 = _load_features(f0_ptr, rows, L, 0, C, stride_f0_l, stride_f0_c, BLOCK_C).to(DOT)
    valid0 = _load_valid(mask0_ptr, rows, L, stride_mask0_l)
    shift0 = _load_shift(shift0_ptr, rows, L)
    row_max = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(split * SPAN, tl.minimum(split * SPAN + SPAN, S), BLOCK_S):
        columns = start + tl.arange(0, BLOCK_S)
        valid1 = _load_valid(mask1_ptr, columns, S, stride_mask1_s)
        if WHOLE:
            f1 = _load_tile(f1_ptr, columns, S, 0, C, stride_f1_s, stride_f1_c, BLOCK_C, EVEN).to(DOT)
            scores = tl.dot(f0, tl.trans(f1), input_precision=PRECISION)
        else:
            scores = tl.zeros((BLOCK_L, BLOCK_S), tl.float32)
            for c in range(0, C, BLOCK_C):
                x = _load_features(f0_ptr, rows, L, c, C, stride_f0_l, stride_f0_c, BLOCK_C).to(DOT)
                y = _load_tile(f1_ptr, columns, S, c, C, stride_f1_s, stride_f1_c, BLOCK_C, EVEN).to(DOT)
                scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
        if shift0_ptr is not None:
            scores = scores + shift0[:, None] + _load_shift(shift1_ptr, columns, S)[None, :]
        scores *= scale
        if mask0_ptr is not None or mask1_ptr is not None:
            scores = tl.where(valid0[:, None] & valid1[None, :], scores, -1e9)
        if not EVEN:
            scores = tl.where((columns < S)[None, :], scores, float("-inf"))
        tops = tl.max(scores, 1)
        if top_ptr is not None:
            tl.store(top_ptr + (b * tl.cdiv(S, BLOCK_S) + start // BLOCK_S) * L + rows, tops, mask=rows < L)
        new_max = tl.maximum(row_max, tops)
        powers = exp2((scores - tops[:, None]) * LOG2_E, FLUSH)
        row_sum *= exp2((row_max - new_max) * LOG2_E, FLUSH)
        row_sum += exp2((tops - new_max) * LOG2_E, FLUSH) * tl.sum(powers, 1)
        row_max = new_max
        tops = tl.where(rows < L, tops, float("-inf"))
        top = tl.max(tops, 0)
        sums = tl.sum(powers * exp2((tops - top) * LOG2_E, FLUSH)[:, None], 0)
        col_lse = top + log2(tl.maximum(sums, LEAST_SUM), FLUSH) * LN_2
        if tl.min(tl.where(valid1 & (columns < S), sums, 1.0), 0) < LEAST_SUM:
            down = tl.where((rows < L)[:, None], scores, float("-inf"))
            col_max = tl.max(down, 0)
            sums = tl.sum(exp2((down - col_max[None, :]) * LOG2_E, FLUSH), 0)
            col_lse = col_max + log2(sums, FLUSH) * LN_2
        elif mask1_ptr is not None:
            # Of a masked column all scores are alike.
            everything = tl.minimum(L - first_row - tile * BLOCK_L, BLOCK_L).to(tl.float32)
            col_lse = tl.where(valid1, col_lse, -1e9 + tl.log(everything))
        tl.store(col_ptr + (b * tiles + tile) * S + columns, col_lse, mask=columns < S)
    tl.store(row_ptr + (b * splits + split) * L + rows, row_max + tl.log(row_sum), mask=rows < L)


@triton.jit
def _lse_reduce(part_ptr, out_ptr, parts, N, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """(B, parts, N) -> (B, N) log-sum-exp, ``out`` itself taking part when ACCUMULATE; grid (blocks * B,)."""
    blocks = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    top = tl.full((BLOCK,), -3e38, tl.float32)  # finite: nothing but -inf may be left to reduce
    total = tl.zeros((BLOCK,), tl.float32)
    if ACCUMULATE:
        top = tl.load(out_ptr + b * N + n, mask=inside, other=0.0)
        total += 1.0
    for part in range(parts):
        value = tl.load(part_ptr + (b * parts + part) * N + n, mask=inside, other=0.0)
        new_top = tl.maximum(top, value)
        total = total * tl.exp(top - new_top) + tl.exp(value - new_top)
        top = new_top
    tl.store(out_ptr + b * N + n, top + tl.log(total), mask=inside)
