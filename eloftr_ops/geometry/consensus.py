# SPDX-License-Identifier: Apache-2.0
"""Robust estimation by sample consensus, for inference: no gradients, high outlier ratios."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eloftr_ops.geometry._backends import BACKENDS, Sampling, Solver, solver_of
from eloftr_ops.geometry._cameras import in_camera_coordinates
from eloftr_ops.geometry._checks import (
    check_cameras,
    check_choice,
    check_matches,
    check_sampling,
    check_scale,
)
from eloftr_ops.geometry._consensus import framed
from eloftr_ops.geometry._eight_point import nearest_essential, with_fixed_sign
from eloftr_ops.geometry._linalg import homography_in_units, skew, unit_magnitude
from eloftr_ops.geometry._precision import eager, returned, work_device
from eloftr_ops.geometry._ragged import Matches, PaddedMatches, canonical_order, pad_matches, solve_in_pieces
from eloftr_ops.geometry.fundamental import camera_matrix, fundamental_from_matches, fundamental_in_pixels
from eloftr_ops.geometry.homography import homography_from_matches
from eloftr_ops.geometry.hypotheses import consensus_from_matches, in_frame_of, no_accident
from eloftr_ops.geometry.pose import choose_motion, relative_pose_from_matches

__all__ = ["ConsensusEstimate", "estimate_robust"]

_SAMPLE_SIZE = {"homography": 4, "fundamental": 7, "essential": 5, "pose": 5}
_CALIBRATED = ("essential", "pose")


class ConsensusEstimate(NamedTuple):
    """Models of B pairs and the matches that agree with them. Nothing here carries a gradient."""

    model_0to1: Tensor  # (B, 3, 3) homography, fundamental or essential matrix, or (B, 4, 4) pose
    valid: Tensor  # (B,) bool: a model was found and its inliers determine one
    inliers: Tensor  # (M,) bool, in the order of the matches; all False for a pair that is not valid


@eager
def estimate_robust(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    *,
    batch_size: int,
    model: str,
    backend: str = "opencv",
    K0: Tensor | None = None,
    K1: Tensor | None = None,
    threshold: float = 1.0,
    confidence: float = 0.9999,
    max_iterations: int = 10_000,
    seed: int = 0,
) -> ConsensusEstimate:
    """Estimate a model of each pair from matches of which many may be wrong.

    Three backends:

    - "opencv": USAC with MAGSAC++ (Barath et al. 2020), on the CPU, pair by pair.
    - "poselib": PoseLib's LO-RANSAC (Larsson 2020), on the CPU, pair by pair; needs the extra `poselib`.
    - "torch": `consensus_from_matches` without gradient, all pairs at once on the device of the keypoints.

    The pose and the homography are a start for the differentiable estimators: pass them as `initial_0to1` and the
    inliers as weights.

    Convention:
        - Direction and frames: as `homography_from_matches`, `fundamental_from_matches`,
          `essential_from_matches` and `relative_pose_from_matches`, whose normalisation the models have.
        - Units: threshold in pixels: transfer error for a homography, Sampson error (OpenCV: distance to the
          epipolar line) otherwise.
        - Degenerate input: too few matches, inliers that do not determine the model (collinear, repeated), or no more
          of them than wrong matches would give by accident, give `valid=False`, the identity (the zero matrix for a
          fundamental or essential matrix) and no inliers. So does a pair at which OpenCV itself raises an error; the
          other pairs keep their results.
        - Order: the result does not depend on the order of the matches.
        - Gradient: none; the inputs are detached.
        - Randomness: from `seed` alone; no global random state is read or changed.

    Args:
        keypoints0: `(M, 2)` in image 0, pixels.
        keypoints1: `(M, 2)` in image 1, pixels.
        batch_indexes: `(M,)` integers in [0, batch_size), in any order.
        batch_size: B, the number of pairs.
        model: "homography", "fundamental", "essential" or "pose".
        backend: "opencv", "poselib" or "torch".
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
        ImportError: `backend="poselib"` without PoseLib.
    """
    check_matches(keypoints0, keypoints1, batch_indexes, batch_size, None)
    check_choice("model", model, tuple(_SAMPLE_SIZE))
    check_choice("backend", backend, BACKENDS)
    check_scale("threshold", threshold)
    check_sampling(confidence, max_iterations)
    check_cameras(model in _CALIBRATED, K0, K1, batch_size)
    options = Sampling(threshold, confidence, max_iterations, seed)
    device = work_device(keypoints0.device) if backend == "torch" else torch.device("cpu")
    points = [x.detach().to(device) for x in (keypoints0, keypoints1)]
    matches = Matches(points[0], points[1], batch_indexes.detach().to(device).long(), batch_size, None)
    cameras = None
    if model in _CALIBRATED and K0 is not None and K1 is not None:
        cameras = (K0.detach().to(device).double(), K1.detach().to(device).double())
    with torch.no_grad():
        if backend == "torch":
            matrices, inliers = _all_pairs_at_once(model, matches, options, cameras)
        else:
            matrices, inliers = _pair_by_pair(model, matches, solver_of(backend, model, options, cameras))
        model_0to1, valid = _judged(model, matrices, matches._replace(weights=inliers.double()), cameras)
        valid = valid & _supported(model, matrices, matches, threshold, cameras)
        empty = _nothing(model, model_0to1)
        model_0to1 = torch.where(valid[:, None, None], model_0to1, empty)
    found, valid = returned(model_0to1, keypoints0), returned(valid, keypoints0)
    return ConsensusEstimate(found, valid, inliers.to(keypoints0.device) & valid[batch_indexes.long()])


def _pair_by_pair(model: str, matches: Matches, solve: Solver) -> tuple[Tensor, Tensor]:
    """Matrices `(B, 3, 3)` and inliers `(M,)` of matches on the CPU; the identity where nothing was found."""
    matrices = torch.eye(3, dtype=torch.float64).repeat(matches.batch_size, 1, 1)
    inliers = torch.zeros(matches.keypoints0.shape[0], dtype=torch.bool)
    points0, points1, index = matches.keypoints0.double(), matches.keypoints1.double(), matches.batch_indexes
    order = canonical_order(index, points0, points1)
    counts = torch.bincount(index, minlength=matches.batch_size).tolist()
    for pair, rows in enumerate(order.split(counts)):
        if rows.shape[0] < _SAMPLE_SIZE[model]:
            continue
        matrix, mask = solve(points0[rows].numpy(), points1[rows].numpy(), pair)
        if matrix is not None and matrix.shape == (3, 3) and np.isfinite(matrix).all():
            matrices[pair] = torch.from_numpy(np.ascontiguousarray(matrix))
            inliers[rows] = torch.from_numpy(mask.ravel() > 0)
    return matrices, inliers


def _all_pairs_at_once(
    model: str, matches: Matches, options: Sampling, cameras: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Matrices `(B, 3, 3)` and inliers `(M,)` by this library's own batched consensus, on the device."""
    kind = "essential" if model == "pose" else model
    K0, K1 = (None, None) if cameras is None else cameras
    found = consensus_from_matches(
        *matches[:3],
        batch_size=matches.batch_size,
        model=kind,
        K0=K0,
        K1=K1,
        robust_scale=options.threshold,
        hypotheses=1,
        confidence=options.confidence,
        max_iterations=options.max_iterations,
        generator=torch.Generator().manual_seed(options.seed),
    )
    # Agreement is 1 / (1 + r^2 / t^2): one half at the threshold.
    return found.best_0to1.double(), found.inlier_weights >= 0.5


