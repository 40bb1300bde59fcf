# SPDX-License-Identifier: Apache-2.0
"""Losses on homographies, and on matches where a homography is known."""

import torch
from torch import Tensor

from eloftr_ops.geometry._checks import batch_size_of, check_matrices
from eloftr_ops.geometry._linalg import unit_magnitude
from eloftr_ops.geometry._precision import returned, to_work
from eloftr_ops.geometry.homography import apply_homography
from eloftr_ops.geometry.residuals import symmetric_transfer_residuals
from eloftr_ops.losses._reduction import (
    check_options,
    constant,
    counted,
    mean_over_matches,
    reduce_pairs,
    saturated,
    smooth_length,
    without_invalid,
)

__all__ = [
    "corner_error_loss",
    "cycle_consistency_loss",
    "symmetric_transfer_loss",
    "weak_homography_loss",
]


def corner_error_loss(
    H_0to1: Tensor,
    H_gt_0to1: Tensor,
    size_hw: tuple[int, int],
    *,
    valid: Tensor | None = None,
    smoothing: float = 0.01,
    saturation: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean distance between the four corners of image 0 as two homographies map them (DeTone et al. 2016).

    Convention:
        - Frame: the corners are (0, 0), (W, 0), (W, H), (0, H): the image's outline where the centre of pixel
          (x, y) is (x + 0.5, y + 0.5). Both homographies map to pixels of image 1, at any scale and sign.
        - Units: pixels of image 1.
        - At equal homographies the value is exactly zero and so is the gradient; it is finite where a corner
          goes to infinity.

    Args:
        H_0to1: `(B, 3, 3)`, the estimate.
        H_gt_0to1: `(B, 3, 3)`, the truth.
        size_hw: height and width of image 0, pixels.
        valid: `(B,)` bool, the estimate's flag; pairs that are not valid count for nothing.
        smoothing: distance in pixels below which the loss turns quadratic.
        saturation: the most a pair can cost, pixels, approached smoothly; None for no bound.
        reduction: "none" `(B,)`, "mean" over the valid pairs, or "sum".

    Returns:
        `(B,)` or a scalar; the dtype of H_0to1, at least float32. The gradient flows to both homographies.

    Raises:
        ValueError: shapes that do not fit, non-finite entries, an option out of range.
        TypeError: an integer dtype.
    """
    check_options(smoothing, saturation, reduction)
    batch_size = batch_size_of("H_0to1", H_0to1)
    H_0to1, H_gt_0to1 = (without_invalid(H, valid, batch_size) for H in (H_0to1, H_gt_0to1))
    check_matrices("H_0to1", H_0to1, batch_size)
    check_matrices("H_gt_0to1", H_gt_0to1, batch_size)
    height, width = size_hw
    if height < 1 or width < 1:
        raise ValueError(f"size_hw: expected a height and a width of at least 1, got {size_hw}")
    estimate, truth = to_work(H_0to1), to_work(H_gt_0to1)
    outline = [[0, 0], [width, 0], [width, height], [0, height]]
    corners = estimate.new_tensor(outline).expand(batch_size, 4, 2)
    distance = smooth_length(apply_homography(estimate, corners) - apply_homography(truth, corners), smoothing)
    values = saturated(distance.mean(1), saturation)
    return returned(reduce_pairs(values, valid, reduction), H_0to1)


def symmetric_transfer_loss(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    H_0to1: Tensor,
    weights: Tensor | None = None,
    *,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
    valid: Tensor | None = None,
    smoothing: float = 0.01,
    saturation: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Distance of matches from a homography, measured in both images (Hartley and Zisserman, equation 4.7).

    Convention:
        - `keypoints1 ~ H_0to1 @ (keypoints0, 1)`; both keypoint sets in the homography's frames, axis order
          (x, y).
        - Units: pixels; per match the mean of the two smoothed distances, per pair their weighted mean.
        - Weights are divided by their sum, so that low confidence everywhere does not lower the loss;
          raising the weight of a match that is better than its pair's mean does.
        - A pair without matches, or with zero weights, costs zero. A match at infinity costs a large finite
          amount, or `saturation`. At exact matches the value and the gradient are zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        H_0to1: `(B, 3, 3)`, any scale; B is the number of pairs.
        weights: `(M,)`, finite, >= 0, for instance the confidence; None for ones. Carries a gradient.
        covariance0: `(M, 2, 2)` of keypoints0, pixels squared; None for exact points. Distances then count standard
            deviations, and so do `smoothing` and `saturation`. Carries no gradient: the loss would fall by larger ones.
        covariance1: `(M, 2, 2)` of keypoints1.
        valid: `(B,)` bool; pairs that are not valid count for nothing.
        smoothing: distance in pixels below which the loss turns quadratic.
        saturation: the most a match can cost, pixels, approached smoothly; None for no bound.
        reduction: "none" `(B,)`, "mean" over the valid pairs, or "sum".

    Returns:
        `(B,)` or a scalar; the keypoints' dtype, at least float32. The gradient flows to keypoints, weights
        and homographies.

    Raises:
        ValueError: shapes that do not fit, non-finite values, negative weights, an option out of range.
        IndexError: a batch index out of range.
        TypeError: integer keypoints or weights.
    """
    check_options(smoothing, saturation, reduction)
    batch_size = batch_size_of("H_0to1", H_0to1)
    matches, H = counted(keypoints0, keypoints1, batch_indexes, H_0to1, weights, valid, "H_0to1")
    residuals = symmetric_transfer_residuals(
        *matches, H, covariance0=constant(covariance0), covariance1=constant(covariance1)
    )
    forward, backward = residuals.split(2, dim=1)
    distance = 0.5 * (smooth_length(forward, smoothing) + smooth_length(backward, smoothing))
    values = mean_over_matches(saturated(distance, saturation), batch_indexes, weights, batch_size)
    return returned(reduce_pairs(values, valid, reduction), keypoints0)


def weak_homography_loss(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    H_gt_0to1: Tensor,
    weights: Tensor | None = None,
    *,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
    saturation: float = 8.0,
    reduction: str = "mean",
) -> Tensor:
    """Supervise matches by a known homography alone, without match labels.

    `symmetric_transfer_loss` in which a wrong match costs at most `saturation`, so that the right ones
    decide.

    Convention:
        - As `symmetric_transfer_loss`: pixels, `keypoints1 ~ H_gt_0to1 @ (keypoints0, 1)`, value and gradient
          zero at exact matches and finite everywhere.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, B).
        H_gt_0to1: `(B, 3, 3)`, the known homography, any scale.
        weights: `(M,)`, the confidence; None for ones. Carries no gradient: the loss would fall by fewer matches too.
        covariance0: `(M, 2, 2)` of keypoints0, pixels squared; None for exact points. Distances then count standard
            deviations, and so do `smoothing` and `saturation`. Carries no gradient: the loss would fall by larger ones.
        covariance1: `(M, 2, 2)` of keypoints1.
        saturation: the most a match can cost, pixels; half the reach of a coarse cell's window by default.
        reduction: "none" `(B,)`, "mean" over pairs, or "sum".

    Returns:
        `(B,)` or a scalar.

    Raises:
        ValueError: as `symmetric_transfer_loss`.
        IndexError: a batch index out of range.
        TypeError: integer keypoints or weights.
    """
    return symmetric_transfer_loss(
        keypoints0,
        keypoints1,
        batch_indexes,
        H_gt_0to1,
        None if weights is None else weights.detach(),
        covariance0=covariance0,
        covariance1=covariance1,
        saturation=saturation,
        reduction=reduction,
    )


def cycle_consistency_loss(
    H_0to1: Tensor,
    H_1to0: Tensor,
    size_hw: tuple[int, int],
    *,
    valid: Tensor | None = None,
    smoothing: float = 0.01,
    saturation: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """How far the corners of image 0 return from where they were, for image pairs without labels.

    Two homographies that are both the identity are consistent too: use it beside `photometric_loss`.

    Convention:
        - Frame and units as `corner_error_loss`, in image 0; value and gradient zero at `H_1to0 ~
          inv(H_0to1)`.

    Args:
        H_0to1: `(B, 3, 3)`, any scale.
        H_1to0: `(B, 3, 3)`, any scale.
        size_hw: height and width of image 0, pixels.
        valid: `(B,)` bool; pairs that are not valid count for nothing.
        smoothing: distance in pixels below which the loss turns quadratic.
        saturation: the most a pair can cost, pixels; None for no bound.
        reduction: "none" `(B,)`, "mean" over the valid pairs, or "sum".

    Returns:
        `(B,)` or a scalar. The gradient flows to both homographies.

    Raises:
        ValueError: shapes that do not fit, non-finite entries, an option out of range.
        TypeError: an integer dtype.
    """
    batch_size = batch_size_of("H_0to1", H_0to1)
    H_0to1, H_1to0 = (without_invalid(H, valid, batch_size) for H in (H_0to1, H_1to0))
    check_matrices("H_0to1", H_0to1, batch_size)
    check_matrices("H_1to0", H_1to0, batch_size)
    around = unit_magnitude(to_work(H_1to0), (1, 2)) @ unit_magnitude(to_work(H_0to1), (1, 2))
    identity = torch.eye(3, dtype=around.dtype, device=around.device).expand_as(around)
    loss = corner_error_loss(
        around,
        identity,
        size_hw,
        valid=valid,
        smoothing=smoothing,
        saturation=saturation,
        reduction=reduction,
    )
    return returned(loss, H_0to1)
