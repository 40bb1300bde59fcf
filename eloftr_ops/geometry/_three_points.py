# SPDX-License-Identifier: Apache-2.0
"""Camera poses from three points in space (P3P), and the best of many such samples. No gradient."""

import torch
from torch import Tensor

from eloftr_ops.geometry._linalg import homogeneous
from eloftr_ops.geometry._minimal import draw_samples, gumbel_noise
from eloftr_ops.geometry._polynomials import real_roots
from eloftr_ops.geometry._residuals import HORIZON

SOLUTIONS = 4
SAMPLE_SIZE = 3
SAMPLES = 512
_DIRECTIONS = 48
# Residuals of samples that are held at once.
_AT_ONCE = 4_000_000


def poses_of_three(points: Tensor, rays: Tensor) -> Tensor:
    """All poses that see three points in given directions: Grunert's quartic (Haralick et al. 1994, section 3).

    Args:
        points: `(S, 3, 3)` in space, one per row.
        rays: `(S, 3, 3)`, unit directions from the camera.

    Returns:
        `(S, 4, 3, 4)` matrices [R | t]; zero where there is no such solution.
    """
    first, second, third = rays.unbind(1)
    cos_a, cos_b, cos_c = (second * third).sum(1), (first * third).sum(1), (first * second).sum(1)
    sides = points[:, [1, 0, 0]] - points[:, [2, 2, 1]]
    a2, b2, c2 = sides.square().sum(2).unbind(1)
    a, c = a2 / b2, c2 / b2
    d, e = a - c, 1.0 - a - c
    coefficients = torch.stack(
        [
            (d - 1.0).square() - 4.0 * c * cos_a.square(),
            4.0 * (d * (1.0 - d) * cos_b - e * cos_a * cos_c + 2.0 * c * cos_a.square() * cos_b),
            2.0 * (d.square() - 1.0 + 2.0 * d.square() * cos_b.square() + 2.0 * (1.0 - c) * cos_a.square())
            + 4.0 * (1.0 - a) * cos_c.square() - 8.0 * (a + c) * cos_a * cos_b * cos_c,
            4.0 * (-d * (1.0 + d) * cos_b + 2.0 * a * cos_c.square() * cos_b - e * cos_a * cos_c),
            (1.0 + d).square() - 4.0 * a * cos_c.square(),
        ],
        dim=1,
    )  # fmt: skip
    cosine, sine, real = real_roots(coefficients.nan_to_num(0.0, 0.0, 0.0), SOLUTIONS, _DIRECTIONS)
    v = cosine / torch.where(sine == 0, 1.0, sine)  # third over first distance
    d, cos_a, cos_b, cos_c = (x[:, None] for x in (d, cos_a, cos_b, cos_c))
    below = 2.0 * (cos_c - v * cos_a)
    u = ((d - 1.0) * v.square() - 2.0 * d * cos_b * v + 1.0 + d) / torch.where(below == 0, 1e-12, below)
    squared = b2[:, None] / (1.0 + v.square() - 2.0 * v * cos_b).clamp_min(1e-30)
    distances = squared.sqrt()[..., None] * torch.stack([torch.ones_like(u), u, v], dim=2)
    real = real & (sine != 0) & (u > 0) & (v > 0)
    seen = distances[..., None] * rays[:, None]
    R = _axes(seen) @ _axes(points)[:, None].mT
    t = seen[:, :, 0] - (R @ points[:, None, 0, :, None])[..., 0]
    found = torch.cat([R, t[..., None]], dim=3)
    usable = real & torch.isfinite(found).flatten(2).all(2)
    return torch.where(usable[..., None, None], found, 0.0)


def best_poses(points: Tensor, image: Tensor, weights: Tensor, scale: Tensor | None, keep: int) -> Tensor:
    """Of the poses of many samples those of least cost, `(B, keep, 3, 4)`.

    Args:
        points: `(B, N, 3)` in space, of about unit size.
        image: `(B, N, 2)`, camera coordinates at depth 1.
        weights: `(B, N)`; a match is drawn in proportion to its weight.
        scale: `(B,)`, of the soft count `r^2 / (1 + r^2 / s^2)`; None for the sum of squares.
        keep: how many.
    """
    missing = SAMPLE_SIZE - points.shape[1]
    if missing > 0:
        points, image = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (points, image))
        weights = torch.nn.functional.pad(weights, (0, missing))
    rays = torch.nn.functional.normalize(homogeneous(image), dim=2)
    noise = gumbel_noise(points.shape[1], SAMPLES, torch.Generator().manual_seed(0))
    index = draw_samples(weights, noise.to(weights.device), SAMPLE_SIZE)
    rows = torch.arange(len(points), device=points.device)[:, None, None].expand_as(index)
    drawn = (x[rows, index].flatten(0, 1) for x in (points, rays))
    poses = poses_of_three(*drawn).view(len(points), -1, 3, 4)
    at_once = max(_AT_ONCE // weights.numel(), 1)
    cost = torch.cat([_cost(part, points, image, weights, scale) for part in poses.split(at_once, dim=1)], dim=1)
    cost = torch.where(poses.flatten(2).any(2), cost, float("inf"))
    best = cost.topk(keep, dim=1, largest=False).indices
    return poses.gather(1, best[..., None, None].expand(-1, -1, 3, 4))


def _cost(poses: Tensor, points: Tensor, image: Tensor, weights: Tensor, scale: Tensor | None) -> Tensor:
    """Cost `(B, S)` of poses `(B, S, 3, 4)`."""
    seen = (poses.flatten(1, 2) @ homogeneous(points).mT).view(*poses.shape[:2], 3, -1)
    depth = seen[:, :, 2]
    residual = seen[:, :, :2] / torch.where(depth > HORIZON, depth, HORIZON)[:, :, None] - image.mT[:, None]
    squared = residual.square().sum(2).clamp_max(1e30)
    if scale is not None:
        limit = scale.square()[:, None, None]
        squared = limit * (1.0 - 1.0 / (1.0 + squared / limit))
    cost: Tensor = (squared @ weights[..., None])[..., 0]
    return cost


def _axes(triangles: Tensor) -> Tensor:
    """Rotations `(..., 3, 3)` whose columns are axes fixed to triangles `(..., 3, 3)`, one corner per row."""
    along, across = triangles[..., 1, :] - triangles[..., 0, :], triangles[..., 2, :] - triangles[..., 0, :]
    first = torch.nn.functional.normalize(along, dim=-1)
    third = torch.nn.functional.normalize(torch.linalg.cross(along, across), dim=-1)
    return torch.stack([first, torch.linalg.cross(third, first), third], dim=-1)
