# SPDX-License-Identifier: Apache-2.0
"""Homographies from matches: weighted, robust, refined, with gradients that stay finite."""

from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._charts import HomographyChart
from eloftr_ops.geometry._checks import check_choice, check_floats, check_matches, check_matrices, check_scale
from eloftr_ops.geometry._covariances import Covariances, check_covariances, relative_covariances
from eloftr_ops.geometry._linalg import (
    FAR,
    LEAST_GAP,
    ROUNDINGS,
    Normalised,
    homogeneous,
    homography_in_units,
    normalise_points,
    shares,
    smallest_eigenvector,
    unit_magnitude,
)
from eloftr_ops.geometry._precision import eager, result_dtype, returned, to_work
from eloftr_ops.geometry._ragged import Matches, PaddedMatches, solve_in_pieces
from eloftr_ops.geometry._refine import RobustCost, minimise
from eloftr_ops.geometry._residuals import TransferResidual, guarded_depth, symmetric_transfer
from eloftr_ops.geometry._robust import (
    KERNELS,
    cheapest,
    graduated_start,
    robust_weight,
    sampled_starts,
    trusted_weights,
    votes,
)
from eloftr_ops.geometry._validity import is_no_accident

__all__ = ["HomographyEstimate", "apply_homography", "homography_from_matches"]

LEAST_MATCHES = 4
# Determinant of a unit-norm homography between normalised frames below which it collapses the plane.
LEAST_DETERMINANT = 1e-9
DEFAULT_ROBUST_STEPS = 20


class HomographyEstimate(NamedTuple):
    """Homographies of B pairs, with flags and diagnostics."""

    H_0to1: Tensor  # (B, 3, 3), determinant 1; the identity where not valid
    valid: Tensor  # (B,) bool: the matches determine a homography
    converged: Tensor  # (B,) bool: the refinement reached its minimum; equals `valid` without refinement
    conditioning: Tensor  # (B,) in [0, 1]: how far from ill-posed; no gradient
    inlier_weights: Tensor  # (M,) in [0, 1], the robust kernel's weight of each match; differentiable


class _Linear(NamedTuple):
    matrix: Tensor  # (B, 3, 3) between normalised frames, unit norm
    frame0: Normalised
    frame1: Normalised
    determined: Tensor  # (B,) bool
    gap: Tensor  # (B,)
    least_gap: Tensor  # (B,)


