# SPDX-License-Identifier: Apache-2.0
"""Sample consensus of padded pairs: frames, hypotheses, refinement and scores, batched over pairs and hypotheses."""

from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._charts import Chart, FundamentalChart, HomographyChart, PoseChart
from eloftr_ops.geometry._eight_point import nearest_essential, nearest_rank_two, with_fixed_sign
from eloftr_ops.geometry._linalg import (
    FAR,
    LEAST_GAP,
    ROUNDINGS,
    Normalised,
    adjugate,
    normalise_points,
    skew,
)
from eloftr_ops.geometry._ragged import PaddedMatches
from eloftr_ops.geometry._refine import RobustCost, first_order, levenberg_marquardt, minimise
from eloftr_ops.geometry._residuals import Residual, SampsonResidual, TransferResidual, symmetric_transfer
from eloftr_ops.geometry._robust import START_KERNEL, trusted_weights, votes
from eloftr_ops.geometry._search import Candidates, Problem, search

# So many of the best candidates are improved after each round of samples, by so many steps at so many times the
# scale: the wider kernel reaches further, the last one decides.
IMPROVED = 8
STEPS_OF_IMPROVEMENT = {2.0: 4, 1.0: 4}
# Singular values of the equations of a minimal sample: a smaller ratio means that it determines no model.
LEAST_RATIO = 1e-6


class Framed(NamedTuple):
    """A problem in its frame, and what brings its models back."""

    problem: Problem  # points and weights without gradient, one vote per place
    points0: Tensor  # (B, N, 2), with gradient
    points1: Tensor  # (B, N, 2)
    weights: Tensor  # (B, N), one vote per place, with gradient
    share: Tensor  # (B, N), votes: one over the number of matches at the place; zero for none
    frames: tuple[Normalised, Normalised]
    least_gap: Tensor  # (B,)
    unit: Tensor  # (B,), from the unit of the points to that of Hartley's frame


class Hypotheses(NamedTuple):
    """K models of each pair, in the frame of the problem."""

    matrices: Tensor  # (B, K, 3, 3), with gradient
    determined: Tensor  # (B, K) bool
    score: Tensor  # (B, K), soft number of matches that agree, with gradient
    samples: Tensor  # (B, K, m)


def framed(model: str, matches: PaddedMatches, scale: Tensor) -> Framed:
    """Bring points to about unit size, both images by the same scale.

    Matches for "essential" are in camera coordinates and stay there.

    Args:
        model: "homography", "fundamental" or "essential".
        matches: padded matches.
        scale: `(B,)`, error at which a match starts to count as wrong, in the unit of image 1.
    """
    with torch.no_grad():
        trusted = trusted_weights(matches)
        frames = [normalise_points(x.detach(), trusted, matches.eps) for x in (matches.points0, matches.points1)]
        rounding = torch.maximum(*(frame.rounding for frame in frames))
        least_gap = (ROUNDINGS * rounding).square().clamp_min(LEAST_GAP)
        common = (frames[0].scale * frames[1].scale).sqrt()
        if model != "essential":
            # One scale for both images: with two, errors in them could not be compared.
            frames = [scaled_frame(frame, common) for frame in frames]
        else:
            frames = [identity_frame(frame) for frame in frames]
        scale = scale * frames[1].scale
    points0, points1 = (
        (points * frame.scale[:, None, None] + frame.transform[:, None, :2, 2]).clamp(-FAR, FAR)
        for points, frame in zip((matches.points0, matches.points1), frames, strict=True)
    )
    with torch.no_grad():
        share = votes(points0, points1, (matches.weights > 0).to(scale.dtype), 2.0 * scale)
        problem = Problem(model, points0.detach(), points1.detach(), (trusted * share).detach(), scale.detach())
    unit = common if model == "essential" else torch.ones_like(common)
    weights = matches.weights * share
    return Framed(problem, points0, points1, weights, share, (frames[0], frames[1]), least_gap, unit)


def scaled_frame(frame: Normalised, scale: Tensor) -> Normalised:
    """The frame around the same centre with another scale."""
    ratio = scale / frame.scale
    transform, inverse = frame.transform.clone(), frame.inverse.clone()
    transform[:, :2] *= ratio[:, None, None]
    inverse[:, 0, 0], inverse[:, 1, 1] = 1.0 / scale, 1.0 / scale
    return frame._replace(transform=transform, inverse=inverse, scale=scale, points=frame.points * ratio[:, None, None])


def identity_frame(frame: Normalised) -> Normalised:
    """The frame of the points as they come."""
    eye = torch.eye(3, dtype=frame.scale.dtype, device=frame.scale.device).expand_as(frame.transform)
    return frame._replace(transform=eye, inverse=eye, scale=torch.ones_like(frame.scale))


def chart_at(model: str, matrices: Tensor) -> Chart:
    """The chart of its manifold that is centred at (or next to) each matrix `(P, 3, 3)`."""
    if model == "homography":
        return HomographyChart.centred(matrices)
    if model == "fundamental":
        return FundamentalChart.centred(nearest_rank_two(with_fixed_sign(matrices))[0])
    E, t, _ = nearest_essential(with_fixed_sign(matrices))
    # One of the four motions of E; which one does not matter to E.
    return PoseChart.centred(adjugate(E).mT - skew(t) @ E, t)


def residual_of(model: str) -> Residual:
    """What the refinement minimises."""
    return TransferResidual() if model == "homography" else SampsonResidual()


