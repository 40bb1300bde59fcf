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
from eloftr_kernels.aggregated_attention.reference import AGGREGATION
from eloftr_kernels.upsample_mlp import reference

OP = "upsample_mlp"
MAX_CHANNELS = 256


def upsample_mlp(
    x: Tensor,  # (B, C, H, W)
    message: Tensor,  # (B, C, ceil(H/4), ceil(W/4))
    expand_weight: Tensor,  # (2C, 2C)
    contract_weight: Tensor,  # (C, 2C)
    norm_weight: Tensor,  # (C,)
    norm_bias: Tensor,  # (C,)
    mask: Tensor | None = None,  # (B, H, W) bool
) -> Tensor:
    r"""Update the coarse map with the message (EfficientLoFTR, section 3.2).

    .. math:: x + \mathrm{LN}\bigl(W_2\,\mathrm{LeakyReLU}_{0.01}(W_1\,[x;\, \mathrm{up}_{4}(m)])\bigr)

    with bilinear :math:`\mathrm{up}_4` (``align_corners=False``). With a mask, only messages of valid tokens (those
    with any valid cell) are interpolated, by weights that sum to one, and masked cells of the result are zero. Under
    autocast the linear maps run in its dtype, the residual in that of ``x``.

    Gradient: to all but the mask; zero at masked cells. LeakyReLU's at zero is its slope, 0.01.

    Returns:
        (B, C, H, W), channels last in memory, dtype of ``x``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that differ, or a mask that is not bool.
        RuntimeError: ``backend("triton")`` is in force and ``why_not`` knows a reason against it.
    """
    dtype = _check(x, message, expand_weight, contract_weight, norm_weight, norm_bias, mask)
    if not dispatch.use_triton(OP, why_not(x, mask)):
        return reference.upsample_mlp(
            x, message, expand_weight, contract_weight, norm_weight, norm_bias, mask
        )  # fmt: skip
    y: Tensor = _forward(
        x, message.to(dtype), expand_weight.to(dtype), contract_weight.to(dtype), norm_weight, norm_bias, mask
    )  # fmt: skip
    return y


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
    expand_weight: Tensor,
    contract_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask: Tensor | None,
) -> torch.dtype:
    """Check every argument once; returns the dtype in which the linear maps run."""
    dispatch.check_shape("x", x, (None,) * 4, "(B, C, H, W)")
    batch, channels, height, width = x.shape
    if 0 in x.shape[2:]:
        raise ValueError(f"x: expected at least one row and one column, got {tuple(x.shape)}.")
    tokens = [-(-size // AGGREGATION) for size in (height, width)]
    dispatch.check_shape("message", message, (batch, channels, *tokens), "(B, C, ceil(H/4), ceil(W/4))")
    dispatch.check_shape("expand_weight", expand_weight, (2 * channels, 2 * channels), "(2C, 2C)")
    dispatch.check_shape("contract_weight", contract_weight, (channels, 2 * channels), "(C, 2C)")
    dispatch.check_shape("norm_weight", norm_weight, (channels,), "(C,)")
    dispatch.check_shape("norm_bias", norm_bias, (channels,), "(C,)")
    if mask is not None:
        dispatch.check_shape("mask", mask, (batch, height, width), "(B, H, W)")
        dispatch.check_dtype("mask", mask, torch.bool, "compare it with a threshold")
    others = {"message": message, "expand_weight": expand_weight, "contract_weight": contract_weight,
              "norm_weight": norm_weight, "norm_bias": norm_bias}  # fmt: skip
    dispatch.check_devices({"x": x, **others, "mask": mask})
    if not torch.is_autocast_enabled(x.device.type):
        for name, t in others.items():
            dispatch.check_dtype(name, t, x.dtype, "convert it to the dtype of x, or use autocast")
    return dispatch.compute_dtype(x)


@torch.library.custom_op("eloftr::upsample_mlp", mutates_args=())
def _forward(
    x: Tensor,
    message: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask: Tensor | None,
) -> Tensor:
    from eloftr_kernels.upsample_mlp import kernel

    with dispatch.on_device_of(x):
        return kernel.forward(x, message, expand_weight, contract_weight, norm_weight, norm_bias, mask)


@_forward.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


@torch.library.custom_op("eloftr::upsample_mlp_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    message: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from eloftr_kernels.upsample_mlp import kernel

    with dispatch.on_device_of(x):
        return kernel.backward(grad, x, message, expand_weight, contract_weight, norm_weight, norm_bias, mask)


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    message: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels, rows, columns = message.shape
    return (
        torch.empty_like(x),
        message.new_empty((batch, rows, columns, channels)).permute(0, 3, 1, 2),
        expand_weight.new_empty(expand_weight.shape),
        contract_weight.new_empty(contract_weight.shape),
        torch.empty_like(norm_weight),
        torch.empty_like(norm_bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors), None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
