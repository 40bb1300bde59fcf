# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the message's upsampling and MLP; ``docs/kernels/upsample_mlp.md`` derives the backward pass.

Forward: the message's half of the first layer is a matrix product at a sixteenth of the positions; one kernel does
the rest per tile of positions, with hidden units in tiles that never leave the chip.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eloftr_kernels.aggregated_attention.naive import AGGREGATION
from eloftr_kernels.kernel_common import NORM_EPS
from eloftr_kernels.upsample_mlp.naive import LEAKY_SLOPE

SIDE = tl.constexpr(AGGREGATION)
# A token is interpolated by the cells of an 8x8 window around its own 4x4.
REACH = tl.constexpr(2 * AGGREGATION)
SLOPE = tl.constexpr(LEAKY_SLOPE)
MIN_SHARE = tl.constexpr(0.25)


@triton.jit
def _taps(at, size):
    """The two tokens that ``up_4`` interpolates at a cell's row or column, and the share of the second."""
    place = tl.maximum((at.to(tl.float32) + 0.5) / SIDE - 0.5, 0.0)
    low = place.to(tl.int32)
    return low, tl.minimum(low + 1, size - 1), place - low.to(tl.float32)


@triton.jit
def _positions(H, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The program's tile of cells: rows and columns in the map, and which of them are there."""
    at, tiles = tl.arange(0, ROWS * COLUMNS), tl.cdiv(W, COLUMNS)
    y = tl.program_id(0) // tiles * ROWS + at // COLUMNS
    x = tl.program_id(0) % tiles * COLUMNS + at % COLUMNS
    return y, x, (y < H) & (x < W)


@triton.jit
def _upsampling(y, x, valid_ptr, H, W, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                BLOCK_T: tl.constexpr):  # fmt: skip
    """``up_4`` of a tile as a matrix: tokens around it (T,), weights (P, T), and the sum of valid tokens' weights (P,).

    Weights are 64ths, exact in every type; with a mask what they give is to be divided by the sums.
    """
    rows, columns = (H + SIDE - 1) // SIDE, (W + SIDE - 1) // SIDE
    slot, tiles = tl.arange(0, BLOCK_T), tl.cdiv(W, COLUMNS)
    across: tl.constexpr = COLUMNS // SIDE + 2
    token_y = tl.program_id(0) // tiles * (ROWS // SIDE) - 1 + slot // across
    token_x = tl.program_id(0) % tiles * (COLUMNS // SIDE) - 1 + slot % across
    there = (slot < across * (ROWS // SIDE + 2)) & (token_y >= 0) & (token_y < rows)
    there &= (token_x >= 0) & (token_x < columns)
    token = tl.where(there, token_y * columns + token_x, 0)
    weights = _shares(y, token_y, rows) * _shares(x, token_x, columns)
    weights = tl.where(there[None, :], weights, 0.0)
    share = tl.full((ROWS * COLUMNS,), 1.0, tl.float32)
    if HAS_MASK:
        there &= tl.load(valid_ptr + token) != 0
        weights = tl.where(there[None, :], weights, 0.0)
        share = tl.maximum(tl.sum(weights, 1), MIN_SHARE)
    return token, there, weights, share


@triton.jit
def _shares(at, token, size):
    """(P, T) share of each token's row or column in the interpolation at each cell's."""
    low, high, of_high = _taps(at, size)
    return tl.where(low[:, None] == token[None, :], 1 - of_high[:, None], 0.0) + tl.where(
        high[:, None] == token[None, :], of_high[:, None], 0.0
    )


@triton.jit
def _hidden(
    x, expand_ptr, coarse_ptr, token, there, weights, inverse, channel, unit,
    C: tl.constexpr, HAS_MASK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of hidden units before the nonlinearity: W1x x + up_4(W1m m), (P, U) float32."""
    at = expand_ptr + unit[None, :] * (2 * C) + channel[:, None]
    near = coarse_ptr + token[:, None] * (2 * C) + unit[None, :]
    if EVEN:
        weight, coarse = tl.load(at), tl.load(near, mask=there[:, None], other=0.0)
    else:
        real = (unit < 2 * C)[None, :]
        weight = tl.load(at, mask=(channel < C)[:, None] & real, other=0.0)
        coarse = tl.load(near, mask=there[:, None] & real, other=0.0)
    hidden = tl.dot(weights, coarse, input_precision=PRECISION)
    if HAS_MASK:
        hidden *= inverse[:, None]
    return tl.dot(x, weight, hidden, input_precision=PRECISION)


@triton.jit
def _update(
    x, expand_ptr, contract_ptr, coarse_ptr, active_ptr, token, there, weights, share, flat, position_in, channel,
    C: tl.constexpr, HAS_MASK: tl.constexpr, KEEP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W2 LeakyReLU(hidden) before normalisation, (P, C) float32; stores the activations when asked to KEEP them."""
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    weights, inverse = weights.to(x.dtype), 1 / share
    even: tl.constexpr = C == BLOCK_C and 2 * C % BLOCK_U == 0
    for first in range(0, 2 * C, BLOCK_U):
        unit = first + tl.arange(0, BLOCK_U)
        hidden = _hidden(x, expand_ptr, coarse_ptr, token, there, weights, inverse, channel, unit, C, HAS_MASK, even,
                         PRECISION)  # fmt: skip
        active = tl.maximum(hidden, SLOPE * hidden).to(contract_ptr.dtype.element_ty)
        if KEEP:
            to = active_ptr + flat[:, None] * (2 * C) + unit[None, :]
            tl.store(to, active, mask=position_in[:, None] & (unit < 2 * C)[None, :])
        at = contract_ptr + channel[None, :] * (2 * C) + unit[:, None]
        real = None if even else (unit < 2 * C)[:, None] & (channel < C)[None, :]
        weight = tl.load(at, mask=real, other=None if even else 0.0)
        total = tl.dot(active, weight, total, input_precision=PRECISION)
    return total


@triton.jit
def _own(x, common_ptr, sample, channel, C: tl.constexpr):
    """``x`` (P, C) without what all positions of the sample have in common."""
    if common_ptr is not None:
        common = tl.load(common_ptr + sample * C + channel, mask=channel < C, other=0.0)
        x = x.to(tl.float32) - common.to(tl.float32)[None, :]
    return x


@triton.jit
def _standardise(update, channel, C: tl.constexpr):
    """LayerNorm without its affine part, and 1 / standard deviation."""
    real = (channel < C)[None, :]
    mean = tl.sum(tl.where(real, update, 0.0), 1) / C
    centred = tl.where(real, update - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / C + NORM_EPS)
    return centred * inverse[:, None], inverse


@triton.jit
def _halves(x, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(P, C) -> the first and the second half of its channels."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_P, 2, BLOCK_C // 2)), (0, 2, 1)))


@triton.jit
def _finish(
    standard, x_ptr, y_ptr, norm_weight_ptr, norm_bias_ptr, keep, position_in, channel, x_stride_c, C: tl.constexpr
):  # fmt: skip
    """Adds the affine part of LayerNorm and the residual, which is read again: kept, it would occupy registers."""
    real = channel < C
    scale = tl.load(norm_weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    x = tl.load(x_ptr[:, None] + (channel * x_stride_c)[None, :], mask=keep[:, None] & real[None, :], other=0.0)
    y = tl.where(keep[:, None], x.to(tl.float32) + standard * scale[None, :] + shift[None, :], 0.0)
    at = y_ptr[:, None] + channel[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=position_in[:, None] & real[None, :])


@triton.jit
def _upsample_mlp_fwd(
    x_ptr, coarse_ptr, common_ptr, expand_ptr, contract_ptr, norm_weight_ptr, norm_bias_ptr, mask_ptr, valid_ptr, y_ptr,
    H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes y = x + LN(W2 LeakyReLU(W1x (x - common) + up_4(coarse))); masked cells are zero.

    coarse = W1m m + W1x common, where there is something in common to take out.

    Shapes, with N tokens: x (B, C, H, W), by its strides; coarse (B, N, 2C); common (B, C) or None; expand (2C, 2C);
    contract (C, 2C); norm_weight, norm_bias (C,); mask (B, H, W); valid (B, N). Written: y (B, H, W, C).
    """
    sample = tl.program_id(1)
    tokens = (H + SIDE - 1) // SIDE * ((W + SIDE - 1) // SIDE)
    row, column, position_in = _positions(H, W, ROWS, COLUMNS)
    flat = row * W + column
    channel = tl.arange(0, BLOCK_C)
    wanted = position_in[:, None] & (channel < C)[None, :]
    place = sample * x_stride_b + row * x_stride_y + column * x_stride_x
    x = tl.load(x_ptr + place[:, None] + channel[None, :] * x_stride_c, mask=wanted, other=0.0)
    token, there, weights, share = _upsampling(
        row, column, valid_ptr + sample * tokens, H, W, HAS_MASK, ROWS, COLUMNS, BLOCK_T
    )  # fmt: skip
    update = _update(
        _own(x, common_ptr, sample, channel, C).to(expand_ptr.dtype.element_ty),
        expand_ptr, contract_ptr, coarse_ptr + sample * tokens * 2 * C, y_ptr, token, there, weights, share,
        flat, position_in, channel, C, HAS_MASK, False, ROWS * COLUMNS, BLOCK_C, BLOCK_U, PRECISION,
    )  # fmt: skip
    standard, _ = _standardise(update, channel, C)
    keep = position_in
    if HAS_MASK:
        keep &= tl.load(mask_ptr + sample * H * W + flat, mask=position_in, other=0) != 0
    # One half of the channels after the other takes fewer registers.
    first, second = _halves(standard, ROWS * COLUMNS, BLOCK_C)
    channel = tl.arange(0, BLOCK_C // 2)
    x_ptr += place
    y_ptr += (sample * H * W + flat) * C
    _finish(first, x_ptr, y_ptr, norm_weight_ptr, norm_bias_ptr, keep, position_in, channel, x_stride_c, C)
    _finish(second, x_ptr, y_ptr, norm_weight_ptr, norm_bias_ptr, keep, position_in, BLOCK_C // 2 + channel,
            x_stride_c, C)  # fmt: skip
