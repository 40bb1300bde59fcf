# SPDX-License-Identifier: Apache-2.0
"""Distances of matches from an epipolar geometry, as losses."""

from torch import Tensor

from eloftr_ops.geometry._precision import returned
from eloftr_ops.geometry.fundamental import fundamental_from_pose
from eloftr_ops.geometry.residuals import epipolar_residuals, sampson_residuals
from eloftr_ops.losses._reduction import (
    check_options,
    constant,
    counted,
    mean_over_matches,
    reduce_pairs,
    saturated,
    smooth_length,
)

__all__ = ["sampson_loss", "symmetric_epipolar_loss", "weak_pose_loss"]


def sampson_loss(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    F_0to1: Tensor,
    weights: Tensor | None = None,
    *,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
    valid: Tensor | None = None,
    smoothing: float = 0.01,
    saturation: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Sampson distance of matches: to first order, how far both points must move to satisfy the geometry.

    Hartley and Zisserman, equation 11.9.

    Convention:
        - `(keypoints1, 1)^T F_0to1 (keypoints0, 1) = 0`; both keypoint sets in the matrix's frames, axis
          order (x, y). With an essential matrix, pass camera coordinates.
        - Units: those of the keypoints; per pair the weighted mean of the smoothed distances.
        - Weights are divided by their sum (see `symmetric_transfer_loss`).
        - A match at both epipoles, a zero matrix, a pair without matches or with zero weights cost zero. At
          exact matches the value and the gradient are zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        F_0to1: `(B, 3, 3)`, any scale and sign; B is the number of pairs.
        weights: `(M,)`, finite, >= 0, for instance the confidence; None for ones. Carries a gradient.
        covariance0: `(M, 2, 2)` of keypoints0, pixels squared; None for exact points. Distances then count standard
            deviations, and so does `saturation`. Carries no gradient: the loss would fall by larger ones.
        covariance1: `(M, 2, 2)` of keypoints1.
        valid: `(B,)` bool; pairs that are not valid count for nothing.
        smoothing: distance below which the loss turns quadratic.
        saturation: the most a match can cost, approached smoothly; None for no bound.
        reduction: "none" `(B,)`, "mean" over the valid pairs, or "sum".

    Returns:
        `(B,)` or a scalar; the keypoints' dtype, at least float32. The gradient flows to keypoints, weights
        and matrices.

    Raises:
        ValueError: shapes that do not fit, non-finite values, negative weights, an option out of range.
        IndexError: a batch index out of range.
        TypeError: integer keypoints or weights.
    """
    check_options(smoothing, saturation, reduction)
    matches, F = counted(keypoints0, keypoints1, batch_indexes, F_0to1, weights, valid, "F_0to1")
    residual = sampson_residuals(*matches, F, covariance0=constant(covariance0), covariance1=constant(covariance1))[
        :, None
    ]
    distance = saturated(smooth_length(residual, smoothing), saturation)
    values = mean_over_matches(distance, batch_indexes, weights, F_0to1.shape[0])
    return returned(reduce_pairs(values, valid, reduction), keypoints0)


def symmetric_epipolar_loss(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    F_0to1: Tensor,
    weights: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    smoothing: float = 0.01,
    saturation: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean distance of matched points to their epipolar lines, in both images.

    Hartley and Zisserman, equation 11.10.

    Convention:
        - Direction, frames, units, weights and reduction as `sampson_loss`; the value does not change when
          the images are swapped and the matrix is transposed.
        - A point at an epipole has no line there, and that side costs zero. At exact matches the value and
          the gradient are zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        F_0to1: `(B, 3, 3)`, any scale and sign.
        weights: `(M,)`, finite, >= 0; None for ones. Carries a gradient.
        valid: `(B,)` bool; pairs that are not valid count for nothing.
        smoothing: distance below which the loss turns quadratic.
        saturation: the most a match can cost, approached smoothly; None for no bound.
        reduction: "none" `(B,)`, "mean" over the valid pairs, or "sum".

    Returns:
        `(B,)` or a scalar; the keypoints' dtype, at least float32.

    Raises:
        ValueError: as `sampson_loss`.
        IndexError: a batch index out of range.
        TypeError: integer keypoints or weights.
    """
    check_options(smoothing, saturation, reduction)
    matches, F = counted(keypoints0, keypoints1, batch_indexes, F_0to1, weights, valid, "F_0to1")
    sides = epipolar_residuals(*matches, F)
    distance = saturated(smooth_length(sides[..., None], smoothing).mean(-1), saturation)
    values = mean_over_matches(distance, batch_indexes, weights, F_0to1.shape[0])
    return returned(reduce_pairs(values, valid, reduction), keypoints0)


def weak_pose_loss(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    T_gt_0to1: Tensor,
    K0: Tensor,
    K1: Tensor,
    weights: Tensor | None = None,
    *,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
    saturation: float = 8.0,
    reduction: str = "mean",
) -> Tensor:
    """Supervise matches by a known relative pose alone, without depth or match labels.

    `sampson_loss` under `fundamental_from_pose`, in which a wrong match costs at most `saturation`. It sees
    only the component of the error across the epipolar line.

    Convention:
        - `X1 = R X0 + t`; the intrinsics are for the keypoints' frame (see `fundamental_from_pose`). Pixels.
        - A pose without translation gives no epipolar geometry: such a pair costs zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        T_gt_0to1: `(B, 4, 4)`, the known pose, translation in any unit.
        K0: `(B, 3, 3)` intrinsics of camera 0.
        K1: `(B, 3, 3)` intrinsics of camera 1.
        weights: `(M,)`, the confidence; None for ones. Carries no gradient: the loss would fall by fewer matches too.
        covariance0: `(M, 2, 2)` of keypoints0, pixels squared; None for exact points. Distances then count standard
            deviations, and so does `saturation`. Carries no gradient: the loss would fall by larger ones.
        covariance1: `(M, 2, 2)` of keypoints1.
        saturation: the most a match can cost, pixels.
        reduction: "none" `(B,)`, "mean" over pairs, or "sum".

    Returns:
        `(B,)` or a scalar.

    Raises:
        ValueError: as `sampson_loss` and `fundamental_from_pose`.
        IndexError: a batch index out of range.
        TypeError: integer keypoints or weights.
    """
    F_0to1 = fundamental_from_pose(T_gt_0to1, K0, K1)
    weights = None if weights is None else weights.detach()
    return sampson_loss(
        keypoints0,
        keypoints1,
        batch_indexes,
        F_0to1,
        weights,
        covariance0=covariance0,
        covariance1=covariance1,
        saturation=saturation,
        reduction=reduction,
    )
