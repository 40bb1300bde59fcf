# SPDX-License-Identifier: Apache-2.0
"""Kernels of the best partners: from what the normalisers' pass left (``one_pass.py``), or in a pass of their own."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from eloftr_kernels.dual_softmax.kernel_forward import _load_features, _load_shift, _load_valid, _scores

# Of a logarithm, absolute and relative: far above rounding.
SLACK = tl.constexpr(1e-2)
RELATIVE_SLACK = tl.constexpr(1e-5)
NONE = tl.constexpr(2**30)  # no group, no column: above all indices


@triton.jit
def _ordered(score, index):
    """int64 that is lower for a higher score, and of equal ones for the lower index, which is its lower half."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ((-1 - bits).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def _best_above_fwd(
    f0_ptr,  # (B, L, C)
    f1_ptr,  # (B, S, C)
    mask0_ptr,  # (B, L) or None
    mask1_ptr,  # (B, S) or None
    shift0_ptr,  # (B, L) of ``_centre``, or None
    shift1_ptr,  # (B, S)
    row_lse_ptr,  # (B, L)
    col_lse_ptr,  # (B, S)
    top_ptr,  # (B, S / GROUP, L) largest score of every row in each group of columns
    index_ptr,  # (B, L) int64, best partner
    score_ptr,  # (B, L) its score
    column_ptr,  # (B, S) int64 of ``_ordered``, ``launch.NO_PARTNER`` before
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
    scale,
    log_threshold,
    GROUP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Best partners of pairs whose probability in their row is above the threshold; grid (tiles of rows, B).

    Scores are computed again in groups where a row has such a pair. A minimum of integers is the same in any order.
    """
    b = tl.program_id(1).to(tl.int64)
    f0_ptr += b * stride_f0_b
    f1_ptr += b * stride_f1_b
    if shift0_ptr is not None:
        shift0_ptr += b * L
        shift1_ptr += b * S
    groups = tl.cdiv(S, GROUP)
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    row_lse = tl.load(row_lse_ptr + b * L + rows, mask=rows < L, other=0.0)
    allowed = (rows < L) & (row_lse > -5e8)  # a cell that saw masked cells alone has no partner
    if mask0_ptr is not None:
        allowed &= tl.load(mask0_ptr + b * stride_mask0_b + rows * stride_mask0_l, mask=rows < L, other=0) != 0
    least = tl.where(allowed, row_lse + log_threshold - SLACK - RELATIVE_SLACK * tl.abs(row_lse), float("inf"))
    shift0 = _load_shift(shift0_ptr, rows, L)
    best = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    best_index = tl.zeros((BLOCK_L,), tl.int32)
    for first in range(0, groups, BLOCK_G):
        group = first + tl.arange(0, BLOCK_G)
        there = (group < groups)[:, None] & (rows < L)[None, :]
        top = tl.load(top_ptr + (b * groups + group)[:, None] * L + rows[None, :], mask=there, other=float("-inf"))
        wanted = tl.where(tl.max((top >= least[None, :]).to(tl.int32), 1) > 0, group, NONE)
        next_group = tl.min(wanted, 0)
        while next_group < NONE:
            columns = next_group * GROUP + tl.arange(0, GROUP)
            scores = tl.zeros((BLOCK_L, GROUP), tl.float32)
            for c in range(0, C, BLOCK_C):
                x = _load_features(f0_ptr, rows, L, c, C, stride_f0_l, stride_f0_c, BLOCK_C).to(DOT)
                y = _load_features(f1_ptr, columns, S, c, C, stride_f1_s, stride_f1_c, BLOCK_C).to(DOT)
                scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
            if shift0_ptr is not None:
                scores = scores + shift0[:, None] + _load_shift(shift1_ptr, columns, S)[None, :]
            scores *= scale
            valid = (columns < S)[None, :] & (scores >= least[:, None])
            if mask1_ptr is not None:
                mask1 = tl.load(mask1_ptr + b * stride_mask1_b + columns * stride_mask1_s, mask=columns < S, other=0)
                valid &= (mask1 != 0)[None, :]
            col_lse = tl.load(col_lse_ptr + b * S + columns, mask=columns < S, other=0.0)
            scores = 2 * scores - row_lse[:, None] - col_lse[None, :]
            scores = tl.where(valid & (scores == scores), scores, float("-inf"))
            value, at = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
            best_index = tl.where(value > best, next_group * GROUP + at, best_index)
            best = tl.maximum(best, value)
            kept = scores > log_threshold - SLACK - RELATIVE_SLACK * tl.abs(row_lse)[:, None]
            keys = _ordered(scores, tl.broadcast_to(rows[:, None], (BLOCK_L, GROUP)))
            at_columns = tl.broadcast_to((b * S + columns)[None, :], (BLOCK_L, GROUP))
            tl.atomic_min(column_ptr + at_columns, keys, mask=kept, sem="relaxed")
            wanted = tl.where(wanted == next_group, NONE, wanted)
            next_group = tl.min(wanted, 0)
    tl.store(index_ptr + b * L + rows, best_index.to(tl.int64), mask=rows < L)
    tl.store(score_ptr + b * L + rows, best, mask=rows < L)


@triton.jit
def _mutual_best_fwd(
    f0_ptr,  # (B, L, C)
    f1_ptr,  # (B, S, C)
    mask0_ptr,
    mask1_ptr,
    shift0_ptr,
    shift1_ptr,
    row_lse_ptr,  # (B, L) or None: the raw score decides
    col_lse_ptr,  # (B, S) or None
    row_score_ptr,  # (B, splits, L) best over one span of columns
    row_index_ptr,  # (B, splits, L) int32
    col_score_ptr,  # (B, tiles, S) best over one tile of rows
    col_index_ptr,  # (B, tiles, S) int32
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
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial row and column arg-maxes, lowest index on ties; grid as in ``_dual_softmax_lse_fwd``."""
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    b = (tl.program_id(0) // tiles // splits).to(tl.int64)
    f1_ptr += b * stride_f1_b
    if mask0_ptr is not None:
        mask0_ptr += b * stride_mask0_b
    if mask1_ptr is not None:
        mask1_ptr += b * stride_mask1_b
    rows = first_row + tile * BLOCK_L + tl.arange(0, BLOCK_L)
    f0_ptr += b * stride_f0_b
    f0 = _load_features(f0_ptr, rows, L, 0, C, stride_f0_l, stride_f0_c, BLOCK_C).to(DOT)
    valid0 = _load_valid(mask0_ptr, rows, L, stride_mask0_l)
    if shift0_ptr is not None:
        shift0_ptr += b * L
        shift1_ptr += b * S
    shift0 = _load_shift(shift0_ptr, rows, L)
    if row_lse_ptr is not None:
        row_lse = tl.load(row_lse_ptr + b * L + rows, mask=rows < L, other=0.0)
    best = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    best_index = tl.zeros((BLOCK_L,), tl.int32)
    for start in range(split * SPAN, tl.minimum(split * SPAN + SPAN, S), BLOCK_S):
        columns = start + tl.arange(0, BLOCK_S)
        valid1 = _load_valid(mask1_ptr, columns, S, stride_mask1_s)
        shift1 = _load_shift(shift1_ptr, columns, S)
        scores, _ = _scores(
            f0_ptr, f0, rows, L, stride_f0_l, stride_f0_c,
            f1_ptr, columns, S, stride_f1_s, stride_f1_c,
            C, valid0, valid1, shift0, shift1, scale, BLOCK_C, WHOLE, DOT, PRECISION,
        )  # fmt: skip
        if row_lse_ptr is not None:
            col_lse = tl.load(col_lse_ptr + b * S + columns, mask=columns < S, other=0.0)
            scores = 2 * scores - row_lse[:, None] - col_lse[None, :]
        along = tl.where((columns < S)[None, :], scores, float("-inf"))
        value, index = tl.max(along, 1, return_indices=True, return_indices_tie_break_left=True)
        best_index = tl.where(value > best, index + start, best_index)
        best = tl.maximum(best, value)
        down = tl.where((rows < L)[:, None], scores, float("-inf"))
        value, index = tl.max(down, 0, return_indices=True, return_indices_tie_break_left=True)
        offsets = (b * tiles + tile) * S + columns
        tl.store(col_score_ptr + offsets, value, mask=columns < S)
        tl.store(col_index_ptr + offsets, index + first_row + tile * BLOCK_L, mask=columns < S)
    offsets = (b * splits + split) * L + rows
    tl.store(row_score_ptr + offsets, best, mask=rows < L)
    tl.store(row_index_ptr + offsets, best_index, mask=rows < L)


@triton.jit
def _best_reduce(
    part_score_ptr,
    part_index_ptr,
    score_ptr,
    index_ptr,
    parts,
    N,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(B, parts, N) -> (B, N) arg-max; parts come in order of index: the first of equals wins."""
    blocks = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_index = tl.zeros((BLOCK,), tl.int64)
    if ACCUMULATE:
        best = tl.load(score_ptr + b * N + n, mask=inside, other=0.0)
        best_index = tl.load(index_ptr + b * N + n, mask=inside, other=0)
    for part in range(parts):
        offsets = (b * parts + part) * N + n
        value = tl.load(part_score_ptr + offsets, mask=inside, other=0.0)
        index = tl.load(part_index_ptr + offsets, mask=inside, other=0).to(tl.int64)
        best_index = tl.where(value > best, index, best_index)
        best = tl.maximum(best, value)
    tl.store(score_ptr + b * N + n, best, mask=inside)
    tl.store(index_ptr + b * N + n, best_index, mask=inside)
