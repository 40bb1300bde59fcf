# SPDX-License-Identifier: Apache-2.0
"""Operator and public function of the window matches; formulas in ``naive.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eloftr_kernels.dispatch import (
    check_devices,
    check_dtype,
    check_indices,
    check_positive,
    check_shape,
    once_per_signature,
    use_triton,
    why_not_triton,
)
from eloftr_kernels.registration import differentiable, operator
from eloftr_kernels.window_match import cpu
from eloftr_kernels.window_match.naive import WindowMatches

MAX_CHANNELS = 64


def window_match(
    map0: Tensor,  # (B, D, 4h, 4w) fused fine features at 1/2
    map1: Tensor,  # (B, D, 4h', 4w')
    batch: Tensor,  # (M,) int64
    cells0: Tensor,  # (M,) int64, row * w + column
    cells1: Tensor,  # (M,) int64
    subpixel_channels: int,
    subpixel_temperature: float,
    centred_subpixel: bool = False,
    soft_temperature: float | None = None,
) -> WindowMatches:
    r"""Pixel pair by dual softmax and arg-max, then sub-pixel offset by soft-argmax (EfficientLoFTR, 3.4).

    With windows :math:`a` (8x8 of image 0) and :math:`b` (10x10 of image 1) of the maps upsampled bilinearly
    by two, split into the first :math:`D-d` and the last :math:`d` = ``subpixel_channels`` channels,

    .. math::
        p_{lr} &= \mathrm{softmax}_l(s_{lr})\;\mathrm{softmax}_r(s_{lr}), \quad
        s_{lr} = \langle a_l, b_r\rangle / D, \\
        (l^*, r^*) &= \arg\max_{r\,\text{inside}} p_{lr}, \qquad
        \delta = \sum_{\Delta\in\{-1,0,1\}^2} \Delta\;
        \mathrm{softmax}_\Delta\bigl(\langle a'_{l^*}, b'_{r^*+\Delta}\rangle / (\sqrt d\,\tau)\bigr).

    Convention:
        Offsets are (x, y) in pixels from the frame position 8 * (column, row) of each match's cell. Gradient
        reaches both maps through ``subpixel1`` and the expectations; the arg-max pixels have none. Of probabilities
        that are equal but for rounding (:func:`eloftr_kernels.arithmetic.first_best`) the lowest pixel of image 0,
        then of image 1, wins. No match gives empty fields and zero
        gradients. The kernels add up gradients in a fixed order; they have no second derivative and say so;
        the reference has. Indices must name cells of the maps. On the CPU others raise; on a GPU, where
        reading them would wait for the device, a match outside the maps gets NaN and gives no gradient.
        A call that ``torch.compile`` traces is not checked on the CPU either.

    Args:
        map0: (B, D, 4h, 4w) float32, float16 or bfloat16 (float64: reference), any strides.
        map1: (B, D, 4h', 4w'), same dtype.
        batch: (M,) int64.
        cells0: (M,) int64.
        cells1: (M,) int64.
        subpixel_channels: d, at least 1 and fewer than D.
        subpixel_temperature: positive.
        centred_subpixel: see :func:`~eloftr_kernels.window_match.subpixel_scores`.
        soft_temperature: positive T: also return the expectations of both pixels under :math:`p^{1/T}`,
            normalised over the 64x64 pairs.

    Returns:
        Offsets (M, 2), float32 (float64 for float64 maps), also under autocast.

    Raises:
        ValueError: shapes or devices that do not fit, options out of range.
        TypeError: dtypes that differ, indices that are not int64.
        IndexError: on the CPU, an index outside the maps.
        RuntimeError: ``backend("triton")`` that cannot be honoured.
    """
    triton = _decide((map0, map1), subpixel_channels, subpixel_temperature, soft_temperature)[0]
    _check_matches(map0, {"batch": batch, "cells0": cells0, "cells1": cells1})
    if not triton or map0.device.type == "cpu" or not map0.shape[0]:
        cells = [(m.shape[2] // 4) * (m.shape[3] // 4) for m in (map0, map1)]
        check_indices({"batch": (batch, map0.shape[0]), "cells0": (cells0, cells[0]), "cells1": (cells1, cells[1])})
    options = subpixel_channels, subpixel_temperature, centred_subpixel, soft_temperature
    if not triton:
        return cpu.window_match(map0, map1, batch, cells0, cells1, *options)
    pixel0, pixel1, subpixel1, expected0, expected1, _ = _forward(map0, map1, batch, cells0, cells1, *options)
    soft = (None, None) if soft_temperature is None else (expected0, expected1)
    return WindowMatches(pixel0.detach(), pixel1.detach(), subpixel1, *soft)


@once_per_signature
def _decide(
    tensors: tuple[Tensor, ...],
    subpixel_channels: int,
    subpixel_temperature: float,
    soft_temperature: float | None,
) -> tuple[bool]:
    """Whether Triton runs; checks everything but the matches, which differ from call to call."""
    map0, map1 = tensors
    _check(map0, map1, subpixel_channels, subpixel_temperature, soft_temperature)
    return (use_triton("window_match", why_not(map0, map1)),)


def why_not(map0: Tensor, map1: Tensor) -> str | None:
    """Why Triton is not used for these arguments, as half a sentence; None where it is."""
    reason = why_not_triton({"map0": map0, "map1": map1})
    if reason is None and map0.shape[1] > MAX_CHANNELS:
        return f"{map0.shape[1]} channels are more than the {MAX_CHANNELS} of windows that fit the registers"
    return reason


def _forward_fake(map0: Tensor, map1: Tensor, batch: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    count, soft_temperature = batch.shape[0], rest[-1]
    pixel0, pixel1, subpixel1 = (map0.new_empty((count, 2), dtype=torch.float32) for _ in range(3))
    soft = 0 if soft_temperature is None else count
    expected0, expected1 = (map0.new_empty((soft, 2), dtype=torch.float32) for _ in range(2))
    return pixel0, pixel1, subpixel1, expected0, expected1, map0.new_empty((count,), dtype=torch.int64)


@operator("eloftr::window_match", fake=_forward_fake)
def _forward(
    map0: Tensor,
    map1: Tensor,
    batch: Tensor,
    cells0: Tensor,
    cells1: Tensor,
    subpixel_channels: int,
    subpixel_temperature: float,
    centred_subpixel: bool,
    soft_temperature: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from eloftr_kernels.window_match import launch

    return launch.window_match_forward(
        map0, map1, batch, cells0, cells1, subpixel_channels, subpixel_temperature, centred_subpixel, soft_temperature
    )  # fmt: skip


def _backward_fake(best: Tensor, grads: list[Tensor], map0: Tensor, map1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(map0), torch.empty_like(map1)


@operator("eloftr::window_match_backward", fake=_backward_fake)
def _backward(
    best: Tensor,
    grads: list[Tensor],  # of subpixel1, expected0, expected1
    map0: Tensor,
    map1: Tensor,
    batch: Tensor,
    cells0: Tensor,
    cells1: Tensor,
    subpixel_channels: int,
    subpixel_temperature: float,
    centred_subpixel: bool,
    soft_temperature: float | None,
) -> tuple[Tensor, Tensor]:
    from eloftr_kernels.window_match import launch

    subpixel1, expected0, expected1 = grads
    return launch.window_match_backward(
        subpixel1, expected0, expected1, best, map0, map1, batch, cells0, cells1,
        subpixel_channels, subpixel_temperature, centred_subpixel, soft_temperature,
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, channels, temperature, centred, soft_temperature = inputs
    ctx.save_for_backward(output[-1], *tensors)
    ctx.options = channels, temperature, centred, soft_temperature


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    best, *tensors = ctx.saved_tensors
    grad0, grad1 = _backward(best, list(grads[2:5]), *tensors, *ctx.options)
    return grad0, grad1, *(None,) * 7


differentiable(_forward, save=_save, backward=_gradients)


def _check(
    map0: Tensor,
    map1: Tensor,
    subpixel_channels: int,
    subpixel_temperature: float,
    soft_temperature: float | None,
) -> None:
    check_shape("map0", map0, (None,) * 4, "(B, D, 4h, 4w)")
    B, D = map0.shape[:2]
    check_shape("map1", map1, (B, D, None, None), "(B, D, 4h', 4w')")
    check_dtype("map1", map1, map0.dtype, "convert both maps to one dtype")
    if not map0.is_floating_point():
        raise TypeError(f"map0: expected a floating-point dtype, got {map0.dtype}; convert it with .float().")
    for name, fine_map in (("map0", map0), ("map1", map1)):
        if min(fine_map.shape[2:]) < 4:
            raise ValueError(f"{name}: expected at least 4 rows and 4 columns (one cell), got {tuple(fine_map.shape)}.")
    check_devices({"map0": map0, "map1": map1})
    if not 0 < subpixel_channels < D:
        raise ValueError(f"subpixel_channels: expected 1 to D - 1 = {D - 1}, got {subpixel_channels}.")
    temperatures = {"subpixel_temperature": subpixel_temperature, "soft_temperature": soft_temperature}
    for name, temperature in temperatures.items():
        if temperature is not None:
            check_positive(name, temperature)


def _check_matches(map0: Tensor, matches: dict[str, Tensor]) -> None:
    batch = matches["batch"]
    count = batch.shape[0] if batch.ndim else None
    for name, index in matches.items():
        if index.shape != (count,):
            check_shape(name, index, (count,), "(M,)")
        check_dtype(name, index, torch.int64, "convert it with .long()")
        if index.device != map0.device:
            check_devices({"map0": map0, name: index})