def consensus(
    problem: Framed,
    keep: int,
    *,
    max_samples: int,
    confidence: float | None,
    seed: int,
    refine_steps: int,
) -> Hypotheses:
    """The best K hypotheses, refined on the robust cost (`refine_steps > 0`) or as their minimal samples give them.

    The gradient of a refined model is that of its minimum, the gradient of a minimal one that of its equations: both
    by the implicit function theorem, so no solver is differentiated.
    """
    model, generator = problem.problem.model, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        found = search(
            problem.problem,
            max(keep, IMPROVED),
            max_samples=max_samples,
            confidence=confidence,
            generator=generator,
            improve=_improved if refine_steps else None,
        )
        found = Candidates(*(x[:, :keep] for x in found))
    batch = torch.arange(found.cost.shape[0], device=found.cost.device)[:, None, None]
    counts = torch.nn.functional.pad(problem.problem.weights, (0, found.samples.shape[2]))
    missing = torch.isinf(found.cost) | (counts[batch, found.samples] <= 0).any(2)
    chart = chart_at(model, found.matrices.flatten(0, 1))
    many = repeated(problem, keep)
    if refine_steps:
        cost = RobustCost(
            residual_of(model), many.points0, many.points1, many.weights, many.problem.scale, START_KERNEL
        )
        minimum = minimise(chart, cost, refine_steps, many.least_gap)
        matrices, determined = minimum.chart.at(minimum.delta), minimum.determined
    else:
        matrices, determined = _minimal_with_gradient(model, chart, many, found.samples.flatten(0, 1))
    determined = determined & ~missing.flatten()
    score = soft_count(many, matrices)
    shape = missing.shape
    return Hypotheses(matrices.unflatten(0, shape), determined.view(shape), score.view(shape), found.samples)


def repeated(problem: Framed, times: int) -> Framed:
    """The same problem for each of several hypotheses: `(B * K, ...)`."""

    def many(x: Tensor) -> Tensor:
        return x.repeat_interleave(times, 0)

    plain = Problem(problem.problem.model, *map(many, problem.problem[1:]))
    frame0, frame1 = (Normalised(*map(many, frame)) for frame in problem.frames)
    points0, points1, weights, share = map(many, problem[1:5])
    return Framed(
        plain, points0, points1, weights, share, (frame0, frame1), many(problem.least_gap), many(problem.unit)
    )


def squared_residuals(model: str, matrices: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
    """Squared errors `(P, N)` in the frame of the points: transfer in both images, or Sampson distance."""
    if model == "homography":
        return symmetric_transfer(matrices, points0, points1)
    return SampsonResidual.value(matrices, points0, points1).clamp(-FAR, FAR).square().sum(-1)


def soft_count(problem: Framed, matrices: Tensor) -> Tensor:
    """Soft number `(P,)` of matches that agree with matrices `(P, 3, 3)`: the soft MSAC score.

    `n sum_i w_i / (1 + r_i^2 / s^2) / sum_i w_i`, n the number of places with a match.
    """
    squared = squared_residuals(problem.problem.model, matrices, problem.points0, problem.points1)
    agreement = 1.0 / (1.0 + squared / problem.problem.scale.clamp(1e-60, 1e60).square()[:, None])
    total = problem.weights.sum(1)
    return problem.share.sum(1) * (problem.weights * agreement).sum(1) / torch.where(total > 0, total, 1.0)


def _improved(problem: Problem, matrices: Tensor) -> Tensor:
    """A few steps down the robust cost from the first candidates."""
    few = min(IMPROVED, matrices.shape[1])
    starts = matrices[:, :few].flatten(0, 1)
    points0, points1, weights, scale = (x.repeat_interleave(few, 0) for x in problem[1:])
    chart = chart_at(problem.model, starts)
    for width, steps in STEPS_OF_IMPROVEMENT.items():
        cost = RobustCost(residual_of(problem.model), points0, points1, weights, width * scale, START_KERNEL)
        chart = levenberg_marquardt(chart, cost, steps)
    better = chart.at(torch.zeros_like(chart.tangent[:, 0]))
    finite = torch.isfinite(better).flatten(1).all(1)[:, None, None]
    improved: Tensor = torch.where(finite, better, starts).unflatten(0, (-1, few))
    return improved


def _minimal_with_gradient(model: str, chart: Chart, many: Framed, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Minimal models `(P, 3, 3)` of samples `(P, m)` with gradient, and where the sample determines them.

    The residuals of the sample vanish at its model for all positions of its points, so `dx = -J^-1 dr`.
    """
    residual = residual_of(model)
    # A pair with too few matches has samples with indexes beyond them; it is flagged.
    rows = samples.clamp_max(many.points0.shape[1] - 1)[..., None].expand(-1, -1, 2)
    points0, points1 = many.points0.gather(1, rows), many.points1.gather(1, rows)
    with torch.no_grad():
        zero = torch.zeros_like(chart.tangent[:, 0])
        matrix = chart.at(zero)
        slope = residual.jacobian(matrix, points0.detach(), points1.detach()) @ chart.tangent[:, None]
        slope = slope.flatten(1, 2)
        finite = torch.isfinite(slope).flatten(1).all(1)
        eye = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
        values = torch.linalg.svdvals(torch.where(finite[:, None, None], slope, eye))
        determined = finite & (values[:, -1] > LEAST_RATIO * values[:, 0])
        slope = torch.where(determined[:, None, None], slope, eye)
    if not torch.is_grad_enabled():
        return matrix, determined
    keep = determined[:, None, None]
    points0, points1 = (torch.where(keep, x, x.detach()) for x in (points0, points1))
    live = torch.where(determined[:, None], residual.value(matrix, points0, points1).flatten(1), 0.0)
    step = -torch.linalg.solve_ex(slope, live - live.detach())[0]
    return chart.at(first_order(step)), determined
