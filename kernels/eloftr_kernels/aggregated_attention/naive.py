# SPDX-License-Identifier: Apache-2.0
r"""Aggregated attention as a formula: documentation, oracle, and what exported graphs hold.

.. math::
    q = W_q\,\mathrm{LN}(\mathrm{DWConv}_{4\times4}(x)),\quad
    k = W_k\,\mathrm{LN}(\mathrm{MaxPool}_{4\times4}(s)),\quad
    v = W_v\,\mathrm{LN}(\mathrm{MaxPool}_{4\times4}(s)),\quad
    m = W_m\,\mathrm{softmax}(R q\,(R k)^\top / \sqrt{d})\, v

(EfficientLoFTR, section 3.2). :math:`R` rotates channel pairs :math:`(2c, 2c+1)` by ``rotary`` (cosines, sines),
before the heads are split, so that every head has frequencies of its own.

A token is valid when any of its 4x4 cells is. Masked cells count as zero in the convolution and take no part in the
maximum. Sizes that are no multiples of 4 are completed by masked cells. Invalid tokens are no keys. Their message is
zero, and so is that of a sample without any valid key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AGGREGATION = 4  # cells per side of an aggregated token


class AttentionWeights(NamedTuple):
    """The weights of one attention layer; build it by name, since three of them have one shape."""

    aggregate: Tensor  # (C, 1, 4, 4) depthwise convolution
    norm: Tensor  # (C,) scale of the LayerNorm of tokens
    norm_bias: Tensor  # (C,)
    q: Tensor  # (C, C)
    k: Tensor  # (C, C)
    v: Tensor  # (C, C)
    merge: Tensor  # (C, C)


def aggregated_attention(
    x: Tensor,  # (B, C, H, W)
    source: Tensor,  # (B, C, H', W')
    weights: AttentionWeights,
    *,
    num_heads: int,
    rotary: Tensor | None = None,  # (2, tokens, C/2)
    mask: Tensor | None = None,  # (B, H, W) bool
    source_mask: Tensor | None = None,  # (B, H', W') bool
) -> Tensor:
    """Message (B, C, ceil(H/4), ceil(W/4)) from ``source`` to ``x``."""
    x, mask = complete_blocks(x, mask)
    source, source_mask = complete_blocks(source, source_mask)
    shown = x if mask is None else x * mask[:, None]
    query = F.conv2d(shown, weights.aggregate, stride=AGGREGATION, groups=x.shape[1])
    key, key_valid = masked_max_pool(source, source_mask)
    rows, columns = query.shape[-2:]
    query, key = (F.layer_norm(t.flatten(2).mT, (x.shape[1],), weights.norm, weights.norm_bias) for t in (query, key))
    q, k, v = F.linear(query, weights.q), F.linear(key, weights.k), F.linear(key, weights.v)
    if rotary is not None:
        q, k = rotate_pairs(q, rotary), rotate_pairs(k, rotary)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if key_valid is not None:
        scores = scores.masked_fill(~key_valid[:, None, None], torch.finfo(scores.dtype).min)
        v = v * key_valid[:, None, :, None]  # a sample without any valid key gets zeros
    message = F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), weights.merge)
    message = message.mT.reshape(*x.shape[:2], rows, columns)
    return message if mask is None else message * token_mask(mask)[:, None]


def token_mask(mask: Tensor) -> Tensor:
    """(B, H, W) bool -> (B, ceil(H/4), ceil(W/4)) bool: any cell of the 4x4 block."""
    return F.max_pool2d(mask[:, None].float(), AGGREGATION, ceil_mode=True)[:, 0] > 0


def rotate_pairs(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate channel pairs (2c, 2c+1) of (B, N, C) by the angles whose (cos, sin) are ``rotary`` (2, N, C/2)."""
    cos, sin = rotary.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def complete_blocks(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Map and mask, completed by masked cells to multiples of 4."""
    height, width = x.shape[-2:]
    pad = (0, -width % AGGREGATION, 0, -height % AGGREGATION)
    if pad == (0, 0, 0, 0):
        return x, mask
    if mask is None:
        mask = torch.ones((x.shape[0], height, width), dtype=torch.bool, device=x.device)
    return F.pad(x, pad), F.pad(mask, pad)


def masked_max_pool(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Maxima of the valid cells of each block, zero where there is none, and (B, tokens) which blocks have some."""
    if mask is None:
        return F.max_pool2d(x, AGGREGATION), None
    valid = token_mask(mask)
    pooled = F.max_pool2d(x.masked_fill(~mask[:, None], torch.finfo(x.dtype).min), AGGREGATION)
    return torch.where(valid[:, None], pooled, 0), valid.flatten(1)
