# SPDX-License-Identifier: Apache-2.0
"""Search for the models that most matches agree with: minimal samples, scored by a soft MSAC cost. No gradient."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._minimal import (
    SAMPLE_SIZE,
    SOLUTIONS,
    draw_samples,
    gumbel_noise,
    minimal_models,
)
from eloftr_ops.geometry._residuals import sampson_of_many, symmetric_transfer_of_many

# Residuals held at once while samples are scored: they fit a cache of a CPU, and fill other devices.
RESIDUALS_AT_ONCE = {"cpu": 2**20, "other": 2**26}
LEAST_SAMPLES_AT_ONCE = 16
FIRST_ROUND, LONGEST_ROUND = 256, 1024

Improve = Callable[["Problem", Tensor], Tensor]


class Problem(NamedTuple):
    """Padded matches in a frame of about unit size, and the error at which one starts to count as wrong."""

    model: str  # "homography", "fundamental" or "essential"
    points0: Tensor  # (B, N, 2) float64
    points1: Tensor  # (B, N, 2)
    weights: Tensor  # (B, N): a match is drawn, and counts, in proportion to its weight
    scale: Tensor  # (B,), in the unit of the points

    def of_pairs(self, pairs: Tensor) -> "Problem":
        """Return the problem of some of the pairs."""
        points0, points1, weights, scale = (x[pairs] for x in self[1:])
        return Problem(self.model, points0, points1, weights, scale)


class Candidates(NamedTuple):
    """The best models of each pair, the best first."""

    matrices: Tensor  # (B, K, 3, 3); the identity where fewer were found
    cost: Tensor  # (B, K), soft MSAC; infinite where fewer were found
    samples: Tensor  # (B, K, m), the matches that each came from

    @classmethod
    def none_yet(cls, problem: Problem, keep: int) -> "Candidates":
        pairs, like = problem.scale.shape[0], problem.scale
        eye = torch.eye(3, dtype=like.dtype, device=like.device).repeat(pairs, keep, 1, 1)
        samples = torch.zeros(pairs, keep, SAMPLE_SIZE[problem.model], dtype=torch.long, device=like.device)
        return cls(eye, like.new_full((pairs, keep), float("inf")), samples)

    def best_with(self, other: "Candidates") -> "Candidates":
        """Return as many candidates as these, the best of both."""
        cost = torch.cat([self.cost, other.cost], dim=1)
        best, order = cost.topk(self.cost.shape[1], dim=1, largest=False, sorted=True)
        batch = torch.arange(cost.shape[0], device=cost.device)[:, None]
        matrices = torch.cat([self.matrices, other.matrices], dim=1)[batch, order]
        return Candidates(matrices, best, torch.cat([self.samples, other.samples], dim=1)[batch, order])


def squared_errors(model: str, matrices: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
    """Squared errors `(B, S, N)` of S models each: transfer in both images, or Sampson distance."""
    function = symmetric_transfer_of_many if model == "homography" else sampson_of_many
    return function(matrices, points0, points1)


def search(
    problem: Problem,
    keep: int,
    *,
    max_samples: int,
    confidence: float | None = None,
    generator: torch.Generator | None = None,
    improve: Improve | None = None,
) -> Candidates:
    """Return the best of many minimal models of each pair.

    Rounds of samples, each as large as all before it up to a limit. A pair is done when a better sample would have
    been drawn with probability `confidence` (Fischler and Bolles 1981), or after `max_samples`. A pair gets the same
    samples alone and in a batch.

    Args:
        problem: the matches.
        keep: K, how many models to keep.
        max_samples: the most samples per pair.
        confidence: None for `max_samples` in all cases.
        generator: of the samples, on the CPU; None for a fixed seed.
        improve: local optimisation of the best candidates `(B, K, 3, 3)` after each round, to `(B, L, 3, 3)` of the
            first L of them.
    """
    problem = _with_enough_columns(problem)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    found = Candidates.none_yet(problem, keep)
    pairs = torch.arange(problem.scale.shape[0], device=problem.scale.device)
    size, drawn = SAMPLE_SIZE[problem.model], 0
    while drawn < max_samples and pairs.shape[0]:
        samples = min(max(FIRST_ROUND, drawn), LONGEST_ROUND, max_samples - drawn)
        seed = int(torch.randint(2**62, (), generator=generator))
        part, drawn = problem.of_pairs(pairs), drawn + samples
        kept = Candidates(*(x[pairs] for x in found))
        noise = gumbel_noise(part.weights.shape[1], samples, torch.Generator().manual_seed(seed))
        # Each round's own candidates are improved: a minimal model of right matches is less accurate than an improved
        # model of wrong ones, and would never be among the best of all rounds.
        fresh = Candidates.none_yet(part, keep)
        fresh = _scored(part, fresh, draw_samples(part.weights, noise.to(part.scale.device), size))
        kept = kept.best_with(fresh)
        if improve is not None:
            better = improve(part, fresh.matrices)
            first = better.shape[1]
            kept = kept.best_with(Candidates(better, cost_of(part, better), fresh.samples[:, :first]))
        found = Candidates(*(x.index_copy(0, pairs, y) for x, y in zip(found, kept, strict=True)))
        if confidence is not None:
            pairs = pairs[_needed(part, kept.matrices[:, :1], confidence) > drawn]
    return found


def cost_of(problem: Problem, matrices: Tensor) -> Tensor:
    """Soft MSAC cost `(B, S)`: the sum of `w r^2 / (1 + r^2 / s^2)`, in units of s^2; infinite for a zero matrix.

    It is the smooth form of MSAC's truncated square (Torr and Zisserman 2000).
    """
    device = problem.scale.device.type
    with torch.autocast(device, enabled=False):
        points = (problem.points0.float(), problem.points1.float())
        squared = squared_errors(problem.model, matrices.float(), *points)
        limit = problem.scale.clamp(1e-15, 1e15).square().float()[:, None, None]
        cost = (1.0 - 1.0 / (1.0 + squared / limit)) @ problem.weights.float()[..., None]
    values = cost[..., 0].to(problem.scale.dtype).nan_to_num(nan=float("inf"))
    return torch.where(matrices.flatten(2).any(2), values, float("inf"))


def _scored(problem: Problem, kept: Candidates, index: Tensor) -> Candidates:
    """The best of the candidates so far and of the models of samples `(B, S, m)`."""
    pairs, solutions = index.shape[0], SOLUTIONS[problem.model]
    room = RESIDUALS_AT_ONCE["cpu" if index.device.type == "cpu" else "other"]
    at_once = max(room // (solutions * problem.weights.numel()), LEAST_SAMPLES_AT_ONCE)
    batch = torch.arange(pairs, device=index.device)[:, None]
    for part in index.split(at_once, dim=1):
        rows = batch[:, :, None].expand_as(part)
        points = [x[rows, part].flatten(0, 1) for x in (problem.points0, problem.points1)]
        matrices = minimal_models(problem.model, *points).view(pairs, -1, 3, 3)
        # Most samples have fewer solutions than places for them: the real ones first, the rest left out.
        real, order = matrices.flatten(2).any(2).to(torch.uint8).sort(dim=1, descending=True, stable=True)
        order = order[:, : max(int(real.sum(1).max()), kept.cost.shape[1])]
        matrices = matrices[batch, order]
        samples = part[batch, order // solutions]
        kept = kept.best_with(Candidates(matrices, cost_of(problem, matrices), samples))
    return kept


def _needed(problem: Problem, best: Tensor, confidence: float) -> Tensor:
    """How many samples `(B,)` find a model at least as well supported with that confidence."""
    squared = squared_errors(problem.model, best, problem.points0, problem.points1)[:, 0]
    agreeing = (squared <= problem.scale.square()[:, None]).to(problem.weights.dtype)
    total = problem.weights.sum(1)
    share = (problem.weights * agreeing).sum(1) / torch.where(total > 0, total, 1.0)
    hit = share.clamp(1e-3, 1 - 1e-9) ** SAMPLE_SIZE[problem.model]
    return math.log1p(-confidence) / torch.log1p(-hit)


def _with_enough_columns(problem: Problem) -> Problem:
    """The same matches, with as many columns as a sample has points."""
    missing = SAMPLE_SIZE[problem.model] - problem.weights.shape[1]
    if missing <= 0:
        return problem
    points0, points1 = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in problem[1:3])
    return problem._replace(
        points0=points0, points1=points1, weights=torch.nn.functional.pad(problem.weights, (0, missing))
    )
