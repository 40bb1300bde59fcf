# SPDX-License-Identifier: Apache-2.0
"""Fundamental matrices from matches and from poses."""

from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._charts import FundamentalChart
from eloftr_ops.geometry._checks import (
    batch_size_of,
    check_choice,
    check_intrinsics,
    check_matches,
    check_matrices,
    check_scale,
)
from eloftr_ops.geometry._covariances import Covariances, check_covariances, relative_covariances
from eloftr_ops.geometry._eight_point import (
    eight_point,
    nearest_essential,
    nearest_rank_two,
    to_pixels,
    with_fixed_sign,
)
from eloftr_ops.geometry._linalg import FAR, Normalised, skew, unit_magnitude
from eloftr_ops.geometry._precision import eager, returned, to_work
from eloftr_ops.geometry._ragged import Matches, PaddedMatches, solve_in_pieces
from eloftr_ops.geometry._refine import RobustCost, minimise
from eloftr_ops.geometry._residuals import SampsonResidual
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
from eloftr_ops.geometry.homography import resolve_steps

__all__ = ["FundamentalEstimate", "fundamental_from_matches", "fundamental_from_pose"]


class FundamentalEstimate(NamedTuple):
    """Fundamental matrices of B pairs, with flags and diagnostics."""

    F_0to1: Tensor  # (B, 3, 3), rank 2, unit norm, largest entry positive; zero where not valid
    valid: Tensor  # (B,) bool: the matches determine a fundamental matrix
    converged: Tensor  # (B,) bool: the refinement reached its minimum; equals `valid` without refinement
    conditioning: Tensor  # (B,) in [0, 1]: how far from ill-posed; no gradient
    inlier_weights: Tensor  # (M,) in [0, 1], the robust kernel's weight of each match; differentiable


