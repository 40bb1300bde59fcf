# SPDX-License-Identifier: Apache-2.0
"""Robust estimators of relative poses and homographies, as evaluations use them.

Three by name:

- ``magsac``: OpenCV's MAGSAC++ (Barath et al. 2020), the default;
- ``ransac``: OpenCV's RANSAC, what the tables of LoFTR and EfficientLoFTR are made with;
- ``project``: `eloftr_ops.geometry.estimate_robust`, and the least squares of `eloftr_ops.geometry` on its inliers.

Points are scaled by the mean focal length, and thresholds are in pixels. Many scripts use coordinates of unit scale,
for which OpenCV's MAGSAC++ is less exact. RANSAC is equally exact for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eloftr_ops.geometry import (
    apply_homography,
    estimate_robust,
    homography_from_matches,
    relative_pose_from_matches,
)

__all__ = ["ESTIMATORS", "estimate_homography", "estimate_pose"]

ESTIMATORS = ("magsac", "ransac", "project")

_CONFIDENCE = 0.99999
_MAX_ITERATIONS = 10_000  # of a homography; OpenCV's essential matrix has its own bound
_FAR = 1e9  # baselines at which recoverPose still takes a point for one in front of the cameras
_Array = npt.NDArray[np.float64]


def estimate_pose(
    keypoints0: Tensor,
    keypoints1: Tensor,
    K0: Tensor,
    K1: Tensor,
    *,
    estimator: str = "magsac",
    threshold: float = 0.5,
) -> Tensor | None:
    """Robust estimate of a relative pose; many matches may be wrong.

    Convention:
        Keypoints and intrinsics are in one frame, either one. The result is ``T_0to1``, ``X1 = R X0 + t``, |t| = 1.
        No gradient. Deterministic: the estimators' random numbers start at a fixed seed; the order of the matches
        decides which are drawn.

    Args:
        keypoints0: (M, 2), pixels.
        keypoints1: (M, 2).
        K0: (3, 3).
        K1: (3, 3).
        estimator: one of `ESTIMATORS`.
        threshold: largest distance between an inlier and its epipolar line, in pixels at the mean focal length.

    Returns:
        (4, 4) float64, or None: fewer than five matches, or no pose found.

    Raises:
        ValueError: an unknown estimator, or another shape.
    """
    _check_estimator(estimator)
    if len(keypoints0) < 5:
        return None
    K0, K1, x0, x1 = (_float64(value) for value in (K0, K1, keypoints0, keypoints1))
    focal = torch.stack([K0[0, 0], K0[1, 1], K1[0, 0], K1[1, 1]]).mean()
    K = torch.diag(torch.stack([focal, focal, torch.ones_like(focal)]))
    x0, x1 = (
        apply_homography((K @ torch.linalg.inv(matrix))[None], points[None])[0]
        for matrix, points in ((K0, x0), (K1, x1))
    )
    if estimator == "project":
        return _project_pose(x0, x1, K, threshold)
    points0, points1, camera = x0.numpy(), x1.numpy(), K.numpy()
    found = _attempt(
        lambda: cv2.findEssentialMat(
            points0, points1, camera, method=_method(estimator), prob=_CONFIDENCE, threshold=threshold
        )
    )
    return None if found is None else _motion(*found, points0, points1, camera)


def estimate_homography(
    keypoints0: Tensor, keypoints1: Tensor, *, estimator: str = "magsac", threshold: float = 3.0
) -> Tensor | None:
    """Robust estimate of a homography; many matches may be wrong.

    Convention:
        ``H_0to1`` in the keypoints' frame, either one. No gradient. Deterministic, as `estimate_pose`.

    Args:
        keypoints0: (M, 2), pixels.
        keypoints1: (M, 2).
        estimator: one of `ESTIMATORS`.
        threshold: largest transfer error of an inlier in image 1, pixels.

    Returns:
        (3, 3) float64, or None: fewer than four matches, or no homography found.

    Raises:
        ValueError: an unknown estimator, or another shape.
    """
    _check_estimator(estimator)
    if len(keypoints0) < 4:
        return None
    x0, x1 = _float64(keypoints0), _float64(keypoints1)
    if estimator == "project":
        return _project_homography(x0, x1, threshold)
    found = _attempt(
        lambda: cv2.findHomography(
            x0.numpy(),
            x1.numpy(),
            _method(estimator),
            threshold,
            maxIters=_MAX_ITERATIONS,
            confidence=_CONFIDENCE,
        )
    )
    return None if found is None else torch.from_numpy(np.asarray(found[0], dtype=np.float64))


def _check_estimator(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}.")


def _float64(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _method(estimator: str) -> int:
    return int(cv2.USAC_MAGSAC if estimator == "magsac" else cv2.RANSAC)


def _attempt(solve: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """What OpenCV finds; None also where it gives up by an exception, as it does at degenerate points."""
    try:
        model, mask = solve()
    except cv2.error:
        return None
    return None if model is None or mask is None else (model, mask)


def _motion(stacked: _Array, mask: Any, points0: _Array, points1: _Array, camera: _Array) -> Tensor | None:
    """Of all essential matrices found, and their four motions each, the one with most inliers in front."""
    best, pose = 0, None
    for E in stacked.reshape(-1, 3, 3) if len(stacked) % 3 == 0 else ():
        recovered = _attempt(functools.partial(_recovered, E, mask, points0, points1, camera))
        if recovered is not None and recovered[0] > best:
            best, pose = recovered
    return None if pose is None else torch.from_numpy(pose)


def _recovered(E: _Array, mask: Any, points0: _Array, points1: _Array, camera: _Array) -> tuple[int, _Array]:
    # recoverPose overwrites the mask it is given.
    count, R, t, *_ = cv2.recoverPose(E, points0, points1, camera, distanceThresh=_FAR, mask=mask.copy())
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = R, t[:, 0]
    return count, pose


def _project_pose(x0: Tensor, x1: Tensor, K: Tensor, threshold: float) -> Tensor | None:
    indexes = torch.zeros(len(x0), dtype=torch.int64)
    start = estimate_robust(
        x0,
        x1,
        indexes,
        batch_size=1,
        model="pose",
        K0=K[None],
        K1=K[None],
        threshold=threshold,
        confidence=_CONFIDENCE,
    )
    if not start.valid.item():
        return None
    kept = start.inliers
    refined = relative_pose_from_matches(
        x0[kept], x1[kept], K[None], K[None], indexes[kept], initial_0to1=start.model_0to1
    )
    return (refined.T_0to1 if refined.valid.item() else start.model_0to1)[0]


def _project_homography(x0: Tensor, x1: Tensor, threshold: float) -> Tensor | None:
    indexes = torch.zeros(len(x0), dtype=torch.int64)
    start = estimate_robust(
        x0, x1, indexes, batch_size=1, model="homography", threshold=threshold, confidence=_CONFIDENCE
    )
    if not start.valid.item():
        return None
    kept = start.inliers
    refined = homography_from_matches(
        x0[kept], x1[kept], indexes[kept], batch_size=1, refine_steps=20, initial_0to1=start.model_0to1
    )
    return (refined.H_0to1 if refined.valid.item() else start.model_0to1)[0]
