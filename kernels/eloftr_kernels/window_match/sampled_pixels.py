# SPDX-License-Identifier: Apache-2.0
"""Pairs of pixels drawn from the joint probability of fine windows."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.noise import counters, gumbel
from eloftr_kernels.window_match.cpu import CHUNK, CHUNK_CPU, pixel_log_joint, recomputed, windows
from eloftr_kernels.window_match.naive import RING, WINDOW, pixel_offsets


class DrawnPixels(NamedTuple):
    """Offsets (x, y) in pixels from the frame position 8 * (column, row) of each match's cell."""

    pixel0: Tensor  # (M, T, 2) -3.5 .. 3.5, no gradient
    pixel1: Tensor  # (M, T, 2)
    log_probability: Tensor  # (M, T) of the pair of pixels, given the pair of cells; with gradient


def sample_pixels(
    map0: Tensor,  # (B, D, 4h, 4w) fused fine features at 1/2
    map1: Tensor,  # (B, D, 4h', 4w')
    batch: Tensor,  # (M,) int64
    cells0: Tensor,  # (M,) int64, row * w + column
    cells1: Tensor,  # (M,) int64
    subpixel_channels: int,
    *,
    keys: Tensor,  # (M,) int32
    draws: int,
) -> DrawnPixels:
    """Draw ``draws`` of the 64 x 64 pairs of pixels of each window, without replacement.

    The probability is the window's dual softmax, divided by its sum over the 64 x 64 pairs. Drawn by Gumbel top-k, as
    :func:`eloftr_kernels.dual_softmax.sampled_pairs.sample_pairs`. Windows are worked off in chunks, each recomputed
    in the backward pass.

    Returns:
        As the fields say; float32, or float64 for float64 maps. No match gives empty tensors.
    """
    draw = partial(_draw, subpixel_channels=subpixel_channels, draws=draws)
    chunk = CHUNK_CPU if map0.device.type == "cpu" else CHUNK
    parts = [
        recomputed(draw, map0, map1, *(x[start : start + chunk] for x in (batch, cells0, cells1, keys)))
        for start in range(0, max(1, len(batch)), chunk)
    ]
    return DrawnPixels(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def window_log_joint(
    map0: Tensor, map1: Tensor, batch: Tensor, cells0: Tensor, cells1: Tensor, subpixel_channels: int
) -> Tensor:
    """(M, 64, 64) logarithm of the dual-softmax probability of the pairs of pixels of each window; with gradient."""
    joint = partial(_log_joint, subpixel_channels=subpixel_channels)
    chunk = CHUNK_CPU if map0.device.type == "cpu" else CHUNK
    parts = [
        recomputed(joint, map0, map1, *(x[start : start + chunk] for x in (batch, cells0, cells1)))
        for start in range(0, max(1, len(batch)), chunk)
    ]
    return torch.cat(parts)


def _log_joint(
    map0: Tensor, map1: Tensor, batch: Tensor, cells0: Tensor, cells1: Tensor, subpixel_channels: int
) -> Tensor:
    windows0 = windows(map0, batch, cells0, ring=0)[..., :-subpixel_channels]
    windows1 = windows(map1, batch, cells1, ring=RING)[..., :-subpixel_channels]
    return pixel_log_joint(windows0, windows1, map0.shape[1])


def _draw(
    map0: Tensor,
    map1: Tensor,
    batch: Tensor,
    cells0: Tensor,
    cells1: Tensor,
    keys: Tensor,
    subpixel_channels: int,
    draws: int,
) -> DrawnPixels:
    """One chunk of matches."""
    log_joint = _log_joint(map0, map1, batch, cells0, cells1, subpixel_channels).flatten(1)
    with torch.autocast(log_joint.device.type, enabled=False):
        log_joint = F.log_softmax(log_joint, 1)
    with torch.no_grad():
        noise = gumbel(keys[:, None], counters(0, WINDOW**4, keys.device))
        drawn = (log_joint + noise).topk(draws, 1).indices
        grid = pixel_offsets(log_joint)
    pixel0, pixel1 = grid[drawn // WINDOW**2], grid[drawn % WINDOW**2]
    return DrawnPixels(pixel0, pixel1, log_joint.gather(1, drawn))
