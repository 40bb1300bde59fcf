# SPDX-License-Identifier: Apache-2.0
"""True coarse pairs and true pixels from a homography.

Convention: everything is in the keypoint frame (centre of pixel (x, y) at (x + 0.5, y + 0.5)); cell (column, row)
stands at (8 column, 8 row), pixel q of its window at 8 column + q - 3.5, as the matcher reports them.
"""

from __future__ import annotations

import torch
from kornia.geometry.linalg import transform_points
from torch import Tensor

from eloftr_kernels.window_match import pixel_offsets
from eloftr_ops.types import CoarsePairs, WindowTargets

CELL = 8


@torch.no_grad()
def pairs_from_homography(
    H_0to1: Tensor,
    grid0: tuple[int, int],
    grid1: tuple[int, int],
    valid0: Tensor | None = None,
    valid1: Tensor | None = None,
) -> CoarsePairs:
    """Cells that are each other's nearest under the homography.

    Args:
        H_0to1: (B, 3, 3) image 0 to image 1, keypoint frame.
        grid0: (h0, w0) cells.
        grid1: (h1, w1) cells.
        valid0: (B, h0, w0) bool, cells that show the scene.
        valid1: (B, h1, w1) bool.
    """
    forward, inside0 = _nearest_cells(H_0to1, grid0, grid1)
    backward, inside1 = _nearest_cells(torch.linalg.inv(H_0to1.double()).to(H_0to1), grid1, grid0)
    own = torch.arange(grid0[0] * grid0[1], device=H_0to1.device)
    mutual = inside0 & inside1.gather(1, forward) & (backward.gather(1, forward) == own)
    if valid0 is not None:
        mutual &= valid0.flatten(1)
    if valid1 is not None:
        mutual &= valid1.flatten(1).gather(1, forward)
    batch, cells0 = mutual.nonzero(as_tuple=True)
    return CoarsePairs(batch, cells0, forward[batch, cells0])


@torch.no_grad()
def window_targets_from_homography(
    H_0to1: Tensor, pairs: CoarsePairs, grid0: tuple[int, int], grid1: tuple[int, int]
) -> WindowTargets:
    """True pixels in the windows of ``pairs``; arguments as :func:`pairs_from_homography`."""
    offsets = pixel_offsets(H_0to1)  # (64, 2)
    points0 = _positions(pairs.cells0, grid0).to(H_0to1)[:, None] + offsets
    points1 = transform_points(H_0to1[pairs.batch], points0)
    relative = points1 - _positions(pairs.cells1, grid1).to(H_0to1)[:, None] - offsets[0]
    pixel = relative.round()
    visible = ((pixel >= 0) & (pixel < CELL)).all(-1)
    column, row = pixel.long().clamp(0, CELL - 1).unbind(-1)
    return WindowTargets(visible, row * CELL + column, relative - pixel)


def sample_pairs(pairs: CoarsePairs, count: int, generator: torch.Generator) -> CoarsePairs:
    """At most ``count`` of the pairs, drawn without replacement."""
    if len(pairs.batch) <= count:
        return pairs
    order = torch.randperm(len(pairs.batch), generator=generator)[:count].to(pairs.batch.device)
    return CoarsePairs(*(field[order] for field in pairs))


def _nearest_cells(H: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Nearest target cell of every cell, (B, h * w) clamped, and whether it exists."""
    cells = torch.arange(grid[0] * grid[1], device=H.device)
    points = transform_points(H, _positions(cells, grid).to(H).expand(len(H), -1, -1))
    nearest = (points / CELL).round()
    limit = torch.tensor([target[1], target[0]], device=H.device)
    inside = ((nearest >= 0) & (nearest < limit)).all(-1)
    column, row = torch.minimum(nearest.long().clamp(min=0), limit - 1).unbind(-1)
    return row * target[1] + column, inside


def _positions(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    return CELL * torch.stack([cells % grid[1], cells // grid[1]], -1)
