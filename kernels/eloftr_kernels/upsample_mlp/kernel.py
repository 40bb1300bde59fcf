# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the message's upsampling and MLP; ``docs/kernels/upsample_mlp.md`` derives the backward pass.

Forward: the message's half of the first layer is a matrix product at a sixteenth of the positions; one kernel does
the rest per tile of positions, with hidden units in tiles that never leave the chip.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from eloftr_kernels import dispatch
from eloftr_kernels.aggregated_attention.reference import AGGREGATION, token_mask
from eloftr_kernels.kernel_common import NORM_EPS
from eloftr_kernels.upsample_mlp.reference import LEAKY_SLOPE

SIDE = tl.constexpr(AGGREGATION)
# A token is interpolated by the cells of an 8x8 window around its own 4x4.
REACH = tl.constexpr(2 * AGGREGATION)
SLOPE = tl.constexpr(LEAKY_SLOPE)
MIN_SHARE = tl.constexpr(0.25)
LARGE_TILE_BYTES = 120 * 1024


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
def _standardise(update, channel, C: tl.constexpr):
    """LayerNorm without its affine part, and 1 / standard deviation."""
    real = (channel < C)[None, :]
    mean = tl.sum(tl.where(real, update, 0.0), 1) / C
    centred = tl.where(real, update - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / C + NORM_EPS)
    return centred * inverse[:, None], inverse


