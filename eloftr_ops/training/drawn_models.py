# SPDX-License-Identifier: Apache-2.0
"""Geometric models from drawn matches: candidates, of which a reward says how good they are.

A draw gives several models, and the best of them counts. While few of its matches are right, the model that most of
them support is wrong by chance; later on, models fitted to parts of the agreeing matches lie on all sides of the truth,
and the reward knows which of them is nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.noise import counters, gumbel, keys, mixed
from eloftr_ops.geometry import (
    estimate_robust,
    fundamental_from_matches,
    fundamental_from_pose,
    homography_from_matches,
    relative_pose_from_matches,
)
from eloftr_ops.losses.expected_reward import Candidates
from eloftr_ops.types import SampledMatches

Reward = Callable[[Candidates], Tensor]  # (N,) in [0, 1] of N models
SIMILARITY_STREAM, CELL_STREAM, REFIT_STREAM = 1 << 22, 1 << 23, 1 << 24  # of noise
_MOST_ZOOM = 4.0
_TURNS, _PARTS = 2, 16  # of a draw: rounds of refits, and how many in each
_FIT_SCALE, _REWEIGHTINGS = (
    2.0,
    3,
)  # pixels, from which on a match counts for less; linear fits, each by weights of the last
_QUARTER = 1.2459  # of Gumbel noise, that much lies above


class Geometry(NamedTuple):
    """Which model is estimated."""

    model: Literal["homography", "fundamental", "pose"]
    K0: Tensor | None = None  # (B, 3, 3), for poses
    K1: Tensor | None = None
    backend: str = "opencv"  # of estimate_robust; torch has no loop over pairs, and runs on a GPU


class Points(NamedTuple):
    """M matches, each of a group: of a pair of images, or of those that one model is fitted to."""

    keypoints0: Tensor  # (M, 2)
    keypoints1: Tensor  # (M, 2)
    group: Tensor  # (M,) int64
    window: Tensor  # (M,) int64: matches with the same number are taken or left together


class Judged(NamedTuple):
    """The best model of each of B * D draws."""

    models: Tensor  # (B, D, 3, 3) or (B, D, 4, 4); zero where there is none
    rewards: Tensor  # (B, D), zero for a failure
    support: Tensor  # (B, D) share of the drawn matches that agree
    agrees: Tensor  # (B, D, K) bool


@torch.no_grad()
def judge_cells(
    drawn: SampledMatches,
    seeds: Tensor,
    reward: Reward,
    geometry: Geometry,
    *,
    threshold: float,
    rough: int = 64,
) -> Judged:
    """The best model of each draw: a robust one, then those fitted to quarters of the matches that agree with it.

    Homographies have a second start, from the matches that agree with a similarity; see :func:`similarities`.

    Args:
        drawn: D draws of K matches of each of B pairs.
        seeds: (B,) int64.
        reward: of models; looked at without gradient.
        geometry: which models.
        threshold: pixels up to which a match agrees with a model.
        rough: similarities whose reward is asked for.
    """
    chosen = [drawn.valid]
    if geometry.model == "homography":
        streams = keys(seeds[:, None], SIMILARITY_STREAM + torch.arange(drawn.valid.shape[1], device=seeds.device))
        models = similarities(drawn, streams, threshold=2 * threshold, kept=rough)
        chosen.append(_best(drawn, models, reward, geometry, 2 * threshold).agrees)
    models = torch.stack([_robust_models(drawn, some, geometry, threshold) for some in chosen], 2)
    judged = _best(drawn, models, reward, geometry, threshold)
    for turn in range(_TURNS):
        streams = keys(keys(seeds, CELL_STREAM + turn).long()[:, None], torch.arange(drawn.valid.shape[1]).to(seeds))
        models = torch.cat([judged.models[:, :, None], _cell_refits(drawn, judged, streams, geometry)], 2)
        judged = _best(drawn, models, reward, geometry, threshold)
    return judged


@torch.no_grad()
def refits(
    cells: Points, pixels: Points, seeds: Tensor, start: Tensor, geometry: Geometry, *, count: int
) -> Candidates:
    """``count`` models of each pair, half of them fitted to cells and half to pixels, each to a quarter of them.

    Args:
        cells: agreeing matches; ``group`` is the pair.
        pixels: drawn in windows of such cells.
        seeds: (B,) int64.
        start: (B, 3, 3) or (B, 4, 4) the best model so far, where the fit of poses starts.
        geometry: which models.
        count: H, even.
    """
    halves = [
        _quarters(cells, keys(seeds, REFIT_STREAM), range(count // 2), count),
        _quarters(pixels, keys(seeds, REFIT_STREAM + 1), range(count // 2, count), count),
    ]
    points = Points(*(torch.cat(fields) for fields in zip(*halves, strict=True)))
    pairs = torch.arange(len(seeds), device=seeds.device).repeat_interleave(count)
    models = _fit(points, start[pairs], pairs, geometry)
    return Candidates(models, _found(models), pairs, torch.zeros(len(pairs), device=seeds.device))


def squared_distances(
    points0: Tensor, points1: Tensor, models: Tensor, geometry: Geometry, *, pairwise: bool = False
) -> Tensor:
    """Pixels squared by which matches miss a model: the transfer error in image 1, or the Sampson distance.

    Args:
        points0: (..., P, 2).
        points1: (..., P, 2), or (..., Q, 2) with ``pairwise``.
        models: (..., 3, 3), homographies or fundamental matrices, of any scale.
        geometry: which of them.
        pairwise: of each point of image 0 with each of image 1.

    Returns:
        (..., P), or (..., P, Q).
    """
    x0, x1 = (F.pad(points, (0, 1), value=1.0) for points in (points0, points1))
    models = models.to(points0)
    models = models / models.abs().amax((-2, -1), keepdim=True).clamp_min(1e-30)
    to1, to0 = x0 @ models.mT, x1 @ models
    if pairwise:
        to1, to0, x1 = to1[..., :, None, :], to0[..., None, :, :], x1[..., None, :, :]
    if geometry.model == "homography":
        depth = to1[..., 2:]
        depth = torch.where(depth.abs() > 1e-9, depth, 1e-9)
        return (to1[..., :2] / depth - x1[..., :2]).square().sum(-1)
    slope = to1[..., :2].square().sum(-1) + to0[..., :2].square().sum(-1)
    return (to1 * x1).sum(-1).square() / slope.clamp_min(1e-12)


def as_matrices(models: Tensor, pairs: Tensor, geometry: Geometry) -> Tensor:
    """(N, 3, 3): poses as fundamental matrices of their pair's cameras, others as they are."""
    if geometry.K0 is None or geometry.K1 is None:
        return models
    matrices: Tensor = fundamental_from_pose(models, geometry.K0[pairs].to(models), geometry.K1[pairs].to(models))
    return matrices


