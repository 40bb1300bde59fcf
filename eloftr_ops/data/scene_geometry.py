# SPDX-License-Identifier: Apache-2.0
"""Parallelograms in space, the cameras that look at them, and exact ray casting.

Convention:
    A facet is the set centre + a u + b v with |a| <= 1 and |b| <= 1; its frame is the matrix with columns
    (u, v, centre). ``T`` maps world to camera coordinates (x right, y down, z forward), depth is z. Image points
    are (x, y) with the centre of pixel (x, y) at (x + 0.5, y + 0.5), and ``K`` belongs to that frame.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCE = 4.0  # of the cameras from the world's origin before they are moved: what fixes the unit of length
_ENDLESS = 30.0  # half side of walls and floors
_SAME_SURFACE = 1e-3  # relative difference of inverse depths


class Facets(NamedTuple):
    """The facets of B scenes: single ones first, then boxes as six faces, opposite faces side by side."""

    frames: Tensor  # (B, P, 3, 3) columns u, v, centre, in world coordinates
    present: Tensor  # (B, P) bool
    single: int  # how many of the P are no face of a box


class Views(NamedTuple):
    """N cameras, each with the facets that it may see."""

    ids: Tensor  # (N, V) int64 index of each of the V facets in its scene
    inverse: Tensor  # (N, V, 3, 3) camera coordinates to (a, b, 1) / depth; zero if absent or edge-on
    K: Tensor  # (N, 3, 3)
    T: Tensor  # (N, 4, 4) world to camera


class Hits(NamedTuple):
    """What rays meet first."""

    facet: Tensor  # (N, M) int64, which of the view's V facets
    inverse_depth: Tensor  # (N, M), 0 where nothing is met


def reproject(points0: Tensor, depth: Tensor, K0: Tensor, K1: Tensor, T_0to1: Tensor) -> tuple[Tensor, Tensor]:
    """Move image points with known depth to another image.

    Convention:
        ``X1 = R X0 + t`` with (R, t) of ``T_0to1``; the points lie in the frames of ``K0`` and ``K1``. Pixels;
        depth is z in the unit of t.

    Args:
        points0: (B, M, 2).
        depth: (B, M) of the points in camera 0.
        K0: (B, 3, 3) with last row (0, 0, 1).
        K1: (B, 3, 3).
        T_0to1: (B, 4, 4).

    Returns:
        Points (B, M, 2) of image 1 and their depths (B, M) in camera 1. Where that depth is not positive, the
        point is meaningless but finite. The gradient flows through both, finite.
    """
    with torch.autocast(points0.device.type, enabled=False):  # at eight bits the points would be off by pixels
        rays = F.pad(points0, (0, 1), value=1.0) @ torch.linalg.inv(K0).mT
        X1 = rays * depth[..., None] @ T_0to1[:, :3, :3].mT + T_0to1[:, None, :3, 3]
        projected = X1 @ K1.mT
    z = projected[..., 2]
    return projected[..., :2] / torch.where(z > 0, z, 1.0)[..., None], z


def look(facets: Facets, K: Tensor, T: Tensor) -> Views:
    """Cameras (B, 3, 3) and (B, 4, 4), one per scene, with the facets that each may see."""
    R, t = T[:, :3, :3], T[:, :3, 3]
    single, count = facets.single, facets.frames.shape[1]
    position = -(R.mT @ t[..., None])[:, None, :, 0]
    # Of two opposite faces of a box only the nearer one can face the camera.
    away = (facets.frames[:, single:, :, 2] - position).square().sum(-1)
    faces = single + 2 * torch.arange((count - single) // 2, device=T.device) + away.unflatten(1, (-1, 2)).argmin(-1)
    ids = torch.cat([torch.arange(single, device=T.device).expand(len(T), -1), faces], dim=1)
    rows = torch.arange(len(T), device=T.device)[:, None]
    u, v, centre = (R[:, None] @ facets.frames[rows, ids]).unbind(-1)
    centre = centre + t[:, None]
    adjugate = torch.stack([torch.linalg.cross(v, centre), torch.linalg.cross(centre, u), torch.linalg.cross(u, v)], -2)
    volume = (adjugate[..., 2, :] * centre).sum(-1)
    usable = facets.present[rows, ids] & (volume.abs() > 1e-9)
    inverse = torch.where(usable, 1 / torch.where(usable, volume, 1), 0)[..., None, None] * adjugate
    return Views(ids, inverse, K, T)


def cast(views: Views, rays: Tensor) -> Hits:
    """First facet along each ray.

    The coordinates (a, b, 1) of a facet, times the inverse depth, are linear in the ray, so no division is needed. A
    ray hits a facet where the scaled |a| and |b| are below the inverse depth. Of equally near facets the first one
    counts.

    Args:
        views: N cameras with at most 256 facets.
        rays: (N, 3, M) of `view_rays`.
    """
    nearest, reach = rays.new_zeros(rays.shape[0], rays.shape[2]), torch.empty_like(rays[:, 0])
    facet = torch.zeros(nearest.shape, dtype=torch.uint8, device=rays.device)
    scaled, met = torch.empty_like(rays), torch.empty_like(nearest, dtype=torch.bool)
    for number in range(views.inverse.shape[1]):  # into the same buffers: fresh memory costs more than the sums
        torch.matmul(views.inverse[:, number], rays, out=scaled)
        nearness = scaled[:, 2]
        torch.amax(scaled[:, :2].abs_(), dim=1, out=reach)
        nearness *= torch.le(reach, nearness, out=met)
        torch.gt(nearness, nearest, out=met)
        torch.maximum(nearest, nearness, out=nearest)
        # Numbers grow, so the maximum is the last facet that was nearer.
        torch.maximum(facet, met.view(torch.uint8).mul_(number), out=facet)
    return Hits(facet.long(), nearest)


def view_rays(views: Views, points: Tensor) -> Tensor:
    """Rays (N, 3, M) with z = 1 through image points (M, 2) or (N, M, 2), without skew, in the dtype of ``inverse``."""
    x, y = points.to(views.inverse).expand(len(views.K), -1, -1).unbind(-1)
    focal, _, cx, _, focal_y, cy = views.K[:, :2].flatten(1).to(x)[..., None].unbind(1)
    return torch.stack([(x - cx) / focal, (y - cy) / focal_y, torch.ones_like(x)], dim=1)


def scaled_coordinates(homographies: Tensor, rays: Tensor, facet: Tensor) -> Tensor:
    """First two rows (N, 2, M) of homography (N, V, 3, 3) number ``facet`` (N, M) times ray (N, 3, M)."""
    scaled = torch.zeros_like(rays[:, :2])
    for axis in (0, 1):
        for k in range(3):
            scaled[:, axis].addcmul_(homographies[:, :, axis, k].gather(1, facet), rays[:, k])
    return scaled


def visible_share(views0: Views, views1: Views, size_hw: tuple[int, int]) -> Tensor:
    """Share (N,) of image 0 that image 1 shows too, unoccluded; counted on a 12 x 12 grid."""
    height, width = size_hw
    steps = (torch.arange(12, device=views0.K.device, dtype=views0.K.dtype) + 0.5) / 12
    extent = torch.tensor([width, height], device=steps.device, dtype=steps.dtype)
    points0 = (torch.cartesian_prod(steps, steps) * extent).expand(len(views0.K), -1, -1)
    inverse_depth = cast(views0, view_rays(views0, points0)).inverse_depth
    met = inverse_depth > 0
    T_0to1 = views1.T @ torch.linalg.inv(views0.T)
    points1, z1 = reproject(points0, 1 / torch.where(met, inverse_depth, 1), views0.K, views1.K, T_0to1)
    inside = ((points1 > 0) & (points1 < extent)).all(-1) & (z1 > 0)
    nearest = cast(views1, view_rays(views1, points1)).inverse_depth
    return (met & inside & ((nearest * z1 - 1).abs() < _SAME_SURFACE)).to(steps.dtype).mean(1)


def draw_facets(batch: int, panels: int, boxes: int, generator: torch.Generator) -> Facets:
    """A back wall with, by chance, a floor and a side wall; before them panels and boxes, some left out. float64."""
    frames = torch.cat(
        [_walls(batch, generator), _panels(batch, panels, generator), _boxes(batch, boxes, generator)], dim=1
    )
    chance = torch.tensor([1.0, 0.6, 0.4] + [0.75] * (panels + boxes), device=generator.device)
    drawn = torch.rand(batch, len(chance), generator=generator, device=generator.device) < chance
    single = 3 + panels
    present = torch.cat([drawn[:, :single], drawn[:, single:].repeat_interleave(6, dim=1)], dim=1)
    return Facets(frames, present, single)


def camera_pose(yaw: Tensor, pitch: Tensor, roll: Tensor, distance: Tensor, target: Tensor) -> Tensor:
    """World-to-camera (B, 4, 4) of cameras that look at ``target`` (B, 3) from ``distance`` (B,); radians (B,)."""
    R = turn(roll, 2) @ turn(pitch, 0) @ turn(yaw, 1)
    T = torch.eye(4, device=yaw.device, dtype=yaw.dtype).repeat(len(yaw), 1, 1)
    T[:, :3, :3] = R
    T[:, :3, 3] = -(R @ target[..., None])[..., 0]
    T[:, 2, 3] += distance
    return T


def turn(angle: Tensor, axis: int) -> Tensor:
    """Rotations (..., 3, 3) about a coordinate axis."""
    cos, sin, zero, one = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle), torch.ones_like(angle)
    entries = [one, zero, zero, zero, cos, -sin, zero, sin, cos]
    about_x = torch.stack(entries, dim=-1).view(*angle.shape, 3, 3)
    return about_x.roll((axis, axis), (-2, -1))


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    draws = torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float64)
    return draws.mul_(high - low).add_(low)


def _frames(axes: Tensor, half: Tensor, centre: Tensor) -> Tensor:
    """Frames (..., 3, 3) from rotations (..., 3, 3), half sides (..., 2) and centres (..., 3)."""
    return torch.cat([axes[..., :2] * half[..., None, :], centre[..., None]], dim=-1)


def _walls(batch: int, generator: torch.Generator) -> Tensor:
    def draw(low: float, high: float) -> Tensor:
        return _uniform(generator, low, high, batch)

    half = torch.full((batch, 2), _ENDLESS, device=generator.device, dtype=torch.float64)
    zero = torch.zeros_like(half[:, 0])
    side = torch.where(draw(-1, 1) > 0, 1.0, -1.0) * draw(2.0, 4.0)
    back = turn(draw(-0.4, 0.4), 1) @ turn(draw(-0.2, 0.2), 0)
    floor = turn(draw(-0.1, 0.1) + math.pi / 2, 0) @ turn(draw(-math.pi, math.pi), 2)
    flank = turn(draw(-0.25, 0.25) + math.pi / 2, 1) @ turn(draw(-0.1, 0.1), 2)
    return torch.stack(
        [
            _frames(back, half, torch.stack([zero, zero, draw(2.0, 6.0)], -1)),
            _frames(floor, half, torch.stack([zero, draw(0.9, 1.8), zero], -1)),
            _frames(flank, half, torch.stack([side, zero, zero], -1)),
        ],
        dim=1,
    )


def _places(batch: int, count: int, generator: torch.Generator) -> Tensor:
    ranges = ((-1.7, 1.7), (-1.2, 1.0), (-1.5, 1.8))
    return torch.stack([_uniform(generator, low, high, batch, count) for low, high in ranges], dim=-1)


def _panels(batch: int, count: int, generator: torch.Generator) -> Tensor:
    angles = [_uniform(generator, -bound, bound, batch, count) for bound in (1.0, 0.7, math.pi)]
    half = torch.exp(_uniform(generator, math.log(0.25), math.log(0.9), batch, count, 2))
    axes = turn(angles[0], 1) @ turn(angles[1], 0) @ turn(angles[2], 2)
    return _frames(axes, half, _places(batch, count, generator))


def _boxes(batch: int, count: int, generator: torch.Generator) -> Tensor:
    angles = [_uniform(generator, -bound, bound, batch, count) for bound in (math.pi, 0.35, 0.35)]
    half = torch.exp(_uniform(generator, math.log(0.2), math.log(0.65), batch, count, 3))
    axes = (turn(angles[0], 1) @ turn(angles[1], 0) @ turn(angles[2], 2)) * half[..., None, :]
    centre = _places(batch, count, generator)
    faces = [
        torch.stack([axes[..., (k + 1) % 3], axes[..., (k + 2) % 3], centre + sign * axes[..., k]], dim=-1)
        for k in range(3)
        for sign in (-1, 1)
    ]
    return torch.stack(faces, dim=2).flatten(1, 2)
