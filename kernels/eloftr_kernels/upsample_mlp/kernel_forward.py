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
def _corners(position, position_in, valid_ptr, H, W, HAS_MASK: tl.constexpr):
    """The four tokens of each position, their weights (of valid tokens, summing to one), and the weights' sum."""
    rows, columns = (H + SIDE - 1) // SIDE, (W + SIDE - 1) // SIDE
    top, bottom, down = _taps(position // W, rows)
    left, right, across = _taps(position % W, columns)
    t0, t1, t2, t3 = (
        top * columns + left,
        top * columns + right,
        bottom * columns + left,
        bottom * columns + right,
    )
    w0, w1, w2, w3 = (1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across
    share = w0 + w1 + w2 + w3
    if HAS_MASK:
        w0 = tl.where(tl.load(valid_ptr + t0, mask=position_in, other=0) != 0, w0, 0.0)
        w1 = tl.where(tl.load(valid_ptr + t1, mask=position_in, other=0) != 0, w1, 0.0)
        w2 = tl.where(tl.load(valid_ptr + t2, mask=position_in, other=0) != 0, w2, 0.0)
        w3 = tl.where(tl.load(valid_ptr + t3, mask=position_in, other=0) != 0, w3, 0.0)
        share = tl.maximum(w0 + w1 + w2 + w3, MIN_SHARE)
        w0, w1, w2, w3 = w0 / share, w1 / share, w2 / share, w3 / share
    return t0, t1, t2, t3, w0, w1, w2, w3, share


@triton.jit
def _tap(coarse_ptr, token, weight, unit, wanted, C: tl.constexpr):
    value = tl.load(coarse_ptr + token[:, None] * (2 * C) + unit[None, :], mask=wanted, other=0.0)
    return value.to(tl.float32) * weight[:, None]


@triton.jit
def _hidden(
    x, expand_ptr, coarse_ptr, t0, t1, t2, t3, w0, w1, w2, w3, position_in, channel, unit,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of hidden units before the nonlinearity: W1x x + up_4(W1m m), (P, U) float32."""
    real = (channel < C)[:, None] & (unit < 2 * C)[None, :]
    weight = tl.load(expand_ptr + unit[None, :] * (2 * C) + channel[:, None], mask=real, other=0.0)
    wanted = position_in[:, None] & (unit < 2 * C)[None, :]
    hidden = tl.dot(x, weight, input_precision=PRECISION)
    hidden += _tap(coarse_ptr, t0, w0, unit, wanted, C)
    hidden += _tap(coarse_ptr, t1, w1, unit, wanted, C)
    hidden += _tap(coarse_ptr, t2, w2, unit, wanted, C)
    hidden += _tap(coarse_ptr, t3, w3, unit, wanted, C)
    return hidden


@triton.jit
def _update(
    x, expand_ptr, contract_ptr, coarse_ptr, active_ptr, t0, t1, t2, t3, w0, w1, w2, w3, position, position_in, channel,
    C: tl.constexpr, KEEP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W2 LeakyReLU(hidden) before normalisation, (P, C) float32; stores the activations when asked to KEEP them."""
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, 2 * C, BLOCK_U):
        unit = first + tl.arange(0, BLOCK_U)
        hidden = _hidden(x, expand_ptr, coarse_ptr, t0, t1, t2, t3, w0, w1, w2, w3, position_in, channel, unit, C,
                         PRECISION)  # fmt: skip
        active = tl.where(hidden > 0, hidden, SLOPE * hidden).to(contract_ptr.dtype.element_ty)
        if KEEP:
            to = active_ptr + position[:, None] * (2 * C) + unit[None, :]
            tl.store(to, active, mask=position_in[:, None] & (unit < 2 * C)[None, :])
        real = (unit < 2 * C)[:, None] & (channel < C)[None, :]
        weight = tl.load(contract_ptr + channel[None, :] * (2 * C) + unit[:, None], mask=real, other=0.0)
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
def _upsample_mlp_fwd(
    x_ptr, coarse_ptr, common_ptr, expand_ptr, contract_ptr, norm_weight_ptr, norm_bias_ptr, mask_ptr, valid_ptr, y_ptr,
    H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes y = x + LN(W2 LeakyReLU(W1x (x - common) + up_4(coarse))); masked cells are zero.

    coarse = W1m m + W1x common, where there is something in common to take out.

    Shapes, with N tokens: x (B, C, H, W), by its strides; coarse (B, N, 2C); common (B, C) or None; expand (2C, 2C);
    contract (C, 2C); norm_weight, norm_bias (C,); mask (B, H, W); valid (B, N). Written: y (B, H, W, C).
    """
    sample = tl.program_id(1)
    tokens = (H + SIDE - 1) // SIDE * ((W + SIDE - 1) // SIDE)
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    position_in = position < H * W
    channel = tl.arange(0, BLOCK_C)
    wanted = position_in[:, None] & (channel < C)[None, :]
    row = sample * x_stride_b + position // W * x_stride_y + position % W * x_stride_x
    at = x_ptr + row[:, None] + channel[None, :] * x_stride_c
    t0, t1, t2, t3, w0, w1, w2, w3, _ = _corners(position, position_in, valid_ptr + sample * tokens, H, W, HAS_MASK)
    x = tl.load(at, mask=wanted, other=0.0)
    update = _update(
        _own(x, common_ptr, sample, channel, C).to(expand_ptr.dtype.element_ty),
        expand_ptr, contract_ptr, coarse_ptr + sample * tokens * 2 * C, y_ptr, t0, t1, t2, t3, w0, w1, w2, w3,
        position, position_in, channel, C, False, BLOCK_P, BLOCK_C, BLOCK_U, PRECISION,
    )  # fmt: skip
    standard, _ = _standardise(update, channel, C)
    scale = tl.load(norm_weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    # The residual is read again, from the cache: kept, it would occupy registers through the loop. So would its
    # addresses, which are therefore added up in another order.
    again = (x_ptr + channel * x_stride_c)[None, :] + row[:, None]
    y = tl.load(again, mask=wanted, other=0.0).to(tl.float32) + standard * scale[None, :] + shift[None, :]
    if HAS_MASK:
        keep = tl.load(mask_ptr + sample * H * W + position, mask=position_in, other=0) != 0
        y = tl.where(keep[:, None], y, 0.0)
    out = y_ptr + sample * H * W * C + position[:, None] * C + channel[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=wanted)
