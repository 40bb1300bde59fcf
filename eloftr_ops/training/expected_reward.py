# SPDX-License-Identifier: Apache-2.0
"""Training by rewards: draw matches, estimate a model from them, reward what led to a good one.

The reward is any function of the estimated model; it needs no gradient. Cells first, by the model that a draw of them
gives. Then pixels, in the windows of cells that agree with a good model, by a finer model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eloftr_kernels.noise import gumbel, keys
from eloftr_ops.geometry import (
    consensus_from_matches,
    estimate_robust,
    fundamental_from_pose,
    sampson_residuals,
    transfer_residuals,
)
from eloftr_ops.losses.expected_reward import (
    Candidates,
    agreement_rewards,
    expected_reward_loss,
    homography_reward,
    pose_reward,
    support_reward,
)
from eloftr_ops.model.coarse import score_cells
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.model.sampling import check_sampling, draw_cells, draw_pixels, pair_seeds
from eloftr_ops.types import CoarseOutput, Features, SampledMatches, SampledPixels

ObjectiveKind = Literal["supervised", "homography_reward", "pose_reward", "support"]
Reward = Callable[[Candidates], Tensor]  # (N,) in [0, 1] of N models
_LEAST_WINDOWS = 8  # of a pair, for a finer model
_WINDOW_STREAM = 1 << 21


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What a training step goes down, and how matches are drawn for a reward.

    Args:
        kind: ``supervised`` by true matches (section ``loss``); or by drawn matches alone, with the error of the
            homography or pose that they give, or for pairs without labels their support, as the reward.
        draws: of cells, of each pair of images; they are each other's baseline.
        matches: pairs of cells in a draw.
        windows: of each pair of images, whose pixels are drawn; 0 for cells alone.
        pixels: pairs of pixels drawn in each of them.
        hypotheses: finer models of each pair of images, each of a minimal sample of the pixels.
        sharpness: of the softmax over their rewards: how much better ones count for more.
        model: that support is counted for: ``homography`` or ``fundamental``.
        cell_threshold: pixels up to which a pair of cells agrees with a model.
        pixel_threshold: pixels up to which a pair of pixels does.
        scale: error from which on the reward is zero, pixels or degrees.
        chance: for ``support``: share of matches that agrees by chance.
        penalty: of matches that do not agree with a good model, relative to its reward.
        pixel_weight: of the loss of pixels.
        entropy: weight of the entropy of cells.
        baseline: compare the draws of a pair with each other.
        backend: of ``estimate_robust``: ``opencv``, ``poselib`` or ``torch``, which runs on a GPU.

    Raises:
        ValueError: a value out of range.
    """

    kind: ObjectiveKind = "supervised"
    draws: int = 2
    matches: int = 384
    windows: int = 100
    pixels: int = 16
    hypotheses: int = 64
    sharpness: float = 20.0
    model: Literal["homography", "fundamental"] = "homography"
    cell_threshold: float = 7.0
    pixel_threshold: float = 2.5
    scale: float = 16.0
    chance: float = 0.05
    penalty: float = 0.25
    pixel_weight: float = 1.0
    entropy: float = 0.0
    baseline: bool = True
    backend: Literal["opencv", "poselib", "torch"] = "opencv"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("draws", 1, 1000),
            ("matches", 8, 1 << 20),
            ("windows", 0, 1 << 20),
            ("pixels", 2, 4096),
            ("hypotheses", 2, 4096),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {getattr(self, name)}.")
        for name in ("cell_threshold", "pixel_threshold", "scale", "sharpness"):
            if not 0 < getattr(self, name) < 1e9:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}.")
        for name in ("penalty", "pixel_weight", "entropy"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}.")
        if not 0 <= self.chance < 1:
            raise ValueError(f"chance: expected a share in [0, 1), got {self.chance}.")


class Geometry(NamedTuple):
    """Which model is estimated."""

    model: Literal["homography", "fundamental", "pose"]
    K0: Tensor | None = None  # (B, 3, 3), for poses
    K1: Tensor | None = None
    backend: str = "opencv"  # of estimate_robust; torch has no loop over pairs, and runs on a GPU


