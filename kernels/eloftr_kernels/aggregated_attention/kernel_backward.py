# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward kernels of aggregated attention; ``docs/kernels/aggregated_attention.md`` derives them.

(1) ``_attention_bwd`` recomputes the probabilities from the saved log-sum-exps; (2) ``_tokens_bwd`` recomputes the
tokens from the maps. Gradients of linear weights are matrix products and left to ``torch.matmul``. No atomics: what
is summed over blocks is written once per block and added by ``torch.sum``, so that runs agree to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eloftr_kernels.aggregated_attention.kernel_forward import (
    CELLS,
    SIDE,
    _convolve,
    _load_cell,
    _normalise,
    _pool,
    _rotate,
)


@triton.jit
def _store_cell(
    value, map_ptr, cell, row, column, token_in, channel, H, W, stride_c, stride_y, stride_x, C: tl.constexpr
):  # fmt: skip
    """Write one cell of every token of the block; cells beyond the map do not exist."""
    # 4 is SIDE, see `_load_cell`.
    y = row * SIDE + cell // 4
    x = column * SIDE + cell % 4
    inside = token_in & (y < H) & (x < W)
    at = map_ptr + (y * stride_y + x * stride_x)[:, None] + channel[None, :] * stride_c
    tl.store(at, value.to(map_ptr.dtype.element_ty), mask=inside[:, None] & (channel < C)[None, :])