@triton.jit
def _upsample_mlp_fwd(
    x_ptr, coarse_ptr, expand_ptr, contract_ptr, norm_weight_ptr, norm_bias_ptr, mask_ptr, valid_ptr, y_ptr,
    H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes y = x + LN(W2 LeakyReLU(W1x x + up_4(coarse))), coarse = W1m m; masked cells are zero."""
    sample = tl.program_id(1)
    tokens = (H + SIDE - 1) // SIDE * ((W + SIDE - 1) // SIDE)
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    position_in = position < H * W
    channel = tl.arange(0, BLOCK_C)
    wanted = position_in[:, None] & (channel < C)[None, :]
    row = sample * x_stride_b + position // W * x_stride_y + position % W * x_stride_x
    at = x_ptr + row[:, None] + channel[None, :] * x_stride_c
    t0, t1, t2, t3, w0, w1, w2, w3, _ = _corners(
        position, position_in, valid_ptr + sample * tokens, H, W, HAS_MASK
    )
    x = tl.load(at, mask=wanted, other=0.0).to(expand_ptr.dtype.element_ty)
    update = _update(
        x, expand_ptr, contract_ptr, coarse_ptr + sample * tokens * 2 * C, y_ptr, t0, t1, t2, t3, w0, w1, w2, w3,
        position, position_in, channel, C, False, BLOCK_P, BLOCK_C, BLOCK_U, PRECISION,
    )  # fmt: skip
    standard, _ = _standardise(update, channel, C)
    scale = tl.load(norm_weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    # The residual is read again, from the cache: kept, it would occupy registers through the loop.
    y = tl.load(at, mask=wanted, other=0.0).to(tl.float32) + standard * scale[None, :] + shift[None, :]
    if HAS_MASK:
        keep = tl.load(mask_ptr + sample * H * W + position, mask=position_in, other=0) != 0
        y = tl.where(keep[:, None], y, 0.0)
    out = y_ptr + sample * H * W * C + position[:, None] * C + channel[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def _update_bwd(
    grad_ptr, x_ptr, coarse_ptr, expand_ptr, contract_ptr, norm_weight_ptr, mask_ptr, valid_ptr,
    grad_update_ptr, active_ptr, share_ptr, norm_partial_ptr,
    H, W, grad_stride_b, grad_stride_c, grad_stride_y, grad_stride_x, x_stride_b, x_stride_c, x_stride_y, x_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Recomputes the activations and goes back through LayerNorm: stores the gradient of what it normalised."""
    sample = tl.program_id(1)
    tokens = (H + SIDE - 1) // SIDE * ((W + SIDE - 1) // SIDE)
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    position_in = position < H * W
    channel = tl.arange(0, BLOCK_C)
    wanted = position_in[:, None] & (channel < C)[None, :]
    row, column = position // W, position % W
    t0, t1, t2, t3, w0, w1, w2, w3, share = _corners(
        position, position_in, valid_ptr + sample * tokens, H, W, HAS_MASK
    )  # fmt: skip
    at = sample * x_stride_b + row * x_stride_y + column * x_stride_x
    x = tl.load(x_ptr + at[:, None] + channel[None, :] * x_stride_c, mask=wanted, other=0.0)
    update = _update(
        x.to(expand_ptr.dtype.element_ty), expand_ptr, contract_ptr, coarse_ptr + sample * tokens * 2 * C,
        active_ptr + sample * H * W * 2 * C, t0, t1, t2, t3, w0, w1, w2, w3, position, position_in, channel,
        C, True, BLOCK_P, BLOCK_C, BLOCK_U, PRECISION,
    )  # fmt: skip
    standard, inverse = _standardise(update, channel, C)
    kept = position_in
    if HAS_MASK:
        kept &= tl.load(mask_ptr + sample * H * W + position, mask=position_in, other=0) != 0
        tl.store(share_ptr + sample * H * W + position, share, mask=position_in)
    at = sample * grad_stride_b + row * grad_stride_y + column * grad_stride_x
    at = grad_ptr + at[:, None] + channel[None, :] * grad_stride_c
    grad = tl.load(at, mask=wanted & kept[:, None], other=0.0).to(tl.float32)
    part = norm_partial_ptr + (sample * tl.num_programs(0) + tl.program_id(0)) * 2 * C + channel
    tl.store(part, tl.sum(grad * standard, 0), mask=channel < C)
    tl.store(part + C, tl.sum(grad, 0), mask=channel < C)
    slope = grad * tl.load(norm_weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    along = tl.sum(slope * standard, 1) / C
    slope = inverse[:, None] * (slope - tl.sum(slope, 1)[:, None] / C - standard * along[:, None])
    to = grad_update_ptr + (sample * H * W + position)[:, None] * C + channel[None, :]
    tl.store(to, slope.to(grad_update_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def _hidden_bwd(
    grad_ptr, grad_update_ptr, active_ptr, expand_ptr, contract_ptr, mask_ptr, grad_hidden_ptr, grad_x_ptr,
    H, W, grad_stride_b, grad_stride_c, grad_stride_y, grad_stride_x,
    grad_x_stride_b, grad_x_stride_c, grad_x_stride_y, grad_x_stride_x,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through both linear layers: stores the gradients of the hidden units and of x."""
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
        through = tl.where(active.to(tl.float32) > 0, through, SLOPE * through).to(
            grad_hidden_ptr.dtype.element_ty
        )
        tl.store(grad_hidden_ptr + at, through, mask=there)
        real = (unit < 2 * C)[:, None] & (channel < C)[None, :]
        weight = tl.load(expand_ptr + unit[:, None] * (2 * C) + channel[None, :], mask=real, other=0.0)
        grad_x = tl.dot(through, weight, grad_x, input_precision=PRECISION)
    row, column = position // W, position % W
    if HAS_MASK:
        wanted &= (tl.load(mask_ptr + flat, mask=position_in, other=0) != 0)[:, None]
    at = sample * grad_stride_b + row * grad_stride_y + column * grad_stride_x
    at = grad_ptr + at[:, None] + channel[None, :] * grad_stride_c
    grad_x += tl.load(at, mask=wanted, other=0.0).to(tl.float32)
    to = sample * grad_x_stride_b + row * grad_x_stride_y + column * grad_x_stride_x
    to = grad_x_ptr + to[:, None] + channel[None, :] * grad_x_stride_c
    tl.store(to, grad_x.to(grad_x_ptr.dtype.element_ty), mask=position_in[:, None] & (channel < C)[None, :])


@triton.jit
def _upsample_bwd(
    grad_hidden_ptr, valid_ptr, share_ptr, grad_coarse_ptr, H, W,
    C: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Transpose of up_4 as a gather: every token sums the cells of its 8x8 window in order, so that runs agree."""
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


def forward(
    x: Tensor,
    message: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Launch the forward kernel. Workspace: (B, h * w, 2C), the first layer of the message at its own resolution."""
    batch, channels, height, width = x.shape
    y = x.new_empty((batch, height, width, channels))
    coarse = F.linear(_tokens(message), expand_weight[:, channels:])
    options = _options(x, coarse.dtype, mask is not None)
    if batch:
        _upsample_mlp_fwd[triton.cdiv(height * width, options["BLOCK_P"]), batch](
            x, coarse, expand_weight.contiguous(), contract_weight.contiguous(), norm_weight.contiguous(),
            norm_bias.contiguous(), *_masks(x, mask), y, height, width, *x.stride(), **options,
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)


def backward(
    grad: Tensor,  # (B, C, H, W)
    x: Tensor,
    message: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to the six differentiable arguments, in order.

    Workspaces, of which only the backward pass has need: (B, H * W, 2C) activations and their gradients, and
    (B, H * W, C) of the update, from which ``torch.matmul`` makes the weight gradients.
    """
    batch, channels, height, width = x.shape
    dtype, masked = expand_weight.dtype, mask is not None
    tokens = _tokens(message)
    coarse = F.linear(tokens, expand_weight[:, channels:])
    mask_, valid = _masks(x, mask)
    grad_x, grad_coarse = torch.empty_like(x), torch.empty_like(coarse)
    grad_update = x.new_empty((batch, height * width, channels), dtype=dtype)
    active, grad_hidden = (x.new_empty((batch, height * width, 2 * channels), dtype=dtype) for _ in range(2))
    share = x.new_empty((batch, height, width) if masked else (0,), dtype=torch.float32)
    expand_weight, contract_weight = expand_weight.contiguous(), contract_weight.contiguous()
    # The recomputation has more to keep in registers: the small tile over twice the threads.
    small, large = _options(x, dtype, masked, large=False) | {"num_warps": 8}, _options(x, dtype, masked)
    blocks = triton.cdiv(height * width, small["BLOCK_P"])
    norm = x.new_empty((batch * blocks, 2, channels), dtype=torch.float32)
    if batch:
        _update_bwd[blocks, batch](
            grad, x, coarse, expand_weight, contract_weight, norm_weight.contiguous(), mask_, valid, grad_update,
            active, share, norm, height, width, *grad.stride(), *x.stride(), **small,
        )  # fmt: skip
        _hidden_bwd[triton.cdiv(height * width, large["BLOCK_P"]), batch](
            grad, grad_update, active, expand_weight, contract_weight, mask_, grad_hidden, grad_x, height, width,
            *grad.stride(), *grad_x.stride(), **large,
        )  # fmt: skip
        _upsample_bwd[triton.cdiv(tokens.shape[1], 16), triton.cdiv(2 * channels, 64), batch](
            grad_hidden, valid, share, grad_coarse, height, width, C=channels, HAS_MASK=masked, BLOCK_T=16,
            BLOCK_U=64, num_warps=4,
        )  # fmt: skip
    cells = x.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
    grad_expand = torch.cat(
        [grad_hidden.flatten(0, 1).T @ cells, grad_coarse.flatten(0, 1).T @ tokens.flatten(0, 1)], 1
    )
    grad_contract = grad_update.flatten(0, 1).T @ active.flatten(0, 1)
    grad_message = (grad_coarse @ expand_weight[:, channels:]).reshape(batch, *message.shape[2:], channels)
    grad_norm = norm.sum(0).to(norm_weight.dtype)
    # Two views of one buffer may not leave an operator.
    grad_norm_weight, grad_norm_bias = grad_norm[0].clone(), grad_norm[1].clone()
    return (
        grad_x,
        grad_message.permute(0, 3, 1, 2),
        grad_expand,
        grad_contract,
        grad_norm_weight,
        grad_norm_bias,
    )


def _tokens(message: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C), a view where it is channels last in memory."""
    batch, channels = message.shape[:2]
    return message.permute(0, 2, 3, 1).reshape(batch, message.shape[2] * message.shape[3], channels)


def _masks(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mask of cells and of tokens; without one, stand-ins that no kernel reads."""
    return (x, x) if mask is None else (mask.contiguous(), token_mask(mask))


def _options(x: Tensor, dtype: torch.dtype, masked: bool, large: bool = True) -> dict[str, Any]:
    """Constants of a kernel over positions: one fixed choice per dtype and machine, no timing at the first call.

    A large tile halves how often the weights are read, and needs 112 KiB of shared memory at 256 channels.
    """
    large = large and dispatch.shared_memory(x.device) >= LARGE_TILE_BYTES
    exact = dtype == torch.float32
    return {
        "C": x.shape[1],
        "HAS_MASK": masked,
        "BLOCK_P": 16 if exact else 64 if large else 32,
        "BLOCK_C": triton.next_power_of_2(x.shape[1]),
        "BLOCK_U": 16 if exact else 32,
        "PRECISION": dispatch.dot_precision(dtype),
        "num_warps": 8 if large and not exact else 4,
        "num_stages": 1 if exact else 2,
    }
