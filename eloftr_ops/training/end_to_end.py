# SPDX-License-Identifier: Apache-2.0
"""Training through the geometry: images -> matches -> homography or relative pose -> loss.

It needs no match labels. The gradient flows from the error of the estimated model through the estimator to each match,
to its position in both images and to its confidence, and from there to all weights. Memory is linear in the number of
cells and matches.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Literal, NamedTuple

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
        robust: kernel of the estimator, ``geman_mcclure`` or ``cauchy``; None for weighted least squares. The gradient
            of least squares is mostly that of the wrong matches; with a kernel it is nearly that of the right ones
            alone (docs/geometry.md has the table that this default follows).
        robust_scale: of the kernel: error in pixels at which a match starts to count as an outlier.
        corner_saturation: the most a pair can cost in the homography loss, pixels; None for no bound.
        pose_saturation: the most a pair can cost in the pose loss, radians; None for no bound.
        invalid: what a pair costs whose matches determine no model: ``zero`` leaves it out of the mean; ``saturated``
            counts the saturation, the most that a pair can cost; ``nan`` makes the loss NaN. None of them has a
            gradient, but only ``zero`` makes a matcher without matches look perfect.
    """

    mode: GradientMode = "straight_through"
    robust: str | None = "geman_mcclure"
    robust_scale: float = 2.0
    corner_saturation: float | None = 32.0
    pose_saturation: float | None = 0.5
    invalid: Literal["zero", "saturated", "nan"] = "zero"

    def __post_init__(self) -> None:
        if self.invalid not in ("zero", "saturated", "nan"):
            raise ValueError(f"invalid: expected zero, saturated or nan, got {self.invalid!r}.")
        if self.invalid == "saturated" and None in (self.corner_saturation, self.pose_saturation):
            raise ValueError("invalid: 'saturated' needs corner_saturation and pose_saturation, got None.")


class EndToEndLoss(NamedTuple):
    """The loss of one batch of B pairs."""

    loss: Tensor  # () mean over the valid pairs; zero, with zero gradient, if there is none (see ``invalid``)
    per_pair: Tensor  # (B,), where not valid zero, the saturation or NaN, as ``invalid`` says
    valid: Tensor  # (B,) bool: the matches determine a model
    matches: Matches  # what the model was estimated from
    matches_per_pair: Tensor  # (B,) int64; watch it: a matcher that finds nothing has no error


def homography_objective(
    model: EfficientLoFTR,
    image0: Tensor,
    image1: Tensor,
    H_gt_0to1: Tensor,
    config: EndToEndConfig | None = None,
    *,
    mask0: Tensor | None = None,
    mask1: Tensor | None = None,
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
        mask0: (B, H0, W0) bool, True where image 0 shows something: pairs of different sizes, padded to one.
        mask1: (B, H1, W1), the same for image 1.

    Raises:
        ValueError: shapes, ranges or options that do not fit; from the matcher, the estimator or the loss.
        TypeError: dtypes that do not fit.
    """
    config = config or EndToEndConfig()
    matches = _match(model, (image0, image1), (mask0, mask1), config.mode)
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
    return _summed_up(per_pair, estimate.valid, matches, config.invalid, config.corner_saturation)


def pose_objective(
    model: EfficientLoFTR,
    image0: Tensor,
    image1: Tensor,
    K0: Tensor,
    K1: Tensor,
    T_gt_0to1: Tensor,
    config: EndToEndConfig | None = None,
    *,
    mask0: Tensor | None = None,
    mask1: Tensor | None = None,
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
        mask0: (B, H0, W0) bool, True where image 0 shows something: pairs of different sizes, padded to one.
        mask1: (B, H1, W1), the same for image 1.

    Raises:
        ValueError: shapes, ranges or options that do not fit; from the matcher, the estimator or the loss.
        TypeError: dtypes that do not fit.
    """
    config = config or EndToEndConfig()
    matches = _match(model, (image0, image1), (mask0, mask1), config.mode)
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
    return _summed_up(per_pair, estimate.valid, matches, config.invalid, config.pose_saturation)


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


def _match(
    model: EfficientLoFTR,
    images: tuple[Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    mode: GradientMode,
) -> Matches:
    data = {"image0": images[0], "image1": images[1]}
    data |= {f"mask{k}": mask for k, mask in enumerate(masks) if mask is not None}
    return Matches(**model(data, mode=mode))


def _summed_up(
    per_pair: Tensor, valid: Tensor, matches: Matches, invalid: str, saturation: float | None
) -> EndToEndLoss:
    """The loss of a batch, with the cost of invalid pairs, and a warning where no pair is valid."""
    counts = torch.bincount(matches.batch_indexes, minlength=len(per_pair))
    if not bool(valid.any()):
        warnings.warn(
            f"no pair of this batch determines a model (matches per pair: {counts.tolist()}); its loss teaches "
            "nothing. Lower the matcher's threshold or the learning rate; EndToEndConfig(invalid='saturated') "
            "keeps such a batch from looking perfect",
            RuntimeWarning,
            stacklevel=3,
        )
    if invalid != "zero":
        cost = float("nan") if invalid == "nan" else float(saturation or 0.0)
        per_pair = torch.where(valid, per_pair, cost)
    pairs = valid.sum().clamp_min(1) if invalid == "zero" else len(per_pair)
    return EndToEndLoss(per_pair.sum() / pairs, per_pair, valid, matches, counts)
