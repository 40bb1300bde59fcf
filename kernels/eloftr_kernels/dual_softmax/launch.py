# SPDX-License-Identifier: Apache-2.0
"""Launches of the dual-softmax kernels: tiles, workspaces, outputs. Imported on the first launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_kernels import dispatch
from eloftr_kernels.dispatch import dot_precision, rounds_below
from eloftr_kernels.dual_softmax import kernel_backward, kernel_forward, kernel_partners
from eloftr_kernels.kernel_common import blocks, dot_dtype, flushes, launch, power_of_2

ROWS_PER_LAUNCH = 1 << 15  # bounds the column workspace to S * ROWS_PER_LAUNCH / rows-of-a-tile elements
LARGE = 160 * 1024  # bytes of shared memory that data-centre GPUs have
SPAN = 512  # columns that one program of the forward walks over
NO_PARTNER = 0x7FFFFFFF << 32  # above all that ``kernel_partners._ordered`` gives; its lower half is cell 0
_PARTNER_ROWS = 16  # the fewest that a matrix product takes
_REDUCE_BLOCK = 128
_CENTRE_BLOCK = 32  # rows


class Tiles(NamedTuple):
    """Launch configuration: a table, not a search: the same bits and the same first call everywhere."""

    rows: int
    columns: int
    channels: int  # of the inner product at a time; all of them where the tile of rows then stays on the chip
    num_warps: int
    num_stages: int


def room(device: torch.device) -> int:
    """Bytes of shared memory that tiles may take on ``device``; the interpreter has no limit."""
    return dispatch.shared_memory(device) if device.type == "cuda" or not dispatch.interpreting() else LARGE


def forward_tiles(dtype: torch.dtype, channels: int, shared: int) -> Tiles:
    """Tiles of the two forward kernels, for ``shared`` bytes of shared memory."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2)
    whole = power_of_2(channels)
    if whole > 256:
        return Tiles(64, 64, 64, 4, 2)
    if shared < LARGE:
        return Tiles(64 if whole > 128 else 128, 32, whole, 4, 2)
    # Two programs share a multiprocessor: one multiplies while the other takes exponentials.
    return Tiles(128, 32, whole, 8, 2) if whole > 128 else Tiles(64, 64, whole, 4, 2)


def best_tiles(dtype: torch.dtype, channels: int, shared: int) -> Tiles:
    """Tiles of the kernel of the partners alone, which spills on sm_100 in narrow tiles."""
    tiles = forward_tiles(dtype, channels, shared)
    return tiles._replace(columns=64) if tiles.num_warps == 8 else tiles


def backward_tiles(dtype: torch.dtype, channels: int, shared: int) -> Tiles:
    """Tiles of the backward kernel, for ``shared`` bytes of shared memory."""
    if dtype == torch.float32:
        return Tiles(32, 32, 32, 4, 2)
    whole = power_of_2(channels)
    if whole > 256:
        return Tiles(64, 32, 64, 4, 2)
    if shared < LARGE:
        return Tiles(64, 32, whole, 8 if shared > 64 * 1024 else 4, 1)  # less is AMD's, with more registers
    return Tiles(64, 64, whole, 8, 2)


def forward_constants(tiles: Tiles, dtype: torch.dtype, channels: int) -> dict[str, object]:
    """Compile-time arguments of the forward kernels."""
    return {
        "BLOCK_L": tiles.rows,
        "BLOCK_S": tiles.columns,
        "BLOCK_C": tiles.channels,
        "SPAN": SPAN,
        "WHOLE": tiles.channels >= channels,
        "DOT": dot_dtype(dtype),
        "PRECISION": dot_precision(dtype),
    }


def lse_constants(tiles: Tiles, dtype: torch.dtype, channels: int, columns: int) -> dict[str, object]:
    """Compile-time arguments of the kernel of the normalisers."""
    even = channels > 0 and channels % tiles.channels == 0 and columns % tiles.columns == 0
    return {**forward_constants(tiles, dtype, channels), "EVEN": even, "FLUSH": flushes()}


def backward_constants(tiles: Tiles, dtype: torch.dtype, channels: int) -> dict[str, object]:
    """Compile-time arguments of the backward kernel."""
    constants = forward_constants(tiles, dtype, channels) | {"FLUSH": flushes()}
    del constants["SPAN"]
    constants["BLOCK_OUT"] = tiles.channels if constants["WHOLE"] else min(128, power_of_2(channels))
    return constants


class Operand(NamedTuple):
    """Features of one image as the kernels multiply them."""

    features: Tensor  # (B, L, C)
    shift: Tensor | None  # (B, L) float32: what the parts taken out add to the products
    common: Tensor | None  # (B, C) float32: what was taken out


