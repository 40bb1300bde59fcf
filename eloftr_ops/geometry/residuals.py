# SPDX-License-Identifier: Apache-2.0
"""Residuals of each match under a homography or an epipolar geometry: what a robust estimator of one's own needs."""

import torch
from torch import Tensor

from eloftr_ops.geometry._checks import batch_size_of, check_matches, check_matrices
from eloftr_ops.geometry._covariances import Covariances, check_covariances, symmetrised
from eloftr_ops.geometry._linalg import adjugate, extreme_unit, homography_in_units, unit_magnitude
from eloftr_ops.geometry._precision import returned, to_work
from eloftr_ops.geometry._residuals import SampsonResidual, TransferResidual, line_distances

__all__ = [
    "epipolar_residuals",
    "sampson_residuals",
    "symmetric_transfer_residuals",
    "transfer_residuals",
]


def transfer_residuals(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    H_0to1: Tensor,
    *,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
) -> Tensor:
    """Residual in image 1 of each match: where the homography maps keypoint 0, minus keypoint 1.

    Convention:
        - `keypoints1 ~ H_0to1 @ (keypoints0, 1)`; both in the frames of the homography, axis order (x, y). The norm
          over the last dimension is the transfer error (Hartley and Zisserman, section 4.2.2).
        - A point that the homography maps to infinity has a large finite residual.
        - With covariances the residual is whitened by `S1 + J S0 J^T`, J the derivative of the homography at the match:
          it counts standard deviations, and its squared norm is the squared Mahalanobis distance.
        - Gradient: to keypoints, homographies and covariances; exact and finite, also at residual zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        H_0to1: `(B, 3, 3)`, any scale; B is the number of pairs.
        covariance0: `(M, 2, 2)` of keypoints0, positive definite; None for exact points.
        covariance1: `(M, 2, 2)` of keypoints1.

    Returns:
        `(M, 2)` in pixels of image 1, or standard deviations; the keypoints' dtype, at least float32.

    Raises:
        ValueError: shapes that do not fit, non-finite values, covariances that are not positive definite.
        IndexError: a batch index out of range.
        TypeError: integer keypoints.
    """
    both = symmetric_transfer_residuals(
        keypoints0, keypoints1, batch_indexes, H_0to1, covariance0=covariance0, covariance1=covariance1
    )
    return both[:, :2]


def symmetric_transfer_residuals(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    H_0to1: Tensor,
    *,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
) -> Tensor:
    """Residuals in both images: `transfer_residuals`, and the same of the inverse homography in image 0.

    Convention, arguments and errors as `transfer_residuals`. The squared norm is the symmetric transfer error (Hartley
    and Zisserman, equation 4.7). A homography that is not invertible has large finite residuals in image 0.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        H_0to1: `(B, 3, 3)`, any scale.
        covariance0: `(M, 2, 2)`; None for exact points.
        covariance1: `(M, 2, 2)`.

    Returns:
        `(M, 4)`: x and y in image 1, then x and y in image 0, pixels or standard deviations.

    Raises:
        ValueError: as `transfer_residuals`.
        IndexError: a batch index out of range.
        TypeError: integer keypoints.
    """
    batch_size = batch_size_of("H_0to1", H_0to1)
    check_matches(keypoints0, keypoints1, batch_indexes, batch_size, None)
    check_matrices("H_0to1", H_0to1, batch_size)
    check_covariances(covariance0, covariance1, len(keypoints0))
    x0, x1 = to_work(keypoints0), to_work(keypoints1)
    unit0, unit1 = extreme_unit(x0, (1,)), extreme_unit(x1, (1,))
    x0, x1 = (x0 / unit0)[:, None], (x1 / unit1)[:, None]
    H = to_work(H_0to1)[batch_indexes.to(x0.device).long()]
    H = unit_magnitude(homography_in_units(H, 1.0 / unit0[:, 0], 1.0 / unit1[:, 0]), (1, 2))
    covariances = _of_points(covariance0, covariance1, unit0, unit1)
    back = None if covariances is None else Covariances(covariances.points1, covariances.points0)
    forward = TransferResidual.value(H, x0, x1, covariances)[:, 0]
    backward = TransferResidual.value(adjugate(H), x1, x0, back)[:, 0]
    if covariances is None:
        forward, backward = unit1 * forward, unit0 * backward
    return returned(torch.cat([forward, backward], dim=1), keypoints0)


def _of_points(
    covariance0: Tensor | None, covariance1: Tensor | None, unit0: Tensor, unit1: Tensor
) -> Covariances | None:
    """Covariances `(M, 1, 2, 2)` in squares of units `(M, 1)`; None where both points are exact."""
    if covariance0 is None and covariance1 is None:
        return None
    sides = ((covariance0, unit0), (covariance1, unit1))
    return Covariances(
        *(None if x is None else (symmetrised(x) / unit[..., None] / unit[..., None])[:, None] for x, unit in sides)
    )


def sampson_residuals(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    F_0to1: Tensor,
    *,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
) -> Tensor:
    """Signed Sampson distance of each match: to first order, how far both points must move together.

    Hartley and Zisserman, equation 11.9.

    Convention:
        - `(keypoints1, 1)^T F_0to1 (keypoints0, 1) = 0`; both in the frames of the matrix, axis order (x, y). With an
          essential matrix, pass camera coordinates.
        - A match at both epipoles, and a zero matrix, have residual zero. The sign changes with that of F.
        - With covariances the residual counts standard deviations: `x1^T F x0 / sqrt(l0^T S0 l0 + l1^T S1 l1)`, l the
          normals of the epipolar lines. Without, that is the distance for `S0 = S1 = 1`.
        - Gradient: to keypoints, matrices and covariances; exact and finite, also at residual zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        F_0to1: `(B, 3, 3)`, any scale and sign.
        covariance0: `(M, 2, 2)` of keypoints0, positive definite; None for exact points.
        covariance1: `(M, 2, 2)` of keypoints1.

    Returns:
        `(M,)` in the unit of the keypoints, or standard deviations; their dtype, at least float32.

    Raises:
        ValueError: shapes that do not fit, non-finite values, covariances that are not positive definite.
        IndexError: a batch index out of range.
        TypeError: integer keypoints.
    """
    F, x0, x1, unit = _of_each_match(keypoints0, keypoints1, batch_indexes, F_0to1)
    check_covariances(covariance0, covariance1, len(keypoints0))
    covariances = _of_points(covariance0, covariance1, unit[:, None], unit[:, None])
    residual = SampsonResidual.value(F, x0, x1, covariances)[:, 0, 0]
    return returned(unit * residual if covariances is None else residual, keypoints0)


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