def similarities(drawn: SampledMatches, streams: Tensor, *, threshold: float, kept: int, samples: int = 2048) -> Tensor:
    """(B, D, N, 3, 3): of the similarities that two matches of a draw give, those that most of it agrees with.

    A homography takes four right matches. Two give a similarity; one right match in thirty is enough to find one by
    chance, and where perspective is mild, the matches that agree with it show the way to the homography.

    Args:
        drawn: matches.
        streams: (B, D) int32 keys of the noise.
        threshold: pixels up to which a match agrees.
        kept: N.
        samples: pairs of matches that are tried.
    """
    valid = drawn.valid.flatten(0, 1)
    z0, z1 = (torch.view_as_complex(x.flatten(0, 1).contiguous()) for x in (drawn.keypoints0, drawn.keypoints1))
    noise = mixed(streams.flatten()[:, None] ^ counters(0, 2 * samples, streams.device))
    picks = noise.bitwise_and_(0x7FFFFFFF).long() % valid.shape[1]
    i, j = picks[:, :samples], picks[:, samples:]
    span = z0.gather(1, j) - z0.gather(1, i)
    usable = valid.gather(1, i) & valid.gather(1, j) & (span.abs() > 2 * threshold)
    turn = (z1.gather(1, j) - z1.gather(1, i)) / torch.where(usable, span, 1)
    usable &= (turn.abs() > 1 / _MOST_ZOOM) & (turn.abs() < _MOST_ZOOM)
    shift = z1.gather(1, i) - turn * z0.gather(1, i)

    def votes(turn: Tensor, shift: Tensor) -> Tensor:
        miss = torch.view_as_real(turn[..., None] * z0[:, None] + shift[..., None] - z1[:, None])
        return (1 - miss.square().sum(-1) / threshold**2).clamp_(min=0) * valid[:, None]

    scores = [votes(*part).sum(2) for part in zip(turn.split(256, 1), shift.split(256, 1), strict=True)]
    best = torch.where(usable, torch.cat(scores, 1), 0).topk(kept, 1).indices
    turn, shift = _least_squares_similarity(z0, z1, votes(turn.gather(1, best), shift.gather(1, best)))
    zero = torch.zeros_like(turn.real)
    entries = [turn.real, -turn.imag, shift.real, turn.imag, turn.real, shift.imag, zero, zero, zero + 1]
    return torch.stack(entries, -1).view(*drawn.valid.shape[:2], kept, 3, 3)


