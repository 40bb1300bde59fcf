# SPDX-License-Identifier: Apache-2.0
"""Affine maps and similarities of the plane from matches: closed form, robust, refined."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._charts import LinearChart
from eloftr_ops.geometry._checks import check_choice, check_matches, check_scale
from eloftr_ops.geometry._covariances import Covariances, check_covariances, relative_covariances
from eloftr_ops.geometry._linalg import FAR, LEAST_GAP, ROUNDINGS, homography_in_units, normalise_points, shares
from eloftr_ops.geometry._minimal import draw_samples, gumbel_noise
from eloftr_ops.geometry._precision import eager, returned
from eloftr_ops.geometry._ragged import Matches, PaddedMatches, solve_in_pieces
from eloftr_ops.geometry._refine import RobustCost, minimise
from eloftr_ops.geometry._residuals import TransferResidual
from eloftr_ops.geometry._robust import (
    KERNELS,
    START_KERNEL,
    STARTS,
    cheapest,
    graduated_start,
    robust_cost,
    robust_weight,
    trusted_weights,
    votes,
)
from eloftr_ops.geometry._validity import ACCEPTED_ALARMS, log_false_alarms
from eloftr_ops.geometry.homography import or_identity, resolve_steps

__all__ = ["PlanarEstimate", "affine_from_matches", "similarity_from_matches"]

SAMPLES = 256
# Singular value of a map between normalised frames below which it collapses the plane.
LEAST_STRETCH = 1e-6


class PlanarEstimate(NamedTuple):
    """Affine maps or similarities of B pairs, with flags and diagnostics."""

    A_0to1: Tensor  # (B, 3, 3), last row (0, 0, 1): a homography; the identity where not valid
    valid: Tensor  # (B,) bool: the matches determine a map
    converged: Tensor  # (B,) bool: the refinement reached its minimum; equals `valid` without refinement
    conditioning: Tensor  # (B,) in [0, 1]: how far from ill-posed; no gradient
    inlier_weights: Tensor  # (M,) in [0, 1], the robust kernel's weight of each match; differentiable


class _Kind(NamedTuple):
    """What distinguishes the two maps."""

    matches: int  # of a minimal sample
    tangent: Tensor  # (9, p): entries of the matrix that the parameters move
    linear: Callable[[Tensor, Tensor, Tensor], Tensor]  # centred points0, points1 and shares to (B, 2, 2)


@eager
def affine_from_matches(
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
) -> PlanarEstimate:
    """Estimate the affine map of each pair: a plane seen from far away.

    Weighted least squares of the transfer error in image 1, in closed form. With a robust kernel, the best of 256
    three-point samples, graduated re-weighting, then Levenberg-Marquardt on the robust cost.

    Convention:
        - Direction, frames, units, weights, covariances, dtype and `robust_scale` as `homography_from_matches`; the
          closed form takes covariances as weights, the refinement as Mahalanobis distances.
        - Degenerate input: fewer than three matches of positive weight, points of image 0 on one line, or a map that
          collapses the plane, give `valid=False`, the identity and zero gradient.
        - Gradient: exact; of the closed form, or of the minimum by the implicit function theorem.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, batch_size), in any order.
        batch_size: B, the number of pairs.
        weights: `(M,)`, finite, >= 0; None for ones.
        covariance0: `(M, 2, 2)` of keypoints0, positive definite; None for exact points.
        covariance1: `(M, 2, 2)` of keypoints1.
        robust: None, "cauchy" or "geman_mcclure".
        robust_scale: transfer error in pixels at which a match starts to count as an outlier.
        refine_steps: the most iterations; None for 0, or 20 with a robust kernel, which needs at least one.

    Returns:
        A `PlanarEstimate`.

    Raises:
        ValueError, IndexError, TypeError: as `homography_from_matches`.
    """
    matches = Matches(keypoints0, keypoints1, batch_indexes, batch_size, weights, Covariances(covariance0, covariance1))
    return _estimate(_affine(), matches, robust, robust_scale, refine_steps)


@eager
def similarity_from_matches(
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
) -> PlanarEstimate:
    """Estimate rotation, scale and translation of each pair: weighted Procrustes (Umeyama 1991), without reflection.

    Convention, arguments, errors and gradient as `affine_from_matches`. The map is `s R x + t`: its upper 2x2 block is
    `[[a, -b], [b, a]]`. Degenerate input: fewer than two places in image 0, or a scale of zero.

    Args:
        keypoints0: `(M, 2)` in image 0.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, batch_size), in any order.
        batch_size: B, the number of pairs.
        weights: `(M,)`, finite, >= 0; None for ones.
        covariance0: `(M, 2, 2)` of keypoints0, positive definite; None for exact points.
        covariance1: `(M, 2, 2)` of keypoints1.
        robust: None, "cauchy" or "geman_mcclure".
        robust_scale: transfer error in pixels at which a match starts to count as an outlier.
        refine_steps: the most iterations; None for 0, or 20 with a robust kernel.

    Returns:
        A `PlanarEstimate`.

    Raises:
        ValueError, IndexError, TypeError: as `homography_from_matches`.
    """
    matches = Matches(keypoints0, keypoints1, batch_indexes, batch_size, weights, Covariances(covariance0, covariance1))
    return _estimate(_similarity(), matches, robust, robust_scale, refine_steps)


def _affine() -> _Kind:
    def linear(points0: Tensor, points1: Tensor, share: Tensor) -> Tensor:
        weighted = share[..., None] * points0
        spread = weighted.mT @ points0
        # Regular where the pair is valid; elsewhere the result is not used.
        singular = torch.linalg.det(spread.detach()).abs() < LEAST_GAP
        safe = torch.where(singular[:, None, None], torch.eye(2).to(spread), spread)
        block: Tensor = torch.linalg.solve_ex(safe, weighted.mT @ points1)[0]
        return block.mT

    return _Kind(3, torch.eye(9, 6, dtype=torch.float64), linear)


def _similarity() -> _Kind:
    def linear(points0: Tensor, points1: Tensor, share: Tensor) -> Tensor:
        (x, y), (u, v) = points0.unbind(2), points1.unbind(2)
        square = (share * (x * x + y * y)).sum(1)
        square = torch.where(square > 0, square, 1.0)
        a, b = (share * (x * u + y * v)).sum(1) / square, (share * (x * v - y * u)).sum(1) / square
        return torch.stack([a, -b, b, a], dim=1).view(-1, 2, 2)

    tangent = torch.zeros(9, 4, dtype=torch.float64)
    for parameter, entries in enumerate(({0: 1.0, 4: 1.0}, {1: -1.0, 3: 1.0}, {2: 1.0}, {5: 1.0})):
        for entry, value in entries.items():
            tangent[entry, parameter] = value
    return _Kind(2, tangent, linear)


def _estimate(
    kind: _Kind, matches: Matches, robust: str | None, robust_scale: float, refine_steps: int | None
) -> PlanarEstimate:
    check_matches(*matches[:5])
    check_covariances(*(matches.covariances or Covariances(None, None)), count=len(matches.keypoints0))
    check_choice("robust", robust, KERNELS)
    check_scale("robust_scale", robust_scale)
    steps = resolve_steps(refine_steps, robust, False)

    def solve(padded: PaddedMatches, pairs: Tensor) -> tuple[Tensor, ...]:
        relative, weights = relative_covariances(padded.covariances, padded.weights, summed=True)
        padded = padded._replace(covariances=relative)
        scale = robust_scale / padded.unit1
        matrix, valid, conditioning = _linear(kind, padded, weights)
        converged = valid
        if steps > 0:
            matrix, valid, converged, conditioning = _refined(kind, padded, weights, (robust, scale), steps)
        residual = TransferResidual.value(matrix, padded.points0, padded.points1, relative)
        inlier_weights = robust_weight(residual.clamp(-FAR, FAR).square().sum(-1), scale, robust)
        matrix = or_identity(homography_in_units(matrix, padded.unit0, padded.unit1), valid)
        return matrix, valid, converged, conditioning, inlier_weights

    return PlanarEstimate(*(returned(x, matches.keypoints0) for x in solve_in_pieces(matches, solve)))


def _linear(kind: _Kind, matches: PaddedMatches, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maps `(B, 3, 3)`, the identity where the matches determine none; which they determine; conditioning."""
    frame0 = normalise_points(matches.points0, weights, matches.eps)
    frame1 = normalise_points(matches.points1, weights, matches.eps)
    share = shares(weights)
    block = kind.linear(frame0.points, frame1.points, share)
    spread = torch.linalg.eigvalsh(((share[..., None] * frame0.points).mT @ frame0.points).detach())
    ratio = spread[:, 0] / torch.where(spread[:, 1] > 0, spread[:, 1], 1.0)
    conditioning = ratio if kind.matches == 3 else torch.ones_like(ratio)
    least = (ROUNDINGS * frame0.rounding).square().clamp_min(LEAST_GAP)
    stretch = torch.linalg.det(block.detach()).abs().sqrt()
    enough = (weights > 0).sum(1) >= kind.matches
    determined = enough & frame0.spread & frame1.spread & (conditioning > least) & (stretch > LEAST_STRETCH)
    last = torch.zeros_like(block[:, :1])
    inner = torch.cat([torch.cat([block, last], dim=1), torch.eye(3).to(block)[:, 2:].expand(len(block), 3, 1)], dim=2)
    return or_identity(frame1.inverse @ inner @ frame0.transform, determined), determined, conditioning


