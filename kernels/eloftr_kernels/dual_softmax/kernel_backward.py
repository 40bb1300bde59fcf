# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Backward kernel of the streaming dual softmax; ``docs/kernels/dual_softmax.md`` derives it."""

from __future__ import annotations

import triton
import triton.language as tl

from eloftr_kernels.dual_softmax.kernel_forward import _load_features, _load_shift, _load_valid, _scores
from eloftr_kernels.kernel_common import LOG2_E, exp2


@triton.jit
def _dual_softmax_lse_bwd(
    own_ptr,  # (B, L, C) the side whose gradient this launch computes
    other_ptr,  # (B, S, C)
    own_mask_ptr,
    other_mask_ptr,
    own_shift_ptr,  # (B, L) of ``_centre``, or None
    other_shift_ptr,  # (B, S)
    other_common_ptr,  # (B, C)
    own_lse_ptr,  # (B, L)
    other_lse_ptr,  # (B, S)
    own_grad_ptr,  # (B, L) gradient of own_lse
    other_grad_ptr,  # (B, S)
    amax_ptr,  # (B,) largest magnitude of both gradients
    out_ptr,  # (B, L, C)
    stride_own_b,
    stride_own_l,
    stride_own_c,
    stride_other_b,
    stride_other_s,
    stride_other_c,
    stride_own_mask_b,
    stride_own_mask_l,
    stride_other_mask_b,
    stride_other_mask_s,
    L,
    S,
    C,
    tiles,
    scale,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    WHOLE: tl.constexpr,
    FLUSH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dF_i = sum_j w_ij F_j / tau, w_ij = g_i e^{s_ij - r_i} + g_j e^{s_ij - c_j}, from recomputed scores.

    What was taken out of F comes back as sum_j w_ij times it.
    Grid (tiles * B, blocks of C).
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first_channel = tl.program_id(1) * BLOCK_OUT
    rows = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    other_ptr += b * stride_other_b
    if own_mask_ptr is not None:
        own_mask_ptr += b * stride_own_mask_b
    if other_mask_ptr is not None:
        other_mask_ptr += b * stride_other_mask_b
    own_ptr += b * stride_own_b
    own = _load_features(own_ptr, rows, L, 0, C, stride_own_l, stride_own_c, BLOCK_C).to(DOT)
    own_valid = _load_valid(own_mask_ptr, rows, L, stride_own_mask_l)
    if own_shift_ptr is not None:
        own_shift_ptr += b * L
        other_shift_ptr += b * S
    own_shift = _load_shift(own_shift_ptr, rows, L)
    # The second product takes the weights in the features' type: a power of two keeps them in its range.
    amax = tl.load(amax_ptr + b)
    unit = (amax.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(unit > 0, unit, 1.0)
    per_unit = 1 / unit  # exact
    own_lse = tl.load(own_lse_ptr + b * L + rows, mask=rows < L, other=0.0)
    own_grad = tl.load(own_grad_ptr + b * L + rows, mask=rows < L, other=0.0) * per_unit
    out = tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32)
    weight = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, S, BLOCK_S):
        columns = start + tl.arange(0, BLOCK_S)
        valid = _load_valid(other_mask_ptr, columns, S, stride_other_mask_s) & (columns < S)
        other_lse = tl.load(other_lse_ptr + b * S + columns, mask=columns < S, other=0.0)
        other_grad = tl.load(other_grad_ptr + b * S + columns, mask=columns < S, other=0.0) * per_unit
        scores, other = _scores(
            own_ptr, own, rows, L, stride_own_l, stride_own_c,
            other_ptr, columns, S, stride_other_s, stride_other_c,
            C, own_valid, valid, own_shift, _load_shift(other_shift_ptr, columns, S), scale,
            BLOCK_C, WHOLE, DOT, PRECISION,
        )  # fmt: skip
        weights = own_grad[:, None] * exp2((scores - own_lse[:, None]) * LOG2_E, FLUSH)
        weights += other_grad[None, :] * exp2((scores - other_lse[None, :]) * LOG2_E, FLUSH)
        weights = tl.where((own_valid & (rows < L))[:, None] & valid[None, :], weights, 0.0)
        if not WHOLE:
            other = _load_features(
                other_ptr, columns, S, first_channel, C, stride_other_s, stride_other_c, BLOCK_OUT
            ).to(DOT)
        if other_common_ptr is not None:
            weight += tl.sum(weights, 1)
        weights = weights.to(other_ptr.dtype.element_ty).to(DOT)
        out = tl.dot(weights, other, out, input_precision=PRECISION)
    c = first_channel + tl.arange(0, BLOCK_OUT)
    if other_common_ptr is not None:
        common = tl.load(other_common_ptr + b * C + c, mask=c < C, other=0.0)
        out += weight[:, None] * common[None, :]
    offsets = (b * L + rows)[:, None] * C + c[None, :]
    out = (out * (scale * unit)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=(rows < L)[:, None] & (c < C)[None, :])