def _least_squares_similarity(z0: Tensor, z1: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``z1 = turn * z0 + shift`` for complex points (G, K) and weights (G, N, K): two (G, N)."""
    share = weights / weights.sum(2, keepdim=True).clamp_min(1e-9)
    centre0, centre1 = ((share * z[:, None]).sum(2, keepdim=True) for z in (z0, z1))
    from0, from1 = z0[:, None] - centre0, z1[:, None] - centre1
    spread = (share * torch.view_as_real(from0).square().sum(-1)).sum(2)
    turn = (share * from0.conj() * from1).sum(2) / spread.clamp_min(1e-9)
    return turn, centre1[..., 0] - turn * centre0[..., 0]


def _robust_models(drawn: SampledMatches, chosen: Tensor, geometry: Geometry, threshold: float) -> Tensor:
    """(B, D, ...) of the chosen (B, D, K) of the drawn matches; zero where none is found."""
    pairs, draws, _ = chosen.shape
    group = torch.arange(pairs * draws, device=chosen.device)
    cameras = [None if K is None else K[group // draws] for K in (geometry.K0, geometry.K1)]
    estimate = estimate_robust(
        drawn.keypoints0[chosen],
        drawn.keypoints1[chosen],
        group.view(pairs, draws, 1).expand_as(chosen)[chosen],
        batch_size=len(group),
        model=geometry.model,
        K0=cameras[0],
        K1=cameras[1],
        backend=geometry.backend,
        threshold=threshold,
        confidence=0.999,
        max_iterations=3000,
    )
    models: Tensor = torch.where(estimate.valid[:, None, None], estimate.model_0to1, 0)
    return models.view(pairs, draws, *models.shape[1:])


def _best(drawn: SampledMatches, models: Tensor, reward: Reward, geometry: Geometry, threshold: float) -> Judged:
    """Of the models (B, D, N, ...) of each draw the one with the highest reward, or else with the most support."""
    pairs, draws, kept = models.shape[:3]
    pair = torch.arange(pairs, device=models.device).repeat_interleave(draws * kept)
    flat = models.flatten(0, 2)
    found = _found(flat)
    flat = torch.where(found[:, None, None], flat, torch.eye(flat.shape[-1]).to(flat))
    matrices = as_matrices(flat, pair, geometry).unflatten(0, models.shape[:3])
    squared = squared_distances(drawn.keypoints0[:, :, None], drawn.keypoints1[:, :, None], matrices, geometry)
    agrees = (squared < threshold**2) & drawn.valid[:, :, None] & found.view(pairs, draws, kept, 1)
    support = agrees.sum(3) / drawn.valid.sum(2).clamp_min(1)[..., None]
    rewards = rewards_of(reward, Candidates(flat, found, pair, support.flatten())).view_as(support)
    best = (rewards + 1e-6 * support.to(rewards)).argmax(2, keepdim=True)
    return Judged(
        models.take_along_dim(best[..., None, None], 2)[:, :, 0],
        rewards.take_along_dim(best, 2)[..., 0],
        support.take_along_dim(best, 2)[..., 0],
        agrees.take_along_dim(best[..., None], 2)[:, :, 0],
    )


def _cell_refits(drawn: SampledMatches, judged: Judged, streams: Tensor, geometry: Geometry) -> Tensor:
    """(B, D, N, ...) models fitted to quarters of the cells that agree with the best one of their draw."""
    pairs, draws, _ = judged.agrees.shape
    points = agreeing(drawn, judged)
    points = points._replace(group=judged_rows(judged)[0] * draws + judged_rows(judged)[1])
    parts = _quarters(points, streams.flatten(), range(_PARTS), _PARTS)
    pair = torch.arange(pairs, device=streams.device).repeat_interleave(draws * _PARTS)
    models = _fit(parts, judged.models.flatten(0, 1).repeat_interleave(_PARTS, 0), pair, geometry)
    return models.view(pairs, draws, _PARTS, *models.shape[1:])


def agreeing(drawn: SampledMatches, judged: Judged) -> Points:
    """Drawn matches that agree with a model of some reward; ``group`` is the pair of images."""
    where = judged_rows(judged)
    window = drawn.cells0[where] * 65537 + drawn.cells1[where]
    return Points(drawn.keypoints0[where], drawn.keypoints1[where], where[0], window)


def judged_rows(judged: Judged) -> tuple[Tensor, ...]:
    """Pair, draw and number of the matches that agree with a model of some reward."""
    return (judged.agrees & (judged.rewards > 0)[..., None]).nonzero(as_tuple=True)


def _quarters(points: Points, streams: Tensor, models: range, kept: int) -> Points:
    """For each of these models of each group a quarter of its points, by chance; the new group is the model."""
    number = torch.arange(models.start, models.stop, device=streams.device)
    rows = keys(streams[points.group].long(), points.window)[:, None]
    row, model = (gumbel(rows, counters(models.start, len(number), rows.device)) > _QUARTER).nonzero(as_tuple=True)
    group = points.group[row] * kept + number[model]
    return Points(points.keypoints0[row], points.keypoints1[row], group, points.window[row])


def _fit(points: Points, start: Tensor, pairs: Tensor, geometry: Geometry) -> Tensor:
    """(N, ...) by least squares, re-weighted; zero where none is determined."""
    if geometry.K0 is not None and geometry.K1 is not None:
        known = _found(start)
        start = torch.where(known[:, None, None], start, _SOME_POSE.to(start))
        pose = relative_pose_from_matches(
            points.keypoints0,
            points.keypoints1,
            geometry.K0[pairs],
            geometry.K1[pairs],
            points.group,
            robust="cauchy",
            robust_scale=_FIT_SCALE,
            initial_0to1=start,
            refine_steps=5,
        )
        return torch.where((pose.valid & known)[:, None, None], pose.T_0to1, 0)
    models, weights = start, None
    for _ in range(_REWEIGHTINGS):
        models = _linear_fit(points, weights, len(pairs), geometry)
        squared = squared_distances(
            points.keypoints0[:, None], points.keypoints1[:, None], models[points.group], geometry
        )
        weights = 1 / (1 + squared[:, 0] / _FIT_SCALE**2)
    return models


def _linear_fit(points: Points, weights: Tensor | None, count: int, geometry: Geometry) -> Tensor:
    matches = points.keypoints0, points.keypoints1, points.group
    if geometry.model == "homography":
        flat = homography_from_matches(*matches, batch_size=count, weights=weights)
        return torch.where(flat.valid[:, None, None], flat.H_0to1, 0)
    lines = fundamental_from_matches(*matches, batch_size=count, weights=weights)
    return torch.where(lines.valid[:, None, None], lines.F_0to1, 0)


_SOME_POSE = torch.eye(4)
_SOME_POSE[2, 3] = 1


def _found(models: Tensor) -> Tensor:
    """(N,) bool: zero stands for none."""
    return models.abs().amax((1, 2)) > 0


def rewards_of(reward: Reward, found: Candidates) -> Tensor:
    """(N,) of a user's function: the right shape, finite, no gradient.

    Raises:
        ValueError: they are not.
    """
    rewards = reward(found)
    if not isinstance(rewards, Tensor) or rewards.shape != found.valid.shape:
        shape = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"reward: expected a tensor (N,) = {tuple(found.valid.shape)}, got {shape}.")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("reward: expected finite numbers, got NaN or infinity. Return 0 for a failure.")
    return rewards.detach()
