# SPDX-License-Identifier: Apache-2.0
"""The usual measures of matching: pose error, corner error, precision, and the area under the recall curve.

Convention:
    Image points are (x, y) in pixels with the centre of pixel (x, y) at (x + 0.5, y + 0.5); intrinsics and homographies
    belong to that frame. ``T_0to1``: ``X1 = R X0 + t``. Everything is computed in float64 and carries no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eloftr_ops.geometry import apply_homography, fundamental_from_pose
from eloftr_ops.losses import rotation_angle, translation_direction_angle

__all__ = [
    "PoseErrors",
    "auc",
    "corner_error",
    "epipolar_errors",
    "matching_precision",
    "overlap_error",
    "pose_errors",
    "transfer_errors",
]

_GRID = 12  # points per side on which the overlap error is measured
_LEAST_BASELINE = 1e-6  # in the data set's unit: shorter true translations are rounding
_TINY = 1e-20  # squared length of an epipolar line's normal, below which the point is the epipole


class PoseErrors(NamedTuple):
    """The errors of a pose in degrees; infinite if there is no pose."""

    rotation: float  # in [0, 180]
    translation: float  # angle between the directions up to sign, in [0, 90]

    @property
    def largest(self) -> float:
        """What the AUC is made of: the larger of the two angles."""
        return max(self)


def auc(errors: Sequence[float], thresholds: Sequence[float]) -> list[float]:
    """Area under the recall curve up to each threshold, in percent (Sarlin et al. 2020, SuperGlue).

    Recall is the share of errors up to a bound; between the sorted errors it is interpolated linearly, from 0 at error
    0 on, and after the last error within the threshold it stays. Infinite errors are never recalled.

    Args:
        errors: N errors in any order, 0 to infinity.
        thresholds: positive bounds, in the errors' unit.

    Returns:
        One area in [0, 100] per threshold; NaN for no errors at all.

    Raises:
        ValueError: an error that is negative or NaN, or a threshold that is not positive and finite.
    """
    ordered = np.sort(np.asarray(errors, dtype=np.float64))
    if not (ordered >= 0).all():
        raise ValueError(
            f"errors: expected numbers of 0 or more, got {ordered[~(ordered >= 0)][0]}. Count a failure as infinite."
        )
    if not all(0 < threshold < np.inf for threshold in thresholds):
        raise ValueError(f"thresholds: expected positive numbers, got {list(thresholds)}.")
    if len(ordered) == 0:
        return [float("nan")] * len(thresholds)
    recall = np.arange(len(ordered) + 1) / len(ordered)
    ordered = np.concatenate([[0.0], ordered])
    areas = []
    for threshold in thresholds:
        # Never 0: the curve starts at the origin, even where the first error is 0, too.
        below = int(np.searchsorted(ordered, threshold))
        widths = np.diff(ordered[:below], append=threshold)
        means = (recall[:below] + np.append(recall[1:below], recall[below - 1])) / 2
        areas.append(float(100 * (widths * means).sum() / threshold))
    return areas


def pose_errors(T_0to1_estimated: Tensor, T_0to1: Tensor, *, least_baseline: float = _LEAST_BASELINE) -> PoseErrors:
    """Angles between an estimated relative pose and the true one.

    Convention:
        - Rotation: the angle of ``R_estimated^T R``. Translation: the angle between the two directions, opposite ones
          counting as equal, because an essential matrix leaves the sign open (as SuperGlue and LoFTR).
        - A true translation shorter than ``least_baseline`` (a pure rotation) has no direction: the translation error
          is 0.
        - An estimated translation of zero has no direction: its error is 90 degrees.

    Args:
        T_0to1_estimated: (4, 4), translation in any unit.
        T_0to1: (4, 4), the truth.
        least_baseline: in the unit of the true translation.

    Returns:
        `PoseErrors` in degrees; infinite if the estimate is not finite.

    Raises:
        ValueError: other shapes, or a truth that is not finite.
    """
    estimated, truth = (
        _float64("T_0to1_estimated", T_0to1_estimated, (4, 4)),
        _float64("T_0to1", T_0to1, (4, 4)),
    )
    if not truth.isfinite().all():
        raise ValueError("T_0to1: expected finite numbers, got NaN or infinity.")
    if not estimated.isfinite().all():
        return PoseErrors(float("inf"), float("inf"))
    rotation = rotation_angle(estimated[None, :3, :3], truth[None, :3, :3]).rad2deg().item()
    t_estimated, t = estimated[None, :3, 3], truth[None, :3, 3]
    if t.norm() < least_baseline:
        return PoseErrors(rotation, 0.0)
    if not t_estimated.any():
        return PoseErrors(rotation, 90.0)
    return PoseErrors(rotation, translation_direction_angle(t_estimated, t, ignore_sign=True).rad2deg().item())


def corner_error(H_0to1_estimated: Tensor, H_0to1: Tensor, size0_wh: tuple[int, int]) -> float:
    """Mean distance in image 1 between the corners of image 0 under two homographies (DeTone et al. 2018, SuperPoint).

    Convention:
        - The corners are the centres of the four corner pixels: (0, 0) ... (W - 1, H - 1) in a frame with integer
          centres, as in the evaluations of SuperPoint, SuperGlue and LoFTR.
        - Neither homography's scale nor sign matters.

    Args:
        H_0to1_estimated: (3, 3).
        H_0to1: (3, 3), the truth.
        size0_wh: (W, H) of image 0.

    Returns:
        Pixels of image 1; infinite if the estimate is not finite.

    Raises:
        ValueError: other shapes.
    """
    width, height = size0_wh
    x, y = (0.5, width - 0.5), (0.5, height - 0.5)
    corners = torch.tensor([[x[0], y[0]], [x[1], y[0]], [x[1], y[1]], [x[0], y[1]]], dtype=torch.float64)
    return _mean_distance(H_0to1_estimated, H_0to1, corners)


def overlap_error(
    H_0to1_estimated: Tensor, H_0to1: Tensor, size0_wh: tuple[int, int], size1_wh: tuple[int, int]
) -> float:
    """Mean distance in image 1 between two homographies on what both images show.

    Corners outside image 1 extrapolate the true homography. This error does not: it takes a grid of 12 x 12 points of
    image 0, and of these the points whose true position is in image 1.

    Convention:
        The grid runs from the centre of the first pixel to the centre of the last one, along both axes.

    Args:
        H_0to1_estimated: (3, 3).
        H_0to1: (3, 3), the truth.
        size0_wh: (W, H) of image 0.
        size1_wh: (W, H) of image 1.

    Returns:
        Pixels of image 1; infinite if the estimate is not finite, or if the truth puts no point into image 1.

    Raises:
        ValueError: other shapes.
    """
    steps = [torch.linspace(0.5, side - 0.5, _GRID, dtype=torch.float64) for side in size0_wh]
    points = torch.cartesian_prod(*steps)
    truth = _float64("H_0to1", H_0to1, (3, 3))
    depth = points @ truth[2, :2] + truth[2, 2]
    moved = apply_homography(truth[None], points[None])[0]
    last = torch.tensor(size1_wh, dtype=torch.float64) - 0.5
    # Points beyond the horizon have another sign than most of the image.
    seen = (depth * depth.median() > 0) & (moved >= 0.5).all(1) & (moved <= last).all(1)
    return _mean_distance(H_0to1_estimated, truth, points[seen])


def epipolar_errors(keypoints0: Tensor, keypoints1: Tensor, K0: Tensor, K1: Tensor, T_0to1: Tensor) -> Tensor:
    """Squared symmetric epipolar distances in normalised coordinates, for the precision as in SuperGlue and LoFTR.

    The sum over both images of the squared distance between a point and the epipolar line of its partner
    (Hartley and Zisserman, equation 11.10).

    Convention:
        - Keypoints and intrinsics are in one frame; coordinates are divided by the focal length, hence no unit.
        - A point at the epipole has no line: that side counts as 0.
        - A pose without translation (shorter than 1e-6) has no epipolar lines: there the errors are the squared
          distances, in both images, between a point and its rotated partner.

    Args:
        keypoints0: (M, 2), pixels.
        keypoints1: (M, 2).
        K0: (3, 3).
        K1: (3, 3).
        T_0to1: (4, 4).

    Returns:
        (M,) float64; M may be 0.

    Raises:
        ValueError: other shapes, numbers that are not finite, or intrinsics that cannot be inverted.
    """
    count = len(keypoints0)
    x0, x1 = _float64("keypoints0", keypoints0, (count, 2)), _float64("keypoints1", keypoints1, (count, 2))
    K0, K1, T = _float64("K0", K0, (3, 3)), _float64("K1", K1, (3, 3)), _float64("T_0to1", T_0to1, (4, 4))
    x0, x1 = (apply_homography(torch.linalg.inv(K)[None], x[None])[0] for K, x in ((K0, x0), (K1, x1)))
    if T[:3, 3].norm() < _LEAST_BASELINE:
        R = T[:3, :3]
        return transfer_errors(x0, x1, R).square() + transfer_errors(x1, x0, R.mT).square()
    eye = torch.eye(3, dtype=torch.float64)[None]
    E = fundamental_from_pose(T[None], eye, eye)[0]
    x0, x1 = (torch.nn.functional.pad(x, (0, 1), value=1.0) for x in (x0, x1))
    lines1, lines0 = x0 @ E.mT, x1 @ E
    product = (lines1 * x1).sum(1).square()
    normals = [lines[:, :2].square().sum(1) for lines in (lines0, lines1)]
    sides = [torch.where(n > _TINY, product / n.clamp_min(_TINY), 0.0) for n in normals]
    return sides[0] + sides[1]


def transfer_errors(keypoints0: Tensor, keypoints1: Tensor, H_0to1: Tensor) -> Tensor:
    """Distances in image 1 between keypoints and their partners under a homography.

    Args:
        keypoints0: (M, 2), pixels.
        keypoints1: (M, 2).
        H_0to1: (3, 3), any scale.

    Returns:
        (M,) float64, pixels of image 1; M may be 0.

    Raises:
        ValueError: other shapes.
    """
    count = len(keypoints0)
    x0, x1 = _float64("keypoints0", keypoints0, (count, 2)), _float64("keypoints1", keypoints1, (count, 2))
    distances: Tensor = (apply_homography(_float64("H_0to1", H_0to1, (3, 3))[None], x0[None])[0] - x1).norm(dim=1)
    return distances


def matching_precision(errors: Tensor, threshold: float) -> float:
    """Share of matches whose error is below a threshold, in [0, 1]; 0 where there is no match.

    Args:
        errors: (M,) of `epipolar_errors`, usually with threshold 1e-4 outdoors and 5e-4 indoors, or of
            `transfer_errors`.
        threshold: in the errors' unit.
    """
    return float((errors < threshold).double().mean()) if len(errors) else 0.0


def _mean_distance(H_estimated: Tensor, H: Tensor, points: Tensor) -> float:
    estimated, truth = _float64("H_0to1_estimated", H_estimated, (3, 3)), _float64("H_0to1", H, (3, 3))
    if len(points) == 0 or not (estimated.isfinite().all() and estimated.any()):
        return float("inf")
    moved = [apply_homography(matrix[None], points[None])[0] for matrix in (estimated, truth)]
    distance = float((moved[0] - moved[1]).norm(dim=1).mean())
    return distance if np.isfinite(distance) else float("inf")


def _float64(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}.")
    return value.detach().cpu().double()
