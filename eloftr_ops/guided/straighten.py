# SPDX-License-Identifier: Apache-2.0
"""The warp that makes two images look alike, from matches between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eloftr_ops.guided.looks import Found, Look, Setting, plane_between
from eloftr_ops.guided.warps import Warp

__all__ = ["differs", "straightened"]

MULTIPLE = 32  # of the sides of a frame: matchers complete other sizes

_SPACING = 32  # pixels of the frame between the vertices of a field
_REACH = 40.0  # pixels of the frame: standard deviation of a match's influence on the field
_LOCAL_ERROR = 3.0  # pixels: where a match begins to count less for the field
_PRIOR = 1.0  # matches at zero displacement that each vertex has
_ROUNDS = 4  # of the robust fit
_LARGEST_FIELD = 0.15  # of the long side of image 1: a match further off the plane is taken for wrong
_ON_PLANE = 2.0  # pixels
_ALL_ON_PLANE = 0.05  # share of matches off the plane that needs no field
_GRID = 33  # points per axis at which the overlap is looked for
_LEAST_OVERLAP = 8  # of these points
_MARGIN = 8  # pixels around the overlap
_PROBES = 7  # points per axis at which two looks are compared
_LEAST_CHANGE = 0.03  # of a length or, in radians, of a direction


def straightened(look: Look, found: Found, setting: Setting) -> Look | None:
    """The next look: the part of image 0 that image 1 shows, and image 1 warped so that it looks like that.

    The warp is the homography of the plane that most matches lie near, and a smooth field for what lies off it. So one
    look serves scenes with depth, as long as that varies smoothly; where it jumps, the field blends both sides.

    Args:
        look: what was looked at.
        found: its matches.
        setting: of the pair.

    Returns:
        None where the matches show no plane, or image 1 shows nothing of image 0 then.
    """
    flat = plane_between(look, found)
    if flat is None:
        return None
    plane, near = flat
    found = found.detached()
    overlap = _overlap(plane, *setting.sizes)
    if len(overlap) < _LEAST_OVERLAP:
        return None
    frame = _frame_over(torch.cat([overlap, found.points0[near]]), setting)
    warp1 = Warp(plane @ frame.matrix, frame.size_wh)
    back = torch.linalg.inv(frame.matrix)
    points = found.points0 @ back[:2, :2].T + back[:2, 2]
    displaced = (found.points1 - warp1.to_image(points)).norm(dim=1)
    kept = displaced < _LARGEST_FIELD * max(setting.sizes[1])
    if float((displaced[kept] > _ON_PLANE).double().mean()) > _ALL_ON_PLANE:
        field = _smooth_field(warp1, points[kept], found.points1[kept], found.confidence[kept].double())
        warp1 = warp1._replace(field=field)
    return Look(frame, warp1, "straightened") if torch.isfinite(warp1.matrix).all() else None


def differs(look: Look, before: Look) -> bool:
    """Whether image 1 is stretched or turned otherwise than in the look before; a shift alone changes no match."""
    points = look.warp0.to_image(look.warp0.grid(_PROBES))
    change = torch.linalg.inv_ex(_stretch(before, points)).inverse @ _stretch(look, points)
    error = (change - torch.eye(2, dtype=torch.float64)).abs().amax((1, 2))
    return not bool(error.median() <= _LEAST_CHANGE)  # NaN differs


def _stretch(look: Look, points0: Tensor) -> Tensor:
    """Jacobians (N, 2, 2), at points of image 0, of the map to image 1 that a look straightens."""
    here = look.assumed(points0)
    return torch.stack([look.assumed(points0 + step) - here for step in torch.eye(2, dtype=torch.float64)], -1)


def _overlap(plane: Tensor, size0_wh: tuple[int, int], size1_wh: tuple[int, int]) -> Tensor:
    """Points (N, 2) of a grid over image 0 that lie in image 1."""
    whole = Warp(plane, size0_wh)
    grid = whole.grid(_GRID)
    mapped = whole.to_image(grid)
    return grid[((mapped > 0) & (mapped < mapped.new_tensor(size1_wh))).all(1)]


def _smooth_field(plane: Warp, points: Tensor, targets: Tensor, weights: Tensor) -> Tensor | None:
    """What is missing from a plane: displacements (2, h, w) on a grid over the frame.

    Each vertex takes an affine fit to the displacements of the matches near it, robust (Cauchy) and drawn to zero.

    Args:
        plane: from the frame to image 1.
        points: (N, 2), in the frame.
        targets: (N, 2), where they lie in image 1.
        weights: (N,).
    """
    width, height = plane.size_wh
    columns, rows = width // _SPACING + 1, height // _SPACING + 1
    if min(columns, rows) < 2 or not len(points):
        return None
    xs = torch.linspace(0, width / _REACH, columns, dtype=torch.float64)
    ys = torch.linspace(0, height / _REACH, rows, dtype=torch.float64)
    vertices = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).view(-1, 2)
    places = points / _REACH
    displaced = targets - plane.to_image(points)
    near = torch.exp(-0.5 * torch.cdist(vertices, places).square()) * weights  # (V, N)
    trusted = near
    for _ in range(_ROUNDS):
        at_vertices, fit = _affine_fits(vertices, places, displaced, trusted)
        error = sum((displaced[:, axis] - fit[..., axis] @ _linear(places).T).square() for axis in (0, 1))
        trusted = near / (1 + error / _LOCAL_ERROR**2)
    return at_vertices.T.reshape(2, rows, columns).contiguous()


def _affine_fits(vertices: Tensor, places: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """For each vertex a weighted affine fit to ``values`` (N, 2) at ``places`` (N, 2), by sums over all places.

    Returns:
        The fits at their vertices (V, 2), and as affine maps (V, 3, 2) of rows (1, x, y).
    """
    rows = _linear(places)
    squares = (rows[:, :, None] * rows[:, None]).view(-1, 9)
    normal = (weights @ squares).view(-1, 3, 3)
    moments = torch.stack([weights @ (rows * values[:, axis, None]) for axis in (0, 1)], -1)  # (V, 3, 2)
    centred = torch.eye(3, dtype=places.dtype).repeat(len(vertices), 1, 1)
    centred[:, 1:, 0] = -vertices
    prior = _PRIOR * torch.eye(3, dtype=places.dtype)
    fit = torch.linalg.solve(centred @ normal @ centred.mT + prior, centred @ moments)
    return fit[:, 0], centred.mT @ fit


def _linear(places: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(places[:, :1]), places], 1)


def _frame_over(points0: Tensor, setting: Setting) -> Warp:
    """A frame over the part of image 0 that holds ``points0`` (N, 2), enlarged as far as pixels and time allow."""
    size0_wh = setting.sizes[0]
    low = (points0.amin(0) - _MARGIN).clamp(min=0)
    high = torch.minimum(points0.amax(0) + _MARGIN, points0.new_tensor(size0_wh))
    extent = (high - low).clamp(min=MULTIPLE)
    same_area = math.sqrt(size0_wh[0] * size0_wh[1] / float(extent.prod()))
    scale = min(setting.finest, setting.longest / float(extent.max()), same_area)
    width, height = (math.ceil(float(side) * scale / MULTIPLE) * MULTIPLE for side in extent)
    matrix = torch.diag(torch.tensor([1 / scale, 1 / scale, 1.0], dtype=torch.float64))
    matrix[:2, 2] = low
    return Warp(matrix, (width, height))
