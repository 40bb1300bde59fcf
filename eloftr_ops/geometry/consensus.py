# SPDX-License-Identifier: Apache-2.0
"""Robust estimation by sample consensus, for inference: no gradients, high outlier ratios."""

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from eloftr_ops.geometry._checks import check_choice, check_intrinsics, check_matches, check_scale
from eloftr_ops.geometry._eight_point import nearest_essential, with_fixed_sign
from eloftr_ops.geometry._linalg import skew
from eloftr_ops.geometry._precision import eager, returned
from eloftr_ops.geometry._ragged import Matches, canonical_order, pad_matches
from eloftr_ops.geometry.fundamental import camera_matrix, fundamental_from_matches
from eloftr_ops.geometry.homography import homography_from_matches
from eloftr_ops.geometry.pose import choose_motion, in_camera_coordinates, relative_pose_from_matches

__all__ = ["ConsensusEstimate", "estimate_robust"]

_SAMPLE_SIZE = {"homography": 4, "fundamental": 7, "essential": 5, "pose": 5}
_CALIBRATED = ("essential", "pose")
_Solver = Callable[[np.ndarray, np.ndarray, int], tuple[Any, Any]]


class ConsensusEstimate(NamedTuple):
    """Models of B pairs and the matches that agree with them. Nothing here carries a gradient."""

    model_0to1: Tensor  # (B, 3, 3) homography, fundamental or essential matrix, or (B, 4, 4) pose
    valid: Tensor  # (B,) bool: a model was found and its inliers determine one
    inliers: (
        Tensor  # (M,) bool, in the order of the matches; False for every match of a pair that is not valid
    )


@eager
def estimate_robust(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    *,
    batch_size: int,
    model: str,
    K0: Tensor | None = None,
    K1: Tensor | None = None,
    threshold: float = 1.0,
    confidence: float = 0.9999,
    max_iterations: int = 10_000,
    seed: int = 0,
) -> ConsensusEstimate:
    """Estimate a model of each pair from matches of which many may be wrong (OpenCV's USAC with MAGSAC++).

    Runs on the CPU, pair by pair (Barath et al. 2020). Its pose and homography are a start for the
    differentiable estimators: pass them as `initial_0to1` and the inliers as weights.

    Convention:
        - Direction and frames: as `homography_from_matches`, `fundamental_from_matches`,
          `essential_from_matches` and `relative_pose_from_matches`, whose normalisation the models have.
        - Units: threshold in pixels: transfer error for a homography, distance to the epipolar line
          otherwise.
        - Degenerate input: too few matches, or inliers that do not determine the model (collinear, repeated),
          give `valid=False`, the identity (the zero matrix for a fundamental or essential matrix) and no
          inliers. So does a pair at which OpenCV itself raises an error; the other pairs keep their results.
        - Order: the result does not depend on the order of the matches.
        - Gradient: none; the inputs are detached.
        - Randomness: from `seed` alone; no global random state is read or changed.

    Args:
        keypoints0: `(M, 2)` in image 0, pixels.
        keypoints1: `(M, 2)` in image 1, pixels.
        batch_indexes: `(M,)` integers in [0, batch_size), in any order.
        batch_size: B, the number of pairs.
        model: "homography", "fundamental", "essential" or "pose".
        K0: `(B, 3, 3)` intrinsics of camera 0; needed for "essential" and "pose".
        K1: `(B, 3, 3)` intrinsics of camera 1; needed for "essential" and "pose".
        threshold: largest error of an inlier.
        confidence: in (0, 1), the probability with which to find the best model.
        max_iterations: the most samples per pair.
        seed: of the sampling.

    Returns:
        A `ConsensusEstimate` on the keypoints' device; the models in their dtype, at least float32.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite coordinates, an unknown model, missing or singular
            intrinsics.
        IndexError: a batch index out of range.
        TypeError: integer keypoints, floating point batch indexes.
    """
    check_matches(keypoints0, keypoints1, batch_indexes, batch_size, None)
    _check_options(model, threshold, confidence, max_iterations)
    _check_cameras(model, K0, K1, batch_size)
    parameters = _parameters(threshold, confidence, max_iterations, seed)
    solver = _solver(model, parameters, K0, K1)
    matrices = torch.eye(3, dtype=torch.float64).repeat(batch_size, 1, 1)
    inliers = torch.zeros(keypoints0.shape[0], dtype=torch.bool)
    index = batch_indexes.detach().cpu().long()
    points0, points1 = (p.detach().cpu().double() for p in (keypoints0, keypoints1))
    order = canonical_order(index, points0, points1)
    counts = torch.bincount(index, minlength=batch_size).tolist()
    for pair, rows in enumerate(order.split(counts)):
        if rows.shape[0] < _SAMPLE_SIZE[model]:
            continue
        matrix, mask = _attempt(solver, points0[rows].numpy(), points1[rows].numpy(), pair)
        if matrix is not None and matrix.shape == (3, 3) and np.isfinite(matrix).all():
            matrices[pair] = torch.from_numpy(matrix)
            inliers[rows] = torch.from_numpy(mask.ravel() > 0)
    cameras = None if K0 is None or K1 is None else (K0.detach().cpu(), K1.detach().cpu())
    kept = Matches(keypoints0.detach().cpu(), keypoints1.detach().cpu(), index, batch_size, inliers.double())
    judged = _judged(model, matrices, kept, cameras)
    found, valid = (returned(x, keypoints0) for x in judged)
    return ConsensusEstimate(found, valid, inliers.to(keypoints0.device) & valid[batch_indexes.long()])


