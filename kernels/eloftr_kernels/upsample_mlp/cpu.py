# SPDX-License-Identifier: Apache-2.0
"""Message upsampling and MLP with PyTorch's own operations: the CPU path, and that of devices without a kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels import dispatch
from eloftr_kernels.aggregated_attention.naive import AGGREGATION, token_mask
from eloftr_kernels.upsample_mlp import naive
from eloftr_kernels.upsample_mlp.naive import LEAKY_SLOPE, MlpWeights

# Of the hidden layer held at once on a CPU: 1 MB in float32, half of a core's L2 cache.
PIECE_ELEMENTS = 1 << 19


def upsample_mlp(x: Tensor, message: Tensor, weights: MlpWeights, *, mask: Tensor | None = None) -> Tensor:
    """As :func:`naive.upsample_mlp`; channels last in memory.

    Upsampling commutes with the linear map, so the message's half of the first layer is applied before it, on a
    sixteenth of the positions. CPU inference takes a few rows of cells at a time.
    """
    batch, channels, height, width = x.shape
    tokens = x.permute(0, 2, 3, 1)
    message = message.permute(0, 2, 3, 1)
    expand_x, expand_message = weights.expand.split(channels, dim=1)
    hidden_message = F.linear(message, expand_message)
    common = naive.common_part(x, dispatch.compute_dtype(x, weights.expand))
    if common is not None:
        # The weights of the interpolation add up to one: what is added before it is added to every position.
        hidden_message = hidden_message + F.linear(common, expand_x)[:, None, None]
        common = common[:, None, None]
    down, across = (
        _interpolation(size, size_up, hidden_message)
        for size, size_up in zip(message.shape[1:3], (height, width), strict=True)
    )
    share = None
    if mask is not None:
        valid = token_mask(mask)[..., None].to(hidden_message.dtype)
        hidden_message = hidden_message * valid
        # A valid cell lies in a valid token, whose weight is at least (5/8)^2: the bound only guards masked cells.
        share = _along_rows(down, across @ valid).clamp(min=0.25)
    hidden_message = across @ hidden_message

    def update(rows: slice, tokens_near: slice) -> Tensor:
        own = tokens[:, rows] if common is None else tokens[:, rows] - common
        hidden = F.linear(own, expand_x)
        if share is None:
            taps = down[rows, tokens_near].expand(batch, -1, -1)
            hidden.flatten(2).baddbmm_(taps, hidden_message[:, tokens_near].flatten(2))
        else:
            hidden += _along_rows(down[rows, tokens_near], hidden_message[:, tokens_near]) / share[:, rows]
        # In place where no backward asks for what is overwritten: fresh memory costs a CPU more than the arithmetic.
        contracted = F.linear(F.leaky_relu(hidden, LEAKY_SLOPE, inplace=True), weights.contract)
        return F.layer_norm(contracted, (channels,), weights.norm, weights.norm_bias)

    if dispatch.is_cpu_inference(x):
        y = x.new_empty((batch, height, width, channels))
        for rows, tokens_near in _row_pieces(height, 2 * batch * channels * width):
            torch.add(tokens[:, rows], update(rows, tokens_near), out=y[:, rows])
    else:
        y = tokens + update(slice(None), slice(None))
    y = y.permute(0, 3, 1, 2)
    return y if mask is None else y * mask[:, None]


def _interpolation(size: int, size_up: int, like: Tensor) -> Tensor:
    """(size_up, size): bilinear weights of ``size`` samples at each of the first ``size_up`` positions between them."""
    position = (torch.arange(size_up, device=like.device, dtype=torch.float32) + 0.5) / AGGREGATION - 0.5
    samples = torch.arange(size, device=like.device, dtype=torch.float32)
    weights = (1 - (position.clamp(0, size - 1)[:, None] - samples).abs()).clamp(min=0)
    return weights.to(like.dtype)  # multiples of 1/8: exact in every dtype


def _along_rows(weights: Tensor, x: Tensor) -> Tensor:
    """(R, h) on (B, h, W, C) -> (B, R, W, C)."""
    return (weights @ x.flatten(2)).reshape(x.shape[0], len(weights), *x.shape[2:])


def _row_pieces(height: int, elements_per_row: int) -> Iterator[tuple[slice, slice]]:
    """Rows of cells, and the rows of tokens that they are interpolated from."""
    rows = AGGREGATION * max(1, PIECE_ELEMENTS // (AGGREGATION * max(1, elements_per_row)))
    for start in range(0, height, rows):
        first = start // AGGREGATION
        yield slice(start, start + rows), slice(max(0, first - 1), first + rows // AGGREGATION + 1)
