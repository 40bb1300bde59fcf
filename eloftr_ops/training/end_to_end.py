# SPDX-License-Identifier: Apache-2.0
"""Training through the geometry: images -> matches -> homography or relative pose -> loss.

It needs no match labels. The gradient flows from the error of the estimated model through the estimator to each match,
to its position in both images and to its confidence, and from there to all weights. Memory is linear in the number of
cells and matches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.config import GradientMode
from eloftr_ops.geometry import homography_from_matches, relative_pose_from_matches
from eloftr_ops.losses import corner_error_loss, pose_loss
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.types import Matches


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndToEndConfig:
    """How matches become a model and a loss.

    Args:
        mode: of the matcher; ``hard`` leaves keypoints0, and the coarse choice of both sides, without gradient.
        robust: kernel of the estimator, ``cauchy`` or ``geman_mcclure``; None for weighted least
            squares. In least squares a wrong match pulls the model, so its confidence learns to fall. A kernel
            suppresses the match and its gradient.
        robust_scale: of the kernel: error in pixels at which a match starts to count as an outlier.
        corner_saturation: the most a pair can cost in the homography loss, pixels; None for no bound.
        pose_saturation: the most a pair can cost in the pose loss, radians; None for no bound.
    """

    mode: GradientMode = "straight_through"
    robust: str | None = None
    robust_scale: float = 2.0
    corner_saturation: float | None = 32.0
    pose_saturation: float | None = 0.5


class EndToEndLoss(NamedTuple):
    """The loss of one batch of B pairs."""

    loss: Tensor  # () mean over the valid pairs; zero, with zero gradient, if there is none
    per_pair: Tensor  # (B,), zero where not valid
    valid: Tensor  # (B,) bool: the matches determine a model
    matches: Matches  # what the model was estimated from


def homography_objective(
    model: EfficientLoFTR,
    image0: Tensor,
    image1: Tensor,
    H_gt_0to1: Tensor,
    config: EndToEndConfig | None = None,
) -> EndToEndLoss:
    """Corner error, in pixels of image 1, of the homography estimated from the matches.

    Convention:
        - Frame: ``H_gt_0to1`` maps image 0 to image 1 with the centre of pixel (x, y) at (x + 0.5, y + 0.5), the
          frame of the keypoints. Axis order (x, y).
        - Weights of the matches are their confidences; only ratios within a pair matter.
        - A pair whose matches determine no homography (fewer than four, collinear) is not valid, costs zero and
          gives zero gradient; it never disturbs the others. No gradient is NaN or infinite.
        - Gradient: flows to images and parameters as the mode's row of ``docs/differentiability.md`` says.

    Args:
        model: the matcher, in training or evaluation mode (which decides on BatchNorm statistics).
        image0: (B, 1, H0, W0) in [0, 1].
        image1: (B, 1, H1, W1) in [0, 1].
        H_gt_0to1: (B, 3, 3) the truth, any scale.
        config: mode, estimator and bound; ``EndToEndConfig()`` by default.

    Raises:
        ValueError: shapes, ranges or options that do not fit; from the matcher, the estimator or the loss.
        TypeError: dtypes that do not fit.
    """
    config = config or EndToEndConfig()
    matches = _match(model, image0, image1, config.mode)
    height, width = image0.shape[-2:]
    return homography_objective_of_matches(matches, (height, width), H_gt_0to1, config)


def homography_objective_of_matches(
    matches: Matches, size_hw: tuple[int, int], H_gt_0to1: Tensor, config: EndToEndConfig
) -> EndToEndLoss:
    """:func:`homography_objective` of matches that are there already; ``size_hw`` is that of image 0."""
    estimate = homography_from_matches(
        matches.keypoints0,
        matches.keypoints1,
        matches.batch_indexes,
        batch_size=len(H_gt_0to1),
        weights=matches.confidence,
        robust=config.robust,
        robust_scale=config.robust_scale,
    )
    per_pair = corner_error_loss(
        estimate.H_0to1,
        H_gt_0to1,
        size_hw,
        valid=estimate.valid,
        saturation=config.corner_saturation,
        reduction="none",
    )
    return EndToEndLoss(_mean_of_valid(per_pair, estimate.valid), per_pair, estimate.valid, matches)


def pose_objective(
    model: EfficientLoFTR,
    image0: Tensor,
    image1: Tensor,
    K0: Tensor,
    K1: Tensor,
    T_gt_0to1: Tensor,
    config: EndToEndConfig | None = None,
) -> EndToEndLoss:
    """Rotation plus translation-direction error, in radians, of the relative pose estimated from the matches.

    Convention:
        - Direction: ``X1 = T_gt_0to1 X0``; the length of the translation does not matter.
        - Frame: the intrinsics are those of images where the centre of pixel (x, y) is (x + 0.5, y + 0.5).
        - Weights, invalid pairs and gradient: as :func:`homography_objective`. A scene that is one plane, or a pure
          rotation, determines no pose for the eight-point start and is not valid.

    Args:
        model: the matcher, in training or evaluation mode.
        image0: (B, 1, H0, W0) in [0, 1].
        image1: (B, 1, H1, W1) in [0, 1].
        K0: (B, 3, 3) intrinsics of camera 0, pixels.
        K1: (B, 3, 3) intrinsics of camera 1.
        T_gt_0to1: (B, 4, 4) the truth.
        config: mode, estimator and bound; ``EndToEndConfig()`` by default.

    Raises:
        ValueError: shapes, ranges or options that do not fit; from the matcher, the estimator or the loss.
        TypeError: dtypes that do not fit.
    """
    config = config or EndToEndConfig()
    matches = _match(model, image0, image1, config.mode)
    return pose_objective_of_matches(matches, K0, K1, T_gt_0to1, config)


def pose_objective_of_matches(
    matches: Matches, K0: Tensor, K1: Tensor, T_gt_0to1: Tensor, config: EndToEndConfig
) -> EndToEndLoss:
    """:func:`pose_objective` of matches that are there already."""
    estimate = relative_pose_from_matches(
        matches.keypoints0,
        matches.keypoints1,
        K0,
        K1,
        matches.batch_indexes,
        weights=matches.confidence,
        robust=config.robust,
        robust_scale=config.robust_scale,
    )
    per_pair = pose_loss(
        estimate.T_0to1,
        T_gt_0to1,
        valid=estimate.valid,
        saturation=config.pose_saturation,
        reduction="none",
    )
    return EndToEndLoss(_mean_of_valid(per_pair, estimate.valid), per_pair, estimate.valid, matches)


def finite_step(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    parameters: Iterable[Tensor],
    *,
    clip_norm: float = 1.0,
) -> bool:
    """One optimiser step down a scalar loss, gradients clipped to a norm.

    Args:
        optimizer: of ``parameters``.
        loss: scalar that requires a gradient.
        parameters: those whose gradients are clipped together.
        clip_norm: largest norm.

    Returns:
        Whether the step was taken: not if the loss or a gradient is not finite, or if no gradient is other than zero
        (no valid pair), where an optimiser with momentum or weight decay would move all the same.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), clip_norm)
    if not bool(torch.isfinite(norm + loss.detach())) or float(norm) == 0:
        return False
    optimizer.step()
    return True


def _match(model: EfficientLoFTR, image0: Tensor, image1: Tensor, mode: GradientMode) -> Matches:
    return Matches(**model({"image0": image0, "image1": image1}, mode=mode))


def _mean_of_valid(per_pair: Tensor, valid: Tensor) -> Tensor:
    return per_pair.sum() / valid.sum().clamp_min(1)
