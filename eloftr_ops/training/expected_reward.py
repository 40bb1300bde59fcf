# SPDX-License-Identifier: Apache-2.0
"""Training by rewards: draw matches, estimate models from them, reward what leads to a good one.

The reward is any function of the estimated model; it needs no gradient. Cells come first, by the models that draws of
them give. Then pixels, in the windows of cells that agree with a good model: by models that are finer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eloftr_kernels.noise import gumbel, keys
from eloftr_kernels.window_match.naive import pixel_offsets
from eloftr_kernels.window_match.sampled_pixels import window_log_joint
from eloftr_ops.losses.expected_reward import (
    Candidates,
    agreement_rewards,
    expected_choice_loss,
    expected_reward_loss,
    homography_reward,
    pose_reward,
    support_reward,
)
from eloftr_ops.model.coarse import score_cells
from eloftr_ops.model.fine import cell_positions
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.model.sampling import check_sampling, draw_cells, draw_pixels, pair_seeds
from eloftr_ops.training.drawn_models import (
    Geometry,
    Judged,
    Points,
    Reward,
    agreeing,
    as_matrices,
    judge_cells,
    judged_rows,
    refits,
    rewards_of,
    squared_distances,
)
from eloftr_ops.types import CoarseOutput, Features, SampledMatches

ObjectiveKind = Literal["supervised", "homography_reward", "pose_reward", "support"]
_LEAST_WINDOWS = 8  # of a pair, for a finer model
_BEST = 8  # finer models of a pair, that its pixels are judged by
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
        pixels: pairs of pixels drawn in each of them, for finer models.
        hypotheses: finer models of each pair of images, fitted to parts of the cells and of the pixels.
        sharpness: of the softmax over their rewards: how much better ones count for more.
        model: that support is counted for: ``homography`` or ``fundamental``.
        cell_threshold: pixels up to which a pair of cells agrees with a model.
        pixel_scale: pixels; the reward of a pair of pixels at distance d from a model is exp(-d^2 / 2 pixel_scale^2).
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
    windows: int = 150
    pixels: int = 4
    hypotheses: int = 64
    sharpness: float = 200.0
    model: Literal["homography", "fundamental"] = "homography"
    cell_threshold: float = 7.0
    pixel_scale: float = 0.6
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
        for name in ("cell_threshold", "pixel_scale", "scale", "sharpness"):
            if not 0 < getattr(self, name) < 1e9:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}.")
        for name in ("penalty", "pixel_weight", "entropy"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}.")
        if not 0 <= self.chance < 1:
            raise ValueError(f"chance: expected a share in [0, 1), got {self.chance}.")


class RewardLoss(NamedTuple):
    """The loss of one batch of B pairs; watch ``reward``."""

    loss: Tensor  # () mean over the pairs
    per_pair: Tensor  # (B,)
    reward: Tensor  # (B,) mean over the draws, without gradient
    fine_reward: Tensor  # (B,) of the finer model; zero without one
    support: Tensor  # (B,) mean share of drawn matches that agree with their model


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
    judged = judge_cells(drawn, seeds, reward, geometry, threshold=config.cell_threshold, rough=config.hypotheses)
    rewards = judged.rewards.to(drawn.log_probability)
    per_pair = expected_reward_loss(
        drawn.log_probability,
        agreement_rewards(rewards, judged.agrees, penalty=config.penalty, baseline=config.baseline),
        valid=drawn.valid,
        baseline=False,
        entropy=config.entropy,
        reduction="none",
    )
    worth = torch.zeros_like(per_pair.detach())
    if config.windows > 0 and config.pixel_weight > 0:
        rows = _windows_to_look_at(judged_rows(judged), drawn, seeds, config.windows)
        if len(rows) > 0:
            of_pixels, worth = _pixel_losses(model, sides, coarse, drawn, judged, rows, seeds, reward, geometry, config)
            per_pair = per_pair + config.pixel_weight * of_pixels
    return RewardLoss(per_pair.sum(), per_pair, rewards.mean(1), worth, judged.support.mean(1))


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


def _pixel_losses(
    model: EfficientLoFTR,
    sides: tuple[Features, Features],
    coarse: CoarseOutput,
    drawn: SampledMatches,
    judged: Judged,
    rows: Tensor,
    seeds: Tensor,
    reward: Reward,
    geometry: Geometry,
    config: ObjectiveConfig,
) -> tuple[Tensor, Tensor]:
    """(B,) mean over the windows of each pair, zero for those without a finer model; and the worth of those models.

    The reward of a pair of pixels is known as soon as a model is, so its expectation over the window needs no draw.
    Pixels are drawn only for the models. One model of all of them would not do: where windows agree on a wrong shift,
    it would reward them for agreeing.
    """
    fine = model.fine_features(*sides, coarse)
    batch = rows // drawn.valid[0].numel()
    counts = torch.bincount(batch, minlength=len(seeds))
    with torch.no_grad():
        found = _finer_models(model, sides, coarse, fine, drawn, judged, rows, seeds, geometry, config)
        of_models = rewards_of(reward, found).view(len(seeds), -1).float() * (counts >= _LEAST_WINDOWS)[:, None]
        share = (config.sharpness * of_models).masked_fill(of_models <= 0, -torch.inf).softmax(1).nan_to_num(0)
        worth = (share * of_models).sum(1)
    cells0, cells1 = drawn.cells0.flatten()[rows], drawn.cells1.flatten()[rows]
    log_joint = window_log_joint(*fine, batch, cells0, cells1, model.config.subpixel_channels)
    corners = cell_positions(cells0, coarse.grid0, worth.dtype), cell_positions(cells1, coarse.grid1, worth.dtype)
    rewards = _pixel_rewards(*corners, batch, found, share, geometry, config)
    per_window = worth[batch] * expected_choice_loss(log_joint, rewards.to(log_joint))
    total = per_window.new_zeros(len(seeds)).index_add(0, batch, per_window)
    return total / counts.clamp_min(1), worth.to(total)


def _finer_models(
    model: EfficientLoFTR,
    sides: tuple[Features, Features],
    coarse: CoarseOutput,
    fine: tuple[Tensor, Tensor],
    drawn: SampledMatches,
    judged: Judged,
    rows: Tensor,
    seeds: Tensor,
    geometry: Geometry,
    config: ObjectiveConfig,
) -> Candidates:
    """Models fitted to parts of the cells, and to parts of the pixels drawn in their windows."""
    pixels = draw_pixels(*sides, coarse, *fine, model.config, drawn, rows=rows, seeds=seeds, pixels=config.pixels)
    group = (rows // drawn.valid[0].numel())[:, None].expand_as(pixels.valid)
    window = rows[:, None].expand_as(pixels.valid)
    points = Points(*(x[pixels.valid] for x in (pixels.keypoints0, pixels.keypoints1, group, window)))
    best = judged.rewards.argmax(1)[:, None, None, None]
    start = judged.models.take_along_dim(best, 1)[:, 0]
    found = refits(agreeing(drawn, judged), points, seeds, start, geometry, count=config.hypotheses)
    matrices = as_matrices(found.models_0to1, found.pairs, geometry).unflatten(0, (len(seeds), config.hypotheses))
    squared = squared_distances(pixels.keypoints0[:, None], pixels.keypoints1[:, None], matrices[group[:, 0]], geometry)
    near = _nearness(squared, config).where(pixels.valid[:, None], 0).sum(2)
    support = near.new_zeros(matrices.shape[:2]).index_add(0, group[:, 0], near)
    count = torch.bincount(group[pixels.valid], minlength=len(seeds)).clamp_min(1)
    return found._replace(support=(support / count[:, None]).flatten())


@torch.no_grad()
def _pixel_rewards(
    corners0: Tensor,
    corners1: Tensor,
    batch: Tensor,
    found: Candidates,
    share: Tensor,
    geometry: Geometry,
    config: ObjectiveConfig,
) -> Tensor:
    """(N, 64, 64) how well pairs of pixels agree with the best models of their pair of images, in [0, 1]."""
    grid = pixel_offsets(share)
    points0, points1 = corners0[:, None] + grid, corners1[:, None] + grid
    matrices = as_matrices(found.models_0to1, found.pairs, geometry).unflatten(0, share.shape)
    share, order = share.topk(min(_BEST, share.shape[1]), 1)
    matrices = matrices.take_along_dim(order[..., None, None], 1)
    total = share.new_zeros(len(batch), len(grid), len(grid))
    for k in range(share.shape[1]):
        squared = squared_distances(points0, points1, matrices[batch, k], geometry, pairwise=True)
        total += _nearness(squared, config) * share[batch, k, None, None]
    return total


def _nearness(squared: Tensor, config: ObjectiveConfig) -> Tensor:
    """In [0, 1], of squared distances in pixels."""
    return (-0.5 * squared / config.pixel_scale**2).exp()


def _windows_to_look_at(where: tuple[Tensor, ...], drawn: SampledMatches, seeds: Tensor, most: int) -> Tensor:
    """(N,) rows of the chosen of (B, D, K) matches, by chance at most so many of each pair."""
    chosen = torch.zeros_like(drawn.valid)
    chosen[where] = True
    flat = chosen.flatten(1)
    columns = torch.arange(flat.shape[1], device=flat.device)
    noise = gumbel(keys(seeds, _WINDOW_STREAM)[:, None], keys(columns))
    _, kept = noise.masked_fill(~flat, -torch.inf).topk(min(most, flat.shape[1]), 1)
    rows = kept + torch.arange(len(flat), device=flat.device)[:, None] * flat.shape[1]
    return rows[flat.gather(1, kept)]
