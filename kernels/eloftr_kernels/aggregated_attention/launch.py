# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels of aggregated attention: tiles, buffers, and what library products do."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels import dispatch
from eloftr_kernels.aggregated_attention.kernel_backward import _attention_bwd, _tokens_bwd
from eloftr_kernels.aggregated_attention.kernel_forward import BLOCK_TOKENS, _attention_fwd, _tokens_fwd
from eloftr_kernels.aggregated_attention.naive import AGGREGATION, AttentionWeights
from eloftr_kernels.kernel_common import blocks, launch, next_power_of_2


class Saved(NamedTuple):
    """What the forward pass keeps for the backward pass, all at a quarter of the resolution."""

    q: Tensor  # (B, N, C)
    k: Tensor  # (B, M, C)
    v: Tensor  # (B, M, C)
    attended: Tensor  # (B, N, C)
    lse: Tensor  # (B, heads, N) float32
    key_valid: Tensor  # (B, M) bool


def forward(
    x: Tensor,
    source: Tensor,
    weights: AttentionWeights,
    num_heads: int,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernels.

    Returns:
        message (B, N, C), then the fields of :class:`Saved`.
    """
    (batch, channels), dtype = x.shape[:2], weights.q.dtype
    queries, keys = (token_count(t) for t in (x, source))
    q, attended = (x.new_empty((batch, queries, channels), dtype=dtype) for _ in range(2))
    k, v = (x.new_empty((batch, keys, channels), dtype=dtype) for _ in range(2))
    lse = x.new_empty((batch, num_heads, queries), dtype=torch.float32)
    query_valid, key_valid = (x.new_empty((batch, count), dtype=torch.bool) for count in (queries, keys))
    exact, precision, size = dtype == torch.float32, dispatch.dot_precision(dtype), channels // num_heads
    # Few channels leave room for a wider tile of outputs, half as many steps.
    block_o = 16 if exact else 64 if channels <= 128 else 32
    flags = {"C": channels, "HAS_MASK": mask is not None, "HAS_SOURCE_MASK": source_mask is not None}
    if batch:
        launch(_tokens_fwd, (2 * blocks(max(queries, keys), BLOCK_TOKENS), batch),
            x, source, x if mask is None else mask.contiguous(),
            source if source_mask is None else source_mask.contiguous(), weights.aggregate.contiguous(),
            weights.norm.contiguous(), weights.norm_bias.contiguous(), weights.q.contiguous(), weights.k.contiguous(),
            weights.v.contiguous(), q if rotary is None else rotary.contiguous(), q, k, v, query_valid, key_valid,
            *x.shape[2:], *x.stride(), *source.shape[2:], *source.stride(), **flags, ROTARY=rotary is not None,
            BLOCK_T=BLOCK_TOKENS, BLOCK_C=next_power_of_2(channels), BLOCK_O=block_o,
            PRECISION=precision, num_warps=8, num_stages=1 if exact else 2,
        )  # fmt: skip
        # Few queries are spread over more programs.
        block_q = 32 if exact or queries <= 1024 else 64
        launch(_attention_fwd, (blocks(queries, block_q), num_heads, batch),
            q, k, v, query_valid, key_valid, attended, lse, queries, keys, math.log2(math.e) * size**-0.5, **flags,
            HEADS=num_heads, D=size, BLOCK_Q=block_q, BLOCK_K=32 if exact else 64, PRECISION=precision, num_warps=4,
            num_stages=2,
        )  # fmt: skip
    return F.linear(attended, weights.merge), q, k, v, attended, lse, key_valid


def backward(
    grad: Tensor,  # (B, N, C), of the message
    saved: Saved,
    x: Tensor,
    source: Tensor,
    weights: AttentionWeights,
    num_heads: int,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> list[Tensor]:
    """Gradients to x, source, and the weights, in the order of :class:`AttentionWeights`."""
    # Invalid tokens have no message: what arrives for them reaches no parameter. Their rows of ``attended`` are zero
    # already, and +inf in ``lse`` stops the rest.
    grad = grad.to(saved.q.dtype).contiguous()
    grad_q, grad_k, grad_v = _attention_backward(
        grad @ weights.merge, saved, num_heads, rotary, source_mask is not None
    )
    grad_key = grad_k @ weights.k + grad_v @ weights.v
    grad_x, grad_source, query, key, norm, conv = _tokens_backward(
        grad_q @ weights.q, grad_key, x, source, weights, mask, source_mask
    )
    grad_conv = conv.sum(0).T.to(weights.aggregate.dtype).contiguous().reshape(weights.aggregate.shape)
    grad_norm, grad_norm_bias = norm.sum(0).to(weights.norm.dtype).unbind()
    of_weights = AttentionWeights(
        aggregate=grad_conv,
        # Two views of one buffer may not leave an operator.
        norm=grad_norm.clone(),
        norm_bias=grad_norm_bias.clone(),
        q=_weight_gradient(grad_q, query),
        k=_weight_gradient(grad_k, key),
        v=_weight_gradient(grad_v, key),
        merge=_weight_gradient(grad, saved.attended),
    )
    return [grad_x, grad_source, *of_weights]


def token_count(x: Tensor) -> int:
    """Tokens of a map (B, C, H, W)."""
    return -(-x.shape[2] // AGGREGATION) * -(-x.shape[3] // AGGREGATION)


def _weight_gradient(grad: Tensor, tokens: Tensor) -> Tensor:
    """Of a linear map of tokens (B, N, C) whose outputs received ``grad``."""
    return grad.flatten(0, 1).T @ tokens.flatten(0, 1)


def _attention_backward(
    grad: Tensor, saved: Saved, num_heads: int, rotary: Tensor | None, masked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, attended, lse, key_valid = saved
    (batch, queries, channels), keys = q.shape, k.shape[1]
    size = channels // num_heads
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    block_q, block_k = (32, 16) if q.dtype == torch.float32 else (64, 64)
    grid = (blocks(keys, block_k) + blocks(queries, block_q), num_heads, batch)
    if batch:
        launch(_attention_bwd, grid,
            q, k, v, key_valid, attended, lse, grad, q if rotary is None else rotary.contiguous(), grad_q, grad_k,
            grad_v, queries, keys, size**-0.5, math.log2(math.e) * size**-0.5, C=channels, HEADS=num_heads, D=size,
            HAS_SOURCE_MASK=masked, ROTARY=rotary is not None, BLOCK_Q=block_q, BLOCK_K=block_k,
            PRECISION=dispatch.dot_precision(q.dtype), num_warps=4, num_stages=2,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _tokens_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    x: Tensor,
    source: Tensor,
    weights: AttentionWeights,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, queries, channels), keys = grad_query.shape, grad_key.shape[1]
    tiles, source_tiles = blocks(queries, BLOCK_TOKENS), blocks(keys, BLOCK_TOKENS)
    grad_x, grad_source = torch.empty_like(x), torch.empty_like(source)
    query, key = torch.empty_like(grad_query), torch.empty_like(grad_key)
    norm = x.new_empty((batch * (tiles + source_tiles), 2, channels), dtype=torch.float32)
    conv = x.new_empty((batch * tiles, AGGREGATION**2, channels), dtype=torch.float32)
    if batch:
        launch(_tokens_bwd, (2 * max(tiles, source_tiles), batch),
            x, source, x if mask is None else mask.contiguous(),
            source if source_mask is None else source_mask.contiguous(), weights.aggregate.contiguous(),
            weights.norm.contiguous(), weights.norm_bias.contiguous(), grad_query, grad_key, query, key, grad_x,
            grad_source, norm, conv, *x.shape[2:], *x.stride(), *grad_x.stride(), *source.shape[2:], *source.stride(),
            *grad_source.stride(), C=channels, HAS_MASK=mask is not None, HAS_SOURCE_MASK=source_mask is not None,
            BLOCK_T=BLOCK_TOKENS, BLOCK_C=next_power_of_2(channels), num_warps=8,
        )  # fmt: skip
    return grad_x, grad_source, query, key, norm, conv
