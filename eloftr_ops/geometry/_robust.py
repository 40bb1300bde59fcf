# SPDX-License-Identifier: Apache-2.0
"""Robust kernels and the graduated, iteratively re-weighted start."""

from collections.abc import Callable

import torch
from torch import Tensor

from eloftr_ops.geometry._ragged import PaddedMatches
from eloftr_ops.geometry._search import Problem, search

KERNELS: tuple[str | None, ...] = (None, "cauchy", "geman_mcclure")
# Each round of the graduated start divides the squared scale by this.
ANNEALING = 2.0
ROUNDS = 16
# The first round is at most so many times as wide as the last one.
WIDEST = 16.0
# Bounded, so that starts are ranked by how many matches they explain, whatever kernel is minimised later.
START_KERNEL = "geman_mcclure"
# With half of the matches wrong, 4 right ones are drawn once in 16 samples, 5 once in 32, 7 once in 128.
SAMPLES = {"homography": 384, "fundamental": 1024, "essential": 512}
# The best so many samples are re-weighted and solved again: a minimal sample is only as good as its noise.
STARTS = 8


def robust_cost(squared: Tensor, scale: Tensor, kernel: str | None) -> Tensor:
    """Cost of squared residuals: `r^2 / 2` for small ones, growing slower (or not at all) for large ones.

    Args:
        squared: `(B, N)`, squared residuals.
        scale: `(B,)`, the residual at which a match starts to count as an outlier, in the residual's unit.
        kernel: None, "cauchy" (`s^2 log(1 + r^2 / s^2) / 2`) or "geman_mcclure"
            (`r^2 / (1 + r^2 / s^2) / 2`).

    Returns:
        `(B, N)`.
    """
    if kernel is None:
        return 0.5 * squared
    limit = _limit(scale)
    if kernel == "cauchy":
        return 0.5 * limit * torch.log1p(squared / limit)
    return 0.5 * squared / (1.0 + squared / limit)


def robust_weight(squared: Tensor, scale: Tensor, kernel: str | None) -> Tensor:
    """Weight in [0, 1] of each residual in re-weighted least squares: twice the derivative of the cost."""
    if kernel is None:
        return torch.ones_like(squared)
    weight = 1.0 / (1.0 + squared / _limit(scale))
    return weight if kernel == "cauchy" else weight.square()


def _limit(scale: Tensor) -> Tensor:
    """Squared scale `(B, 1)`, kept where neither it nor a quotient by it overflows."""
    return scale.clamp(1e-60, 1e60).square()[:, None]


def far_point_weight(points: Tensor, weights: Tensor) -> Tensor:
    """Weights `(B, N)` that let go of points far from the bulk, by the median distance to the median.

    A single coordinate of 1e5 pixels has so much leverage that least squares fits it and nothing else; no
    re-weighting by residuals recovers from that start.
    """
    present = weights > 0
    hidden = points.masked_fill(~present[..., None], float("nan"))
    centre = hidden.nanmedian(1, keepdim=True).values.nan_to_num()
    distance = torch.linalg.vector_norm(points - centre, dim=-1)
    typical = distance.masked_fill(~present, float("nan")).nanmedian(1, keepdim=True).values.nan_to_num()
    ratio = distance / (4.0 * torch.where(typical > 0, typical, 1.0))
    trusted: Tensor = weights / (1.0 + ratio.square()).square()
    return trusted


def trusted_weights(matches: PaddedMatches) -> Tensor:
    """Weights `(B, N)` that let go of points far away in either image."""
    return far_point_weight(matches.points1, far_point_weight(matches.points0, matches.weights))


def votes(points0: Tensor, points1: Tensor, weights: Tensor, cell: Tensor) -> Tensor:
    """Weights `(B, N)` divided by how many matches share a place, in image 0 or in image 1.

    Repeated and clustered matches are not independent witnesses: each place has one vote.

    Args:
        points0: `(B, N, 2)`.
        points1: `(B, N, 2)`.
        weights: `(B, N)`; matches of weight zero do not count.
        cell: `(B,)`, size of a place in the unit of the points.
    """
    batch = torch.arange(weights.shape[0], device=weights.device)[:, None, None]
    crowd = torch.ones_like(weights)
    for points in (points0, points1):
        place = (points / cell[:, None, None]).floor().clamp(-1e15, 1e15).long()
        key = torch.cat([batch.expand_as(place[..., :1]), place], dim=2).flatten(0, 1)
        _, inverse = torch.unique(key, dim=0, return_inverse=True)
        present = (weights > 0).to(weights.dtype).flatten()
        counts = weights.new_zeros(key.shape[0]).index_add(0, inverse, present)
        crowd = torch.maximum(crowd, counts[inverse].view_as(weights))
    return weights / crowd


def sampled_starts(model: str, points: tuple[Tensor, Tensor], weights: Tensor, scale: Tensor) -> Tensor:
    """Best of many minimal solutions by robust cost: starts `(B, STARTS, 3, 3)` that outliers do not pull.

    Args:
        model: "homography", "fundamental" or "essential".
        points: both `(B, N, 2)`, of about unit size.
        weights: `(B, N)`; a match is drawn in proportion to its weight.
        scale: `(B,)`, robust scale in the unit of the points.
    """
    return search(Problem(model, *points, weights, scale), STARTS, max_samples=SAMPLES[model]).matrices


def graduated_start(
    starts: Tensor,
    solve: Callable[[Tensor], Tensor],
    residual: Callable[[Tensor], Tensor],
    weights: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Re-weighted linear solutions with a scale that shrinks from the residuals' own size to `scale`.

    Graduated non-convexity (Blake and Zisserman 1987; Yang et al. 2020): a wide kernel is nearly convex, so
    its minimum is found from far away and followed while the kernel narrows.

    Args:
        starts: matrices `(B, S, 3, 3)` whose residuals weigh the first solutions.
        solve: weights `(B * S, N)` to matrices.
        residual: matrices `(B * S, 3, 3)` to squared residuals.
        weights: `(B, N)`, the user's weights.
        scale: `(B,)`, final scale in the residual's unit.

    Returns:
        Of each start and its solutions, the matrices `(B, S, 3, 3)` of least robust cost at the final scale, and
        that cost `(B, S)`.
    """
    pairs, tries = starts.shape[:2]
    start = starts.flatten(0, 1)
    weights, scale = weights.repeat_interleave(tries, 0), scale.repeat_interleave(tries, 0)
    matrix, squared = start, residual(start)
    best = (weights * robust_cost(squared, scale, START_KERNEL)).sum(1)
    kept = start
    median = squared.masked_fill(weights <= 0, float("nan")).nanmedian(1).values.nan_to_num()
    current = torch.minimum(torch.maximum(2.0 * median.sqrt(), scale), WIDEST * scale)
    for _ in range(ROUNDS):
        matrix = solve(weights * robust_weight(squared, current, START_KERNEL))
        squared = residual(matrix)
        cost = (weights * robust_cost(squared, scale, START_KERNEL)).sum(1)
        better = cost < best
        best, kept = torch.where(better, cost, best), torch.where(better[:, None, None], matrix, kept)
        if bool((current <= scale).all()):
            break
        current = torch.maximum(current / ANNEALING**0.5, scale)
    return kept.view(pairs, tries, 3, 3), best.view(pairs, tries)


def cheapest(matrices: Tensor, cost: Tensor) -> Tensor:
    """Of S matrices per pair `(B, S, 3, 3)` the one of least cost `(B, S)`."""
    return matrices[torch.arange(cost.shape[0], device=cost.device), cost.argmin(1)]
