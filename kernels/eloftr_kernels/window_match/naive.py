# SPDX-License-Identifier: Apache-2.0
r"""Two-stage matching of fine windows as a formula, on maps upsampled as a whole: documentation and oracle.

With windows :math:`a` (8x8 pixels of image 0) and :math:`b` (10x10 of image 1) of the maps upsampled bilinearly by
two, split into the first :math:`D-d` and the last :math:`d` = ``subpixel_channels`` channels,

.. math::
    p_{lr} &= \mathrm{softmax}_l(s_{lr})\;\mathrm{softmax}_r(s_{lr}), \quad s_{lr} = \langle a_l, b_r\rangle / D, \\
    (l^*, r^*) &= \arg\max_{r\,\text{inside}} p_{lr}, \qquad
    \delta = \sum_{\Delta\in\{-1,0,1\}^2} \Delta\;
    \mathrm{softmax}_\Delta\bigl(\langle a'_{l^*}, b'_{r^*+\Delta}\rangle / (\sqrt d\,\tau)\bigr)

(EfficientLoFTR, section 3.4). The softmax over image 1 covers the ring of :math:`b` too; only pixels inside its 8x8 can
be matched. With ``soft_temperature`` :math:`T` the expectations of both pixels under :math:`p^{1/T}`, normalised over
the 64x64 pairs, are returned too: the soft-argmax of the window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.arithmetic import first_best, upcast_for_accumulation

WINDOW = 8  # pixels per side of a coarse cell
RING = 1  # pixels around the window of image 1, so that every 3x3 neighbourhood is complete


class WindowMatches(NamedTuple):
    """Offsets (x, y) in pixels from the frame position 8 * (column, row) of each match's cell."""

    pixel0: Tensor  # (M, 2) arg-max pixel in image 0, -3.5 .. 3.5, no gradient
    pixel1: Tensor  # (M, 2) arg-max pixel in image 1
    subpixel1: Tensor  # (M, 2) 3x3 expectation around pixel1, -1 .. 1
    expected0: Tensor | None  # (M, 2) expectation of pixel0 under the tempered joint probability
    expected1: Tensor | None  # (M, 2) expectation of pixel1


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
    """Pixel pair by dual softmax and arg-max, then sub-pixel offset by soft-argmax.

    Of probabilities that are equal but for rounding the lowest pixel of image 0, then of image 1, wins.
    """
    sizes = [map0.shape[1] - subpixel_channels, subpixel_channels]
    coarse0, sub0 = dense_windows(map0, batch, cells0, ring=0).split(sizes, -1)
    coarse1, sub1 = dense_windows(map1, batch, cells1, ring=RING).split(sizes, -1)
    scores = coarse0 @ coarse1.mT / map0.shape[1]
    side = slice(RING, RING + WINDOW)
    joint = (scores.log_softmax(1) + scores.log_softmax(2)).unflatten(2, (WINDOW + 2 * RING, -1))
    joint = joint[:, :, side, side].flatten(2)  # (M, 64, 64), logarithm
    magnitude = 2 * scores.detach().logsumexp(2).abs().amax(1)
    best = first_best(joint.flatten(1), 1, magnitude)[1]
    index0, index1 = best // WINDOW**2, best % WINDOW**2
    subpixel1 = subpixel_expectation(sub0, sub1, index0, index1, subpixel_temperature, centred_subpixel)
    grid, expected0, expected1 = pixel_offsets(joint), None, None
    if soft_temperature is not None:
        probability = (joint.flatten(1) / soft_temperature).softmax(1).view_as(joint)
        expected0, expected1 = probability.sum(2) @ grid, probability.sum(1) @ grid
    return WindowMatches(grid[index0], grid[index1], subpixel1, expected0, expected1)


def dense_windows(fine_map: Tensor, batch: Tensor, cells: Tensor, ring: int) -> Tensor:
    """(M, (8 + 2 ring)^2, D): windows cut from the whole map upsampled by two; zero outside of it."""
    up = F.interpolate(fine_map, scale_factor=2.0, mode="bilinear", align_corners=False)
    columns = up.shape[-1] // WINDOW
    up = F.pad(up, [ring] * 4)
    pixel = torch.arange(WINDOW + 2 * ring, device=cells.device)
    y = (cells // columns * WINDOW)[:, None, None] + pixel[:, None]
    x = (cells % columns * WINDOW)[:, None, None] + pixel
    return up.permute(0, 2, 3, 1)[batch[:, None, None], y, x].flatten(1, 2)


def subpixel_expectation(
    sub0: Tensor,  # (M, 64, d)
    sub1: Tensor,  # (M, 100, d)
    index0: Tensor,  # (N,) pixel of the 8x8 window of image 0
    index1: Tensor,  # (N,) pixel of the 8x8 window of image 1
    temperature: float,
    centred: bool,
    match: Tensor | None = None,  # (N,) which of the M windows each pair lies in; default: one pair each
) -> Tensor:
    """Expected (x, y) offset, -1 .. 1, over a 3x3 neighbourhood in image 1 for ``index0``: (N, 2)."""
    scores = subpixel_scores(sub0, sub1, index0, index1, temperature, centred, match)
    with torch.autocast(scores.device.type, enabled=False):
        return F.softmax(scores, 1) @ subpixel_offsets(scores)


def subpixel_scores(
    sub0: Tensor,
    sub1: Tensor,
    index0: Tensor,
    index1: Tensor,
    temperature: float,
    centred: bool,
    match: Tensor | None = None,
) -> Tensor:
    """Scores (N, 9) of the 3x3 neighbourhood, rows first; arguments as :func:`subpixel_expectation`.

    ``centred`` puts the neighbourhood around ``index1``. The released weights were trained with one that ignores the
    ring: it lies a pixel up and left, and its index -1 is the last row or column of the 10x10 window.
    """
    delta = torch.arange(-1, 2, device=sub0.device)
    side = WINDOW + 2 * RING
    shift = RING if centred else 0
    y = (index1[:, None] // WINDOW + shift + delta) % side
    x = (index1[:, None] % WINDOW + shift + delta) % side
    neighbours = (y[:, :, None] * side + x[:, None, :]).flatten(1)
    if match is None:
        match = torch.arange(index0.shape[0], device=sub0.device)
    with torch.autocast(sub0.device.type, enabled=False):
        query = upcast_for_accumulation(sub0[match, index0])
        keys = upcast_for_accumulation(sub1[match[:, None], neighbours])
        scores: Tensor = (keys @ query[:, :, None])[..., 0] / (query.shape[-1] ** 0.5 * temperature)
        return scores


def subpixel_offsets(like: Tensor) -> Tensor:
    """(9, 2) offsets (x, y) of a 3x3 neighbourhood, -1 .. 1, rows first."""
    delta = torch.arange(-1, 2, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(delta, delta, indexing="xy"), -1).flatten(0, 1)


def pixel_offsets(like: Tensor) -> Tensor:
    """(64, 2) offset (x, y) of each window pixel from the frame position of its cell, -3.5 .. 3.5."""
    line = torch.arange(WINDOW, device=like.device, dtype=like.dtype) - (WINDOW - 1) / 2
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
