# SPDX-License-Identifier: Apache-2.0
"""From pixels to camera coordinates at depth 1: matches, their covariances, and distances."""

import torch
from torch import Tensor

from eloftr_ops.geometry._covariances import Covariances, moved_covariances, projective_slope
from eloftr_ops.geometry._linalg import homogeneous
from eloftr_ops.geometry._ragged import PaddedMatches

# Camera coordinates above this are directions at 90 degrees to the optical axis.
FARTHEST = 1e30


def in_camera_coordinates(pixels: PaddedMatches, K0: Tensor, K1: Tensor) -> tuple[PaddedMatches, Tensor]:
    """Matches at depth 1 in front of both cameras, and the pairs `(B,)` whose coordinates can be computed with.

    Coordinates beyond 1e30 focal lengths, an angle of 90 degrees for every purpose, are replaced by zero.
    """
    points, covariances, usable = [], [], torch.ones_like(pixels.unit0, dtype=torch.bool)
    given = pixels.covariances or Covariances(None, None)
    sides = ((pixels.points0, pixels.unit0, K0, given[0]), (pixels.points1, pixels.unit1, K1, given[1]))
    for x, unit, K, covariance in sides:
        rows = torch.stack([1.0 / unit, 1.0 / unit, torch.ones_like(unit)], dim=1)
        inverse = torch.linalg.inv(rows[:, :, None] * K)
        mapped = homogeneous(x) @ inverse.mT
        camera, depth = mapped[..., :2] / mapped[..., 2:], mapped[..., 2]
        sane = (camera.detach().abs().amax((1, 2)) < FARTHEST)[:, None, None]
        points.append(torch.where(sane, camera, 0.0))
        usable = usable & sane[:, 0, 0]
        if covariance is not None:
            moved = moved_covariances(covariance, projective_slope(inverse, camera, depth))
            eye = torch.eye(2, dtype=moved.dtype, device=moved.device)
            covariance = torch.where(sane[..., None], moved, eye)
        covariances.append(covariance)
    return pixels._replace(points0=points[0], points1=points[1], covariances=Covariances(*covariances)), usable


def camera_scale(pixels: float, K0: Tensor, K1: Tensor) -> Tensor:
    """A distance in pixels as one at depth 1 `(B,)`, by the mean focal length."""
    focals = [K[:, [0, 1], [0, 1]].abs().mean(1) for K in (K0, K1)]
    return pixels / (0.5 * (focals[0] + focals[1])).clamp_min(torch.finfo(K0.dtype).tiny)