def _judged(
    model: str, matrices: Tensor, matches: Matches, cameras: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Normalise the models as the differentiable estimators do, and let those say which are determined.

    Args:
        model: the name.
        matrices: `(B, 3, 3)`, any scale.
        matches: all matches, with weight 1 for inliers and 0 for the others.
        cameras: intrinsics of both cameras, where the model needs them.
    """
    points, batch_size, weights = matches[:3], matches.batch_size, matches.weights
    if model in _CALIBRATED and cameras is not None:
        T, front = _poses(matrices, matches, cameras)
        estimate = relative_pose_from_matches(
            *points[:2], *cameras, points[2], weights=weights, refine_steps=1, initial_0to1=T
        )
        valid, result = estimate.valid & front, T
        if model == "essential":
            result = with_fixed_sign(skew(T[:, :3, 3]) @ T[:, :3, :3])
    elif model == "homography":
        root = torch.linalg.det(matrices)
        root = root.sign() * root.abs().pow(1.0 / 3.0)
        result = matrices / torch.where(root == 0, 1.0, root)[:, None, None]
        valid = homography_from_matches(*points, batch_size=batch_size, weights=weights).valid & (root != 0)
    else:
        result = with_fixed_sign(matrices)
        valid = fundamental_from_matches(*points, batch_size=batch_size, weights=weights).valid
    return result, valid


def _nothing(model: str, like: Tensor) -> Tensor:
    """The model of a pair that is not valid."""
    eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return eye if model in ("homography", "pose") else torch.zeros_like(eye)


def _supported(
    model: str, matrices: Tensor, matches: Matches, threshold: float, cameras: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Pairs `(B,)` whose model agrees with more of all matches than it would by accident."""
    kind = "essential" if model == "pose" else model
    exact = None if cameras is None else (camera_matrix(cameras[0]), camera_matrix(cameras[1]))

    def solve(pixels: PaddedMatches, pairs: Tensor) -> tuple[Tensor, ...]:
        of_pairs = None if exact is None else (exact[0][pairs], exact[1][pairs])
        camera, scale, _ = in_frame_of(kind, pixels, threshold, of_pairs)
        problem = framed(kind, camera, scale)
        frame0, frame1 = problem.frames
        if kind == "homography":
            inner = homography_in_units(matrices[pairs], 1.0 / pixels.unit0, 1.0 / pixels.unit1)
            inner = frame1.transform @ unit_magnitude(inner, (1, 2)) @ frame0.inverse
        else:
            inner = with_fixed_sign(matrices[pairs])
            if kind == "fundamental":
                inner = with_fixed_sign(fundamental_in_pixels(inner, 1.0 / pixels.unit0))
            inner = frame1.inverse.mT @ inner @ frame0.inverse
        return no_accident(problem, with_fixed_sign(inner)), problem.share

    supported: Tensor = solve_in_pieces(matches, solve, one_unit=kind == "fundamental")[0]
    return supported


def _poses(E: Tensor, matches: Matches, cameras: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    padded, usable = in_camera_coordinates(pad_matches(matches), *(camera_matrix(K) for K in cameras))
    essential, t, _ = nearest_essential(with_fixed_sign(E))
    R, t, front = choose_motion(essential, t, padded)
    T = torch.eye(4, dtype=R.dtype, device=R.device).repeat(R.shape[0], 1, 1)
    T[:, :3, :3], T[:, :3, 3] = R, t
    return T, front & usable
