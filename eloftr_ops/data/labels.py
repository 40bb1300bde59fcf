# SPDX-License-Identifier: Apache-2.0
"""Labels of image pairs: checks, the way from frames with integer pixel centres, and how much two images share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from kornia.geometry.linalg import transform_points
from torch import Tensor

from eloftr_ops.data.scene_geometry import reproject
from eloftr_ops.io import FileError

_GRID = 24  # points per side on which the overlap is counted
_SAME_DEPTH = 0.1  # relative difference up to which two depths count as one surface


def _finite(matrix: npt.NDArray[np.float64]) -> bool:
    """In float32, too, as labels are given out."""
    return bool((np.abs(matrix) <= np.finfo(np.float32).max).all())


def checked_pose(T: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
    """A rigid 4 x 4 motion.

    Raises:
        FileError: something else.
    """
    T = np.asarray(T, dtype=np.float64)
    if T.shape != (4, 4) or not _finite(T):
        raise FileError(f"{name}: expected a finite 4 x 4 pose, got shape {T.shape} with finite={_finite(T)}.")
    R = T[:3, :3]
    if np.abs(R @ R.T - np.eye(3)).max() > 1e-2 or np.linalg.det(R) < 0 or not np.allclose(T[3], (0, 0, 0, 1)):
        raise FileError(f"{name}: expected a rotation and a translation over (0, 0, 0, 1), got {T.tolist()}.")
    return T


def checked_intrinsics(K: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
    """A 3 x 3 matrix of intrinsics.

    Raises:
        FileError: something else.
    """
    K = np.asarray(K, dtype=np.float64)
    if K.shape != (3, 3) or not _finite(K) or min(K[0, 0], K[1, 1]) <= 0 or not np.allclose(K[2], (0, 0, 1)):
        raise FileError(f"{name}: expected 3 x 3 intrinsics with positive focal lengths, got {K.tolist()}.")
    return K


def checked_homography(H: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
    """An invertible 3 x 3 matrix.

    Raises:
        FileError: something else.
    """
    H = np.asarray(H, dtype=np.float64)
    # Hadamard: the determinant is at most the product of the columns' lengths, whatever the units.
    most = np.linalg.norm(H, axis=0).prod() if H.shape == (3, 3) and np.isfinite(H).all() else np.nan
    if not abs(np.linalg.det(H) if most > 0 else 0.0) > 1e-12 * most:
        raise FileError(f"{name}: expected an invertible 3 x 3 homography, got {H.tolist()}.")
    return H


def intrinsics_from_integer_centers(K: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Intrinsics (3, 3) for pixel centres at (x, y), rewritten for pixel centres at (x + 0.5, y + 0.5)."""
    shift = np.array([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return shift @ K


def homography_from_integer_centers(H_0to1: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A homography (3, 3) between frames with pixel centres at (x, y), rewritten for (x + 0.5, y + 0.5)."""
    shift = np.array([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return shift @ H_0to1 @ np.linalg.inv(shift)


def _grid(mask: Tensor) -> Tensor:
    """(N, 2) centres of pixels on a regular grid of the whole image that are not masked."""
    height, width = mask.shape
    rows, columns = (torch.arange(_GRID).add(0.5).mul(side / _GRID).long() for side in (height, width))
    row, column = torch.cartesian_prod(rows, columns).unbind(-1)
    return torch.stack([column, row], dim=-1)[mask[row, column]] + 0.5


def _inside(points: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether points (N, 2) lie on the visible image, and the row and column of their (nearest) pixel."""
    height, width = mask.shape
    extent = points.new_tensor([width, height])
    within = ((points >= 0) & (points < extent)).all(-1)
    column, row = torch.where(within[:, None], points, 0).long().unbind(-1)
    return within & mask[row, column], row, column


def share_by_homography(H: Tensor, mask: Tensor, other: Tensor) -> float:
    """Share of image 0's visible pixels (mask (H, W)) that a homography (3, 3) puts on the other's visible ones."""
    points = _grid(mask).to(H)
    if len(points) == 0:
        return 0.0
    # Points beyond the horizon have another sign than the image's middle.
    denominators = F.pad(points, (0, 1), value=1.0) @ H[2]
    front = denominators * denominators.median() > 0
    inside, _, _ = _inside(transform_points(H[None], points[None])[0], other)
    return float((inside & front).double().mean())


def share_by_depth(depth: Tensor, other: Tensor, K: Tensor, K_other: Tensor, T: Tensor) -> float:
    """Share of the pixels of known depth that the other image shows at the depth that the pose gives them."""
    points = _grid(depth > 0)
    if len(points) == 0:
        return 0.0
    column, row = points.long().unbind(-1)
    moved, z = reproject(points[None].to(K), depth[row, column][None], K[None], K_other[None], T[None])
    inside, row, column = _inside(moved[0], other > 0)
    shown = inside & (z[0] > 0) & ((other[row, column] - z[0]).abs() < _SAME_DEPTH * z[0])
    return float(shown.double().mean())
