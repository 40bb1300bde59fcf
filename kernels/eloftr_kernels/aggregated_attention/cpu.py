# SPDX-License-Identifier: Apache-2.0
"""Aggregated attention with PyTorch's own operations: the CPU path, and that of devices without a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.aggregated_attention.naive import (
    AGGREGATION,
    AttentionWeights,
    complete_blocks,
    masked_max_pool,
    rotate_pairs,
    token_mask,
)
from eloftr_kernels.arithmetic import upcast_for_accumulation
from eloftr_kernels.dispatch import is_cpu_inference


def aggregated_attention(
    x: Tensor,
    source: Tensor,
    weights: AttentionWeights,
    *,
    num_heads: int,
    rotary: Tensor | None = None,
    mask: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> Tensor:
    """As :func:`naive.aggregated_attention`, by PyTorch's fused attention; channels last in memory."""
    x, mask = complete_blocks(x, mask)
    source, source_mask = complete_blocks(source, source_mask)
    query = _aggregate(x if mask is None else x * mask[:, None], weights.aggregate)
    key, key_valid = masked_max_pool(source, source_mask)
    rows, columns = query.shape[-2:]
    query, key = (F.layer_norm(t.flatten(2).mT, (x.shape[1],), weights.norm, weights.norm_bias) for t in (query, key))
    q, k, v = F.linear(query, weights.q), F.linear(key, weights.k), F.linear(key, weights.v)
    if rotary is not None:
        q, k = _rotated(q, rotary), _rotated(k, rotary)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    if key_valid is None:
        message = F.scaled_dot_product_attention(q, k, v)
    else:
        has_keys = key_valid.any(-1)[:, None]  # a row without any key would be a softmax of nothing
        message = F.scaled_dot_product_attention(q, k, v, attn_mask=(key_valid | ~has_keys)[:, None, None])
        message = message * has_keys[..., None, None]
    message = F.linear(message.transpose(1, 2).flatten(2), weights.merge)
    message = message.mT.reshape(*x.shape[:2], rows, columns).contiguous(memory_format=torch.channels_last)
    return message if mask is None else message * token_mask(mask)[:, None]


def _rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """As :func:`naive.rotate_pairs`; in CPU inference as one complex product, one pass instead of seven."""
    if not is_cpu_inference(x) or x.dtype not in (torch.float32, torch.float64):
        return rotate_pairs(x, rotary)
    turns = torch.complex(*rotary.to(x.dtype))
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


def _aggregate(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of each 4x4 block, in float32: its backward in bfloat16 takes a CPU ten times as long."""
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(upcast_for_accumulation(x), upcast_for_accumulation(weight), stride=AGGREGATION, groups=x.shape[1])
        return y.to(x.dtype)
