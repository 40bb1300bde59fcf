# SPDX-License-Identifier: Apache-2.0
"""Angles between rotations and between translation directions, and the loss made of them."""

import torch
from torch import Tensor

from eloftr_ops.geometry._checks import batch_size_of, check_floats, check_matrices
from eloftr_ops.geometry._linalg import extreme_unit, safe_norm, safe_normalise, unit_magnitude
from eloftr_ops.geometry._precision import returned, to_work
from eloftr_ops.losses._reduction import (
    check_options,
    reduce_pairs,
    saturated,
    smooth_distance,
    without_invalid,
)

__all__ = ["pose_loss", "rotation_angle", "translation_direction_angle"]


def rotation_angle(R_a: Tensor, R_b: Tensor) -> Tensor:
    """Angle of the rotation from one orientation to another.

    From sine and cosine together, `atan2(|skew part|, trace - 1)`: precise near 0 and near pi, where the
    usual arc cosine of the trace loses half of the digits and has an infinite derivative.

    Convention:
        - Units: radians, in [0, pi]. The order of the arguments does not matter.
        - The gradient has magnitude one in the angle; at exactly 0 and exactly pi, where the angle has a
          kink, it is zero. `pose_loss` is smooth at 0.

    Args:
        R_a: `(B, 3, 3)` rotations.
        R_b: `(B, 3, 3)` rotations.

    Returns:
        `(B,)`, the dtype of R_a, at least float32.

    Raises:
        ValueError: shapes that do not fit, non-finite entries.
        TypeError: an integer dtype.
    """
    batch_size = batch_size_of("R_a", R_a)
    check_matrices("R_a", R_a, batch_size)
    check_matrices("R_b", R_b, batch_size)
    a, b = (R / extreme_unit(R, (1, 2)) for R in (to_work(R_a), to_work(R_b)))
    between = a.mT @ b
    axis = torch.stack(
        [
            between[:, 2, 1] - between[:, 1, 2],
            between[:, 0, 2] - between[:, 2, 0],
            between[:, 1, 0] - between[:, 0, 1],
        ],
        dim=1,
    )
    cosine = between.diagonal(dim1=-2, dim2=-1).sum(-1) - 1.0
    return returned(_angle(safe_norm(axis), cosine), R_a)


def translation_direction_angle(t_a: Tensor, t_b: Tensor, *, ignore_sign: bool = False) -> Tensor:
    """Angle between two translation directions.

    Convention:
        - Units: radians, in [0, pi], or [0, pi / 2] with `ignore_sign`. Lengths do not matter.
        - The direction of a zero vector is undefined: the angle is 0 there, with zero gradient.
        - The gradient is zero at exactly 0 and exactly pi, where the angle has a kink.

    Args:
        t_a: `(B, 3)`.
        t_b: `(B, 3)`.
        ignore_sign: count opposite directions as equal, as an essential matrix does.

    Returns:
        `(B,)`, the dtype of t_a, at least float32.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: no tensor, an integer dtype.
    """
    for name, vector in (("t_a", t_a), ("t_b", t_b)):
        check_floats(name, vector)
        if vector.ndim != 2 or vector.shape[1] != 3 or vector.shape[0] != t_a.shape[0]:
            raise ValueError(f"{name}: expected shape (B, 3), got {tuple(vector.shape)}")
    a, b = (safe_normalise(unit_magnitude(to_work(t), (1,))) for t in (t_a, t_b))
    cosine = (a * b).sum(-1)
    angle = _angle(safe_norm(torch.linalg.cross(a, b)), cosine.abs() if ignore_sign else cosine)
    return returned(angle, t_a)


def pose_loss(
    T_0to1: Tensor,
    T_gt_0to1: Tensor,
    *,
    rotation_weight: float = 1.0,
    translation_weight: float = 1.0,
    valid: Tensor | None = None,
    smoothing: float = 1e-3,
    saturation: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Weighted sum of the rotation angle and the angle of the translation direction.

    Convention:
        - `X1 = R X0 + t`. The length of either translation does not matter; a true translation of zero (a
          pure rotation) leaves the rotation term alone.
        - Units: radians.
        - At equal poses the value is exactly zero and so is the gradient; it is finite at opposite ones.

    Args:
        T_0to1: `(B, 4, 4)`, the estimate.
        T_gt_0to1: `(B, 4, 4)`, the truth.
        rotation_weight: of the rotation angle, >= 0.
        translation_weight: of the translation angle, >= 0.
        valid: `(B,)` bool, the estimate's flag; pairs that are not valid count for nothing.
        smoothing: angle in radians below which the loss turns quadratic.
        saturation: the most a pair can cost, approached smoothly; None for no bound.
        reduction: "none" `(B,)`, "mean" over the valid pairs, or "sum".

    Returns:
        `(B,)` or a scalar; the dtype of T_0to1, at least float32.

    Raises:
        ValueError: shapes that do not fit, non-finite entries, an option out of range.
        TypeError: an integer dtype.
    """
    check_options(smoothing, saturation, reduction)
    batch_size = batch_size_of("T_0to1", T_0to1)
    T_0to1, T_gt_0to1 = (without_invalid(T, valid, batch_size) for T in (T_0to1, T_gt_0to1))
    check_matrices("T_0to1", T_0to1, batch_size, rows=4)
    check_matrices("T_gt_0to1", T_gt_0to1, batch_size, rows=4)
    if min(rotation_weight, translation_weight) < 0:
        raise ValueError(
            f"rotation_weight, translation_weight: expected >= 0, got {rotation_weight} and {translation_weight}"
        )
    estimate, truth = to_work(T_0to1), to_work(T_gt_0to1)
    turn = rotation_angle(estimate[:, :3, :3], truth[:, :3, :3])
    slide = translation_direction_angle(estimate[:, :3, 3], truth[:, :3, 3])
    values = rotation_weight * smooth_distance(turn.square(), smoothing)
    values = values + translation_weight * smooth_distance(slide.square(), smoothing)
    return returned(reduce_pairs(saturated(values, saturation), valid, reduction), T_0to1)


def _angle(sine: Tensor, cosine: Tensor) -> Tensor:
    """`atan2` that is 0, with zero gradient, where both arguments are zero."""
    defined = (sine != 0) | (cosine != 0)
    return torch.where(defined, torch.atan2(sine, torch.where(defined, cosine, 1.0)), 0.0)