@triton.jit
def _attention_bwd_keys(
    q_ptr, k_ptr, v_ptr, key_valid_ptr, out_ptr, lse_ptr, grad_ptr, rotary_ptr, grad_k_ptr, grad_v_ptr, block, N, M,
    scale, scale_log2, C: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HAS_SOURCE_MASK: tl.constexpr,
    ROTARY: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values: a sum over all queries, in order."""
    head, sample = tl.program_id(1), tl.program_id(2)
    key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    key_in = key < M
    counts = key_in
    if HAS_SOURCE_MASK:
        counts &= tl.load(key_valid_ptr + sample * M + key, mask=key_in, other=0) != 0
    lane = head * D + tl.arange(0, D)
    at = sample * M * C + key[:, None] * C + lane[None, :]
    k = tl.load(k_ptr + at, mask=key_in[:, None], other=0.0)
    v = tl.load(v_ptr + at, mask=key_in[:, None], other=0.0)
    grad_k = tl.zeros((BLOCK_K, D), tl.float32)
    grad_v = tl.zeros((BLOCK_K, D), tl.float32)
    for first in range(0, N, BLOCK_Q):
        query = first + tl.arange(0, BLOCK_Q)
        query_in = query < N
        near = sample * N * C + query[:, None] * C + lane[None, :]
        q = tl.load(q_ptr + near, mask=query_in[:, None], other=0.0)
        out = tl.load(out_ptr + near, mask=query_in[:, None], other=0.0)
        grad = tl.load(grad_ptr + near, mask=query_in[:, None], other=0.0)
        lse = tl.load(lse_ptr + (sample * HEADS + head) * N + query, mask=query_in, other=float("inf"))
        mean = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
        p = tl.where(counts[:, None], p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        slope = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - mean[None, :])
        grad_k = tl.dot(slope.to(q.dtype), q, grad_k, input_precision=PRECISION)
    grad_k *= scale
    if ROTARY:
        grad_k = _rotate(grad_k, rotary_ptr, key, key_in, M, head * D, -1.0, C, BLOCK_K, D)
    tl.store(grad_k_ptr + at, grad_k.to(grad_k_ptr.dtype.element_ty), mask=key_in[:, None])
    tl.store(grad_v_ptr + at, grad_v.to(grad_v_ptr.dtype.element_ty), mask=key_in[:, None])


@triton.jit
def _attention_bwd_queries(
    q_ptr, k_ptr, v_ptr, key_valid_ptr, out_ptr, lse_ptr, grad_ptr, rotary_ptr, grad_q_ptr, block, N, M, scale,
    scale_log2, C: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HAS_SOURCE_MASK: tl.constexpr,
    ROTARY: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries: a sum over all keys, in order."""
    head, sample = tl.program_id(1), tl.program_id(2)
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_in = query < N
    lane = head * D + tl.arange(0, D)
    at = sample * N * C + query[:, None] * C + lane[None, :]
    q = tl.load(q_ptr + at, mask=query_in[:, None], other=0.0)
    out = tl.load(out_ptr + at, mask=query_in[:, None], other=0.0)
    grad = tl.load(grad_ptr + at, mask=query_in[:, None], other=0.0)
    lse = tl.load(lse_ptr + (sample * HEADS + head) * N + query, mask=query_in, other=float("inf"))
    mean = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    grad_q = tl.zeros((BLOCK_Q, D), tl.float32)
    for first in range(0, M, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        key_in = key < M
        counts = key_in
        if HAS_SOURCE_MASK:
            counts &= tl.load(key_valid_ptr + sample * M + key, mask=key_in, other=0) != 0
        near = sample * M * C + key[:, None] * C + lane[None, :]
        k = tl.load(k_ptr + near, mask=key_in[:, None], other=0.0)
        v = tl.load(v_ptr + near, mask=key_in[:, None], other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
        p = tl.where(counts[None, :], p, 0.0)
        slope = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - mean[:, None])
        grad_q = tl.dot(slope.to(k.dtype), k, grad_q, input_precision=PRECISION)
    grad_q *= scale
    if ROTARY:
        grad_q = _rotate(grad_q, rotary_ptr, query, query_in, N, head * D, -1.0, C, BLOCK_Q, D)
    tl.store(grad_q_ptr + at, grad_q.to(grad_q_ptr.dtype.element_ty), mask=query_in[:, None])


@triton.jit
def _attention_bwd(
    q_ptr, k_ptr, v_ptr, key_valid_ptr, out_ptr, lse_ptr, grad_ptr, rotary_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    N, M, scale, scale_log2, C: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HAS_SOURCE_MASK: tl.constexpr,
    ROTARY: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients to the unrotated q, k, v of one head: blocks of keys first, then blocks of queries; no atomics.

    Shapes: q, out and grad (of out) (B, N, C), k and v (B, M, C), key_valid (B, M), lse (B, HEADS, N),
    rotary (2, N, C / 2). Written: grad_q (B, N, C), grad_k and grad_v (B, M, C).
    """
    block = tl.program_id(0)
    key_blocks = (M + BLOCK_K - 1) // BLOCK_K
    if block < key_blocks:
        _attention_bwd_keys(
            q_ptr, k_ptr, v_ptr, key_valid_ptr, out_ptr, lse_ptr, grad_ptr, rotary_ptr, grad_k_ptr, grad_v_ptr,
            block, N, M, scale, scale_log2, C, HEADS, D, HAS_SOURCE_MASK, ROTARY, BLOCK_Q, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        _attention_bwd_queries(
            q_ptr, k_ptr, v_ptr, key_valid_ptr, out_ptr, lse_ptr, grad_ptr, rotary_ptr, grad_q_ptr,
            block - key_blocks, N, M, scale, scale_log2, C, HEADS, D, HAS_SOURCE_MASK, ROTARY, BLOCK_Q, BLOCK_K,
            PRECISION,
        )  # fmt: skip


@triton.jit
def _normalise_bwd(
    tokens, norm_weight_ptr, norm_bias_ptr, grad_ptr, normalised_ptr, partial_ptr, token, token_in, channel,
    C: tl.constexpr,
):  # fmt: skip
    """Through LayerNorm: stores the normalised token and the block's norm gradients, returns the token's gradient."""
    wanted = token_in[:, None] & (channel < C)[None, :]
    at = token[:, None] * C + channel[None, :]
    grad = tl.load(grad_ptr + at, mask=wanted, other=0.0).to(tl.float32)
    standard, inverse, scale, normalised = _normalise(tokens, norm_weight_ptr, norm_bias_ptr, channel, C)
    tl.store(normalised_ptr + at, normalised.to(normalised_ptr.dtype.element_ty), mask=wanted)
    tl.store(partial_ptr + channel, tl.sum(grad * standard, 0), mask=channel < C)
    tl.store(partial_ptr + C + channel, tl.sum(grad, 0), mask=channel < C)
    slope = grad * scale
    along = tl.sum(slope * standard, 1) / C
    return inverse[:, None] * (slope - tl.sum(slope, 1)[:, None] / C - standard * along[:, None])


@triton.jit
def _query_tokens_bwd(
    x_ptr, mask_ptr, conv_ptr, norm_weight_ptr, norm_bias_ptr, grad_ptr, query_ptr, grad_x_ptr, norm_partial_ptr,
    conv_partial_ptr, token, token_in, columns, H, W, stride_c, stride_y, stride_x, grad_stride_c, grad_stride_y,
    grad_stride_x, C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Through LayerNorm and the depthwise convolution."""
    row, column = token // columns, token % columns
    channel = tl.arange(0, BLOCK_C)
    tokens, _ = _convolve(x_ptr, mask_ptr, conv_ptr, row, column, token_in, channel, H, W, stride_c, stride_y,
                          stride_x, C, HAS_MASK, BLOCK_T, BLOCK_C)  # fmt: skip
    grad = _normalise_bwd(tokens, norm_weight_ptr, norm_bias_ptr, grad_ptr, query_ptr, norm_partial_ptr, token,
                          token_in, channel, C)  # fmt: skip
    for cell in tl.range(0, CELLS, num_stages=1, loop_unroll_factor=2):
        value, inside = _load_cell(x_ptr, mask_ptr, cell, row, column, token_in, channel, H, W, stride_c, stride_y,
                                   stride_x, C, HAS_MASK)  # fmt: skip
        tl.store(conv_partial_ptr + cell * C + channel, tl.sum(value * grad, 0), mask=channel < C)
        weight = tl.load(conv_ptr + channel * CELLS + cell, mask=channel < C, other=0.0).to(tl.float32)
        _store_cell(tl.where(inside[:, None], grad * weight[None, :], 0.0), grad_x_ptr, cell, row, column, token_in,
                    channel, H, W, grad_stride_c, grad_stride_y, grad_stride_x, C)  # fmt: skip


@triton.jit
def _key_tokens_bwd(
    source_ptr, mask_ptr, norm_weight_ptr, norm_bias_ptr, grad_ptr, key_ptr, grad_source_ptr, norm_partial_ptr,
    token, token_in, columns, H, W, stride_c, stride_y, stride_x, grad_stride_c, grad_stride_y, grad_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Through LayerNorm and the maximum."""
    row, column = token // columns, token % columns
    channel = tl.arange(0, BLOCK_C)
    tokens, winner, valid = _pool(source_ptr, mask_ptr, row, column, token_in, channel, H, W, stride_c, stride_y,
                                  stride_x, C, HAS_MASK, BLOCK_T, BLOCK_C)  # fmt: skip
    grad = _normalise_bwd(tokens, norm_weight_ptr, norm_bias_ptr, grad_ptr, key_ptr, norm_partial_ptr, token,
                          token_in, channel, C)  # fmt: skip
    grad = tl.where(valid[:, None], grad, 0.0)
    for cell in tl.range(0, CELLS, num_stages=1, loop_unroll_factor=2):
        _store_cell(tl.where(winner == cell, grad, 0.0), grad_source_ptr, cell, row, column, token_in, channel, H, W,
                    grad_stride_c, grad_stride_y, grad_stride_x, C)  # fmt: skip


@triton.jit
def _tokens_bwd(
    x_ptr, source_ptr, mask_ptr, source_mask_ptr, conv_ptr, norm_weight_ptr, norm_bias_ptr,
    grad_query_ptr, grad_key_ptr, query_ptr, key_ptr, grad_x_ptr, grad_source_ptr, norm_partial_ptr, conv_partial_ptr,
    H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x,
    grad_x_stride_b, grad_x_stride_c, grad_x_stride_y, grad_x_stride_x,
    SH, SW, source_stride_b, source_stride_c, source_stride_y, source_stride_x,
    grad_source_stride_b, grad_source_stride_c, grad_source_stride_y, grad_source_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOURCE_MASK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the gradients of the normalised tokens to those of the maps, and one partial sum per block for weights.

    Each cell belongs to one token, so every element of the maps' gradients is written once. The normalised tokens
    are written too: the projections' weight gradients are matrix products with them.

    Shapes: the maps, masks, conv and norm_* as in ``_tokens_fwd``; grad_query (B, N, C) and grad_key (B, M, C), of the
    normalised tokens. Written: query (B, N, C), key (B, M, C), grad_x and grad_source like the maps, by their strides;
    norm_partial (blocks, 2, C), first those of x; conv_partial (blocks of x, 16, C).
    """
    sample, block = tl.program_id(1), tl.program_id(0) // 2
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (W + SIDE - 1) // SIDE
    total = (H + SIDE - 1) // SIDE * columns
    blocks = (total + BLOCK_T - 1) // BLOCK_T
    source_columns = (SW + SIDE - 1) // SIDE
    source_total = (SH + SIDE - 1) // SIDE * source_columns
    source_blocks = (source_total + BLOCK_T - 1) // BLOCK_T
    if tl.program_id(0) % 2 == 0:
        if block < blocks:
            part = sample * blocks + block
            _query_tokens_bwd(
                x_ptr + sample * x_stride_b, mask_ptr + sample * H * W, conv_ptr, norm_weight_ptr, norm_bias_ptr,
                grad_query_ptr + sample * total * C, query_ptr + sample * total * C,
                grad_x_ptr + sample * grad_x_stride_b, norm_partial_ptr + part * 2 * C,
                conv_partial_ptr + part * CELLS * C, token, token < total, columns, H, W, x_stride_c, x_stride_y,
                x_stride_x, grad_x_stride_c, grad_x_stride_y, grad_x_stride_x, C, HAS_MASK, BLOCK_T, BLOCK_C,
            )  # fmt: skip
    else:
        if block < source_blocks:
            part = tl.num_programs(1) * blocks + sample * source_blocks + block
            _key_tokens_bwd(
                source_ptr + sample * source_stride_b, source_mask_ptr + sample * SH * SW, norm_weight_ptr,
                norm_bias_ptr, grad_key_ptr + sample * source_total * C, key_ptr + sample * source_total * C,
                grad_source_ptr + sample * grad_source_stride_b, norm_partial_ptr + part * 2 * C, token,
                token < source_total, source_columns, SH, SW, source_stride_c, source_stride_y, source_stride_x,
                grad_source_stride_c, grad_source_stride_y, grad_source_stride_x, C, HAS_SOURCE_MASK, BLOCK_T, BLOCK_C,
            )  # fmt: skip
