# SPDX-License-Identifier: Apache-2.0
"""Two-stage matching of fine windows with PyTorch's own operations: for the CPU, and devices without a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eloftr_kernels.arithmetic import (
    Scratch,
    first_best,
    first_reaching,
    tie_margin,
    two_way_logsumexp,
    upcast_for_accumulation,
)
from eloftr_kernels.dispatch import is_cpu_inference
from eloftr_kernels.window_match.naive import (
    RING,
    WINDOW,
    WindowMatches,
    pixel_offsets,
    subpixel_expectation,
)

# Matches whose windows and scores are held at once: on a CPU what its caches hold (6 MB of scores), elsewhere 0.2 GB.
CHUNK_CPU, CHUNK = 256, 1024
_SCORES = WINDOW**2 * (WINDOW + 2 * RING) ** 2  # of one match
_PATCH = WINDOW // 2 + 2  # half-resolution positions per side that a window is interpolated from

T = TypeVar("T")


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
    """As :func:`naive.window_match`, on windows of matched cells only.

    Matches are worked off in chunks. Each is recomputed in the backward pass, so that memory stays bounded.
    """
    # Channels last once, so that no chunk copies the map to gather from it.
    map0, map1 = (m.contiguous(memory_format=torch.channels_last) for m in (map0, map1))
    match = partial(
        _match,
        subpixel_channels=subpixel_channels,
        subpixel_temperature=subpixel_temperature,
        centred_subpixel=centred_subpixel,
        soft_temperature=soft_temperature,
    )
    chunk = CHUNK_CPU if map0.device.type == "cpu" else CHUNK
    if torch.compiler.is_compiling() or len(batch) <= chunk:  # loops would be written out
        return match(map0, map1, batch, cells0, cells1)
    if is_cpu_inference(map0):
        match = partial(match, memory=[Scratch(chunk * _SCORES, upcast_for_accumulation(map0[:0])) for _ in "ab"])
    parts = [
        recomputed(match, map0, map1, *(index[start : start + chunk] for index in (batch, cells0, cells1)))
        for start in range(0, len(batch), chunk)
    ]
    soft = soft_temperature is not None
    return WindowMatches(
        torch.cat([p.pixel0 for p in parts]),
        torch.cat([p.pixel1 for p in parts]),
        torch.cat([p.subpixel1 for p in parts]),
        torch.cat([p.expected0 for p in parts if p.expected0 is not None]) if soft else None,
        torch.cat([p.expected1 for p in parts if p.expected1 is not None]) if soft else None,
    )


def _match(
    map0: Tensor,
    map1: Tensor,
    batch: Tensor,
    cells0: Tensor,
    cells1: Tensor,
    subpixel_channels: int,
    subpixel_temperature: float,
    centred_subpixel: bool,
    soft_temperature: float | None,
    memory: Sequence[Scratch] | None = None,
) -> WindowMatches:
    """One chunk of matches."""
    channels = map0.shape[1]
    order, place = _inside_first(map1.device)
    windows0 = windows(map0, batch, cells0, ring=0)
    windows1 = windows(map1, batch, cells1, ring=RING, order=order)
    sizes = [channels - subpixel_channels, subpixel_channels]
    coarse0, sub0 = torch.split(windows0, sizes, -1)
    coarse1, sub1 = torch.split(windows1, sizes, -1)
    halves, over1 = _half_log_joint(coarse0, coarse1, channels, memory)
    index0, index1 = _best_pixels(halves, over1)
    sub1 = sub1.index_select(1, place)
    subpixel1 = subpixel_expectation(sub0, sub1, index0, index1, subpixel_temperature, centred_subpixel)
    grid = pixel_offsets(halves)
    expected0 = expected1 = None
    if soft_temperature is not None:
        with torch.autocast(halves.device.type, enabled=False):
            log_joint = 2 * halves - over1[..., None]
            joint = F.softmax(log_joint.flatten(1) / soft_temperature, 1)
            joint = joint.view(joint.shape[0], WINDOW**2, WINDOW**2)
            expected0, expected1 = joint.sum(2) @ grid, joint.sum(1) @ grid
    return WindowMatches(grid[index0], grid[index1], subpixel1, expected0, expected1)


def windows(fine_map: Tensor, batch: Tensor, cells: Tensor, ring: int, order: Tensor | None = None) -> Tensor:
    """Feature windows of the map upsampled by two, of the given cells only.

    Args:
        fine_map: (B, D, 4h, 4w).
        batch: (M,) int64.
        cells: (M,) int64.
        ring: pixels added around the 8x8 window; those outside the upsampled map are zero.
        order: (P,) int64 in which the pixels come; default: rows first.

    Returns:
        (M, (8 + 2 ring)^2, D).
    """
    height, width = fine_map.shape[-2:]
    rows, columns = cells // (width // 4) * 4, cells % (width // 4) * 4
    taps = torch.arange(_PATCH, device=cells.device) - 1
    y = (rows[:, None] + taps).clamp(0, height - 1)
    x = (columns[:, None] + taps).clamp(0, width - 1)
    flat = (batch[:, None, None] * height + y[:, :, None]) * width + x[:, None, :]
    patches = fine_map.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, flat.flatten()).unflatten(0, flat.shape)
    side = WINDOW + 2 * ring
    pixels = torch.arange(side**2, device=cells.device) if order is None else order
    w: Tensor = _upsampling_matrix(ring, patches)[pixels] @ patches.flatten(1, 2)
    if not ring:
        return w
    inside_y, inside_x = _inside(rows, height, side, ring), _inside(columns, width, side, ring)
    if is_cpu_inference(fine_map) and bool(inside_y.all() & inside_x.all()):
        return w
    return w * (inside_y[:, :, None] & inside_x[:, None]).flatten(1)[:, pixels, None]


def pixel_log_joint(coarse0: Tensor, coarse1: Tensor, channels: int) -> Tensor:
    """Logarithm of the dual-softmax probability of every pixel pair, ring dropped: (M, 64, 64).

    Args:
        coarse0: (M, 64, D - d).
        coarse1: (M, 100, D - d), rows first.
        channels: D.
    """
    coarse1 = coarse1.index_select(1, _inside_first(coarse1.device)[0])
    halves, over1 = _half_log_joint(coarse0, coarse1, channels)
    return 2 * halves - over1[..., None]


def _half_log_joint(
    coarse0: Tensor,  # (M, 64, D - d)
    coarse1: Tensor,  # (M, 100, D - d), ring last
    channels: int,
    memory: Sequence[Scratch] | None = None,
) -> tuple[Tensor, Tensor]:
    """The logarithm is 2 h - over1: h (M, 64, 64), and the normalisers over image 1, (M, 64).

    It takes two passes over the scores less than the whole. With ``memory`` for two times M scores, they are kept
    there, and no gradient is.
    """
    shape = (*coarse0.shape[:2], coarse1.shape[1])
    held, scratch = (None, None) if memory is None else (part.view(*shape) for part in memory)
    with torch.autocast(coarse0.device.type, enabled=False):
        coarse0, coarse1 = upcast_for_accumulation(coarse0), upcast_for_accumulation(coarse1) / channels
        scores = torch.matmul(coarse0, coarse1.mT, out=held)
        bound = math.inf if memory is None else float(_longest(coarse0) * _longest(coarse1))
        over1, over0 = two_way_logsumexp(scores, scratch, bound=bound)
        inside = slice(WINDOW**2)
        out = None if held is None else held[..., inside]
        return torch.sub(scores[..., inside], over0[:, None, inside] / 2, out=out), over1


def _longest(vectors: Tensor) -> Tensor:
    """The largest length of (..., C); by way of a matrix product, which is what a CPU sums short rows soonest with."""
    return (vectors.square() @ vectors.new_ones(vectors.shape[-1])).amax().sqrt()


def _best_pixels(halves: Tensor, over1: Tensor) -> tuple[Tensor, Tensor]:
    """Arg-max pixel pair of what :func:`_half_log_joint` returns, the first of ties: (M,) and (M,)."""
    halves, over1 = halves.detach(), over1.detach()
    magnitude = over1.abs().amax(1)
    best, index0 = first_best(halves.amax(2) - over1 / 2, 1, magnitude)
    row = halves.gather(1, index0[:, None, None].expand(-1, 1, halves.shape[2]))[:, 0]
    row = row - over1.gather(1, index0[:, None]) / 2  # as above, for the same bits
    return index0, first_reaching(row, best - tie_margin(magnitude), 1)


def _upsampling_matrix(ring: int, like: Tensor) -> Tensor:
    """((8 + 2 ring)^2, 36): bilinear weights of window pixels on the half-resolution taps -1 .. 4 of a cell.

    Along both axes at once: more arithmetic than one after the other, in products that are not as tiny.
    """
    side = WINDOW + 2 * ring
    position = (torch.arange(side, device=like.device, dtype=torch.float32) - ring) / 2 - 0.25 + 1
    taps = torch.arange(_PATCH, device=like.device, dtype=torch.float32)
    weights = (1 - (position[:, None] - taps).abs()).clamp(min=0)
    return torch.kron(weights, weights).to(like.dtype)  # sixteenths: exact in every dtype


def _inside_first(device: torch.device) -> tuple[Tensor, Tensor]:
    """(100,) pixels of the window with its ring: those of the window, then those of the ring, rows first.

    And the inverse, the place of each pixel in that order. No sort: exported graphs have no stable one.
    """
    side = torch.arange(WINDOW + 2 * RING, device=device)
    within = (side >= RING) & (side < WINDOW + RING)
    inside = (within[:, None] & within).flatten().long()
    place = torch.where(inside > 0, inside.cumsum(0) - 1, WINDOW**2 - 1 + (1 - inside).cumsum(0))
    return torch.zeros_like(place).scatter(0, place, torch.arange(len(place), device=device)), place


def _inside(start: Tensor, size: int, side: int, ring: int) -> Tensor:
    """(M, side) bool: which window pixels along one axis lie in the upsampled map."""
    position = 2 * start[:, None] + torch.arange(side, device=start.device) - ring
    return (position >= 0) & (position < 2 * size)


def recomputed(function: Callable[..., T], *args: Tensor) -> T:
    """Call ``function`` keeping only its inputs for the backward."""
    if torch.is_grad_enabled() and any(a.requires_grad for a in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    return function(*args)
