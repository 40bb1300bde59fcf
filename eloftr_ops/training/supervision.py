# SPDX-License-Identifier: Apache-2.0
"""True coarse pairs and true pixels from a homography, or from depth and pose; checked candidates from a pose alone.

Labels are always computed at full precision: autocast is off in these functions.

Convention:
    Everything is in the keypoint frame (centre of pixel (x, y) at (x + 0.5, y + 0.5)), intrinsics included; cell
    (column, row) stands at (8 column, 8 row), pixel q of its window at 8 column + q - 3.5, as the matcher reports
    them. ``X1 = R X0 + t`` with (R, t) of ``T_0to1``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.window_match import pixel_offsets
from eloftr_ops.data.scene_geometry import reproject
from eloftr_ops.geometry import fundamental_from_pose
from eloftr_ops.geometry._precision import to_work
from eloftr_ops.types import CELL, CoarsePairs, WindowTargets

_SAME_SURFACE = 0.05  # relative difference of neighbouring depths up to which they are interpolated


class DepthLabels(NamedTuple):
    """Depth, intrinsics and pose of a batch of pairs.

    Convention:
        See the module. Depth is z at the pixel centres, 0 or less, infinite or NaN where it is unknown.
    """

    depth0: Tensor  # (B, H0, W0) at the size of image 0
    depth1: Tensor  # (B, H1, W1)
    K0: Tensor  # (B, 3, 3)
    K1: Tensor  # (B, 3, 3)
    T_0to1: Tensor  # (B, 4, 4)

    def swapped(self) -> DepthLabels:
        """The same pairs with the images exchanged."""
        R, t = self.T_0to1[:, :3, :3].mT, self.T_0to1[:, :3, 3]
        T_1to0 = self.T_0to1.clone()
        T_1to0[:, :3, :3], T_1to0[:, :3, 3] = R, -(R * t[:, None]).sum(-1)
        return DepthLabels(self.depth1, self.depth0, self.K1, self.K0, T_1to0)


@torch.no_grad()
def pairs_from_homography(
    H_0to1: Tensor,
    grid0: tuple[int, int],
    grid1: tuple[int, int],
    valid0: Tensor | None = None,
    valid1: Tensor | None = None,
) -> CoarsePairs:
    """Cells that are each other's nearest under the homography.

    Points beyond the horizon have no match. In front of it the denominator has the sign of the determinant. A singular
    homography gives no pair.

    Args:
        H_0to1: (B, 3, 3) image 0 to image 1, keypoint frame, any scale and sign.
        grid0: (h0, w0) cells.
        grid1: (h1, w1) cells.
        valid0: (B, h0, w0) bool, cells that show the scene.
        valid1: (B, h1, w1) bool.
    """
    H_1to0 = torch.linalg.inv_ex(to_work(H_0to1))[0].to(H_0to1)
    return _mutual_pairs(
        lambda points: _transformed(H_0to1[:, None], points),
        lambda points: _transformed(H_1to0[:, None], points),
        (grid0, grid1),
        (valid0, valid1),
        H_0to1[:, 0, :2],
    )


@torch.no_grad()
def window_targets_from_homography(
    H_0to1: Tensor, pairs: CoarsePairs, grid0: tuple[int, int], grid1: tuple[int, int]
) -> WindowTargets:
    """True pixels in the windows of ``pairs``; arguments as :func:`pairs_from_homography`.

    Window pixels off the images (the windows of the first row and column reach over the border) have no target.
    """
    points0 = _window_points(pairs.cells0, grid0, H_0to1)
    points1, seen = _transformed(H_0to1[pairs.batch][:, None], points0)
    return _window_targets(points0, points1, seen, pairs.cells1, grid1)


@torch.no_grad()
def pairs_from_depth(
    labels: DepthLabels,
    grid0: tuple[int, int],
    grid1: tuple[int, int],
    valid0: Tensor | None = None,
    valid1: Tensor | None = None,
    *,
    tolerance: float = 0.05,
) -> CoarsePairs:
    """Cells that are each other's nearest under depth and pose, and see the same surface (LoFTR, section 3.5).

    A pair without any gives no pair.

    Args:
        labels: depth, intrinsics and pose.
        grid0: (h0, w0) cells.
        grid1: (h1, w1) cells.
        valid0: (B, h0, w0) bool, cells that take part.
        valid1: (B, h1, w1) bool.
        tolerance: a point counts as occluded where the depth that the pose gives it and the other image's depth
            differ by more than this share, between 0 and 1. LoFTR takes 0.2; exact depth allows less.

    Raises:
        ValueError: the tolerance is out of range.
    """
    labels = DepthLabels(*(label.float() for label in labels))
    backward = labels.swapped()
    return _mutual_pairs(
        lambda points: _seen_by_depth(labels, points.expand(len(labels.K0), -1, -1), tolerance),
        lambda points: _seen_by_depth(backward, points.expand(len(labels.K0), -1, -1), tolerance),
        (grid0, grid1),
        (valid0, valid1),
        labels.K0[:, 0, :2],
    )


@torch.no_grad()
def window_targets_from_depth(
    labels: DepthLabels,
    pairs: CoarsePairs,
    grid0: tuple[int, int],
    grid1: tuple[int, int],
    *,
    tolerance: float = 0.05,
) -> WindowTargets:
    """True pixels in the windows of ``pairs``; arguments as :func:`pairs_from_depth`.

    Window pixels have no target if image 1 does not show their surface. A wrong pair has no targets.
    """
    labels = DepthLabels(*(label.float() for label in labels))
    points0 = _window_points(pairs.cells0, grid0, labels.K0)
    points1, seen = _seen_by_depth(labels, points0, tolerance, pairs.batch)
    return _window_targets(points0, points1, seen, pairs.cells1, grid1)


@torch.no_grad()
def pairs_consistent_with_pose(
    candidates: CoarsePairs,
    K0: Tensor,
    K1: Tensor,
    T_0to1: Tensor,
    grid0: tuple[int, int],
    grid1: tuple[int, int],
    *,
    max_distance: float = CELL,
) -> CoarsePairs:
    """Candidates that a pose alone does not rule out.

    A pose without depth does not say which pairs are true. Matches of the matcher itself that agree with the pose can
    serve as labels instead.

    Args:
        candidates: pairs of cells, for instance the matcher's own.
        K0: (B, 3, 3) intrinsics, keypoint frame.
        K1: (B, 3, 3).
        T_0to1: (B, 4, 4). Without translation there is no epipolar geometry, and the distance is that from where the
            rotation alone takes the point.
        grid0: (h0, w0) cells.
        grid1: (h1, w1) cells.
        max_distance: pixels of Sampson distance; the true partners of a pair of cells, each up to half a cell off
            along both axes, lie within 4 sqrt(2).
    """
    points0 = _positions(candidates.cells0, grid0).to(K0)
    points1 = _positions(candidates.cells1, grid1).to(K1)
    with torch.autocast(K0.device.type, enabled=False):
        F_0to1 = fundamental_from_pose(T_0to1, K0, K1)
        turned = to_work(K1) @ to_work(T_0to1[:, :3, :3]) @ torch.linalg.inv(to_work(K0))
    x0, x1 = to_work(points0), to_work(points1)
    batch = candidates.batch.to(x0.device)
    moved, front = _transformed(turned[batch][:, None], x0[:, None])
    rotated = torch.where(front[:, 0], (moved[:, 0] - x1).norm(dim=-1), torch.inf)
    moving = to_work(T_0to1)[:, :3, 3].norm(dim=-1)[batch] > 0
    distance = torch.where(moving, _sampson(to_work(F_0to1)[batch], x0, x1), rotated)
    kept = (distance <= max_distance).to(points0.device)
    return CoarsePairs(*(field[kept] for field in candidates))


def sample_pairs(pairs: CoarsePairs, count: int, generator: torch.Generator) -> CoarsePairs:
    """At most ``count`` of the pairs, drawn without replacement."""
    if len(pairs.batch) <= count:
        return pairs
    order = torch.randperm(len(pairs.batch), generator=generator)[:count].to(pairs.batch.device)
    return CoarsePairs(*(field[order] for field in pairs))


def pad_with_true_pairs(
    predicted: CoarsePairs, true: CoarsePairs, count: int, minimum: int, generator: torch.Generator
) -> CoarsePairs:
    """Training pairs of the fine stage: predicted pairs, filled up with true ones (ground-truth padding, LoFTR).

    The result always has ``count`` pairs. So the fine stage also learns early in training, when there are few matches,
    and memory does not depend on the batch. Without a true pair it has only predicted pairs, perhaps none.

    Args:
        predicted: pairs that the matcher selected; at most ``count - minimum`` are drawn of them.
        true: true pairs, drawn with replacement.
        count: pairs in all.
        minimum: true pairs at least.
        generator: CPU source of randomness.

    Returns:
        The pairs, predicted ones first.

    Raises:
        ValueError: not 0 <= minimum <= count.
    """
    if not 0 <= minimum <= count:
        raise ValueError(f"minimum, count: expected 0 <= minimum <= count, got {minimum} and {count}.")
    kept = sample_pairs(predicted, count - minimum, generator)
    if len(true.batch) == 0:
        return kept
    order = torch.randint(len(true.batch), (count - len(kept.batch),), generator=generator).to(true.batch.device)
    return CoarsePairs(*(torch.cat([a, b[order]]) for a, b in zip(kept, true, strict=True)))


_Warp = Callable[[Tensor], tuple[Tensor, Tensor]]  # (1, N, 2) points to (B, N, 2) points and (B, N) bool


def _mutual_pairs(
    warp_0to1: _Warp,
    warp_1to0: _Warp,
    grids: tuple[tuple[int, int], tuple[int, int]],
    valid: tuple[Tensor | None, Tensor | None],
    like: Tensor,
) -> CoarsePairs:
    grid0, grid1 = grids
    forward, inside0 = _nearest_cells(warp_0to1, grid0, grid1, like)
    backward, inside1 = _nearest_cells(warp_1to0, grid1, grid0, like)
    own = torch.arange(grid0[0] * grid0[1], device=like.device)
    mutual = inside0 & inside1.gather(1, forward) & (backward.gather(1, forward) == own)
    if valid[0] is not None:
        mutual &= valid[0].flatten(1)
    if valid[1] is not None:
        mutual &= valid[1].flatten(1).gather(1, forward)
    batch, cells0 = mutual.nonzero(as_tuple=True)
    return CoarsePairs(batch, cells0, forward[batch, cells0])


def _nearest_cells(warp: _Warp, grid: tuple[int, int], target: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest target cell of every cell, (B, h * w) clamped, and whether it exists."""
    cells = torch.arange(grid[0] * grid[1], device=like.device)
    points, seen = warp(_positions(cells, grid).to(like)[None])
    nearest = (points / CELL).round()
    limit = torch.tensor([target[1], target[0]], device=like.device)
    inside = ((nearest >= 0) & (nearest < limit)).all(-1) & seen
    column, row = torch.where(inside[..., None], nearest, 0).long().unbind(-1)
    return row * target[1] + column, inside