class RewardLoss(NamedTuple):
    """The loss of one batch of B pairs; watch ``reward``."""

    loss: Tensor  # () mean over the pairs
    per_pair: Tensor  # (B,)
    reward: Tensor  # (B,) mean over the draws, without gradient
    fine_reward: Tensor  # (B,) of the finer model; zero without one
    support: Tensor  # (B,) mean share of drawn matches that agree with their model


class _Judged(NamedTuple):
    """Models of N groups of matches."""

    found: Candidates
    distance: Tensor  # (M,) of each match from the model of its group, pixels; infinite where there is none


def reward_objective(
    model: EfficientLoFTR,
    image0: Tensor,
    image1: Tensor,
    reward: Reward,
    geometry: Geometry,
    config: ObjectiveConfig | None = None,
    *,
    mask0: Tensor | None = None,
    mask1: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RewardLoss:
    """Loss of a batch by a reward of your own, for your own training loop.

    Convention:
        - Frame of the models: that of the keypoints, the centre of pixel (x, y) at (x + 0.5, y + 0.5).
        - ``reward(found)`` gets N candidates and returns (N,) in [0, 1], 0 for a failure.
        - Models are found by :func:`eloftr_ops.geometry.estimate_robust` with ``geometry.backend``.
        - A pair without a success costs zero, with zero gradient. No gradient is NaN or infinite.

    Args:
        model: the matcher, in training or evaluation mode (which decides on BatchNorm statistics).
        image0: (B, 1, H0, W0) in [0, 1].
        image1: (B, 1, H1, W1) in [0, 1].
        reward: of the estimated models.
        geometry: which model is estimated.
        config: how matches are drawn; its ``kind`` and ``scale`` are not looked at.
        mask0: (B, H0, W0), zero where there is no image.
        mask1: (B, H1, W1).
        generator: of what is drawn.

    Raises:
        ValueError, TypeError: as ``model.sample_matches``; or a reward of another shape, or not finite.
    """
    config = config or ObjectiveConfig()
    data = {"image0": image0, "image1": image1, "mask0": mask0, "mask1": mask1}
    sides = model.extract_pair(model.check_input(data))
    coarse = score_cells(*model.transform(*sides), sides[0].coarse_mask, sides[1].coarse_mask, model.config)
    seeds = pair_seeds(len(image0), generator, model.device)
    result = reward_of_stages(model, sides, coarse, reward, geometry, config, seeds)
    return result._replace(loss=result.per_pair.mean())


def reward_of_stages(
    model: EfficientLoFTR,
    sides: tuple[Features, Features],
    coarse: CoarseOutput,
    reward: Reward,
    geometry: Geometry,
    config: ObjectiveConfig,
    seeds: Tensor,
) -> RewardLoss:
    """:func:`reward_objective` of stages that have run; ``loss`` is the sum over the pairs."""
    check_sampling(model.config, config.draws, config.matches, config.pixels)
    drawn = draw_cells(*sides, coarse, model.config, seeds=seeds, draws=config.draws, matches=config.matches)
    judged, agrees = _judge_cells(drawn, geometry, config)
    rewards = _checked(reward(judged.found), judged.found).view(agrees.shape[:2])
    rewards = rewards.to(drawn.log_probability)
    per_pair = expected_reward_loss(
        drawn.log_probability,
        agreement_rewards(rewards, agrees, penalty=config.penalty, baseline=config.baseline),
        valid=drawn.valid,
        baseline=False,
        entropy=config.entropy,
        reduction="none",
    )
    fine_rewards = torch.zeros_like(per_pair.detach())
    if config.windows > 0 and config.pixel_weight > 0:
        rows = _windows_to_draw(agrees & (rewards > 0)[..., None], seeds, config.windows)
        if len(rows) > 0:
            fine = model.fine_features(*sides, coarse)
            pixels = draw_pixels(
                *sides, coarse, *fine, model.config, drawn, rows=rows, seeds=seeds, pixels=config.pixels
            )
            batch = rows // drawn.valid[0].numel()
            of_pixels, fine_rewards = _pixel_losses(pixels, batch, len(seeds), reward, geometry, config)
            per_pair = per_pair + config.pixel_weight * of_pixels
    support = judged.found.support.view(agrees.shape[:2]).mean(1)
    return RewardLoss(per_pair.sum(), per_pair, rewards.mean(1), fine_rewards, support)


def reward_of_kind(
    config: ObjectiveConfig,
    *,
    size_hw: tuple[int, int],
    H_0to1: Tensor | None = None,
    T_0to1: Tensor | None = None,
    K0: Tensor | None = None,
    K1: Tensor | None = None,
) -> tuple[Reward, Geometry]:
    """The reward that ``config.kind`` names, of pairs with these labels, and the model that it is of.

    Raises:
        ValueError: a kind without a reward, or without its labels.
    """
    scale, backend = config.scale, config.backend
    if config.kind == "homography_reward" and H_0to1 is not None:
        homography = Geometry("homography", backend=backend)
        return partial(homography_reward, H_gt_0to1=H_0to1, size_hw=size_hw, scale=scale), homography
    if config.kind == "pose_reward" and T_0to1 is not None:
        return partial(pose_reward, T_gt_0to1=T_0to1, scale=scale), Geometry("pose", K0, K1, backend)
    if config.kind == "support":
        return partial(support_reward, chance=config.chance), Geometry(config.model, backend=backend)
    raise ValueError(f"kind: expected a reward whose labels are there, got {config.kind}.")


@torch.no_grad()
def _judge_cells(drawn: SampledMatches, geometry: Geometry, config: ObjectiveConfig) -> tuple[_Judged, Tensor]:
    """The model of each draw, and which drawn matches (B, D, K) agree with it."""
    pairs, draws, _ = drawn.valid.shape
    group = torch.arange(pairs * draws, device=drawn.valid.device)
    index = group.view(pairs, draws, 1).expand_as(drawn.valid)[drawn.valid]
    points = drawn.keypoints0[drawn.valid], drawn.keypoints1[drawn.valid]
    judged = _judge(*points, index, group // draws, geometry, config.cell_threshold)
    agrees = torch.zeros_like(drawn.valid)
    agrees[drawn.valid] = judged.distance < config.cell_threshold
    return judged, agrees


def _pixel_losses(
    pixels: SampledPixels,
    batch: Tensor,
    pairs: int,
    reward: Reward,
    geometry: Geometry,
    config: ObjectiveConfig,
) -> tuple[Tensor, Tensor]:
    """(B,) mean over the windows of each pair, zero for those without a finer model; and the mean reward of those.

    One robust model of all pixels would not do: windows that agree on a wrong shift would be rewarded for agreeing, and
    no draw would ever show them a better one. Small samples give different models, and their rewards can be compared.
    """
    with torch.no_grad():
        index = batch[:, None].expand_as(pixels.valid)[pixels.valid]
        points = pixels.keypoints0[pixels.valid], pixels.keypoints1[pixels.valid]
        found, near = _hypotheses(*points, index, pairs, geometry, config)
        counts = torch.bincount(batch, minlength=pairs)
        of_models = _checked(reward(found), found).view(pairs, -1).to(pixels.log_probability)
        of_models = of_models * (counts >= _LEAST_WINDOWS)[:, None]
        share = (config.sharpness * of_models).masked_fill(of_models <= 0, -torch.inf).softmax(1).nan_to_num(0)
        worth = (share * of_models).sum(1)
        rewards = torch.zeros_like(pixels.log_probability)
        rewards[pixels.valid] = (near.to(share) * share[index]).sum(1) * worth[index]
    per_window = expected_reward_loss(pixels.log_probability, rewards, valid=pixels.valid, reduction="none")
    total = per_window.new_zeros(pairs).index_add(0, batch, per_window)
    return total * config.pixels / counts.clamp_min(1), worth


def _hypotheses(
    keypoints0: Tensor,
    keypoints1: Tensor,
    index: Tensor,
    pairs: int,
    geometry: Geometry,
    config: ObjectiveConfig,
) -> tuple[Candidates, Tensor]:
    """Models of minimal samples, and how well each match agrees with each model of its pair, (M, H) in [0, 1]."""
    found = consensus_from_matches(
        keypoints0,
        keypoints1,
        index,
        batch_size=pairs,
        model=geometry.model,
        K0=geometry.K0,
        K1=geometry.K1,
        robust_scale=config.pixel_threshold,
        hypotheses=config.hypotheses,
        max_iterations=config.hypotheses,
        temperature=1e9,  # no hypothesis that is determined gets the probability zero
        refine_steps=0,
    )
    models = found.models_0to1.flatten(0, 1)
    valid, kept = (found.probabilities > 0).flatten(), found.probabilities.shape[1]
    group = torch.arange(pairs, device=index.device).repeat_interleave(kept)
    rows = (index[:, None] * kept + torch.arange(kept, device=index.device)).flatten()
    cameras = [None if K is None else K[group] for K in (geometry.K0, geometry.K1)]
    repeated = keypoints0.repeat_interleave(kept, 0), keypoints1.repeat_interleave(kept, 0)
    distance = _distances(*repeated, rows, models, geometry, cameras)
    near = torch.where(valid[rows], (-0.5 * distance.square()).exp(), 0)
    support = near.new_zeros(len(group)).index_add(0, rows, near)
    support = support / torch.bincount(rows, minlength=len(group)).clamp_min(1)
    return Candidates(models, valid, group, support), near.view(-1, kept)


@torch.no_grad()
def _judge(
    keypoints0: Tensor,
    keypoints1: Tensor,
    index: Tensor,
    pairs: Tensor,
    geometry: Geometry,
    threshold: float,
) -> _Judged:
    """Robust models of groups of matches, and each match's distance from the model of its group."""
    cameras = [None if K is None else K[pairs] for K in (geometry.K0, geometry.K1)]
    estimate = estimate_robust(
        keypoints0,
        keypoints1,
        index,
        batch_size=len(pairs),
        model=geometry.model,
        K0=cameras[0],
        K1=cameras[1],
        backend=geometry.backend,
        threshold=threshold,
        confidence=0.999,
        max_iterations=3000,
    )
    distance = _distances(keypoints0, keypoints1, index, estimate.model_0to1, geometry, cameras)
    distance = torch.where(estimate.valid[index], distance, torch.inf)
    agreeing = torch.bincount(index[distance < threshold], minlength=len(pairs))
    support = agreeing / torch.bincount(index, minlength=len(pairs)).clamp_min(1)
    return _Judged(Candidates(estimate.model_0to1, estimate.valid, pairs, support), distance)


def _distances(
    keypoints0: Tensor,
    keypoints1: Tensor,
    index: Tensor,
    models: Tensor,
    geometry: Geometry,
    cameras: list[Tensor | None],
) -> Tensor:
    """(M,) pixels: transfer error for homographies, Sampson distance otherwise."""
    if geometry.model == "homography":
        offsets: Tensor = transfer_residuals(keypoints0, keypoints1, index, models)
        return offsets.square().sum(-1).sqrt()
    if cameras[0] is not None and cameras[1] is not None:
        models = fundamental_from_pose(models, cameras[0].to(models), cameras[1].to(models))
    distance: Tensor = sampson_residuals(keypoints0, keypoints1, index, models)
    return distance.abs()


def _windows_to_draw(chosen: Tensor, seeds: Tensor, most: int) -> Tensor:
    """(N,) rows of the chosen of (B, D, K) matches, by chance at most so many of each pair."""
    flat = chosen.flatten(1)
    columns = torch.arange(flat.shape[1], device=flat.device)
    noise = gumbel(keys(seeds, _WINDOW_STREAM)[:, None], keys(columns))
    _, kept = noise.masked_fill(~flat, -torch.inf).topk(min(most, flat.shape[1]), 1)
    rows = kept + torch.arange(len(flat), device=flat.device)[:, None] * flat.shape[1]
    return rows[flat.gather(1, kept)]


def _checked(rewards: Tensor, found: Candidates) -> Tensor:
    """Of a user's function: the right shape, finite, no gradient."""
    if not isinstance(rewards, Tensor) or rewards.shape != found.valid.shape:
        shape = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"reward: expected a tensor (N,) = {tuple(found.valid.shape)}, got {shape}.")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("reward: expected finite numbers, got NaN or infinity. Return 0 for a failure.")
    return rewards.detach()