def _check_options(model: str, threshold: float, confidence: float, max_iterations: int) -> None:
    check_choice("model", model, tuple(_SAMPLE_SIZE))
    check_scale("threshold", threshold)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations: expected at least 1, got {max_iterations}")


def _check_cameras(model: str, K0: Tensor | None, K1: Tensor | None, batch_size: int) -> None:
    if model not in _CALIBRATED:
        return
    if K0 is None or K1 is None:
        raise ValueError(f"K0, K1: expected intrinsics (B, 3, 3) for model={model!r}, got None")
    check_intrinsics("K0", K0, batch_size)
    check_intrinsics("K1", K1, batch_size)


def _attempt(solver: _Solver, x0: np.ndarray, x1: np.ndarray, pair: int) -> tuple[Any, Any]:
    """Return what OpenCV finds for one pair; nothing where it raises, as it does at repeated points."""
    try:
        return solver(x0, x1, pair)
    except cv2.error:
        return None, None


def _parameters(threshold: float, confidence: float, max_iterations: int, seed: int) -> Any:
    parameters = cv2.UsacParams()
    parameters.score = cv2.SCORE_METHOD_MAGSAC
    parameters.sampler = cv2.SAMPLING_UNIFORM
    parameters.loMethod = cv2.LOCAL_OPTIM_SIGMA
    parameters.final_polisher = cv2.LSQ_POLISHER
    parameters.threshold = threshold
    parameters.confidence = confidence
    parameters.maxIterations = max_iterations
    parameters.randomGeneratorState = seed
    return parameters


def _solver(model: str, parameters: Any, K0: Tensor | None, K1: Tensor | None) -> _Solver:
    if model == "homography":
        return lambda x0, x1, pair: cv2.findHomography(x0, x1, parameters)
    if model == "fundamental" or K0 is None or K1 is None:
        return lambda x0, x1, pair: cv2.findFundamentalMat(x0, x1, parameters)
    cameras0, cameras1 = K0.detach().cpu().double().numpy(), K1.detach().cpu().double().numpy()
    undistorted = np.zeros(5)

    def essential(x0: np.ndarray, x1: np.ndarray, pair: int) -> tuple[Any, Any]:
        found: tuple[Any, Any] = cv2.findEssentialMat(
            x0, x1, cameras0[pair], cameras1[pair], undistorted, undistorted, parameters
        )
        return found

    return essential


def _judged(
    model: str, matrices: Tensor, matches: Matches, cameras: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Normalise the models as the differentiable estimators do, and let those say which are determined.

    Args:
        model: the name.
        matrices: `(B, 3, 3)` as OpenCV returns them.
        matches: all matches, with weight 1 for inliers and 0 for the others.
        cameras: intrinsics of both cameras, where the model needs them.
    """
    points, batch_size, weights = matches[:3], matches.batch_size, matches.weights
    if model in _CALIBRATED and cameras is not None:
        T, front = _poses(matrices, matches, cameras)
        estimate = relative_pose_from_matches(
            *points[:2], *cameras, points[2], weights=weights, refine_steps=1, initial_0to1=T
        )
        valid, result, empty = estimate.valid & front, T, torch.eye(4, dtype=T.dtype)
        if model == "essential":
            result, empty = (
                with_fixed_sign(skew(T[:, :3, 3]) @ T[:, :3, :3]),
                torch.zeros(3, 3, dtype=T.dtype),
            )
    elif model == "homography":
        root = torch.linalg.det(matrices)
        root = root.sign() * root.abs().pow(1.0 / 3.0)
        result = matrices / torch.where(root == 0, 1.0, root)[:, None, None]
        valid = homography_from_matches(*points, batch_size=batch_size, weights=weights).valid & (root != 0)
        empty = torch.eye(3, dtype=result.dtype)
    else:
        result, empty = with_fixed_sign(matrices), torch.zeros(3, 3, dtype=matrices.dtype)
        valid = fundamental_from_matches(*points, batch_size=batch_size, weights=weights).valid
    return torch.where(valid[:, None, None], result, empty), valid


def _poses(E: Tensor, matches: Matches, cameras: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    padded, usable = in_camera_coordinates(pad_matches(matches), *(camera_matrix(K) for K in cameras))
    essential, t, _ = nearest_essential(with_fixed_sign(E))
    R, t, front = choose_motion(essential, t, padded)
    T = torch.eye(4, dtype=R.dtype).repeat(R.shape[0], 1, 1)
    T[:, :3, :3], T[:, :3, 3] = R, t
    return T, front & usable
