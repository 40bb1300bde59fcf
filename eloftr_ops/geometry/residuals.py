# SPDX-License-Identifier: Apache-2.0
"""Residuals of each match under a homography or an epipolar geometry: what a robust estimator of one's own needs."""

import torch
from torch import Tensor

from eloftr_ops.geometry._checks import batch_size_of, check_matches, check_matrices
from eloftr_ops.geometry._linalg import adjugate, extreme_unit, homography_in_units, unit_magnitude
from eloftr_ops.geometry._precision import returned, to_work
from eloftr_ops.geometry._residuals import SampsonResidual, line_distances
from eloftr_ops.geometry.homography import apply_homography

__all__ = [
    "epipolar_residuals",
    "sampson_residuals",
    "symmetric_transfer_residuals",
    "transfer_residuals",
]


def transfer_residuals(keypoints0: Tensor, keypoints1: Tensor, batch_indexes: Tensor, H_0to1: Tensor) -> Tensor:
    """Residual in image 1 of each match: where the homography maps keypoint 0, minus keypoint 1.

    Convention:
        - `keypoints1 ~ H_0to1 @ (keypoints0, 1)`; both in the frames of the homography, axis order (x, y). The norm
          over the last dimension is the transfer error (Hartley and Zisserman, section 4.2.2).
        - A point that the homography maps to infinity has a large finite residual.
        - Gradient: to keypoints and homographies; exact and finite, also at residual zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        H_0to1: `(B, 3, 3)`, any scale; B is the number of pairs.

    Returns:
        `(M, 2)` in pixels of image 1; the keypoints' dtype, at least float32.

    Raises:
        ValueError: shapes that do not fit, non-finite values.
        IndexError: a batch index out of range.
        TypeError: integer keypoints.
    """
    return symmetric_transfer_residuals(keypoints0, keypoints1, batch_indexes, H_0to1)[:, :2]


def symmetric_transfer_residuals(
    keypoints0: Tensor, keypoints1: Tensor, batch_indexes: Tensor, H_0to1: Tensor
) -> Tensor:
    """Residuals in both images: `transfer_residuals`, and the same of the inverse homography in image 0.

    Convention, arguments and errors as `transfer_residuals`. The squared norm is the symmetric transfer error (Hartley
    and Zisserman, equation 4.7). A homography that is not invertible has large finite residuals in image 0.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        H_0to1: `(B, 3, 3)`, any scale.

    Returns:
        `(M, 4)`: x and y in image 1, then x and y in image 0, pixels.

    Raises:
        ValueError: as `transfer_residuals`.
        IndexError: a batch index out of range.
        TypeError: integer keypoints.
    """
    batch_size = batch_size_of("H_0to1", H_0to1)
    check_matches(keypoints0, keypoints1, batch_indexes, batch_size, None)
    check_matrices("H_0to1", H_0to1, batch_size)
    x0, x1 = to_work(keypoints0), to_work(keypoints1)
    unit0, unit1 = extreme_unit(x0, (1,)), extreme_unit(x1, (1,))
    x0, x1 = x0 / unit0, x1 / unit1
    H = to_work(H_0to1)[batch_indexes.to(x0.device).long()]
    H = unit_magnitude(homography_in_units(H, 1.0 / unit0[:, 0], 1.0 / unit1[:, 0]), (1, 2))
    forward = unit1 * (apply_homography(H, x0[:, None])[:, 0] - x1)
    backward = unit0 * (apply_homography(adjugate(H), x1[:, None])[:, 0] - x0)
    return returned(torch.cat([forward, backward], dim=1), keypoints0)


def sampson_residuals(keypoints0: Tensor, keypoints1: Tensor, batch_indexes: Tensor, F_0to1: Tensor) -> Tensor:
    """Signed Sampson distance of each match: to first order, how far both points must move together.

    Hartley and Zisserman, equation 11.9.

    Convention:
        - `(keypoints1, 1)^T F_0to1 (keypoints0, 1) = 0`; both in the frames of the matrix, axis order (x, y). With an
          essential matrix, pass camera coordinates.
        - A match at both epipoles, and a zero matrix, have residual zero. The sign changes with that of F.
        - Gradient: to keypoints and matrices; exact and finite, also at residual zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        F_0to1: `(B, 3, 3)`, any scale and sign.

    Returns:
        `(M,)` in the unit of the keypoints; their dtype, at least float32.

    Raises:
        ValueError: shapes that do not fit, non-finite values.
        IndexError: a batch index out of range.
        TypeError: integer keypoints.
    """
    F, x0, x1, unit = _of_each_match(keypoints0, keypoints1, batch_indexes, F_0to1)
    return returned(unit * SampsonResidual.value(F, x0, x1)[:, 0, 0], keypoints0)


def epipolar_residuals(keypoints0: Tensor, keypoints1: Tensor, batch_indexes: Tensor, F_0to1: Tensor) -> Tensor:
    """Signed distances of both points of each match to their epipolar lines (Hartley and Zisserman, equation 11.10).

    Convention, arguments and errors as `sampson_residuals`. A point at an epipole has no line, and residual zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        F_0to1: `(B, 3, 3)`, any scale and sign.

    Returns:
        `(M, 2)`: in image 0 and in image 1, in the unit of the keypoints.

    Raises:
        ValueError: as `sampson_residuals`.
        IndexError: a batch index out of range.
        TypeError: integer keypoints.
    """
    F, x0, x1, unit = _of_each_match(keypoints0, keypoints1, batch_indexes, F_0to1)
    return returned(unit[:, None] * line_distances(F, x0, x1)[:, 0], keypoints0)


def _of_each_match(
    keypoints0: Tensor, keypoints1: Tensor, batch_indexes: Tensor, F_0to1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check, and return one matrix `(M, 3, 3)`, one point `(M, 1, 2)` of each image and a unit `(M,)` per match.

    The points are counted in the unit, pixels, which is 1 for coordinates of ordinary magnitude.
    """
    batch_size = batch_size_of("F_0to1", F_0to1)
    check_matches(keypoints0, keypoints1, batch_indexes, batch_size, None)
    check_matrices("F_0to1", F_0to1, batch_size)
    x0, x1 = to_work(keypoints0), to_work(keypoints1)
    unit = extreme_unit(torch.cat([x0, x1], dim=1), (1,))
    # diag(u, u, 1) F diag(u, u, 1), over u: no entry leaves the range that F itself is in.
    root = unit.sqrt()
    scale = torch.cat([root, root, 1.0 / root], dim=1)
    F = to_work(F_0to1)[batch_indexes.to(x0.device).long()]
    F = unit_magnitude(scale[:, :, None] * F * scale[:, None], (1, 2))
    return F, (x0 / unit)[:, None], (x1 / unit)[:, None], unit[:, 0]
