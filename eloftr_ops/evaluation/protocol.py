# SPDX-License-Identifier: Apache-2.0
"""The configuration of an evaluation, and the results of one pair from its matches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eloftr_ops.data.labelled import ImagePair
from eloftr_ops.evaluation.estimators import ESTIMATORS, estimate_homography, estimate_pose
from eloftr_ops.evaluation.metrics import (
    PoseErrors,
    corner_error,
    epipolar_errors,
    matching_precision,
    overlap_error,
    pose_errors,
    transfer_errors,
)

__all__ = ["CORNER_THRESHOLDS", "POSE_THRESHOLDS", "EvaluationConfig", "PairResult", "measure_pair"]

POSE_THRESHOLDS = (5, 10, 20)  # degrees
CORNER_THRESHOLDS = (3, 5, 10)  # pixels
OVERLAP_THRESHOLDS = (1, 3, 5, 10)  # pixels
TRANSFER_THRESHOLDS = (1, 3)  # pixels, of the precision of matches under a homography


@dataclass(frozen=True)
class EvaluationConfig:
    """How pairs are measured.

    Attributes:
        estimator: "magsac", "ransac" or "project"; see `eloftr_ops.evaluation.estimators`.
        runs: robust estimations per pair, each on another order of the matches; their errors are pooled.
        pose_threshold: largest distance between an inlier of a pose and its epipolar line, pixels.
        homography_threshold: largest transfer error of an inlier of a homography, pixels.
        epipolar_threshold: of the precision: squared symmetric epipolar distance in normalised coordinates, usually
            1e-4 outdoors and 5e-4 indoors.
        original_pixels: thresholds and errors are in pixels of the image files; otherwise in those of the images as
            matched, after resizing.
        max_matches: at most so many matches count, the most confident; None for all.
    """

    estimator: str = "magsac"
    runs: int = 5
    pose_threshold: float = 0.5
    homography_threshold: float = 3.0
    epipolar_threshold: float = 1e-4
    original_pixels: bool = True
    max_matches: int | None = None

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {self.estimator!r}.")
        if self.runs < 1:
            raise ValueError(f"runs: expected at least 1, got {self.runs}.")
        for name in ("pose_threshold", "homography_threshold", "epipolar_threshold"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}.")
        if self.max_matches is not None and self.max_matches < 1:
            raise ValueError(f"max_matches: expected at least 1, got {self.max_matches}.")


@dataclass(frozen=True)
class PairResult:
    """One pair, measured.

    Attributes:
        index: of the pair in its data set.
        name: of its files.
        kind: "pose" or "homography": which ground truth it has.
        matches: number of matches that count.
        seconds: wall clock of the matcher alone.
        precision: share of correct matches, by criterion; 0 where there is no match.
        errors: by measure, one number per run, infinite where nothing was estimated: "rotation" and "translation"
            (degrees) of a pose, "corner" and "overlap" (pixels) of a homography.
    """

    index: int
    name: str
    kind: str
    matches: int
    seconds: float
    precision: dict[str, float]
    errors: dict[str, list[float]]

    @property
    def estimated(self) -> bool:
        """Whether any run gave a model."""
        return any(np.isfinite(error) for errors in self.errors.values() for error in errors)


def measure_pair(
    pair: ImagePair,
    keypoints0: Tensor,
    keypoints1: Tensor,
    config: EvaluationConfig,
    *,
    index: int = 0,
    seconds: float = 0.0,
) -> PairResult:
    """Errors and precision of one pair's matches.

    Convention:
        Keypoints are in pixels of ``pair.image0`` and ``pair.image1``; the centre of pixel (x, y) is
        (x + 0.5, y + 0.5). No match at all is an infinite error and a precision of 0.

    Args:
        pair: images and ground truth, unbatched, without padding.
        keypoints0: (M, 2).
        keypoints1: (M, 2).
        config: what to measure.
        index: stored in the result.
        seconds: stored in the result.

    Raises:
        ValueError: a pair with neither a homography nor intrinsics and pose, or keypoints that are not finite.
    """
    x0, x1 = keypoints0.detach().cpu().double(), keypoints1.detach().cpu().double()
    if not (x0.isfinite().all() and x1.isfinite().all()):
        raise ValueError(f"keypoints0, keypoints1: expected finite numbers, got NaN or infinity at {pair.name}.")
    scales = [s.double() if config.original_pixels else torch.ones(2).double() for s in (pair.scale0, pair.scale1)]
    x0, x1 = x0 * scales[0], x1 * scales[1]
    S0, S1 = (torch.diag(torch.nn.functional.pad(scale, (0, 1), value=1.0)) for scale in scales)
    if pair.H_0to1 is not None:
        H = S1 @ pair.H_0to1.double() @ torch.linalg.inv(S0)
        sizes = [
            (round(image.shape[-1] * s[0].item()), round(image.shape[-2] * s[1].item()))
            for image, s in ((pair.image0, scales[0]), (pair.image1, scales[1]))
        ]
        kind, measured = "homography", _homography_errors(x0, x1, H, (sizes[0], sizes[1]), config)
    elif pair.K0 is not None and pair.K1 is not None and pair.T_0to1 is not None:
        kind = "pose"
        measured = _pose_errors(x0, x1, S0 @ pair.K0.double(), S1 @ pair.K1.double(), pair.T_0to1.double(), config)
    else:
        raise ValueError(f"pair: expected H_0to1, or K0, K1 and T_0to1, got neither at {pair.name}.")
    return PairResult(index, str(pair.name), kind, len(x0), seconds, *measured)


_Measured = tuple[dict[str, float], dict[str, list[float]]]


def _pose_errors(x0: Tensor, x1: Tensor, K0: Tensor, K1: Tensor, T: Tensor, config: EvaluationConfig) -> _Measured:
    def error(order: Tensor) -> PoseErrors:
        estimate = estimate_pose(
            x0[order], x1[order], K0, K1, estimator=config.estimator, threshold=config.pose_threshold
        )
        return PoseErrors(float("inf"), float("inf")) if estimate is None else pose_errors(estimate, T)

    runs = [error(order) for order in _orders(len(x0), config.runs)]
    share = matching_precision(epipolar_errors(x0, x1, K0, K1, T), config.epipolar_threshold)
    errors = {"rotation": [run.rotation for run in runs], "translation": [run.translation for run in runs]}
    return {f"{config.epipolar_threshold:g}": share}, errors


def _homography_errors(
    x0: Tensor,
    x1: Tensor,
    H: Tensor,
    sizes_wh: tuple[tuple[int, int], tuple[int, int]],
    config: EvaluationConfig,
) -> _Measured:
    errors: dict[str, list[float]] = {"corner": [], "overlap": []}
    for order in _orders(len(x0), config.runs):
        estimate = estimate_homography(
            x0[order], x1[order], estimator=config.estimator, threshold=config.homography_threshold
        )
        if estimate is None:
            estimate = torch.full((3, 3), float("nan"))  # every error of it is infinite
        errors["corner"].append(corner_error(estimate, H, sizes_wh[0]))
        errors["overlap"].append(overlap_error(estimate, H, *sizes_wh))
    distances = transfer_errors(x0, x1, H)
    return {f"{bound}px": matching_precision(distances, bound) for bound in TRANSFER_THRESHOLDS}, errors


def _orders(count: int, runs: int) -> Iterator[Tensor]:
    """Orders of the matches: as they are, then permuted, each by its own fixed seed.

    OpenCV's random numbers start at a fixed seed: only the order of the matches makes its runs differ.
    """
    yield torch.arange(count)
    for seed in range(1, runs):
        yield torch.from_numpy(np.random.default_rng(seed).permutation(count))
