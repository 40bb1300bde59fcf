# SPDX-License-Identifier: Apache-2.0
"""Do two images show the same scene? An a-contrario answer, calibrated on photographs that do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eloftr_ops.config import check_choice
from eloftr_ops.efforts import Effort
from eloftr_ops.geometry.consensus import estimate_robust

__all__ = ["Verdict", "related", "shows_parallax"]


ACCEPTED_CHANCE = 0.005  # half of what is promised: the tails come from few pairs
LEAST_CHANCE = 1e-6  # far below what 300 pairs can tell
_MAX_ERROR = 3.0  # pixels: what a matcher is off by
_MIN_ERROR = 0.5  # pixels: smaller errors are luck
_PLACE = 8.0  # pixels: matches of one place count once
_SAMPLE_SIZE = {"homography": 4, "fundamental": 7}
_LEAST_OFF_PLANE = 0.05
# (a, b): log10 NFA is below a - b log10(1 / p) in a share p of pairs of unrelated photographs, for each effort of
# guided matching, which looks for agreement. From benchmarks/verdict.py, which prints them.
_TAILS: dict[Effort, Mapping[str, tuple[float, float]]] = {
    "fast": {"homography": (3.56, 5.36), "fundamental": (4.42, 3.87)},
    "normal": {"homography": (14.94, 14.36), "fundamental": (9.94, 9.08)},
    "thorough": {"homography": (13.54, 14.28), "fundamental": (-0.56, 5.22)},
}
_Array = npt.NDArray[np.float64]


class Verdict(NamedTuple):
    """Whether two images show the same scene, and how sure that is."""

    related: bool
    chance: float  # in [1e-6, 1]: of so much agreement between images that show different things
    inliers: int  # matches behind it, one for each place
    model: str  # that they agree on: "homography" or "fundamental"; "none" without any


def related(
    keypoints0: Tensor,
    keypoints1: Tensor,
    size0_wh: tuple[int, int],
    size1_wh: tuple[int, int],
    *,
    looks: int = 1,
    effort: Effort = "fast",
    threshold: float = 1.5,
) -> Verdict:
    """Decide whether the matches of two images agree more than matches of unrelated images do.

    For a homography and for a fundamental matrix, the number of false alarms (NFA) is the number of agreeing subsets
    that matches at random places would be expected to give (Moisan and Stival 2004; Moulon, Monasse, Marlet 2012).
    Matches of a network are not at random places, not even between unrelated images. So the NFA is compared with those
    of unrelated photographs: ``chance`` is the share of them that agree as much. ``related`` means a chance of at most
    0.005.

    Convention:
        - Frame: pixels of the images as matched, centre of pixel (x, y) at (x + 0.5, y + 0.5).
        - Matches of one place (8 pixels) of either image count once.
        - Degenerate input: too few matches give ``related=False`` and a chance of 1.
        - Gradient: none.

    Args:
        keypoints0: (M, 2).
        keypoints1: (M, 2).
        size0_wh: (width, height) of image 0.
        size1_wh: the same of image 1.
        looks: how many sets of matches were tried, of which this is the best: other scales, rotations, or the images
            of a collection. The chance grows with it.
        effort: of `eloftr_ops.guided.GuidedMatcher`, which gave the matches. It looks for agreement: its matches agree
            more, those of unrelated images, too. Its own looks are accounted for, and do not count as ``looks``.
        threshold: inlier threshold of the robust estimation, pixels.

    Raises:
        ValueError: shapes that do not fit, ``looks`` is less than 1, or an unknown ``effort``.
    """
    if looks < 1:
        raise ValueError(f"looks: expected at least 1, got {looks}.")
    if min(*size0_wh, *size1_wh) <= 0:
        raise ValueError(f"sizes: expected positive (width, height), got {size0_wh} and {size1_wh}.")
    tails = _TAILS[check_choice("effort", effort, Effort)]
    found = {model: log10_nfa(model, keypoints0, keypoints1, size0_wh, size1_wh, threshold) for model in _SAMPLE_SIZE}
    chances = {model: log10_chance({model: nfa}, looks, tails) for model, (nfa, _) in found.items()}
    model = min(chances, key=lambda name: (chances[name], -found[name][1]))
    chance = 10 ** max(chances[model], math.log10(LEAST_CHANCE))
    inliers = found[model][1]
    return Verdict(chance <= ACCEPTED_CHANCE, chance, inliers, model if inliers else "none")


def log10_chance(
    log10_nfas: Mapping[str, float], looks: int = 1, tails: Mapping[str, tuple[float, float]] = _TAILS["fast"]
) -> float:
    """The logarithm of the share of unrelated pairs whose NFA is as small, of the model for which that is smallest."""
    logs = [
        min(0.0, (nfa - tails[model][0]) / tails[model][1]) if nfa < 0 else 0.0 for model, nfa in log10_nfas.items()
    ]
    return min(0.0, min(logs) + math.log10(len(_SAMPLE_SIZE) * looks))  # two models are two looks


def log10_nfa(
    model: str,
    keypoints0: Tensor,
    keypoints1: Tensor,
    size0_wh: tuple[int, int],
    size1_wh: tuple[int, int],
    threshold: float = 1.5,
) -> tuple[float, int]:
    """The logarithm of the number of false alarms, at most 0, and the number of inliers it is smallest for."""
    points0, points1 = _one_for_each_place(_array(keypoints0), _array(keypoints1))
    count, sample = len(points0), _SAMPLE_SIZE[model]
    matrix = _estimate(model, points0, points1, threshold) if count > sample + 1 else None
    if matrix is None:
        return 0.0, 0
    if model == "homography":
        errors = transfer_errors(matrix, points0, points1)
        area = min(size0_wh[0] * size0_wh[1], size1_wh[0] * size1_wh[1])
        exponent, factor = 2, math.pi / area
    else:
        errors = epipolar_errors(matrix, points0, points1)
        exponent, factor = (
            1,
            max(2 * math.hypot(*size) / (size[0] * size[1]) for size in (size0_wh, size1_wh)),
        )
    errors = np.sort(errors)
    k = np.arange(sample + 1, count + 1)
    k = k[errors[k - 1] <= _MAX_ERROR]
    if not len(k):
        return 0.0, 0
    chance = np.minimum(1.0, factor * np.maximum(errors[k - 1], _MIN_ERROR) ** exponent)
    log_nfa = (
        math.log(count - sample) + _log_choose(count, k) + _log_choose(k, sample) + (k - sample) * np.log(chance)
    ) / math.log(10)
    best = int(log_nfa.argmin())
    return (float(log_nfa[best]), int(k[best])) if log_nfa[best] < 0 else (0.0, 0)


def shows_parallax(
    keypoints0: Tensor, keypoints1: Tensor, F_0to1: Tensor, H_0to1: Tensor, *, threshold: float = 1.5
) -> bool:
    """Whether matches off the plane of a homography agree on the fundamental matrix; without them, none is determined.

    Any number of matches of a plane, or of a camera that only rotates, fit a family of fundamental matrices. What
    selects one is the matches that the homography does not explain. They support it if their distances to the epipolar
    lines are smaller than those of directions at random (number of false alarms below 0.01, two of them chosen), and if
    they are at least 5 % of those that the fundamental matrix fits: a matcher's wrong matches come in clusters, which
    agree with each other.

    Args:
        keypoints0: (M, 2), pixels.
        keypoints1: (M, 2).
        F_0to1: (3, 3).
        H_0to1: (3, 3), of the same matches.
        threshold: largest error of an inlier of the fundamental matrix, pixels.
    """
    points0, points1 = _one_for_each_place(_array(keypoints0), _array(keypoints1))
    F, H = (matrix.detach().cpu().double().numpy() for matrix in (F_0to1, H_0to1))
    parallax = np.linalg.norm(_mapped(H, points0) - points1, axis=1)
    off = parallax > 3 * threshold
    fits = epipolar_errors(F, points0, points1) <= threshold
    count, support = int(off.sum()), int((off & fits).sum())
    if support <= 2 or support < _LEAST_OFF_PLANE * fits.sum():
        return False
    chance = float((2 / np.pi * np.arcsin(np.minimum(1.0, threshold / parallax[off]))).mean())
    log_nfa: float = (
        math.log(count)
        + float(_log_choose(count, support) + _log_choose(support, 2))
        + (support - 2) * math.log(chance)
    )
    return log_nfa < math.log(0.01)


def _array(points: Tensor) -> _Array:
    array: _Array = points.detach().cpu().double().numpy()
    return array


def _one_for_each_place(points0: _Array, points1: _Array) -> tuple[_Array, _Array]:
    for side in (0, 1):
        cells = np.floor((points0, points1)[side] / _PLACE)
        first = np.sort(np.unique(cells, axis=0, return_index=True)[1])
        points0, points1 = points0[first], points1[first]
    return points0, points1


def _estimate(model: str, points0: _Array, points1: _Array, threshold: float) -> _Array | None:
    found = estimate_robust(
        torch.from_numpy(points0),
        torch.from_numpy(points1),
        torch.zeros(len(points0), dtype=torch.int64),
        batch_size=1,
        model=model,
        threshold=threshold,
    )
    matrix: _Array = found.model_0to1[0].numpy()
    return matrix if found.valid.item() else None


def _mapped(H: _Array, points: _Array) -> _Array:
    with np.errstate(all="ignore"):
        homogeneous = np.c_[points, np.ones(len(points))] @ H.T
        mapped: _Array = np.nan_to_num(homogeneous[:, :2] / homogeneous[:, 2:], nan=1e9, posinf=1e9, neginf=-1e9)
    return mapped


def transfer_errors(H: _Array, points0: _Array, points1: _Array) -> _Array:
    """The larger one of both images."""
    inverse: _Array = np.linalg.pinv(H).astype(np.float64)
    forward = np.linalg.norm(_mapped(H, points0) - points1, axis=1)
    backward = np.linalg.norm(_mapped(inverse, points1) - points0, axis=1)
    errors: _Array = np.maximum(forward, backward)
    return errors


def epipolar_errors(F: _Array, points0: _Array, points1: _Array) -> _Array:
    """The larger one of both images."""
    x0, x1 = (np.c_[points, np.ones(len(points))] for points in (points0, points1))
    lines1, lines0 = x0 @ F.T, x1 @ F
    product = np.abs((x1 * lines1).sum(1))
    norms = np.minimum(np.hypot(*lines1[:, :2].T), np.hypot(*lines0[:, :2].T))
    errors: _Array = np.where(norms > 0, product / np.where(norms > 0, norms, 1.0), np.inf)
    return errors


def _log_choose(n: int | npt.NDArray[np.int64], k: int | npt.NDArray[np.int64]) -> _Array:
    of, chosen = (torch.as_tensor(value, dtype=torch.float64) for value in (n, k))
    result: _Array = (torch.lgamma(of + 1) - torch.lgamma(chosen + 1) - torch.lgamma(of - chosen + 1)).numpy()
    return result
