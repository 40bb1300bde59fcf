# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of aggregated attention; ``docs/kernels/aggregated_attention.md`` derives the backward pass.

Forward: (1) ``_tokens_fwd`` reads each map once and writes the rotated q, k, v; (2) ``_attention_fwd`` is an
online-softmax attention over these tokens; (3) the merge projection is a matrix product of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eloftr_kernels.aggregated_attention.naive import AGGREGATION
from eloftr_kernels.kernel_common import NORM_EPS

CELLS = tl.constexpr(AGGREGATION**2)  # of a token
SIDE = tl.constexpr(AGGREGATION)
BLOCK_TOKENS = 16  # tokens per program: the fewest rows of a matrix instruction, since tokens are few


@triton.jit
def _load_cell(
    map_ptr, mask_ptr, cell, row, column, token_in, channel, H, W, stride_c, stride_y, stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One cell of every token of the block, zero where there is none: (T, C) float32, and (T,) whether it counts."""
    # 4 is SIDE. In Triton's interpreter `cell` is a Python number, and number % constexpr is an error there.
    y = row * SIDE + cell // 4
    x = column * SIDE + cell % 4
    inside = token_in & (y < H) & (x < W)
    if HAS_MASK:
        inside &= tl.load(mask_ptr + y * W + x, mask=inside, other=0) != 0
    offset = y * stride_y + x * stride_x
    wanted = inside[:, None] & (channel < C)[None, :]
    value = tl.load(map_ptr + offset[:, None] + channel[None, :] * stride_c, mask=wanted, other=0.0)
    return value.to(tl.float32), inside


@triton.jit
def _convolve(
    map_ptr, mask_ptr, conv_ptr, row, column, token_in, channel, H, W, stride_c, stride_y, stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Depthwise 4x4 convolution of every token's cells, and whether any cell counts."""
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    some = tl.zeros((BLOCK_T,), tl.int32)
    for cell in tl.range(0, CELLS, num_stages=1, loop_unroll_factor=2):
        value, inside = _load_cell(
            map_ptr, mask_ptr, cell, row, column, token_in, channel, H, W, stride_c, stride_y, stride_x, C, HAS_MASK
        )  # fmt: skip
        weight = tl.load(conv_ptr + channel * CELLS + cell, mask=channel < C, other=0.0).to(tl.float32)
        total += value * weight[None, :]
        some |= inside.to(tl.int32)
    return total, some != 0


@triton.jit
def _pool(
    map_ptr, mask_ptr, row, column, token_in, channel, H, W, stride_c, stride_y, stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Maximum over every token's cells (NaN wins), the first cell that attains it, and whether any cell counts."""
    best = tl.full((BLOCK_T, BLOCK_C), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_T, BLOCK_C), tl.int32)
    some = tl.zeros((BLOCK_T,), tl.int32)
    for cell in tl.range(0, CELLS, num_stages=1, loop_unroll_factor=2):
        value, inside = _load_cell(
            map_ptr, mask_ptr, cell, row, column, token_in, channel, H, W, stride_c, stride_y, stride_x, C, HAS_MASK
        )  # fmt: skip
        better = inside[:, None] & ((value > best) | (value != value))
        best = tl.where(better, value, best)
        winner = tl.where(better, cell, winner)
        some |= inside.to(tl.int32)
    return tl.where((some != 0)[:, None], best, 0.0), winner, some != 0


@triton.jit
def _normalise(token, norm_weight_ptr, norm_bias_ptr, channel, C: tl.constexpr):
    """LayerNorm over channels: the standardised token, 1 / standard deviation, the scale, the normalised token."""
    real = (channel < C)[None, :]
    mean = tl.sum(tl.where(real, token, 0.0), 1) / C
    centred = tl.where(real, token - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / C + NORM_EPS)
    standard = centred * inverse[:, None]
    scale = tl.load(norm_weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(norm_bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    return standard, inverse, scale, standard * scale + shift


@triton.jit
def _rotate(
    y,
    rotary_ptr,
    token,
    token_in,
    total,
    first,
    sign,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Rotate channel pairs of ``y``, whose first channel is ``first``, by ``sign`` times the table's angles."""
    pair = first // 2 + tl.arange(0, COLS // 2)
    wanted = token_in[:, None] & (pair < C // 2)[None, :]
    at = rotary_ptr + token[:, None] * (C // 2) + pair[None, :]
    cosine = tl.load(at, mask=wanted, other=0.0).to(tl.float32)
    sine = sign * tl.load(at + total * (C // 2), mask=wanted, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(y, (ROWS, COLS // 2, 2)))
    turned = tl.join(even * cosine - odd * sine, odd * cosine + even * sine)
    return tl.reshape(turned, (ROWS, COLS))


@triton.jit
def _project(
    normalised, weight_ptr, rotary_ptr, out_ptr, token, token_in, total, channel,
    C: tl.constexpr, ROTARY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first in range(0, C, BLOCK_O):
        out_channel = first + tl.arange(0, BLOCK_O)
        real = (channel < C)[:, None] & (out_channel < C)[None, :]
        weight = tl.load(weight_ptr + out_channel[None, :] * C + channel[:, None], mask=real, other=0.0)
        y = tl.dot(normalised.to(weight.dtype), weight, input_precision=PRECISION)
        if ROTARY:
            y = _rotate(y, rotary_ptr, token, token_in, total, first, 1.0, C, BLOCK_T, BLOCK_O)
        wanted = token_in[:, None] & (out_channel < C)[None, :]
        tl.store(out_ptr + token[:, None] * C + out_channel[None, :], y.to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def _tokens_fwd(
    x_ptr, source_ptr, mask_ptr, source_mask_ptr, conv_ptr, norm_weight_ptr, norm_bias_ptr,
    q_weight_ptr, k_weight_ptr, v_weight_ptr, rotary_ptr, q_ptr, k_ptr, v_ptr, query_valid_ptr, key_valid_ptr,
    H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x,
    SH, SW, source_stride_b, source_stride_c, source_stride_y, source_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOURCE_MASK: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Even programs: q = R Wq LN(DWConv(x)). Odd ones: k = R Wk LN(MaxPool(s)), v = Wv LN(MaxPool(s)).

    Neighbouring programs read the same cells in self-attention, so that the second reads them from the cache.

    Shapes, with N tokens of x and M of the source: x (B, C, H, W) and source (B, C, SH, SW), by their strides; mask
    (B, H, W), source_mask (B, SH, SW); conv (C, 16); norm_weight, norm_bias (C,); q_weight, k_weight, v_weight (C, C),
    outputs first; rotary (2, N, C / 2), cosines and sines. Written: q (B, N, C), k and v (B, M, C),
    query_valid (B, N), key_valid (B, M).
    """
    sample = tl.program_id(1)
    token = tl.program_id(0) // 2 * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.arange(0, BLOCK_C)
    if tl.program_id(0) % 2 == 0:
        columns = (W + SIDE - 1) // SIDE
        total = (H + SIDE - 1) // SIDE * columns
        token_in = token < total
        tokens, valid = _convolve(
            x_ptr + sample * x_stride_b, mask_ptr + sample * H * W, conv_ptr, token // columns, token % columns,
            token_in, channel, H, W, x_stride_c, x_stride_y, x_stride_x, C, HAS_MASK, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        tl.store(query_valid_ptr + sample * total + token, valid, mask=token_in)
        _, _, _, normalised = _normalise(tokens, norm_weight_ptr, norm_bias_ptr, channel, C)
        base = sample * total * C
        _project(normalised, q_weight_ptr, rotary_ptr, q_ptr + base, token, token_in, total, channel, C, ROTARY,
                 BLOCK_T, BLOCK_O, PRECISION)  # fmt: skip
    else:
        columns = (SW + SIDE - 1) // SIDE
        total = (SH + SIDE - 1) // SIDE * columns
        token_in = token < total
        tokens, _, valid = _pool(
            source_ptr + sample * source_stride_b, source_mask_ptr + sample * SH * SW, token // columns,
            token % columns, token_in, channel, SH, SW, source_stride_c, source_stride_y, source_stride_x,
            C, HAS_SOURCE_MASK, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        tl.store(key_valid_ptr + sample * total + token, valid, mask=token_in)
        _, _, _, normalised = _normalise(tokens, norm_weight_ptr, norm_bias_ptr, channel, C)
        base = sample * total * C
        _project(normalised, k_weight_ptr, rotary_ptr, k_ptr + base, token, token_in, total, channel, C, ROTARY,
                 BLOCK_T, BLOCK_O, PRECISION)  # fmt: skip
        _project(normalised, v_weight_ptr, rotary_ptr, v_ptr + base, token, token_in, total, channel, C, False,
                 BLOCK_T, BLOCK_O, PRECISION)  # fmt: skip


@triton.jit
def _attention_fwd(
    q_ptr, k_ptr, v_ptr, query_valid_ptr, key_valid_ptr, out_ptr, lse_ptr, N, M, scale_log2,
    C: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOURCE_MASK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T / sqrt(D)) v of one head; ``lse`` is the row's log2-sum-exp2 (+inf: the row attends nothing).

    Shapes: q (B, N, C), k and v (B, M, C), query_valid (B, N), key_valid (B, M). Written: out (B, N, C),
    lse (B, HEADS, N).
    """
    head, sample = tl.program_id(1), tl.program_id(2)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_in = query < N
    lane = head * D + tl.arange(0, D)
    at = sample * N * C + query[:, None] * C + lane[None, :]
    q = tl.load(q_ptr + at, mask=query_in[:, None], other=0.0)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, D), tl.float32)
    for first in range(0, M, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        key_in = key < M
        counts = key_in
        if HAS_SOURCE_MASK:
            counts &= tl.load(key_valid_ptr + sample * M + key, mask=key_in, other=0) != 0
        near = sample * M * C + key[:, None] * C + lane[None, :]
        k = tl.load(k_ptr + near, mask=key_in[:, None], other=0.0)
        v = tl.load(v_ptr + near, mask=key_in[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        score = tl.where(counts[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # A row without keys so far has -inf everywhere; measuring from zero keeps -inf - (-inf) out.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(score - level[:, None])
        decay = tl.exp2(top - level)
        mass = mass * decay + tl.sum(p, 1)
        total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision=PRECISION)
        top = higher
    attends = mass != 0
    if HAS_MASK:
        attends &= tl.load(query_valid_ptr + sample * N + query, mask=query_in, other=0) != 0
    out = tl.where(attends[:, None], total / tl.where(mass != 0, mass, 1.0)[:, None], 0.0)
    lse = tl.where(attends, top + tl.log2(tl.where(mass != 0, mass, 1.0)), float("inf"))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=query_in[:, None])
    tl.store(lse_ptr + (sample * HEADS + head) * N + query, lse, mask=query_in)
