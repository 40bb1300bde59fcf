# SPDX-License-Identifier: Apache-2.0
"""The loss of visual localisation: the error of a camera pose whose translation has a unit."""

from torch import Tensor

from eloftr_ops.geometry._checks import batch_size_of, check_matrices
from eloftr_ops.geometry._precision import returned, to_work
from eloftr_ops.losses._reduction import (
    check_options,
    reduce_pairs,
    saturated,
    smooth_distance,
    smooth_length,
    without_invalid,
)
from eloftr_ops.losses.pose import rotation_angle

__all__ = ["absolute_pose_loss"]


def absolute_pose_loss(
    T_0to1: Tensor,
    T_gt_0to1: Tensor,
    *,
    rotation_weight: float = 1.0,
    position_weight: float = 1.0,
    valid: Tensor | None = None,
    smoothing: float = 1e-3,
    saturation: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Weighted sum of the rotation angle and the distance of the camera's position from the true one.

    Convention:
        - `X1 = R X0 + t`; the position is `-R^T t`, in frame 0. For relative poses, whose length is unknown, see
          `pose_loss`.
        - Units: radians, and the unit of the translations: `position_weight` is radians per unit.
        - At equal poses the value is exactly zero and so is the gradient; it is finite everywhere.

    Args:
        T_0to1: `(B, 4, 4)`, the estimate.
        T_gt_0to1: `(B, 4, 4)`, the truth.
        rotation_weight: of the angle, >= 0.
        position_weight: of the distance, >= 0.
        valid: `(B,)` bool, the estimate's flag; pairs that are not valid count for nothing.
        smoothing: angle in radians, and distance in the unit, below which the loss turns quadratic.
        saturation: the most a pair can cost, approached smoothly; None for no bound.
        reduction: "none" `(B,)`, "mean" over the valid pairs, or "sum".

    Returns:
        `(B,)` or a scalar; the dtype of T_0to1, at least float32. The gradient flows to both poses.

    Raises:
        ValueError: shapes that do not fit, non-finite entries, an option out of range.
        TypeError: an integer dtype.
    """
    check_options(smoothing, saturation, reduction)
    batch_size = batch_size_of("T_0to1", T_0to1)
    T_0to1, T_gt_0to1 = (without_invalid(T, valid, batch_size) for T in (T_0to1, T_gt_0to1))
    check_matrices("T_0to1", T_0to1, batch_size, rows=4)
    check_matrices("T_gt_0to1", T_gt_0to1, batch_size, rows=4)
    if min(rotation_weight, position_weight) < 0:
        raise ValueError(
            f"rotation_weight, position_weight: expected >= 0, got {rotation_weight} and {position_weight}"
        )
    estimate, truth = to_work(T_0to1), to_work(T_gt_0to1)
    turn = smooth_distance(rotation_angle(estimate[:, :3, :3], truth[:, :3, :3]).square(), smoothing)
    slide = smooth_length(_position(estimate) - _position(truth), smoothing)
    values = saturated(rotation_weight * turn + position_weight * slide, saturation)
    return returned(reduce_pairs(values, valid, reduction), T_0to1)


def _position(T: Tensor) -> Tensor:
    """Where the camera is `(B, 3)`, in frame 0."""
    position: Tensor = -(T[:, :3, :3].mT @ T[:, :3, 3, None])[..., 0]
    return position
