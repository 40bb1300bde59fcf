# SPDX-License-Identifier: Apache-2.0
"""Aggregated attention as an operator: argument checks, the choice of implementation, schema, fake and autograd.

Convention: maps are (B, C, H, W) with row y and column x; a token is a 4x4 block of cells, in row-major order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eloftr_kernels import dispatch
from eloftr_kernels.aggregated_attention import cpu, naive
from eloftr_kernels.aggregated_attention.naive import AGGREGATION, AttentionWeights
from eloftr_kernels.registration import differentiable, operator

OP = "aggregated_attention"
MAX_CHANNELS = 512
_VECTORS = [AttentionWeights._fields.index(name) for name in ("aggregate", "norm", "norm_bias")]


def aggregated_attention(
    x: Tensor,  # (B, C, H, W)
    source: Tensor,  # (B, C, H', W')
    weights: AttentionWeights,
    *,
    num_heads: int,
    rotary: Tensor | None = None,  # (2, ceil(H/4) * ceil(W/4), C/2)
    mask: Tensor | None = None,  # (B, H, W) bool
    source_mask: Tensor | None = None,  # (B, H', W') bool
) -> Tensor:
    r"""Message from ``source`` to ``x`` at a quarter of its resolution (EfficientLoFTR, section 3.2).

    :mod:`eloftr_kernels.aggregated_attention.naive` has the formula. The table of ``rotary`` (cosines, sines) belongs
    to the tokens of ``x`` and of ``source`` alike. Under autocast the linear maps run in its dtype. Maps in float32 may
    meet weights of half precision, in which the linear maps then run.

    Gradient: to both maps and all weights; none to ``rotary`` from the kernels (``why_not`` says so when it is asked
    for). At equal maxima the first cell of the block, in row-major order, receives it. Masked cells get zeros.

    Returns:
        (B, C, ceil(H/4), ceil(W/4)), channels last in memory, in the dtype of the linear maps.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that differ, masks that are not bool, or weights that are no AttentionWeights.
        RuntimeError: ``backend("triton")`` is in force and ``why_not`` knows a reason against it.
    """
    if not isinstance(weights, AttentionWeights):
        raise TypeError(f"weights: expected AttentionWeights(...), got {type(weights).__name__}.")
    dtype, triton = _decide((x, source, rotary, mask, source_mask, *weights), num_heads)
    if triton:
        parts = [w if w.dtype == dtype or i in _VECTORS else w.to(dtype) for i, w in enumerate(weights)]
        message: Tensor = _forward(x, source, parts, num_heads, rotary, mask, source_mask)[0]
        height, width = x.shape[2:]
        rows, columns = -(-height // AGGREGATION), -(-width // AGGREGATION)
        return message.view(x.shape[0], rows, columns, x.shape[1]).permute(0, 3, 1, 2)
    options = {"num_heads": num_heads, "rotary": rotary, "mask": mask, "source_mask": source_mask}
    if torch.compiler.is_exporting():
        with dispatch.reference_context(x, dtype):
            return naive.aggregated_attention(x, source, _vectors_as(x, weights), **options)  # type: ignore[arg-type]
    with dispatch.reference_context(x, dtype):
        return cpu.aggregated_attention(x, source, _vectors_as(x, weights), **options)  # type: ignore[arg-type]


@dispatch.once_per_signature
def _decide(tensors: tuple[Tensor | None, ...], num_heads: int) -> tuple[torch.dtype, bool]:
    """The dtype of the linear maps, and whether Triton runs; checks every argument."""
    x, source, rotary, mask, source_mask, *parts = tensors
    options = {"num_heads": num_heads, "rotary": rotary, "mask": mask, "source_mask": source_mask}
    dtype = _check(x, source, AttentionWeights(*parts), **options)  # type: ignore[arg-type]
    if torch.compiler.is_exporting():
        return dtype, False
    reason = why_not(x, source, num_heads, rotary, mask, source_mask)  # type: ignore[arg-type]
    return dtype, dispatch.use_triton(OP, reason)


def _vectors_as(x: Tensor, weights: AttentionWeights) -> AttentionWeights:
    """What meets a float32 map outside the linear maps, in float32."""
    if x.dtype != torch.float32 or weights.norm.dtype == torch.float32:
        return weights
    return weights._replace(
        aggregate=weights.aggregate.float(), norm=weights.norm.float(), norm_bias=weights.norm_bias.float()
    )


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
        return f"{x.shape[1]} channels are more than the {MAX_CHANNELS} that a token's row in registers may have"
    return reason


def _check(
    x: Tensor,
    source: Tensor,
    weights: AttentionWeights,
    *,
    num_heads: int,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> torch.dtype:
    """Check every argument; returns the dtype in which the linear maps run."""
    dispatch.check_shape("x", x, (None,) * 4, "(B, C, H, W)")
    batch, channels = x.shape[:2]
    dispatch.check_shape("source", source, (batch, channels, None, None), "(B, C, H', W')")
    for name, t in (("x", x), ("source", source)):
        if 0 in t.shape[2:]:
            raise ValueError(f"{name}: expected at least one row and one column, got {tuple(t.shape)}.")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {channels} channels, got {num_heads}.")
    named = {f"weights.{name}": weight for name, weight in weights._asdict().items()}
    dispatch.check_shape("weights.aggregate", weights.aggregate, (channels, 1, 4, 4), "(C, 1, 4, 4)")
    for name, weight in list(named.items())[1:]:
        vector = "norm" in name
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
            raise ValueError(f"rotary: expected maps of equally many tokens, got {tokens[0]} and {tokens[1]}.")
        dispatch.check_shape("rotary", rotary, (2, tokens[0], channels // 2), "(2, tokens, C / 2)")
    dispatch.check_devices({"x": x, "source": source, **named, "rotary": rotary, "mask": mask,
                            "source_mask": source_mask})  # fmt: skip
    dtype = dispatch.compute_dtype(x, weights.q)
    if not torch.is_autocast_enabled(x.device.type):
        dispatch.check_dtype("source", source, x.dtype, "convert it to the dtype of x, or use autocast")
        for name, t in named.items():
            dispatch.check_dtype(name, t, dtype, "convert it to the dtype of the others, or use autocast")
    return dtype


def _forward_fake(
    x: Tensor, source: Tensor, weights: list[Tensor], num_heads: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    like = AttentionWeights(*weights).q
    queries, keys = (-(-t.shape[2] // AGGREGATION) * -(-t.shape[3] // AGGREGATION) for t in (x, source))
    message, q, attended = (like.new_empty((batch, queries, channels)) for _ in range(3))
    k, v = (like.new_empty((batch, keys, channels)) for _ in range(2))
    lse = x.new_empty((batch, num_heads, queries), dtype=torch.float32)
    return message, q, k, v, attended, lse, x.new_empty((batch, keys), dtype=torch.bool)


@operator("eloftr::aggregated_attention", fake=_forward_fake)
def _forward(
    x: Tensor,
    source: Tensor,
    weights: list[Tensor],
    num_heads: int,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from eloftr_kernels.aggregated_attention import launch

    return launch.forward(x, source, AttentionWeights(*weights), num_heads, rotary, mask, source_mask)


def _backward_fake(
    grad: Tensor, saved: list[Tensor], x: Tensor, source: Tensor, weights: list[Tensor], *_: Any
) -> list[Tensor]:
    return [
        torch.empty_like(x),
        torch.empty_like(source),
        *(weight.new_empty(weight.shape) for weight in weights),
    ]


@operator("eloftr::aggregated_attention_backward", fake=_backward_fake)
def _backward(
    grad: Tensor,
    saved: list[Tensor],
    x: Tensor,
    source: Tensor,
    weights: list[Tensor],
    num_heads: int,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> list[Tensor]:
    from eloftr_kernels.aggregated_attention import launch

    named = AttentionWeights(*weights)
    return launch.backward(grad, launch.Saved(*saved), x, source, named, num_heads, rotary, mask, source_mask)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, source, weights, ctx.num_heads, *optional = inputs
    ctx.save_for_backward(*output[1:], x, source, *weights, *optional)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *of_saved: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    saved, (x, source, *rest) = list(ctx.saved_tensors[:6]), ctx.saved_tensors[6:]
    weights, optional = rest[: len(AttentionWeights._fields)], rest[len(AttentionWeights._fields) :]
    grad_x, grad_source, *of_weights = _backward(grad, saved, x, source, weights, ctx.num_heads, *optional)
    return grad_x, grad_source, of_weights, None, None, None, None


differentiable(_forward, save=_save, backward=_gradients)
