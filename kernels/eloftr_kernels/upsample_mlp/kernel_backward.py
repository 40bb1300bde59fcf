# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward kernels of the message's upsampling and MLP; ``docs/kernels/upsample_mlp.md`` derives them."""

from __future__ import annotations

import triton
import triton.language as tl

from eloftr_kernels.upsample_mlp.kernel_forward import (
    REACH,
    SIDE,
    SLOPE,
    _halves,
    _own,
    _positions,
    _standardise,
    _taps,
    _update,
    _upsampling,
)


@triton.jit
def _update_bwd(
    grad_ptr, x_ptr, coarse_ptr, common_ptr, expand_ptr, contract_ptr, norm_weight_ptr, mask_ptr, valid_ptr,
    grad_update_ptr, active_ptr, share_ptr, norm_partial_ptr,
    H, W, grad_stride_b, grad_stride_c, grad_stride_y, grad_stride_x, x_stride_b, x_stride_c, x_stride_y, x_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Recomputes the activations and goes back through LayerNorm: stores the gradient of what it normalised.

    Shapes: grad (B, C, H, W), by its strides; the other inputs as in ``_upsample_mlp_fwd``. Written: grad_update
    (B, H * W, C), active (B, H * W, 2C), share (B, H, W) with a mask, norm_partial (blocks, 2, C).
    """
    sample = tl.program_id(1)
    tokens = (H + SIDE - 1) // SIDE * ((W + SIDE - 1) // SIDE)
    row, column, position_in = _positions(H, W, ROWS, COLUMNS)
    flat = row * W + column
    channel = tl.arange(0, BLOCK_C)
    wanted = position_in[:, None] & (channel < C)[None, :]
    token, there, weights, share = _upsampling(
        row, column, valid_ptr + sample * tokens, H, W, HAS_MASK, ROWS, COLUMNS, BLOCK_T
    )  # fmt: skip
    at = sample * x_stride_b + row * x_stride_y + column * x_stride_x
    x = tl.load(x_ptr + at[:, None] + channel[None, :] * x_stride_c, mask=wanted, other=0.0)
    update = _update(
        _own(x, common_ptr, sample, channel, C).to(expand_ptr.dtype.element_ty),
        expand_ptr, contract_ptr, coarse_ptr + sample * tokens * 2 * C,
        active_ptr + sample * H * W * 2 * C, token, there, weights, share, flat, position_in, channel,
        C, HAS_MASK, True, ROWS * COLUMNS, BLOCK_C, BLOCK_U, PRECISION,
    )  # fmt: skip
    standard, inverse = _standardise(update, channel, C)
    kept = position_in
    if HAS_MASK:
        kept &= tl.load(mask_ptr + sample * H * W + flat, mask=position_in, other=0) != 0
        tl.store(share_ptr + sample * H * W + flat, share, mask=position_in)
    at = grad_ptr + sample * grad_stride_b + row * grad_stride_y + column * grad_stride_x
    part = norm_partial_ptr + (sample * tl.num_programs(0) + tl.program_id(0)) * 2 * C
    # One half of the channels after the other takes fewer registers.
    standard0, standard1 = _halves(standard, ROWS * COLUMNS, BLOCK_C)
    channel0 = tl.arange(0, BLOCK_C // 2)
    channel1 = channel0 + BLOCK_C // 2
    slope0 = _norm_bwd(at, kept, standard0, norm_weight_ptr, part, channel0, grad_stride_c, C)
    slope1 = _norm_bwd(at, kept, standard1, norm_weight_ptr, part, channel1, grad_stride_c, C)
    mean = (tl.sum(slope0, 1) + tl.sum(slope1, 1)) / C
    along = (tl.sum(slope0 * standard0, 1) + tl.sum(slope1 * standard1, 1)) / C
    slope0 = inverse[:, None] * (slope0 - mean[:, None] - standard0 * along[:, None])
    slope1 = inverse[:, None] * (slope1 - mean[:, None] - standard1 * along[:, None])
    to = grad_update_ptr + (sample * H * W + flat) * C
    there = position_in[:, None]
    tl.store(to[:, None] + channel0[None, :], slope0.to(grad_update_ptr.dtype.element_ty),
             mask=there & (channel0 < C)[None, :])  # fmt: skip
    tl.store(to[:, None] + channel1[None, :], slope1.to(grad_update_ptr.dtype.element_ty),
             mask=there & (channel1 < C)[None, :])  # fmt: skip


@triton.jit
def _norm_bwd(
    grad_ptr, kept, standard, norm_weight_ptr, norm_partial_ptr, channel, grad_stride_c, C: tl.constexpr
):  # fmt: skip
    """Stores the tile's gradients of LayerNorm's affine part; returns that of what it scales, (P, C)."""
    real = channel < C
    at = grad_ptr[:, None] + channel[None, :] * grad_stride_c
    grad = tl.load(at, mask=kept[:, None] & real[None, :], other=0.0).to(tl.float32)
    tl.store(norm_partial_ptr + channel, tl.sum(grad * standard, 0), mask=real)
    tl.store(norm_partial_ptr + C + channel, tl.sum(grad, 0), mask=real)
    return grad * tl.load(norm_weight_ptr + channel, mask=real, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _hidden_bwd(
    grad_ptr, grad_update_ptr, active_ptr, expand_ptr, contract_ptr, mask_ptr, grad_hidden_ptr, grad_x_ptr,
    H, W, grad_stride_b, grad_stride_c, grad_stride_y, grad_stride_x,
    grad_x_stride_b, grad_x_stride_c, grad_x_stride_y, grad_x_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through both linear layers: stores the gradients of the hidden units and of x.

    Shapes: grad as in ``_update_bwd``, which wrote grad_update and active. Written: grad_hidden (B, H * W, 2C), and
    grad_x (B, C, H, W), by its strides.
    """
    sample = tl.program_id(1)
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    position_in = position < H * W
    channel = tl.arange(0, BLOCK_C)
    wanted = position_in[:, None] & (channel < C)[None, :]
    flat = sample * H * W + position
    grad_update = tl.load(grad_update_ptr + flat[:, None] * C + channel[None, :], mask=wanted, other=0.0)
    grad_x = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, 2 * C, BLOCK_U):
        unit = first + tl.arange(0, BLOCK_U)
        at = flat[:, None] * (2 * C) + unit[None, :]
        there = position_in[:, None] & (unit < 2 * C)[None, :]
        real = (channel < C)[:, None] & (unit < 2 * C)[None, :]
        weight = tl.load(contract_ptr + channel[:, None] * (2 * C) + unit[None, :], mask=real, other=0.0)
        through = tl.dot(grad_update, weight, input_precision=PRECISION)
        active = tl.load(active_ptr + at, mask=there, other=0.0)
        through = tl.where(active.to(tl.float32) > 0, through, SLOPE * through).to(grad_hidden_ptr.dtype.element_ty)
        tl.store(grad_hidden_ptr + at, through, mask=there)
        real = (unit < 2 * C)[:, None] & (channel < C)[None, :]
        weight = tl.load(expand_ptr + unit[:, None] * (2 * C) + channel[None, :], mask=real, other=0.0)
        grad_x = tl.dot(through, weight, grad_x, input_precision=PRECISION)
    row, column = position // W, position % W
    kept = position_in
    if HAS_MASK:
        kept &= tl.load(mask_ptr + flat, mask=position_in, other=0) != 0
    grad_ptr += sample * grad_stride_b + row * grad_stride_y + column * grad_stride_x
    grad_x_ptr += sample * grad_x_stride_b + row * grad_x_stride_y + column * grad_x_stride_x
    # One half of the channels after the other takes fewer registers.
    first, second = _halves(grad_x, BLOCK_P, BLOCK_C)
    half = tl.arange(0, BLOCK_C // 2)
    _add_residual(first, grad_ptr, grad_x_ptr, kept, position_in, half, grad_stride_c, grad_x_stride_c, C)
    _add_residual(second, grad_ptr, grad_x_ptr, kept, position_in, BLOCK_C // 2 + half, grad_stride_c, grad_x_stride_c,
                  C)  # fmt: skip


@triton.jit
def _add_residual(
    grad_x, grad_ptr, grad_x_ptr, kept, position_in, channel, grad_stride_c, grad_x_stride_c, C: tl.constexpr
):  # fmt: skip
    """Adds what y = x + ... sends back directly, and stores the sum."""
    real = (channel < C)[None, :]
    at = grad_ptr[:, None] + channel[None, :] * grad_stride_c
    grad_x += tl.load(at, mask=kept[:, None] & real, other=0.0).to(tl.float32)
    to = grad_x_ptr[:, None] + channel[None, :] * grad_x_stride_c
    tl.store(to, grad_x.to(grad_x_ptr.dtype.element_ty), mask=position_in[:, None] & real)


@triton.jit
def _upsample_bwd(
    grad_hidden_ptr, valid_ptr, share_ptr, grad_coarse_ptr, H, W,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Transpose of up_4 as a gather: every token sums the cells of its 8x8 window in order, so that runs agree.

    Shapes: grad_hidden (B, H * W, 2C), valid (B, N), share (B, H, W) with a mask. Written: grad_coarse (B, N, 2C).
    """
    sample = tl.program_id(2)
    rows, columns = (H + SIDE - 1) // SIDE, (W + SIDE - 1) // SIDE
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_in = token < rows * columns
    unit = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    row, column = token // columns, token % columns
    total = tl.zeros((BLOCK_T, BLOCK_U), tl.float32)
    for step in range(REACH * REACH):
        y = row * SIDE - 2 + step // 8
        x = column * SIDE - 2 + step % 8
        inside = token_in & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        top, bottom, down = _taps(y, rows)
        left, right, across = _taps(x, columns)
        weight = tl.where(top == row, 1 - down, 0.0) + tl.where(bottom == row, down, 0.0)
        weight *= tl.where(left == column, 1 - across, 0.0) + tl.where(right == column, across, 0.0)
        position = sample * H * W + y * W + x
        if HAS_MASK:
            weight /= tl.load(share_ptr + position, mask=inside, other=1.0)
        at = grad_hidden_ptr + position[:, None] * (2 * C) + unit[None, :]
        value = tl.load(at, mask=inside[:, None] & (unit < 2 * C)[None, :], other=0.0)
        total += value.to(tl.float32) * weight[:, None]
    if HAS_MASK:
        valid = tl.load(valid_ptr + sample * rows * columns + token, mask=token_in, other=0) != 0
        total = tl.where(valid[:, None], total, 0.0)
    to = grad_coarse_ptr + (sample * rows * columns + token)[:, None] * (2 * C) + unit[None, :]
    tl.store(to, total.to(grad_coarse_ptr.dtype.element_ty), mask=token_in[:, None] & (unit < 2 * C)[None, :])
