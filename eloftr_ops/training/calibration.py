# SPDX-License-Identifier: Apache-2.0
"""Fit the covariances of matches to their errors, on pairs with known homographies.

The seven numbers of ``config.covariance_calibration`` maximise the likelihood of the errors of right matches under a
normal distribution: the residual in image 1 has the covariance ``S1 + J S0 J^T``, J the derivative of the homography.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.window_match import WindowMoments
from eloftr_ops.data.synthetic import HomographyBatch
from eloftr_ops.geometry._covariances import Whitening, moved_covariances, projective_slope
from eloftr_ops.geometry._linalg import homogeneous
from eloftr_ops.model.coarse import select_matches
from eloftr_ops.model.covariance import calibrated_covariances
from eloftr_ops.model.fine import cell_positions, matched_windows, measured_windows
from eloftr_ops.model.matcher import EfficientLoFTR

RIGHT = 3.0  # pixels in image 1: a match with a smaller error is right
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_ITERATIONS = 100


class MatchErrors(NamedTuple):
    """Right matches of pairs with known homographies, float64."""

    residual: Tensor  # (M, 2) keypoint 1 minus where the homography maps keypoint 0, pixels
    slope: Tensor  # (M, 2, 2) derivative of the homography at keypoint 0
    moments: WindowMoments


class CalibrationReport(NamedTuple):
    """How the squared Mahalanobis errors of right matches compare with the chi-square law of two degrees."""

    matches: int
    mean: float  # 2 by the law
    ratios: tuple[float, ...]  # quantile by the law's quantile, at LEVELS


@torch.no_grad()
def measure_errors(matcher: EfficientLoFTR, pairs: Iterable[HomographyBatch], *, right: float = RIGHT) -> MatchErrors:
    """Match pairs in mode ``hard``, and keep the matches with an error below ``right`` pixels in image 1.

    Raises:
        ValueError: there is no such match.
    """
    found = [_errors_of(matcher, batch, right) for batch in pairs]
    if not sum(len(errors.residual) for errors in found):
        raise ValueError(f"pairs: expected matches with an error below {right} pixels, got none.")
    residuals, slopes, moments = zip(*found, strict=True)
    joined = WindowMoments(*(torch.cat(fields) for fields in zip(*moments, strict=True)))
    return MatchErrors(torch.cat(residuals), torch.cat(slopes), joined)


def fit_covariances(errors: MatchErrors) -> tuple[float, ...]:
    """The calibration that makes the errors most likely; deterministic."""
    raw = torch.tensor([-1.0, 0.5, 0.5, -1.0, 0.5, 0.5, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        whitening = Whitening.of(_covariance(errors, _in_range(raw)))
        likelihood = 0.5 * whitening(errors.residual[..., None]).square().sum((1, 2)).mean()
        likelihood = likelihood - (whitening.p.log() + whitening.s.log()).mean()
        likelihood.backward()
        return likelihood

    optimizer.step(loss)
    return tuple(round(float(number), 4) for number in _in_range(raw.detach()))


def squared_mahalanobis(errors: MatchErrors, calibration: tuple[float, ...]) -> Tensor:
    """Squared Mahalanobis errors (M,)."""
    whitening = Whitening.of(_covariance(errors, torch.tensor(calibration, dtype=torch.float64)))
    return whitening(errors.residual[..., None]).square().sum((1, 2))


def calibration_report(squared: Tensor) -> CalibrationReport:
    """Mean and quantiles of squared Mahalanobis errors, beside the chi-square law."""
    quantiles = torch.quantile(squared, torch.tensor(LEVELS, dtype=squared.dtype)).tolist()
    ratios = tuple(found / chi_square_quantile(level) for found, level in zip(quantiles, LEVELS, strict=True))
    return CalibrationReport(len(squared), float(squared.mean()), ratios)


def chi_square_quantile(level: float) -> float:
    """Of two degrees of freedom."""
    return -2.0 * math.log1p(-level)


def _errors_of(matcher: EfficientLoFTR, batch: HomographyBatch, right: float) -> MatchErrors:
    data = {"image0": batch.image0.to(matcher.device), "image1": batch.image1.to(matcher.device)}
    sides = matcher.extract_pair(matcher.check_input(data))
    coarse = matcher.match_coarse(*sides, *matcher.transform(*sides))
    selected = select_matches(coarse, matcher.config)
    fine = matcher.fine_features(*sides, coarse)
    windows = matched_windows(*fine, selected, "hard", matcher.config)
    moments = measured_windows(*fine, selected, windows, matcher.config)
    point0 = cell_positions(selected.cells0, coarse.grid0, torch.float64) + windows.pixel0
    point1 = cell_positions(selected.cells1, coarse.grid1, torch.float64) + windows.pixel1 + windows.subpixel1
    H = batch.H_0to1.to(point0)[selected.batch]
    x = homogeneous(point0)[:, None] @ H.mT
    mapped, depth = x[..., :2] / x[..., 2:], x[..., 2]
    residual = point1 - mapped[:, 0]
    kept = residual.norm(dim=1) < right
    slope = projective_slope(H, mapped, depth)[:, 0]
    fields = (field[kept].double().cpu() for field in (residual, slope, *moments))
    residual, slope, *rest = fields
    return MatchErrors(residual, slope, WindowMoments(*rest))


def _in_range(raw: Tensor) -> Tensor:
    """Six numbers as they are, and a weight that is not negative."""
    return torch.cat([raw[:6], F.softplus(raw[6:])]).clamp(-8.0, 8.0)


def _covariance(errors: MatchErrors, calibration: Tensor) -> Tensor:
    """Covariances (M, 2, 2) of the residuals."""
    covariance0, covariance1 = calibrated_covariances(errors.moments, calibration.unbind())
    return covariance1 + moved_covariances(covariance0, errors.slope)