@eager
def fundamental_from_matches(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    *,
    batch_size: int,
    weights: Tensor | None = None,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
    robust: str | None = None,
    robust_scale: float = 1.0,
    refine_steps: int | None = None,
) -> FundamentalEstimate:
    """Estimate the fundamental matrix of each pair of a ragged batch of matches.

    By default the weighted, normalised eight-point algorithm (Hartley 1997) with the nearest matrix of rank
    two. With `refine_steps > 0`, Levenberg-Marquardt on the Sampson error over the matrices of rank two
    (Hartley and Zisserman, section 11.4.3), started there; with `robust`, on the robust Sampson error,
    started by graduated re-weighting.

    Convention:
        - Frame: any; F_0to1 is bound to the frames of the two keypoint sets. Pixels, axis order (x, y).
        - Direction: `(keypoints1, 1)^T F_0to1 (keypoints0, 1) = 0`; `F_0to1 @ x0` is a line in image 1
          (OpenCV's and kornia's order). F_1to0 is the transpose, up to sign.
        - Scale and sign: unit Frobenius norm, the entry of largest magnitude positive. The sign has no
          geometric meaning and jumps where two such entries tie; the losses do not depend on it.
        - Weights: only their ratios within a pair matter.
        - Covariances: the Sampson error is divided by its standard deviation `sqrt(l0^T S0 l0 + l1^T S1 l1)`, l the
          normals of the epipolar lines; the linear solution divides weights by mean variances. Only the ratios of
          covariances within a pair matter: `robust_scale` stays in pixels, for a match with the geometric mean of the
          variances. The sampled starts do not use them.
        - dtype: computed in float64; the result has the keypoints' dtype, at least float32.
        - Degenerate input: fewer than eight matches of positive weight, collinear or repeated points, points
          on one plane, a pure rotation, all weights zero, give `valid=False`, the zero matrix and zero
          gradient, and leave the other pairs alone. An exact fit is well-posed.
        - Gradient: exact. Linear: through both null vectors, which stays finite where singular values
          coincide.
          Refined: the implicit function theorem at the minimum; zero where it has not converged.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, batch_size), in any order.
        batch_size: B, the number of pairs.
        weights: `(M,)`, finite, >= 0; None for ones.
        covariance0: `(M, 2, 2)` of keypoints0, pixels squared, positive definite; None for exact points.
        covariance1: `(M, 2, 2)` of keypoints1.
        robust: None, "cauchy" or "geman_mcclure".
        robust_scale: Sampson error in pixels at which a match starts to count as an outlier.
        refine_steps: the most iterations; None for 0, or 20 with a robust kernel, which needs at least one.

    Returns:
        A `FundamentalEstimate`.

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
    steps = resolve_steps(refine_steps, robust, False)

    def solve(matches: PaddedMatches, pairs: Tensor) -> tuple[Tensor, ...]:
        scale = robust_scale / matches.unit1
        relative, weights = relative_covariances(matches.covariances, matches.weights, summed=False)
        matches = matches._replace(covariances=relative)
        if steps == 0:
            solution = eight_point(matches, weights)
            matrix, unique = nearest_rank_two(solution.matrix)
            F = to_pixels(matrix, solution.frame0, solution.frame1)
            valid = solution.determined & unique
            converged, conditioning = valid, solution.gap
        else:
            F, valid, converged, conditioning = _refined_estimate(matches, weights, robust, scale, steps)
        F = torch.where(valid[:, None, None], with_fixed_sign(F), 0.0)
        residual = SampsonResidual.value(F, matches.points0, matches.points1, relative)
        squared = residual.clamp(-FAR, FAR).square().sum(-1)
        F = with_fixed_sign(fundamental_in_pixels(F, matches.unit0))
        return F, valid, converged, conditioning, robust_weight(squared, scale, robust)

    covariances = Covariances(covariance0, covariance1)
    matches = Matches(keypoints0, keypoints1, batch_indexes, batch_size, weights, covariances)
    return FundamentalEstimate(*(returned(x, keypoints0) for x in solve_in_pieces(matches, solve, one_unit=True)))


def fundamental_from_pose(T_0to1: Tensor, K0: Tensor, K1: Tensor) -> Tensor:
    """Fundamental matrix of a known relative pose, for the epipolar losses and for weak supervision.

    Convention:
        - `X1 = R X0 + t` with `T_0to1 = [[R, t], [0, 1]]` (world-to-camera order, as COLMAP and kornia);
          `F_0to1 = K1^-T [t]_x R K0^-1`.
        - The intrinsics decide the pixel frame: with the centre of pixel (x, y) at (x + 0.5, y + 0.5), cx
          and cy are 0.5 larger than in OpenCV's frame.
        - Degenerate input: a pose without translation gives the zero matrix, for which the epipolar losses
          are
          zero: nothing is known about a match but its rotation, which they do not use.
        - Gradient: exact, also at zero translation.

    Args:
        T_0to1: `(B, 4, 4)`, translation in any unit.
        K0: `(B, 3, 3)` intrinsics of camera 0, pixels.
        K1: `(B, 3, 3)` intrinsics of camera 1.

    Returns:
        `(B, 3, 3)`, the dtype of T_0to1, at least float32; linear in the translation.

    Raises:
        ValueError: shapes that do not fit, non-finite entries, intrinsics that are not invertible.
        TypeError: an integer dtype.
    """
    check_matrices("T_0to1", T_0to1, batch_size_of("T_0to1", T_0to1), rows=4)
    check_intrinsics("K0", K0, T_0to1.shape[0])
    check_intrinsics("K1", K1, T_0to1.shape[0])
    T = to_work(T_0to1)
    inverse0, inverse1 = (torch.linalg.inv(camera_matrix(K)) for K in (K0, K1))
    return returned(inverse1.mT @ skew(T[:, :3, 3]) @ T[:, :3, :3] @ inverse0, T_0to1)


def camera_matrix(K: Tensor) -> Tensor:
    """Intrinsics in float64 with last entry 1, whatever multiple they came as."""
    K = unit_magnitude(to_work(K), (1, 2))
    last = K[:, 2:, 2:]
    return K / torch.where(last == 0, 1.0, last)


def fundamental_in_pixels(F: Tensor, unit: Tensor) -> Tensor:
    """`D F D` with `D = diag(1, 1, u)`: fundamental matrices of coordinates that were counted in units of u."""
    scale = torch.stack([torch.ones_like(unit), torch.ones_like(unit), unit], dim=1)
    scale = scale / scale.amax(1, keepdim=True)
    return scale[:, :, None] * F * scale[:, None]


def robust_eight_point(model: str, matches: PaddedMatches, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sampled minimal models, then graduated eight-point solutions from the best of them, without gradient.

    Args:
        model: "fundamental", or "essential" for matches in camera coordinates.
        matches: padded matches.
        scale: `(B,)`, final Sampson error at which a match starts to count as an outlier, in the matches'
            unit.

    Returns:
        Matrices `(B, S, 3, 3)`, S starts of a refinement, and their robust cost `(B, S)`.
    """
    nearest = nearest_rank_two if model == "fundamental" else nearest_essential

    def solve(weights: Tensor) -> Tensor:
        tries = weights.shape[0] // scale.shape[0]
        repeated = matches._replace(
            points0=matches.points0.repeat_interleave(tries, 0),
            points1=matches.points1.repeat_interleave(tries, 0),
        )
        solution = eight_point(repeated, weights)
        return nearest(with_fixed_sign(to_pixels(solution.matrix, solution.frame0, solution.frame1)))[0]

    def squared(matrices: Tensor) -> Tensor:
        tries = matrices.shape[0] // scale.shape[0]
        points0, points1 = (x.repeat_interleave(tries, 0) for x in (matches.points0, matches.points1))
        return SampsonResidual.value(matrices, points0, points1).clamp(-FAR, FAR).square().sum(-1)

    with torch.no_grad():
        points = (matches.points0, matches.points1)
        trusted = trusted_weights(matches)
        trusted = votes(*points, trusted, 2.0 * scale)
        starts = sampled_starts(model, points, trusted, scale)
        return graduated_start(starts, solve, squared, trusted, scale)


