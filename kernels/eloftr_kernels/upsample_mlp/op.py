# SPDX-License-Identifier: Apache-2.0
"""Message upsampling and MLP as an operator: argument checks, the choice of implementation, schema, fake, autograd.

Convention: maps are (B, C, H, W) with row y and column x; the message's tokens are 4x4 blocks of cells, completed at
the right and lower border.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eloftr_kernels import dispatch
from eloftr_kernels.aggregated_attention.naive import AGGREGATION
from eloftr_kernels.registration import differentiable, operator
from eloftr_kernels.upsample_mlp import cpu, naive
from eloftr_kernels.upsample_mlp.naive import MlpWeights

OP = "upsample_mlp"
MAX_CHANNELS = 256


def upsample_mlp(
    x: Tensor,  # (B, C, H, W)
    message: Tensor,  # (B, C, ceil(H/4), ceil(W/4))
    weights: MlpWeights,
    *,
    mask: Tensor | None = None,  # (B, H, W) bool
) -> Tensor:
    r"""Update the coarse map with the message (EfficientLoFTR, section 3.2).

    :mod:`eloftr_kernels.upsample_mlp.naive` has the formula. Under autocast the linear maps run in its dtype, the
    residual in that of ``x``. A float32 ``x`` may meet weights and a message of half precision, in which the linear
    maps then run. Where they round ``x``, what all its positions have in common is taken out before, and its product
    is added after: the same formula with less rounding.

    Gradient: to all but the mask; zero at masked cells. LeakyReLU's at zero is its slope, 0.01.

    Returns:
        (B, C, H, W), channels last in memory, dtype of ``x``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that differ, a mask that is not bool, or weights that are no MlpWeights.
        RuntimeError: ``backend("triton")`` is in force and ``why_not`` knows a reason against it.
    """
    if not isinstance(weights, MlpWeights):
        raise TypeError(f"weights: expected MlpWeights(...), got {type(weights).__name__}.")
    dtype, triton = _decide((x, message, mask, *weights))
    if triton:
        expand, contract, *norm = weights
        y: Tensor = _forward(x, message.to(dtype), [expand.to(dtype), contract.to(dtype), *norm], mask)
        return y
    if torch.compiler.is_exporting():
        with dispatch.reference_context(x, dtype):
            return naive.upsample_mlp(x, message, _vectors_as(x, weights), mask=mask)
    with dispatch.reference_context(x, dtype):
        return cpu.upsample_mlp(x, message, _vectors_as(x, weights), mask=mask)


@dispatch.once_per_signature
def _decide(tensors: tuple[Tensor | None, ...]) -> tuple[torch.dtype, bool]:
    """The dtype of the linear maps, and whether Triton runs; checks every argument."""
    x, message, mask, *parts = tensors
    dtype = _check(x, message, MlpWeights(*parts), mask)  # type: ignore[arg-type]
    if torch.compiler.is_exporting():
        return dtype, False
    return dtype, dispatch.use_triton(OP, why_not(x, mask))  # type: ignore[arg-type]


def _vectors_as(x: Tensor, weights: MlpWeights) -> MlpWeights:
    """What meets a float32 map outside the linear maps, in float32."""
    if x.dtype != torch.float32 or weights.norm.dtype == torch.float32:
        return weights
    return weights._replace(norm=weights.norm.float(), norm_bias=weights.norm_bias.float())


def why_not(x: Tensor, mask: Tensor | None = None) -> str | None:
    """Why Triton would not be used for these arguments, as half a sentence; None if it would be."""
    reason = dispatch.why_not_triton({"x": x, "mask": mask})
    if reason is not None:
        return reason
    batch, channels, height, width = x.shape
    if channels > MAX_CHANNELS:
        return f"{channels} channels are more than the {MAX_CHANNELS} that a position's row in registers may have"
    if 2 * batch * channels * height * width >= dispatch.MAX_ELEMENTS:
        return "the hidden layer of the backward pass has 2^31 elements or more, beyond the kernels' 32-bit offsets"
    return None


def _check(
    x: Tensor,
    message: Tensor,
    weights: MlpWeights,
    mask: Tensor | None,
) -> torch.dtype:
    """Check every argument; returns the dtype in which the linear maps run."""
    dispatch.check_shape("x", x, (None,) * 4, "(B, C, H, W)")
    batch, channels, height, width = x.shape
    if 0 in x.shape[2:]:
        raise ValueError(f"x: expected at least one row and one column, got {tuple(x.shape)}.")
    tokens = [-(-size // AGGREGATION) for size in (height, width)]
    dispatch.check_shape("message", message, (batch, channels, *tokens), "(B, C, ceil(H/4), ceil(W/4))")
    dispatch.check_shape("weights.expand", weights.expand, (2 * channels, 2 * channels), "(2C, 2C)")
    dispatch.check_shape("weights.contract", weights.contract, (channels, 2 * channels), "(C, 2C)")
    dispatch.check_shape("weights.norm", weights.norm, (channels,), "(C,)")
    dispatch.check_shape("weights.norm_bias", weights.norm_bias, (channels,), "(C,)")
    if mask is not None:
        dispatch.check_shape("mask", mask, (batch, height, width), "(B, H, W)")
        dispatch.check_dtype("mask", mask, torch.bool, "compare it with a threshold")
    others = {"message": message, **{f"weights.{name}": w for name, w in weights._asdict().items()}}
    dispatch.check_devices({"x": x, **others, "mask": mask})
    dtype = dispatch.compute_dtype(x, weights.expand)
    if not torch.is_autocast_enabled(x.device.type):
        for name, t in others.items():
            dispatch.check_dtype(name, t, dtype, "convert it to the dtype of x, or use autocast")
    return dtype


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


@operator("eloftr::upsample_mlp", fake=_forward_fake)
def _forward(x: Tensor, message: Tensor, weights: list[Tensor], mask: Tensor | None) -> Tensor:
    from eloftr_kernels.upsample_mlp import launch

    return launch.forward(x, message, MlpWeights(*weights), mask)


def _backward_fake(grad: Tensor, x: Tensor, message: Tensor, weights: list[Tensor], *_: Any) -> list[Tensor]:
    batch, channels, rows, columns = message.shape
    of_message = message.new_empty((batch, rows, columns, channels)).permute(0, 3, 1, 2)
    return [torch.empty_like(x), of_message, *(weight.new_empty(weight.shape) for weight in weights)]


@operator("eloftr::upsample_mlp_backward", fake=_backward_fake)
def _backward(grad: Tensor, x: Tensor, message: Tensor, weights: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    from eloftr_kernels.upsample_mlp import launch

    return launch.backward(grad, x, message, MlpWeights(*weights), mask)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, message, weights, mask = inputs
    ctx.save_for_backward(x, message, mask, *weights)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, message, mask, *weights = ctx.saved_tensors
    of_x, of_message, *of_weights = _backward(grad, x, message, weights, mask)
    return of_x, of_message, of_weights, None


differentiable(_forward, save=_save, backward=_gradients)