def _refined(
    kind: _Kind, matches: PaddedMatches, linear_weights: Tensor, kernel: tuple[str | None, Tensor], steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    robust, scale = kernel
    with torch.no_grad():
        trusted = linear_weights if robust is None else trusted_weights(matches)
        frame0 = normalise_points(matches.points0, trusted, matches.eps)
        frame1 = normalise_points(matches.points1, trusted, matches.eps)
        start, determined, _ = _linear(kind, matches, linear_weights)
        if robust is not None:
            start, determined = _robust_start(kind, matches, trusted, scale)
        start = frame1.transform @ start @ frame0.inverse
        least_gap = (ROUNDINGS * torch.maximum(frame0.rounding, frame1.rounding)).square().clamp_min(LEAST_GAP)
    points = [
        (x * frame.transform[:, None, :1, 0] + frame.transform[:, None, :2, 2]).clamp(-FAR, FAR)
        for x, frame in ((matches.points0, frame0), (matches.points1, frame1))
    ]
    covariances = matches.covariances
    if covariances is not None and covariances.points0 is not None:
        ratio = (frame0.scale / frame1.scale).square()[:, None, None, None]
        covariances = covariances._replace(points0=covariances.points0 * ratio)
    data = (points[0], points[1], matches.weights, scale * frame1.scale)
    cost = RobustCost(TransferResidual(), *data, robust, covariances)
    tangent = kind.tangent.to(start).expand(len(start), -1, -1)
    minimum = minimise(LinearChart(start, tangent), cost, steps, least_gap)
    inner = minimum.chart.at(minimum.delta)
    stretch = torch.linalg.det(inner.detach()[:, :2, :2]).abs().sqrt()
    valid = determined & minimum.determined & (stretch > LEAST_STRETCH)
    if robust is not None:
        valid = valid & _is_no_accident(inner.detach(), cost.detached(), kind.matches)
    matrix = or_identity(frame1.inverse @ inner @ frame0.transform, valid)
    return matrix, valid, valid & minimum.converged, minimum.conditioning


def _robust_start(kind: _Kind, matches: PaddedMatches, trusted: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The best of many minimal maps after graduated re-weighting, and whether its matches determine it."""
    weights = votes(matches.points0, matches.points1, trusted, 2.0 * scale)

    def repeated(tries: int) -> PaddedMatches:
        return matches._replace(
            points0=matches.points0.repeat_interleave(tries, 0), points1=matches.points1.repeat_interleave(tries, 0)
        )

    def solve(many: Tensor) -> Tensor:
        return _linear(kind, repeated(many.shape[0] // scale.shape[0]), many)[0]

    def squared(matrices: Tensor) -> Tensor:
        many = repeated(matrices.shape[0] // scale.shape[0])
        residual = TransferResidual.value(matrices, many.points0, many.points1)
        return residual.clamp(-FAR, FAR).square().sum(-1)

    count = weights.shape[1]
    noise = gumbel_noise(count, SAMPLES, torch.Generator().manual_seed(0)).to(weights.device)
    index = draw_samples(weights, noise, min(kind.matches, count))
    drawn = torch.zeros(*index.shape[:2], count, dtype=weights.dtype, device=weights.device).scatter(2, index, 1.0)
    starts = solve(drawn.flatten(0, 1))
    limits = scale.repeat_interleave(SAMPLES, 0)
    cost = (weights.repeat_interleave(SAMPLES, 0) * robust_cost(squared(starts), limits, START_KERNEL)).sum(1)
    best = cost.view(-1, SAMPLES).topk(STARTS, dim=1, largest=False).indices
    starts = starts.view(-1, SAMPLES, 3, 3).gather(1, best[..., None, None].expand(-1, -1, 3, 3))
    start = cheapest(*graduated_start(starts, solve, squared, weights, scale))
    agreeing = matches.weights * robust_weight(squared(start), scale, START_KERNEL)
    return start, _linear(kind, matches, agreeing)[1]


def _is_no_accident(matrix: Tensor, cost: RobustCost, size: int) -> Tensor:
    """Pairs `(B,)` whose map agrees with more matches than one of wrong matches would."""
    present = (cost.weights > 0).to(cost.weights.dtype)
    support = votes(cost.points0, cost.points1, present, 2.0 * cost.scale)
    squared = TransferResidual.value(matrix, cost.points0, cost.points1).clamp(-FAR, FAR).square().sum(-1)
    alarms = log_false_alarms(squared, support, cost.scale, 2, size)
    limit = torch.tensor(ACCEPTED_ALARMS, dtype=alarms.dtype, device=alarms.device).log()
    return (alarms <= limit) | (support.sum(1) <= size + 1e-6)