@eager
def homography_from_matches(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    *,
    batch_size: int,
    weights: Tensor | None = None,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
    robust: str | None = None,
    robust_scale: float = 2.0,
    refine_steps: int | None = None,
    initial_0to1: Tensor | None = None,
) -> HomographyEstimate:
    """Estimate the homography of each pair of a ragged batch of matches.

    Three estimators, by choice:

    - `robust=None, refine_steps=0` (default): the weighted direct linear transform in normalised coordinates
      (Hartley and Zisserman, algorithm 4.2). Gradient: exact, through the null vector and the normalisation.
    - `refine_steps > 0`: Levenberg-Marquardt on the squared transfer error in image 1 (section 4.2.3),
      started at the linear solution. Gradient: exact at the minimum, by the implicit function theorem.
    - `robust="cauchy"` or `"geman_mcclure"`: the same on the robust transfer error, started by the best
      of 256 four-point samples and graduated re-weighting. Gradient: that of the robust minimum, the change
      of every match's robust weight included.

    Convention:
        - Frame: any, the same for both keypoint sets or not; H_0to1 maps from that of keypoints0 to that of
          keypoints1. Pixels, axis order (x, y).
        - Direction: `keypoints1 ~ H_0to1 @ (keypoints0, 1)`.
        - Scale and sign: determinant 1, so that H_1to0 is the inverse of H_0to1. Divide by `H[..., 2:, 2:]`
          for OpenCV's and kornia's convention (undefined where that entry is zero).
        - Weights: only their ratios within a pair matter.
        - Covariances: residuals are whitened (Mahalanobis) by `S1 + J S0 J^T`, J the derivative of the homography at
          the match; the linear solution divides weights by mean variances. Only the ratios of covariances within a
          pair matter: `robust_scale` stays in pixels, for a match with the geometric mean of the variances. The
          sampled starts do not use them.
        - dtype: computed in float64; the result has the keypoints' dtype, at least float32.
        - Degenerate input: fewer than four matches of positive weight, collinear or repeated points, all
          weights zero, or a solution that collapses the plane, give `valid=False`, the identity and zero
          gradient, and leave the other pairs alone. Four exact matches, an exact fit, and points mapped to
          infinity are well-posed.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, batch_size), in any order.
        batch_size: B, the number of pairs.
        weights: `(M,)`, finite, >= 0; None for ones. The matcher's confidence, for instance.
        covariance0: `(M, 2, 2)` of keypoints0, pixels squared, positive definite; None for exact points.
        covariance1: `(M, 2, 2)` of keypoints1.
        robust: None, "cauchy" or "geman_mcclure".
        robust_scale: transfer error in pixels at which a match starts to count as an outlier.
        refine_steps: the most iterations; None for 0, or 20 with a robust kernel, which needs at least one.
        initial_0to1: `(B, 3, 3)`, start of the refinement instead of the linear solution, for instance from
            `estimate_robust`; needs `refine_steps`. No gradient flows to it.

    Returns:
        A `HomographyEstimate`. A second derivative exists for the linear estimate and raises for a refined
        one.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite coordinates, negative or NaN weights, covariances that are
            not finite, symmetric and positive definite, an unknown kernel.
        IndexError: a batch index out of range.
        TypeError: integer keypoints or weights, floating point batch indexes.
    """
    check_matches(keypoints0, keypoints1, batch_indexes, batch_size, weights)
    check_covariances(covariance0, covariance1, len(keypoints0))
    check_choice("robust", robust, KERNELS)
    check_scale("robust_scale", robust_scale)
    steps = resolve_steps(refine_steps, robust, initial_0to1 is not None)
    if initial_0to1 is not None:
        check_matrices("initial_0to1", initial_0to1, batch_size)

    def solve(matches: PaddedMatches, pairs: Tensor) -> tuple[Tensor, ...]:
        scale = robust_scale / matches.unit1
        relative, weights = relative_covariances(matches.covariances, matches.weights, summed=True)
        matches = matches._replace(covariances=relative)
        if steps == 0:
            H, valid, conditioning = _linear_estimate(matches, weights)
            converged = valid
        else:
            initial = None
            if initial_0to1 is not None:
                initial = homography_in_units(
                    to_work(initial_0to1.detach())[pairs], 1.0 / matches.unit0, 1.0 / matches.unit1
                )
            H, valid, converged, conditioning = _refined_estimate(matches, weights, (robust, scale), steps, initial)
        residual = TransferResidual.value(H, matches.points0, matches.points1, relative)
        squared = residual.clamp(-FAR, FAR).square().sum(-1)
        ratio = (matches.unit0 / matches.unit1).pow(2.0 / 3.0)[:, None, None]
        H = or_identity(homography_in_units(H, matches.unit0, matches.unit1) * ratio, valid)
        return H, valid, converged, conditioning, robust_weight(squared, scale, robust)

    covariances = Covariances(covariance0, covariance1)
    matches = Matches(keypoints0, keypoints1, batch_indexes, batch_size, weights, covariances)
    return HomographyEstimate(*(returned(x, keypoints0) for x in solve_in_pieces(matches, solve)))


