# SPDX-License-Identifier: Apache-2.0
"""Robust estimators of other libraries, one pair at a time: OpenCV's USAC with MAGSAC++, and PoseLib's LO-RANSAC."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eloftr_ops.geometry._linalg import skew

BACKENDS = ("opencv", "poselib", "torch")
Array = npt.NDArray[np.float64]
# Points of both images and the index of the pair, to a matrix (3, 3) and a mask (n,), or nothing.
Solver = Callable[[Array, Array, int], tuple[Any, Any]]


class Sampling(NamedTuple):
    """Options of a sample consensus."""

    threshold: float  # pixels
    confidence: float
    max_iterations: int
    seed: int


def solver_of(backend: str, model: str, options: Sampling, cameras: tuple[Tensor, Tensor] | None) -> Solver:
    """Return the function that estimates one pair.

    Args:
        backend: "opencv" or "poselib".
        model: "homography", "fundamental", "essential" or "pose"; the last two give essential matrices.
        options: of the sampling.
        cameras: intrinsics `(B, 3, 3)` of both cameras, float64 on the CPU, where the model needs them.

    Raises:
        ImportError: PoseLib is not installed.
    """
    solve = (_opencv if backend == "opencv" else _poselib)(model, options, cameras)

    def attempt(x0: Array, x1: Array, pair: int) -> tuple[Any, Any]:
        # OpenCV raises at some sets of repeated points.
        try:
            return solve(x0, x1, pair)
        except cv2.error:
            return None, None

    return attempt


def _opencv(model: str, options: Sampling, cameras: tuple[Tensor, Tensor] | None) -> Solver:
    parameters = cv2.UsacParams()
    parameters.score = cv2.SCORE_METHOD_MAGSAC
    parameters.sampler = cv2.SAMPLING_UNIFORM
    parameters.loMethod = cv2.LOCAL_OPTIM_SIGMA
    parameters.final_polisher = cv2.LSQ_POLISHER
    parameters.threshold = options.threshold
    parameters.confidence = options.confidence
    parameters.maxIterations = options.max_iterations
    parameters.randomGeneratorState = options.seed
    if model == "homography":
        return lambda x0, x1, pair: cv2.findHomography(x0, x1, parameters)
    if cameras is None:
        return lambda x0, x1, pair: cv2.findFundamentalMat(x0, x1, parameters)
    K0, K1 = (K.numpy() for K in cameras)
    undistorted = np.zeros(5)

    def essential(x0: Array, x1: Array, pair: int) -> tuple[Any, Any]:
        found: tuple[Any, Any] = cv2.findEssentialMat(x0, x1, K0[pair], K1[pair], undistorted, undistorted, parameters)
        return found

    return essential


def _poselib(model: str, options: Sampling, cameras: tuple[Tensor, Tensor] | None) -> Solver:
    try:
        poselib: Any = importlib.import_module("poselib")
    except ImportError as error:
        raise ImportError(
            'backend="poselib" needs PoseLib; install it with pip install "eloftr-ops[poselib]"'
        ) from error
    ransac = {
        "max_iterations": options.max_iterations,
        "success_prob": options.confidence,
        "seed": options.seed,
        "max_reproj_error": options.threshold,
        "max_epipolar_error": options.threshold,
    }
    if model == "homography" or cameras is None:
        estimate = poselib.estimate_homography if model == "homography" else poselib.estimate_fundamental

        def plain(x0: Array, x1: Array, pair: int) -> tuple[Any, Any]:
            matrix, report = estimate(x0, x1, ransac)
            return matrix, np.asarray(report["inliers"])

        return plain
    inverses = [torch.linalg.inv(K).numpy() for K in cameras]
    focals = torch.stack([K[:, [0, 1], [0, 1]].abs().mean(1) for K in cameras]).mean(0)
    unit = {"model": "PINHOLE", "width": 1, "height": 1, "params": [1.0, 1.0, 0.0, 0.0]}

    def essential(x0: Array, x1: Array, pair: int) -> tuple[Any, Any]:
        rays = [np.c_[x, np.ones(len(x))] @ inverses[k][pair].T for k, x in enumerate((x0, x1))]
        scaled = {**ransac, "max_epipolar_error": options.threshold / float(focals[pair])}
        pose, report = poselib.estimate_relative_pose(*(x[:, :2] / x[:, 2:] for x in rays), unit, unit, scaled)
        t = skew(torch.from_numpy(np.array(pose.t)))
        return t.numpy() @ pose.R, np.asarray(report["inliers"])

    return essential