def supported(model: str, E: Tensor, matches: PaddedMatches, scale: Tensor, unit: Tensor) -> Tensor:
    """Pairs `(B,)` whose robust epipolar geometry agrees with more matches than it would by accident.

    Args:
        model: "fundamental" or "essential".
        E: `(B, 3, 3)`, such matrices.
        matches: in the coordinates of E.
        scale: `(B,)`, robust scale in the unit of the matches.
        unit: `(B,)`, from that unit to Hartley's frame.
    """
    with torch.no_grad():
        points = (matches.points0, matches.points1)
        support = votes(*points, (matches.weights > 0).to(scale.dtype), 2.0 * scale)
        return is_no_accident(model, E, points, support, scale, unit)


def _refined_estimate(
    matches: PaddedMatches, linear_weights: Tensor, robust: str | None, scale: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        linear = eight_point(matches, linear_weights if robust is None else trusted_weights(matches))
        # One scale for both images: with two, the Sampson error would no longer be that of the pixels.
        common = (linear.frame0.scale * linear.frame1.scale).sqrt()
        shift0, shift1 = _frame(linear.frame0, common), _frame(linear.frame1, common)
    centred = matches._replace(
        points0=(matches.points0 * common[:, None, None] + shift0[:, None, :2, 2]).clamp(-FAR, FAR),
        points1=(matches.points1 * common[:, None, None] + shift1[:, None, :2, 2]).clamp(-FAR, FAR),
    )
    scale = scale * common
    with torch.no_grad():
        determined = linear.determined
        if robust is None:
            start = _between(to_pixels(linear.matrix, linear.frame0, linear.frame1), shift0, shift1)
        else:
            start = cheapest(*robust_eight_point("fundamental", centred, scale))
            squared = SampsonResidual.value(start, centred.points0, centred.points1).square().sum(-1)
            agreeing = matches.weights * robust_weight(squared, scale, robust)
            determined = eight_point(centred, agreeing).determined
        start, unique = nearest_rank_two(start)
    data = (centred.points0, centred.points1, matches.weights, scale)
    cost = RobustCost(SampsonResidual(), *data, robust, matches.covariances)
    minimum = minimise(FundamentalChart.centred(start), cost, steps, linear.least_gap)
    inner = minimum.chart.at(minimum.delta)
    valid = determined & unique & minimum.determined
    if robust is not None:
        valid = valid & supported("fundamental", inner, centred, scale, torch.ones_like(scale))
    return shift1.mT @ inner @ shift0, valid, valid & minimum.converged, minimum.conditioning


def _frame(frame: Normalised, scale: Tensor) -> Tensor:
    """Transform `(B, 3, 3)` to the centroid of a frame, with another scale."""
    ratio = (scale / frame.scale)[:, None]
    transform = frame.transform.clone()
    transform[:, :2] = transform[:, :2] * ratio[:, :, None]
    return transform


def _between(matrix: Tensor, transform0: Tensor, transform1: Tensor) -> Tensor:
    """Fundamental matrices between transformed frames, at unit norm."""
    inner = torch.linalg.inv(transform1).mT @ matrix @ torch.linalg.inv(transform0)
    return with_fixed_sign(inner)