def operands(
    features0: Tensor, features1: Tensor, mask0: Tensor | None, mask1: Tensor | None, dtype: torch.dtype
) -> tuple[Operand, Operand]:
    """Where products in ``dtype`` round the features: without what those of an image have in common."""
    if not rounds_below(features0, dtype):
        return Operand(features0, None, None), Operand(features1, None, None)
    (B, L, C), S = features0.shape, features1.shape[1]
    g0, g1 = (features0.new_empty((B, n, C), dtype=dtype) for n in (L, S))
    shift0, shift1 = (features0.new_empty((B, n)) for n in (L, S))
    common = features0.new_empty((2, B, C))
    launch(kernel_forward._centre, (blocks(L, _CENTRE_BLOCK) + blocks(S, _CENTRE_BLOCK), B),
        features0, features1, mask0, mask1, g0, g1, shift0, shift1, common,
        *_strides(features0, features1, mask0, mask1), L, S, C, blocks(L, _CENTRE_BLOCK),
        BLOCK=_CENTRE_BLOCK, BLOCK_C=power_of_2(C), num_warps=8,
    )  # fmt: skip
    return Operand(g0, shift0, common[0]), Operand(g1, shift1, common[1])


def dual_softmax_lse_forward(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    mask0: Tensor | None,
    mask1: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch the forward, products in ``dtype``; other arguments as in ``naive.dual_softmax_lse``."""
    (B, L, _), S = features0.shape, features1.shape[1]
    row_lse, col_lse = (features0.new_empty((B, n), dtype=torch.float32) for n in (L, S))
    if 0 in (B, L, S):
        return row_lse.fill_(-torch.inf), col_lse.fill_(-torch.inf)
    own, other = operands(features0, features1, mask0, mask1, dtype)
    _launch_lse(own, other, temperature, mask0, mask1, row_lse, col_lse, None, dtype)
    return row_lse, col_lse


def _launch_lse(
    own: Operand,
    other: Operand,
    temperature: float,
    mask0: Tensor | None,
    mask1: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    tops: Tensor | None,  # (B, tiles of columns, L)
    dtype: torch.dtype,
) -> None:
    """Write the normalisers, and where wanted the largest score of every row in each tile of columns."""
    (B, L, C), S = own.features.shape, other.features.shape[1]
    tiles = forward_tiles(dtype, C, room(own.features.device))
    constants = lse_constants(tiles, dtype, C, S)
    splits = blocks(S, SPAN)
    row_parts = row_lse.new_empty((B, splits, L))
    for first_row in range(0, L, ROWS_PER_LAUNCH):
        row_tiles = blocks(min(ROWS_PER_LAUNCH, L - first_row), tiles.rows)
        col_parts = row_lse.new_empty((B, row_tiles, S))
        launch(kernel_forward._dual_softmax_lse_fwd, (row_tiles * splits * B,),
            own.features, other.features, mask0, mask1, own.shift, other.shift, row_parts, col_parts, tops,
            *_strides(own.features, other.features, mask0, mask1),
            L, S, C, first_row, row_tiles, splits, 1 / temperature,
            **constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        _reduce(col_parts, col_lse, accumulate=first_row > 0)
    _reduce(row_parts, row_lse)


def _reduce(parts: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """(B, parts, N) -> (B, N) log-sum-exp."""
    B, count, N = parts.shape
    grid = (blocks(N, _REDUCE_BLOCK) * B,)
    constants = {"ACCUMULATE": accumulate, "BLOCK": _REDUCE_BLOCK}
    launch(kernel_forward._lse_reduce, grid, parts, out, count, N, **constants)


def dual_softmax_best_forward(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    threshold: float,
    mask0: Tensor | None,
    mask1: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch one pass for normalisers and partners, products in ``dtype``; as ``one_pass.dual_softmax_best``."""
    (B, L, C), S = features0.shape, features1.shape[1]
    row_lse, col_lse, score1 = (features0.new_empty((B, n), dtype=torch.float32) for n in (L, S, L))
    best1 = features0.new_empty((B, L), dtype=torch.int64)
    best0 = features0.new_full((B, S), NO_PARTNER, dtype=torch.int64)
    own, other = operands(features0, features1, mask0, mask1, dtype)
    group = forward_tiles(dtype, C, room(features0.device)).columns
    tops = row_lse.new_empty((B, blocks(S, group), L))
    _launch_lse(own, other, temperature, mask0, mask1, row_lse, col_lse, tops, dtype)
    launch(kernel_partners._best_above_fwd, (blocks(L, _PARTNER_ROWS), B),
        own.features, other.features, mask0, mask1, own.shift, other.shift, row_lse, col_lse, tops,
        best1, score1, best0, *_strides(own.features, other.features, mask0, mask1),
        L, S, C, 1 / temperature, math.log(threshold),
        GROUP=group, BLOCK_L=_PARTNER_ROWS, BLOCK_G=64, BLOCK_C=min(128, power_of_2(C)),
        DOT=dot_dtype(dtype), PRECISION=dot_precision(dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    return row_lse, col_lse, best1, best0.bitwise_and_(0xFFFFFFFF), score1


def dual_softmax_lse_backward(
    grad_row: Tensor,
    grad_col: Tensor,
    features0: Tensor,
    features1: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    temperature: float,
    mask0: Tensor | None,
    mask1: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of both feature sets, (B, L, C) and (B, S, C); one launch per side."""
    if 0 in (*features0.shape, features1.shape[1]):
        return features0.new_zeros(features0.shape), features1.new_zeros(features1.shape)
    operand0, operand1 = operands(features0, features1, mask0, mask1, dtype)
    tiles = backward_tiles(dtype, features0.shape[2], room(features0.device))
    constants = backward_constants(tiles, dtype, features0.shape[2])
    channel_blocks = blocks(features0.shape[2], int(str(constants["BLOCK_OUT"])))
    grad_row, grad_col = grad_row.contiguous(), grad_col.contiguous()
    amax = torch.maximum(grad_row.abs().amax(1), grad_col.abs().amax(1))
    side0 = (operand0, mask0, row_lse.contiguous(), grad_row)
    side1 = (operand1, mask1, col_lse.contiguous(), grad_col)
    grads = []
    for own, other in ((side0, side1), (side1, side0)):
        (x, mask, lse, grad), (y, other_mask, other_lse, other_grad) = own, other
        B, N, C = x.features.shape
        row_tiles = blocks(N, tiles.rows)
        out = torch.empty((B, N, C), dtype=features0.dtype, device=features0.device)
        launch(kernel_backward._dual_softmax_lse_bwd, (row_tiles * B, channel_blocks),
            x.features, y.features, mask, other_mask, x.shift, y.shift, y.common, lse, other_lse, grad, other_grad,
            amax, out, *_strides(x.features, y.features, mask, other_mask), N, y.features.shape[1], C, row_tiles,
            1 / temperature,
            **constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        grads.append(out)
    return grads[0], grads[1]


def mutual_best_forward(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    row_lse: Tensor | None,
    col_lse: Tensor | None,
    mask0: Tensor | None,
    mask1: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch, products in ``dtype``; other arguments as in ``naive.mutual_best``."""
    (B, L, C), S = features0.shape, features1.shape[1]
    score1, score0 = (features0.new_empty((B, n), dtype=torch.float32) for n in (L, S))
    best1, best0 = (features0.new_empty((B, n), dtype=torch.int64) for n in (L, S))
    if 0 in (B, L, S):
        return best1.zero_(), best0.zero_(), score1.fill_(-torch.inf)
    own, other = operands(features0, features1, mask0, mask1, dtype)
    tiles = best_tiles(dtype, C, room(features0.device))
    if row_lse is not None and col_lse is not None:
        row_lse, col_lse = row_lse.contiguous(), col_lse.contiguous()
    constants = forward_constants(tiles, dtype, C)
    splits = blocks(S, SPAN)
    row_parts = score1.new_empty((B, splits, L)), best1.new_empty((B, splits, L), dtype=torch.int32)
    for first_row in range(0, L, ROWS_PER_LAUNCH):
        row_tiles = blocks(min(ROWS_PER_LAUNCH, L - first_row), tiles.rows)
        col_parts = score1.new_empty((B, row_tiles, S)), best1.new_empty((B, row_tiles, S), dtype=torch.int32)
        launch(kernel_partners._mutual_best_fwd, (row_tiles * splits * B,),
            own.features, other.features, mask0, mask1, own.shift, other.shift, row_lse, col_lse, *row_parts,
            *col_parts, *_strides(own.features, other.features, mask0, mask1),
            L, S, C, first_row, row_tiles, splits, 1 / temperature,
            **constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        launch(
            kernel_partners._best_reduce,
            (blocks(S, _REDUCE_BLOCK) * B,),
            *col_parts,
            score0,
            best0,
            row_tiles,
            S,
            ACCUMULATE=first_row > 0,
            BLOCK=_REDUCE_BLOCK,
        )
    launch(
        kernel_partners._best_reduce,
        (blocks(L, _REDUCE_BLOCK) * B,),
        *row_parts,
        score1,
        best1,
        splits,
        L,
        ACCUMULATE=False,
        BLOCK=_REDUCE_BLOCK,
    )
    return best1, best0, score1


def _strides(x0: Tensor, x1: Tensor, mask0: Tensor | None, mask1: Tensor | None) -> tuple[int, ...]:
    masks = [(0, 0) if mask is None else mask.stride() for mask in (mask0, mask1)]
    return (*x0.stride(), *x1.stride(), *masks[0], *masks[1])
