# SPDX-License-Identifier: Apache-2.0
"""Aggregated attention as an operator: argument checks, the choice of implementation, schema, fake and autograd.

Convention: maps are (B, C, H, W) with row y and column x; a token is a 4x4 block of cells, in row-major order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eloftr_kernels import dispatch
from eloftr_kernels.aggregated_attention import reference
from eloftr_kernels.aggregated_attention.reference import AGGREGATION

OP = "aggregated_attention"
MAX_CHANNELS = 512
_DIFFERENTIABLE = 9  # x, source and the seven weights come first


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
        (k, v) = W_{k,v}\,\mathrm{LN}(\mathrm{MaxPool}_{4\times4}(s)),\quad
        m = W_m\,\mathrm{softmax}(R q\,(R k)^\top / \sqrt{d})\, v

    with :math:`R` the rotation of channel pairs by ``rotary`` (cosines, sines), whose table belongs to the tokens of
    ``x`` and of ``source`` alike. Masked cells count for nothing, invalid tokens (no valid cell) are no keys, and
    their message is zero. Under autocast the linear maps run in its dtype.

    Gradient: to both maps and all weights; none to ``rotary`` from the kernels (``why_not`` says so when it is asked
    for). At equal maxima the first cell of the block, in row-major order, receives it. Masked cells get zeros.

    Returns:
        (B, C, ceil(H/4), ceil(W/4)), channels last in memory, dtype of ``x`` or of autocast, where it is on.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that differ, or masks that are not bool.
        RuntimeError: ``backend("triton")`` is in force and ``why_not`` knows a reason against it.
    """
    dtype = _check(x, source, aggregate_weight, norm_weight, norm_bias, q_weight, k_weight, v_weight, merge_weight,
                   num_heads, rotary, mask, source_mask)  # fmt: skip
    if not dispatch.use_triton(OP, why_not(x, source, num_heads, rotary, mask, source_mask)):
        return reference.aggregated_attention(
            x, source, aggregate_weight, norm_weight, norm_bias, q_weight, k_weight, v_weight, merge_weight,
            num_heads, rotary, mask, source_mask,
        )  # fmt: skip
    projections = (weight.to(dtype) for weight in (q_weight, k_weight, v_weight, merge_weight))
    message: Tensor = _forward(
        x,
        source,
        aggregate_weight,
        norm_weight,
        norm_bias,
        *projections,
        num_heads,
        rotary,
        mask,
        source_mask,
    )[0]
    rows, columns = (-(-size // AGGREGATION) for size in x.shape[2:])
    return message.reshape(x.shape[0], rows, columns, x.shape[1]).permute(0, 3, 1, 2)


def why_not(
    x: Tensor,
    source: Tensor,
    num_heads: int,
    rotary: Tensor | None = None,
    mask: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> str | None:
    """Why Triton would not be used for these arguments, as half a sentence; None if it would be."""
    tensors = {"x": x, "source": source, "rotary": rotary, "mask": mask, "source_mask": source_mask}
    reason = dispatch.why_not_triton(tensors, head_size=x.shape[1] // num_heads)
    if reason is None and rotary is not None and rotary.requires_grad and torch.is_grad_enabled():
        return "rotary requires a gradient, which the kernels do not compute"
    if reason is None and x.shape[1] > MAX_CHANNELS:
        return (
            f"{x.shape[1]} channels are more than the {MAX_CHANNELS} that a token's row in registers may have"
        )
    return reason


def _check(
    x: Tensor,
    source: Tensor,
    aggregate_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    merge_weight: Tensor,
    num_heads: int,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> torch.dtype:
    """Check every argument once; returns the dtype in which the linear maps run."""
    dispatch.check_shape("x", x, (None,) * 4, "(B, C, H, W)")
    batch, channels = x.shape[:2]
    dispatch.check_shape("source", source, (batch, channels, None, None), "(B, C, H', W')")
    for name, t in (("x", x), ("source", source)):
        if 0 in t.shape[2:]:
            raise ValueError(f"{name}: expected at least one row and one column, got {tuple(t.shape)}.")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {channels} channels, got {num_heads}.")
    weights = {
        "aggregate_weight": aggregate_weight,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "q_weight": q_weight,
        "k_weight": k_weight,
        "v_weight": v_weight,
        "merge_weight": merge_weight,
    }
    dispatch.check_shape("aggregate_weight", aggregate_weight, (channels, 1, 4, 4), "(C, 1, 4, 4)")
    for name, weight in list(weights.items())[1:]:
        vector = name.startswith("norm")
        shape, symbols = ((channels,), "(C,)") if vector else ((channels, channels), "(C, C)")
        dispatch.check_shape(name, weight, shape, symbols)
    masks = {"mask": (mask, x), "source_mask": (source_mask, source)}
    for name, (given, of) in masks.items():
        if given is not None:
            dispatch.check_shape(name, given, (batch, *of.shape[2:]), "the map's (B, H, W)")
            dispatch.check_dtype(name, given, torch.bool, "compare it with a threshold")
    if rotary is not None:
        tokens = [-(-t.shape[2] // AGGREGATION) * -(-t.shape[3] // AGGREGATION) for t in (x, source)]
        if tokens[0] != tokens[1]:
            raise ValueError(
                f"rotary: expected maps of equally many tokens, got {tokens[0]} and {tokens[1]}."
            )
        dispatch.check_shape("rotary", rotary, (2, tokens[0], channels // 2), "(2, tokens, C / 2)")
    dispatch.check_devices({"x": x, "source": source, **weights, "rotary": rotary, "mask": mask,
                            "source_mask": source_mask})  # fmt: skip
    dtype = dispatch.compute_dtype(x)
    if not torch.is_autocast_enabled(x.device.type):
        for name, t in {"source": source, **weights}.items():
            dispatch.check_dtype(name, t, x.dtype, "convert it to the dtype of x, or use autocast")
    return dtype


@torch.library.custom_op("eloftr::aggregated_attention", mutates_args=())
def _forward(
    x: Tensor,
    source: Tensor,
    aggregate_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    merge_weight: Tensor,
    num_heads: int,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from eloftr_kernels.aggregated_attention import kernel

    with dispatch.on_device_of(x):
        return kernel.forward(
            x, source, aggregate_weight, norm_weight, norm_bias, q_weight, k_weight, v_weight, merge_weight,
            num_heads, rotary, mask, source_mask,
        )  # fmt: skip


@_forward.register_fake
def _(
    x: Tensor,
    source: Tensor,
    aggregate_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    merge_weight: Tensor,
    num_heads: int,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    queries, keys = (-(-t.shape[2] // AGGREGATION) * -(-t.shape[3] // AGGREGATION) for t in (x, source))
    message, q, attended = (q_weight.new_empty((batch, queries, channels)) for _ in range(3))
    k, v = (q_weight.new_empty((batch, keys, channels)) for _ in range(2))
    lse = x.new_empty((batch, num_heads, queries), dtype=torch.float32)
    return message, q, k, v, attended, lse, x.new_empty((batch, keys), dtype=torch.bool)


@torch.library.custom_op("eloftr::aggregated_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    lse: Tensor,
    key_valid: Tensor,
    x: Tensor,
    source: Tensor,
    aggregate_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    merge_weight: Tensor,
    num_heads: int,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from eloftr_kernels.aggregated_attention import kernel_backward

    with dispatch.on_device_of(x):
        return kernel_backward.backward(
            grad, q, k, v, attended, lse, key_valid, x, source, aggregate_weight, norm_weight, norm_bias, q_weight,
            k_weight, v_weight, merge_weight, num_heads, rotary, mask, source_mask,
        )  # fmt: skip


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    lse: Tensor,
    key_valid: Tensor,
    x: Tensor,
    source: Tensor,
    aggregate_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    merge_weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        torch.empty_like(source),
        aggregate_weight.new_empty(aggregate_weight.shape),
        torch.empty_like(norm_weight),
        torch.empty_like(norm_bias),
        q_weight.new_empty(q_weight.shape),
        k_weight.new_empty(k_weight.shape),
        v_weight.new_empty(v_weight.shape),
        merge_weight.new_empty(merge_weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, num_heads, rotary, mask, source_mask = inputs
    ctx.save_for_backward(*output[1:], *inputs[:_DIFFERENTIABLE], rotary, mask, source_mask)
    ctx.num_heads = num_heads
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *of_saved: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    *tensors, rotary, mask, source_mask = ctx.saved_tensors
    gradients = _backward(grad, *tensors, ctx.num_heads, rotary, mask, source_mask)
    return (*gradients, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