def apply_homography(H_0to1: Tensor, points0: Tensor) -> Tensor:
    """Map points by homographies, finite everywhere.

    Convention:
        - `points1 ~ H_0to1 @ (points0, 1)`; frames and units are the homography's; axis order (x, y).
        - A point that H maps to infinity lands at a large finite distance in the direction it goes to: the
          homogeneous coordinate is kept, with its sign, above 1e-6 of the terms it is the sum of. There its
          gradient with respect to that coordinate is zero. (kornia's `transform_points` divides by 1 there.)

    Args:
        H_0to1: `(B, 3, 3)`, any scale.
        points0: `(B, N, 2)`.

    Returns:
        `(B, N, 2)`, the wider of the two dtypes, at least float32. Autocast does not change it.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: no tensor, an integer dtype.
    """
    check_floats("points0", points0)
    check_floats("H_0to1", H_0to1)
    if points0.ndim != 3 or points0.shape[2] != 2:
        raise ValueError(f"points0: expected shape (B, N, 2), got {tuple(points0.shape)}")
    if H_0to1.shape != (points0.shape[0], 3, 3):
        raise ValueError(f"H_0to1: expected shape (B, 3, 3) with B = {points0.shape[0]}, got {tuple(H_0to1.shape)}")
    dtype = result_dtype(torch.promote_types(H_0to1.dtype, points0.dtype))
    with torch.autocast(points0.device.type, enabled=False):
        H, x = unit_magnitude(H_0to1.to(dtype), (1, 2)), homogeneous(points0.to(dtype))
        return (x @ H[:, :2].mT) / guarded_depth(H[:, None, 2], x)[..., None]


def resolve_steps(refine_steps: int | None, robust: str | None, has_initial: bool) -> int:
    """Return the number of refinement steps, or raise where the choice makes no sense."""
    if refine_steps is None:
        return 0 if robust is None and not has_initial else DEFAULT_ROBUST_STEPS
    if refine_steps < 0:
        raise ValueError(f"refine_steps: expected >= 0, got {refine_steps}")
    if refine_steps == 0 and robust is not None:
        raise ValueError(
            f"refine_steps: expected >= 1 with robust={robust!r}, got 0; the gradient belongs to the "
            "minimum of the robust cost, and only the refinement finds it"
        )
    if refine_steps == 0 and has_initial:
        raise ValueError("refine_steps: expected >= 1 with an initial estimate, got 0; it starts the refinement")
    return refine_steps


def _design(points0: Tensor, points1: Tensor) -> Tensor:
    """Rows `(B, N, 2, 9)` of the equations `u w = p, v w = q` (Hartley and Zisserman, equation 4.3)."""
    x = homogeneous(points0)
    zero = torch.zeros_like(x)
    first = torch.cat([x, zero, -points1[..., :1] * x], dim=-1)
    second = torch.cat([zero, x, -points1[..., 1:] * x], dim=-1)
    return torch.stack([first, second], dim=2)


def _solve_linear(matches: PaddedMatches, weights: Tensor) -> _Linear:
    frame0 = normalise_points(matches.points0, weights, matches.eps)
    frame1 = normalise_points(matches.points1, weights, matches.eps)
    rows = _design(frame0.points, frame1.points).flatten(1, 2)
    moment = (rows * shares(weights).repeat_interleave(2, dim=1)[..., None]).mT @ rows
    rounding = torch.maximum(frame0.rounding, frame1.rounding)
    least_gap = (ROUNDINGS * rounding).square().clamp_min(LEAST_GAP)
    vector, gap, open_gap = smallest_eigenvector(moment, least_gap)
    matrix = vector.view(-1, 3, 3)
    enough = (weights > 0).sum(1) >= LEAST_MATCHES
    regular = torch.linalg.det(matrix.detach()).abs() > LEAST_DETERMINANT
    determined = enough & frame0.spread & frame1.spread & open_gap & regular
    return _Linear(matrix, frame0, frame1, determined, gap, least_gap)


