# SPDX-License-Identifier: Apache-2.0
"""The two attention ops cell by cell in float64, written from the paper and not from the code they check."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Vector = list[float]


def message_oracle(
    x: Tensor,
    source: Tensor,
    conv: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projections: Sequence[Tensor],  # q, k, v, merge
    heads: int,
    rotary: Tensor | None,
    mask: Tensor,
    source_mask: Tensor,
) -> Tensor:
    """One sample: x (C, H, W), source (C, H', W'), bool masks -> (C, ceil(H/4), ceil(W/4))."""
    channels = x.shape[0]
    size = channels // heads
    queries = _blocks(mask)
    keys = [cells for cells in _blocks(source_mask) if cells]
    out = torch.zeros(channels, len(queries), dtype=torch.float64)
    pooled = [[max(float(source[c, y, u]) for y, u in cells) for c in range(channels)] for cells in keys]
    places = [t for t, cells in enumerate(_blocks(source_mask)) if cells]
    normalised = [_layer_norm(token, norm_weight, norm_bias) for token in pooled]
    key_rows = [_turn(_matvec(projections[1], t), rotary, place) for t, place in zip(normalised, places, strict=True)]
    value_rows = [_matvec(projections[2], t) for t in normalised]
    for n, cells in enumerate(queries):
        if not cells or not keys:
            continue
        token = [sum(float(conv[c, 0, y % 4, u % 4] * x[c, y, u]) for y, u in cells) for c in range(channels)]
        query = _turn(_matvec(projections[0], _layer_norm(token, norm_weight, norm_bias)), rotary, n)
        attended: Vector = []
        for h in range(heads):
            lanes = range(h * size, (h + 1) * size)
            scores = [math.exp(sum(query[c] * key[c] for c in lanes) / math.sqrt(size)) for key in key_rows]
            total = sum(scores)
            attended += [sum(s * v[c] for s, v in zip(scores, value_rows, strict=True)) / total for c in lanes]
        out[:, n] = torch.tensor(_matvec(projections[3], attended), dtype=torch.float64)
    return out.reshape(channels, -(-x.shape[1] // 4), -(-x.shape[2] // 4))


def update_oracle(
    x: Tensor,
    message: Tensor,
    expand: Tensor,
    contract: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask: Tensor,
) -> Tensor:
    """One sample: x (C, H, W), message (C, ceil(H/4), ceil(W/4)), mask -> (C, H, W); upsamples, then concatenates."""
    channels, height, width = x.shape
    rows, columns = message.shape[1:]
    valid = [bool(cells) for cells in _blocks(mask)]
    out = torch.zeros_like(x)
    for y in range(height):
        for u in range(width):
            if not mask[y, u]:
                continue
            weights = {
                (r, c): wr * wc
                for r, wr in _hat(y, rows).items()
                for c, wc in _hat(u, columns).items()
                if valid[r * columns + c]
            }
            total = sum(weights.values())
            up = [sum(w * float(message[c, i, j]) for (i, j), w in weights.items()) / total for c in range(channels)]
            hidden = _matvec(expand, [float(v) for v in x[:, y, u]] + up)
            hidden = [value if value > 0 else 0.01 * value for value in hidden]
            update = _layer_norm(_matvec(contract, hidden), norm_weight, norm_bias)
            out[:, y, u] = x[:, y, u] + torch.tensor(update, dtype=torch.float64)
    return out


def _blocks(mask: Tensor) -> list[list[tuple[int, int]]]:
    """The valid cells of every 4x4 block, blocks in row-major order."""
    height, width = mask.shape
    return [
        [(y, u) for y in range(top, min(top + 4, height)) for u in range(left, min(left + 4, width)) if mask[y, u]]
        for top in range(0, height, 4)
        for left in range(0, width, 4)
    ]


def _hat(cell: int, tokens: int) -> dict[int, float]:
    """Weights of the tokens at a cell: their centres lie at 4 t + 1.5, and the border tokens reach beyond."""
    place = min(max((cell - 1.5) / 4, 0), tokens - 1)
    return {t: 1 - abs(place - t) for t in range(tokens) if abs(place - t) < 1}


def _matvec(weight: Tensor, vector: Vector) -> Vector:
    return [sum(float(w) * v for w, v in zip(row, vector, strict=True)) for row in weight]


def _layer_norm(token: Vector, weight: Tensor, bias: Tensor) -> Vector:
    mean = sum(token) / len(token)
    variance = sum((t - mean) ** 2 for t in token) / len(token)
    return [
        (t - mean) / math.sqrt(variance + 1e-5) * float(w) + float(b)
        for t, w, b in zip(token, weight, bias, strict=True)
    ]


def _turn(vector: Vector, rotary: Tensor | None, token: int) -> Vector:
    if rotary is None:
        return vector
    turned = []
    for pair in range(len(vector) // 2):
        number = complex(*vector[2 * pair : 2 * pair + 2]) * complex(*rotary[:, token, pair].tolist())
        turned += [number.real, number.imag]
    return turned
