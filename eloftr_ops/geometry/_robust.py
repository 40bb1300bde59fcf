# SPDX-License-Identifier: Apache-2.0
"""Robust kernels and the graduated, iteratively re-weighted start."""

from collections.abc import Callable

import torch
from torch import Tensor

KERNELS: tuple[str | None, ...] = (None, "cauchy", "geman_mcclure")
# Each round of the graduated start divides the squared scale by this.
ANNEALING = 2.0
ROUNDS = 16
# Bounded, so that starts are ranked by how many matches they explain, whatever kernel is minimised later.
START_KERNEL = "geman_mcclure"
# With half of the matches wrong, 4 right ones are drawn once in 16 samples, 8 once in 256.
SAMPLES = 256
# Residuals held at once while samples are scored, so that memory does not grow with the number of matches.
RESIDUALS_AT_ONCE = 2**18


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


def sampled_start(
    propose: Callable[[Tensor, Tensor], Tensor],
    residual: Callable[[Tensor, Tensor, Tensor], Tensor],
    points: tuple[Tensor, Tensor],
    weights: Tensor,
    scale: Tensor,
    sample_size: int,
) -> Tensor:
    """Best of many minimal solutions by robust cost: a start that outliers do not pull.

    The same quantiles of the cumulated weights are drawn for every pair, from a fixed seed, so that a pair
    gets the same samples alone and in a batch, and no global random state is read.

    Args:
        propose: sampled points `(S, m, 2)` of both images to matrices `(S, 3, 3)`.
        residual: matrices `(S, 3, 3)` and points `(S, N, 2)` to squared residuals `(S, N)`.
        points: both `(B, N, 2)`.
        weights: `(B, N)`; a match is drawn in proportion to its weight.
        scale: `(B,)`, robust scale in the residual's unit.
        sample_size: m.

    Returns:
        Matrices `(B, 3, 3)`.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(SAMPLES, sample_size, generator=generator, dtype=torch.float64)
    total = weights.sum(1, keepdim=True)
    cumulated = (weights / torch.where(total > 0, total, 1.0)).cumsum(1)
    quantiles = drawn.to(weights).flatten()[None] * cumulated[:, -1:]
    index = torch.searchsorted(cumulated, quantiles, right=True).clamp_max(weights.shape[1] - 1)
    batch = torch.arange(weights.shape[0], device=weights.device)
    best = torch.full_like(scale, float("inf"))
    chosen = torch.eye(3, dtype=scale.dtype, device=scale.device).repeat(weights.shape[0], 1, 1)
    at_once = min(max(RESIDUALS_AT_ONCE // weights.numel(), 1), SAMPLES)
    for part in index.view(-1, SAMPLES, sample_size).split(at_once, dim=1):
        count = part.shape[1]
        rows = batch[:, None, None].expand_as(part)
        matrices = propose(points[0][rows, part].flatten(0, 1), points[1][rows, part].flatten(0, 1))
        wide = [x[:, None].expand(-1, count, -1, -1).flatten(0, 1) for x in points]
        squared = residual(matrices, wide[0], wide[1]).view(-1, count, weights.shape[1])
        cost = robust_cost(squared.flatten(1), scale, START_KERNEL).view_as(squared)
        cost = (cost * weights[:, None]).sum(2).nan_to_num(nan=float("inf"))
        least, place = cost.min(1)
        better = least < best
        best = torch.where(better, least, best)
        candidate = matrices.view(-1, count, 3, 3)[batch, place]
        chosen = torch.where(better[:, None, None], candidate, chosen)
    return chosen


def graduated_start(
    start: Tensor,
    solve: Callable[[Tensor], Tensor],
    residual: Callable[[Tensor], Tensor],
    weights: Tensor,
    scale: Tensor,
) -> Tensor:
    """Re-weighted linear solutions with a scale that shrinks from the residuals' own size to `scale`.

    Graduated non-convexity (Blake and Zisserman 1987; Yang et al. 2020): a wide kernel is nearly convex, so
    its minimum is found from far away and followed while the kernel narrows.

    Args:
        start: matrices `(B, 3, 3)` whose residuals weigh the first solution.
        solve: weights `(B, N)` to matrices.
        residual: matrices to squared residuals `(B, N)`.
        weights: `(B, N)`, the user's weights.
        scale: `(B,)`, final scale in the residual's unit.

    Returns:
        The matrices `(B, 3, 3)` of least robust cost among the start and the solutions at the final scale.
    """
    matrix, squared = start, residual(start)
    best = (weights * robust_cost(squared, scale, START_KERNEL)).sum(1)
    kept = start
    median = squared.masked_fill(weights <= 0, float("nan")).nanmedian(1).values.nan_to_num()
    current = torch.maximum(2.0 * median.sqrt(), scale)
    for _ in range(ROUNDS):
        matrix = solve(weights * robust_weight(squared, current, START_KERNEL))
        squared = residual(matrix)
        cost = (weights * robust_cost(squared, scale, START_KERNEL)).sum(1)
        better = cost < best
        best, kept = torch.where(better, cost, best), torch.where(better[:, None, None], matrix, kept)
        if bool((current <= scale).all()):
            break
        current = torch.maximum(current / ANNEALING**0.5, scale)
    return kept