def _linear_estimate(matches: PaddedMatches, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    solution = _solve_linear(matches, weights)
    H = with_unit_determinant(solution.matrix, solution.frame0, solution.frame1)
    return or_identity(H, solution.determined), solution.determined, solution.gap


def _refined_estimate(
    matches: PaddedMatches,
    linear_weights: Tensor,
    kernel: tuple[str | None, Tensor],
    steps: int,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    robust, robust_scale = kernel
    with torch.no_grad():
        trusted = linear_weights
        if robust is not None:
            trusted = trusted_weights(matches)
        linear = _solve_linear(matches, trusted)
        frame0, frame1 = linear.frame0, linear.frame1
        scale = robust_scale * frame1.scale
        start = linear.matrix
        if initial is not None:
            start = frame1.transform @ unit_magnitude(initial, (1, 2)) @ frame0.inverse
        elif robust is not None:
            start = _robust_start(matches, trusted, linear, scale)
    cost = RobustCost(
        TransferResidual(),
        _similarity(frame0.transform, matches.points0),
        _similarity(frame1.transform, matches.points1),
        matches.weights,
        scale,
        robust,
        _in_frames(matches.covariances, frame0, frame1),
    )
    minimum = minimise(HomographyChart.centred(start), cost, steps, linear.least_gap)
    matrix = minimum.chart.at(minimum.delta)
    regular = torch.linalg.det(matrix.detach()).abs() > LEAST_DETERMINANT
    enough = (matches.weights > 0).sum(1) >= LEAST_MATCHES
    valid = minimum.determined & regular & enough & frame0.spread & frame1.spread
    if robust is not None:
        with torch.no_grad():
            points0, points1 = cost.points0, cost.points1
            support = votes(points0, points1, (matches.weights > 0).to(scale.dtype), 2.0 * scale)
            valid = valid & is_no_accident(
                "homography", matrix, (points0, points1), support, scale, torch.ones_like(scale)
            )
    H = or_identity(with_unit_determinant(matrix, frame0, frame1), valid)
    return H, valid, valid & minimum.converged, minimum.conditioning


def _robust_start(matches: PaddedMatches, trusted: Tensor, linear: _Linear, scale: Tensor) -> Tensor:
    frame0, frame1 = linear.frame0, linear.frame1
    points0 = _similarity(frame0.transform, matches.points0)
    points1 = _similarity(frame1.transform, matches.points1)

    def solve(weights: Tensor) -> Tensor:
        tries = weights.shape[0] // points0.shape[0]
        repeated = matches._replace(
            points0=points0.repeat_interleave(tries, 0), points1=points1.repeat_interleave(tries, 0)
        )
        inner = _solve_linear(repeated, weights)
        return inner.frame1.inverse @ inner.matrix @ inner.frame0.transform

    def squared(matrices: Tensor) -> Tensor:
        tries = matrices.shape[0] // points0.shape[0]
        repeated = [x.repeat_interleave(tries, 0) for x in (points0, points1)]
        return symmetric_transfer(matrices, *repeated)

    trusted = votes(points0, points1, trusted, 2.0 * scale)
    starts = sampled_starts("homography", (points0, points1), trusted, scale)
    return cheapest(*graduated_start(starts, solve, squared, trusted, scale))


def _in_frames(covariances: Covariances | None, frame0: Normalised, frame1: Normalised) -> Covariances | None:
    """Relative covariances between normalised frames, relative to the same variance in image 1."""
    if covariances is None or covariances.points0 is None:
        return covariances
    ratio = (frame0.scale / frame1.scale).square()[:, None, None, None]
    return covariances._replace(points0=covariances.points0 * ratio)


def _similarity(transform: Tensor, points: Tensor) -> Tensor:
    return (points * transform[:, None, :1, 0] + transform[:, None, :2, 2]).clamp(-FAR, FAR)


def with_unit_determinant(matrix: Tensor, frame0: Normalised, frame1: Normalised) -> Tensor:
    """Homographies between pixel frames, of determinant 1, from those between normalised frames."""
    # det(T1^-1 H T0), from the well-scaled factors rather than from the pixel matrix, where it cancels.
    det = torch.linalg.det(matrix)
    safe = torch.where(det.abs() > torch.finfo(det.dtype).tiny, det, 1.0)
    root = safe.sign() * safe.abs().pow(1.0 / 3.0) * (frame0.scale / frame1.scale).pow(2.0 / 3.0)
    return frame1.inverse @ matrix @ frame0.transform / root[:, None, None]


def or_identity(H: Tensor, valid: Tensor) -> Tensor:
    """H where valid, the identity elsewhere."""
    eye = torch.eye(3, dtype=H.dtype, device=H.device)
    return torch.where(valid[:, None, None], H, eye)
