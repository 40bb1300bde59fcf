# SPDX-License-Identifier: Apache-2.0
"""Aggregated attention in plain PyTorch: the formula, the CPU path, and what the kernel is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.arithmetic import upcast_for_accumulation
from eloftr_kernels.dispatch import is_cpu_inference

AGGREGATION = 4  # cells per side of an aggregated token


def aggregated_attention(
    x: Tensor,  # (B, C, H, W)
    source: Tensor,  # (B, C, H', W')
    aggregate_weight: Tensor,  # (C, 1, 4, 4)
    norm_weight: Tensor,  # (C,)
    norm_bias: Tensor,  # (C,)
    q_weight: Tensor,  # (C, C)
    k_weight: Tensor,  # (C, C)
    v_weight: Tensor,  # (C, C)
    merge_weight: Tensor,  # (C, C)
    num_heads: int,
    rotary: Tensor | None = None,  # (2, ceil(H/4) * ceil(W/4), C/2)
    mask: Tensor | None = None,  # (B, H, W) bool
    source_mask: Tensor | None = None,  # (B, H', W') bool
) -> Tensor:
    r"""Message from ``source`` to ``x`` at a quarter of its resolution (EfficientLoFTR, section 3.2).

    .. math::
        q = W_q\,\mathrm{LN}(\mathrm{DWConv}_{4\times4}(x)),\quad
        (k, v) = (W_k, W_v)\,\mathrm{LN}(\mathrm{MaxPool}_{4\times4}(s)),\quad
        m = W_m\,\mathrm{softmax}(R q\,(R k)^\top / \sqrt{d})\, v

    with :math:`R` the rotation of channel pairs :math:`(2c, 2c+1)` by ``rotary`` (cosines, sines), applied before the
    heads are split, so that every head has frequencies of its own.

    A token is valid when any of its 4x4 cells is; masked cells count as zero in the convolution and take no part in
    the maximum; sizes that are not multiples of 4 are completed by masked cells. Invalid tokens are no keys, and
    their message, like that of a sample without any valid key, is zero.

    Returns:
        (B, C, ceil(H/4), ceil(W/4)), channels last in memory, dtype of ``x`` (of autocast, where it is on).
    """
    x, mask = _complete_blocks(x, mask)
    source, source_mask = _complete_blocks(source, source_mask)
    query = _aggregate(_zero_masked(x, mask), aggregate_weight)
    key, key_valid = _masked_max_pool(source, source_mask)
    rows, columns = query.shape[-2:]
    query, key = (F.layer_norm(t.flatten(2).mT, (x.shape[1],), norm_weight, norm_bias) for t in (query, key))
    q, k, v = F.linear(query, q_weight), F.linear(key, k_weight), F.linear(key, v_weight)
    if rotary is not None:
        q, k = rotate_pairs(q, rotary), rotate_pairs(k, rotary)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    if key_valid is None:
        message = F.scaled_dot_product_attention(q, k, v)
    else:
        some = key_valid.any(-1)[:, None]  # a row without any key would be a softmax of nothing
        message = F.scaled_dot_product_attention(q, k, v, attn_mask=(key_valid | ~some)[:, None, None])
        message = message * some[..., None, None]
    message = F.linear(message.transpose(1, 2).flatten(2), merge_weight)
    message = message.mT.reshape(*x.shape[:2], rows, columns).contiguous(memory_format=torch.channels_last)
    return message if mask is None else message * token_mask(mask)[:, None]


def token_mask(mask: Tensor) -> Tensor:
    """(B, H, W) bool -> (B, ceil(H/4), ceil(W/4)) bool: any cell of the 4x4 block."""
    return F.max_pool2d(mask[:, None].float(), AGGREGATION, ceil_mode=True)[:, 0] > 0


def rotate_pairs(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate channel pairs (2c, 2c+1) of (B, N, C) by the angles whose (cos, sin) are ``rotary`` (2, N, C/2)."""
    if is_cpu_inference(x) and x.dtype in (torch.float32, torch.float64):  # one pass instead of seven
        turns = torch.complex(*rotary.to(x.dtype))
        return torch.view_as_real(
            torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * turns
        ).flatten(-2)
    cos, sin = rotary.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def _aggregate(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of each 4x4 block, in float32: its backward in bfloat16 takes a CPU ten times as long."""
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(
            upcast_for_accumulation(x), upcast_for_accumulation(weight), stride=AGGREGATION, groups=x.shape[1]
        )
        return y.to(x.dtype)


def _complete_blocks(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    height, width = x.shape[-2:]
    pad = (0, -width % AGGREGATION, 0, -height % AGGREGATION)
    if pad == (0, 0, 0, 0):
        return x, mask
    if mask is None:
        mask = torch.ones((x.shape[0], height, width), dtype=torch.bool, device=x.device)
    return F.pad(x, pad), F.pad(mask, pad)


def _zero_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[:, None]


def _masked_max_pool(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Maxima of the valid cells of each block, zero where there is none, and (B, tokens) which have some."""
    if mask is None:
        return F.max_pool2d(x, AGGREGATION), None
    valid = token_mask(mask)
    pooled = F.max_pool2d(x.masked_fill(~mask[:, None], torch.finfo(x.dtype).min), AGGREGATION)
    return torch.where(valid[:, None], pooled, 0), valid.flatten(1)