def _window_points(cells: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor:
    """(M, 64, 2) pixel centres of the cells' windows."""
    return _positions(cells, grid).to(like)[:, None] + pixel_offsets(like)


def _window_targets(
    points0: Tensor, points1: Tensor, seen: Tensor, cells1: Tensor, grid1: tuple[int, int]
) -> WindowTargets:
    # The centre of the window's first pixel.
    origin = _positions(cells1, grid1).to(points1)[:, None] - (CELL - 1) / 2
    relative = points1 - origin
    pixel = relative.round()
    on_images = (points0 > 0).all(-1) & (origin + pixel > 0).all(-1)
    visible = ((pixel >= 0) & (pixel < CELL)).all(-1) & on_images & seen
    column, row = torch.where(visible[..., None], pixel, 0).long().unbind(-1)
    return WindowTargets(visible, row * CELL + column, torch.where(visible[..., None], relative - pixel, 0))


def _transformed(H: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Points (..., 2) under homographies (..., 3, 3), by sums that autocast leaves alone; False beyond the horizon."""
    H = H * torch.linalg.det(to_work(H)).sign().to(H)[..., None, None]
    x, y = points.unbind(-1)
    mapped = [H[..., row, 0] * x + H[..., row, 1] * y + H[..., row, 2] for row in range(3)]
    front = mapped[2] > 0
    return torch.stack(mapped[:2], dim=-1) / torch.where(front, mapped[2], 1)[..., None], front


def _seen_by_depth(
    labels: DepthLabels, points0: Tensor, tolerance: float, batch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where points (N, K, 2) of image 0 lie in image 1, and whether it shows them; row n is of pair batch[n]."""
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a share between 0 and 1, got {tolerance}.")
    batch = torch.arange(len(points0), device=points0.device) if batch is None else batch
    inverse0 = _inverse_depth(labels.depth0, batch, points0)
    known = inverse0 > 0
    K0, K1, T = (matrix[batch] for matrix in (labels.K0, labels.K1, labels.T_0to1))
    points1, z1 = reproject(points0, 1 / torch.where(known, inverse0, 1), K0, K1, T)
    inverse1 = _inverse_depth(labels.depth1, batch, points1)
    # Below 1 the tolerance also rules out what lies behind camera 1 and what has no depth there.
    return points1, known & ((inverse1 * z1 - 1).abs() < tolerance)


def _inverse_depth(depth: Tensor, batch: Tensor, points: Tensor) -> Tensor:
    """1 / depth at points (N, K, 2), 0 where unknown or off the image.

    Inverse depth is linear on a plane, so that interpolating it is exact there. Over an edge, or beside unknown depth,
    the nearest pixel's counts.
    """
    height, width = depth.shape[1:]
    extent = torch.tensor([width, height], device=points.device)
    inside = ((points >= 0) & (points <= extent)).all(-1)
    points = torch.where(inside[..., None], points, 0)
    first = (points - 0.5).floor()
    weight = points - 0.5 - first

    def at(column_row: Tensor) -> Tensor:
        column, row = torch.minimum(column_row.long().clamp(min=0), extent - 1).unbind(-1)
        value = depth[batch[:, None], row, column]
        known = torch.isfinite(value) & (value > 0)
        return torch.where(known, 1 / torch.where(known, value, 1), 0)

    steps = first.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    corners = torch.stack([at(first + step) for step in steps], dim=-1)
    upper = torch.lerp(corners[..., 0], corners[..., 1], weight[..., 0])
    lower = torch.lerp(corners[..., 2], corners[..., 3], weight[..., 0])
    smooth = corners.amin(-1) * (1 + _SAME_SURFACE) > corners.amax(-1)
    return torch.where(smooth, torch.lerp(upper, lower, weight[..., 1]), at(points.floor())) * inside


def _sampson(F_0to1: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
    """Sampson distance (M,) of points (M, 2) under matrices (M, 3, 3); Hartley and Zisserman, equation 11.9."""
    x0, x1 = (F.pad(points, (0, 1), value=1.0) for points in (points0, points1))
    line1 = (F_0to1 * x0[:, None]).sum(-1)
    line0 = (F_0to1 * x1[:, :, None]).sum(-2)
    slope = torch.cat([line0[:, :2], line1[:, :2]], dim=-1).norm(dim=-1)
    distance: Tensor = (x1 * line1).sum(-1).abs() / slope.clamp(min=torch.finfo(slope.dtype).tiny)
    return distance


def _positions(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    return CELL * torch.stack([cells % grid[1], cells // grid[1]], -1)
