# SPDX-License-Identifier: Apache-2.0
"""The losses of a batch: first its labels, without gradient, then the sums of the losses.

Losses are means over the true pairs and targets of the *joined* batch of all processes and micro-batches. So a
micro-batch gives sums and counts; the trainer divides by the counts of all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from eloftr_ops.losses.expected_reward import Candidates
from eloftr_ops.losses.matching import coarse_focal_loss, window_losses
from eloftr_ops.model.coarse import match_cells, score_cells, select_matches
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.training.batches import DEPTH, HOMOGRAPHY, POSE, TrainingBatch
from eloftr_ops.training.config import LossConfig
from eloftr_ops.training.end_to_end import homography_objective_of_matches, pose_objective_of_matches
from eloftr_ops.training.expected_reward import ObjectiveConfig, RewardLoss, reward_of_kind, reward_of_stages
from eloftr_ops.training.optimization import evaluation_mode
from eloftr_ops.training.supervision import (
    pad_with_true_pairs,
    pairs_consistent_with_pose,
    pairs_from_depth,
    pairs_from_homography,
    window_targets_from_depth,
    window_targets_from_homography,
)
from eloftr_ops.types import CoarseOutput, CoarsePairs, Features, Matches, WindowTargets

TERMS = ("coarse", "pixel", "subpixel", "homography", "pose", "reward")


class Labels(NamedTuple):
    """The labels of a batch; no gradient."""

    pairs: CoarsePairs  # true pairs of cells, ascending in the pair of images
    predicted: CoarsePairs | None  # the matcher's own, where labels need them
    windows: CoarsePairs | None = None  # pairs whose windows the fine losses look at; None: no fine losses
    targets: WindowTargets | None = None  # true pixels in them


class BatchLosses(NamedTuple):
    """Scalar losses, each a mean over its targets in the batch; zero, with zero gradient, without a target."""

    coarse: Tensor  # focal loss at true pairs of cells
    pixel: Tensor  # negative log-likelihood of true pixels
    subpixel: Tensor  # of the sub-pixel offsets, see window_losses
    homography: Tensor  # corner error, pixels, of estimated homographies
    pose: Tensor  # error, radians, of estimated poses
    confidence: Tensor  # mean confidence of the true pairs, without gradient


def batch_losses(
    matcher: EfficientLoFTR, batch: TrainingBatch, config: LossConfig | None = None, *, fine: bool = True
) -> BatchLosses:
    """All losses of one batch in one process, for experiments; training computes the same in micro-batches.

    Args:
        matcher: in training or evaluation mode, which decides on BatchNorm.
        batch: for instance of ``batch_of_rendered``.
        config: what to look at; its weights only decide whether the end-to-end terms are computed.
        fine: run the fine stage.
    """
    config = config or LossConfig()
    labels = coarse_labels(matcher, batch, config, fine=fine)
    if fine:
        labels = fine_labels(batch, labels, config, len(labels.pairs.batch))
    sums, confidence = loss_sums(matcher, batch, labels, config)
    counts = label_counts(batch, labels).clamp_min(1).to(sums)
    return BatchLosses(*torch.cat([(sums / counts)[:5], (confidence / counts[0])[None].to(sums)]).unbind())


def term_weights(config: LossConfig, objective: ObjectiveConfig | None = None) -> list[float]:
    """Weights of the terms, in the order of ``TERMS``; a reward takes the place of the true matches."""
    if objective is not None and objective.kind != "supervised":
        return [0.0, 0.0, 0.0, config.homography_weight, config.pose_weight, 1.0]
    subpixel = config.fine_weight * config.subpixel_weight
    return [1.0, config.fine_weight, subpixel, config.homography_weight, config.pose_weight, 0.0]


def no_labels(batch: TrainingBatch) -> Labels:
    """What training by rewards gets: no true pair."""
    nothing = batch.kinds.new_zeros(0)
    return Labels(CoarsePairs(nothing, nothing, nothing), None)


@torch.no_grad()
def coarse_labels(matcher: EfficientLoFTR, batch: TrainingBatch, config: LossConfig, *, fine: bool = True) -> Labels:
    """True pairs of cells from a homography or depth; from the matcher's own matches if only the pose is known."""
    grid0, grid1 = batch.grids
    kinds = set(batch.kinds.tolist())
    valid0, valid1 = _valid_cells(batch.valid0, grid0), _valid_cells(batch.valid1, grid1)
    predicted = None
    if POSE in kinds or (config.padding and fine):
        predicted = _predicted_pairs(matcher, batch)
    found = []
    for kind in sorted(kinds):
        valid = valid0 & (batch.kinds == kind)[:, None, None]
        if kind == HOMOGRAPHY:
            found.append(pairs_from_homography(batch.H_0to1, grid0, grid1, valid, valid1))
        elif kind == DEPTH:
            found.append(
                pairs_from_depth(batch.depth_labels(), grid0, grid1, valid, valid1, tolerance=config.depth_tolerance)
            )
        elif predicted is not None:
            proposed = _chosen(predicted, valid.flatten(1)[predicted.batch, predicted.cells0])
            found.append(
                pairs_consistent_with_pose(
                    proposed,
                    batch.K0,
                    batch.K1,
                    batch.T_0to1,
                    grid0,
                    grid1,
                    max_distance=config.pose_distance,
                )
            )
    pairs = CoarsePairs(*(torch.cat(fields) for fields in zip(*found, strict=True)))
    order = pairs.batch.argsort(stable=True)
    return Labels(_chosen(pairs, order), predicted)


@torch.no_grad()
def fine_labels(batch: TrainingBatch, labels: Labels, config: LossConfig, total: int) -> Labels:
    """Adds the windows of the fine losses, and the true pixels in them.

    Args:
        batch: the pairs.
        labels: of :func:`coarse_labels`.
        config: number of windows, padding.
        total: true pairs of cells in the joined batch; ``windows`` of them are taken, on average. What is drawn for a
            pair of images comes from its own seed.
    """
    grid0, grid1 = batch.grids
    with_pixels = _chosen(labels.pairs, batch.kinds[labels.pairs.batch] != POSE)
    if config.padding and labels.predicted is not None:
        windows = _padded_windows(batch, with_pixels, labels.predicted, config)
    else:
        counts = with_pixels.batch.bincount(minlength=len(batch.kinds)).tolist()
        drawn = [
            torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for count, seed in zip(counts, batch.seeds.tolist(), strict=True)
        ]
        kept = torch.cat(drawn) * total < config.windows
        windows = _chosen(with_pixels, kept.to(with_pixels.batch.device))
    by_homography = (batch.kinds[windows.batch] == HOMOGRAPHY)[:, None]
    flat = window_targets_from_homography(batch.H_0to1, windows, grid0, grid1)
    if bool((batch.kinds == DEPTH).any()):
        deep = window_targets_from_depth(batch.depth_labels(), windows, grid0, grid1, tolerance=config.depth_tolerance)
        flat = WindowTargets(
            torch.where(by_homography, flat.visible, deep.visible),
            torch.where(by_homography, flat.pixels1, deep.pixels1),
            torch.where(by_homography[..., None], flat.offsets, deep.offsets),
        )
    return labels._replace(windows=windows, targets=flat)


def label_counts(batch: TrainingBatch, labels: Labels, objective: ObjectiveConfig | None = None) -> Tensor:
    """(6,) int64, in the order of ``TERMS``: the number of targets of each loss."""
    pixels = batch.kinds.new_zeros(()) if labels.targets is None else labels.targets.visible.sum()
    flat = (batch.kinds == HOMOGRAPHY).sum()
    rewarded = _rewarded(batch, objective or ObjectiveConfig()).sum()
    return torch.stack(
        [pixels.new_tensor(len(labels.pairs.batch)), pixels, pixels, flat, len(batch.kinds) - flat, rewarded]
    )


def loss_sums(
    matcher: EfficientLoFTR,
    batch: TrainingBatch,
    labels: Labels,
    config: LossConfig,
    objective: ObjectiveConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums (6,) of the losses in the order of ``TERMS``, and the sum of what is worth watching.

    That is the confidence of the true pairs of cells, or with an objective of rewards, the reward of the pairs of
    images. Pairs of images whose matches determine no homography or pose cost zero in those two terms, and count.
    """
    end_to_end = config.homography_weight > 0 or config.pose_weight > 0
    sides = matcher.extract_pair(matcher.check_input(batch.matcher_input()))
    score = match_cells if end_to_end else score_cells
    coarse0, coarse1 = matcher.transform(*sides)
    cells = score(coarse0, coarse1, sides[0].coarse_mask, sides[1].coarse_mask, matcher.config)
    if objective is not None and objective.kind != "supervised":
        coarse = pixel = subpixel = cells.coarse0.new_zeros(()).float()
        rewarded = _reward_sums(matcher, batch, sides, cells, objective)
        reward, watched, trust = rewarded.loss, rewarded.reward.sum(), rewarded.reward
    else:
        coarse, watched = coarse_focal_loss(cells.scores, labels.pairs, matcher.config, reduction="sum")
        pixel, subpixel = _window_sums(matcher, sides, cells, labels, config)
        reward, trust = coarse.new_zeros(()), None
    homography = pose = coarse.new_zeros(())
    if end_to_end:
        selected = select_matches(cells, matcher.config)
        matches = Matches(*matcher.refine(*sides, cells, selected, config.end_to_end.mode)[:4])
        homography, pose = _geometric_sums(matches, batch, config, trust)
    terms = (coarse, pixel, subpixel, homography, pose, reward)
    return torch.stack([term.to(coarse.dtype) for term in terms]), watched.to(coarse.dtype)


class Part:
    """What the objective gets: a plain object, whose tensors wrappers leave alone.

    Fabric casts every floating point tensor that it finds among a module's inputs to the reduced precision, labels
    included.
    """

    def __init__(self, batch: TrainingBatch | None, labels: Labels | None, counts: Tensor) -> None:
        self.batch, self.labels, self.counts = batch, labels, counts  # counts: (5,) of the joined batch


class Objective(nn.Module):
    """The weighted loss of one part of a step, as the module that is wrapped for several processes.

    Args:
        matcher: what is trained.
        config: what is learnt.
        objective: true matches, or a reward.
        touch_all: give every parameter a gradient, zero where a part does not use it: processes that average their
            gradients wait for each other's.
    """

    def __init__(
        self,
        matcher: EfficientLoFTR,
        config: LossConfig,
        objective: ObjectiveConfig | None = None,
        *,
        touch_all: bool,
    ) -> None:
        super().__init__()
        self.matcher, self.config, self.touch_all = matcher, config, touch_all
        self.objective = objective or ObjectiveConfig()

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """Loss of the part, and its sums (7,): the terms, then what is worth watching, without gradient."""
        batch, labels, counts = part.batch, part.labels, part.counts
        zero = counts.new_zeros((), dtype=torch.float32)
        if self.touch_all or batch is None:
            zero = torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0
        if batch is None or labels is None:
            return zero, zero.detach().expand(len(TERMS) + 1).clone()
        sums, watched = loss_sums(self.matcher, batch, labels, self.config, self.objective)
        weights = sums.new_tensor(term_weights(self.config, self.objective)) / counts.clamp_min(1).to(sums)
        # A term of weight zero must not carry its infinities into the loss.
        loss = torch.where(weights > 0, sums * weights, 0).sum() + zero
        return loss, torch.cat([sums.detach(), watched[None].to(sums)])


def _window_sums(
    matcher: EfficientLoFTR,
    sides: tuple[Features, Features],
    cells: CoarseOutput,
    labels: Labels,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Sums of the pixel and sub-pixel losses; zero where the fine stage is not trained."""
    if labels.windows is None or labels.targets is None:
        zero = cells.coarse0.new_zeros(())
        return zero, zero
    fine = matcher.fine_features(*sides, cells)
    return window_losses(
        *fine,
        labels.windows,
        labels.targets,
        matcher.config,
        divergence=config.subpixel_divergence,
        reduction="sum",
    )


def _rewarded(batch: TrainingBatch, objective: ObjectiveConfig) -> Tensor:
    """(B,) bool: pairs of images that the reward is of."""
    if objective.kind == "homography_reward":
        return batch.kinds == HOMOGRAPHY
    if objective.kind == "pose_reward":
        return (batch.kinds == DEPTH) | (batch.kinds == POSE)
    return torch.full_like(batch.kinds, objective.kind == "support", dtype=torch.bool)


def _reward_sums(
    matcher: EfficientLoFTR,
    batch: TrainingBatch,
    sides: tuple[Features, Features],
    cells: CoarseOutput,
    objective: ObjectiveConfig,
) -> RewardLoss:
    """The loss of the drawn matches, by the reward that is configured; pairs without its label get none."""
    size_hw = (batch.image0.shape[-2], batch.image0.shape[-1])
    truth = {"H_0to1": batch.H_0to1, "T_0to1": batch.T_0to1, "K0": batch.K0, "K1": batch.K1}
    reward, geometry = reward_of_kind(objective, size_hw=size_hw, **truth)
    known = _rewarded(batch, objective)

    def of_known(found: Candidates) -> Tensor:
        return reward(found) * known[found.pairs]

    seeds = batch.seeds.to(known.device)
    return reward_of_stages(matcher, sides, cells, of_known, geometry, objective, seeds)


def _geometric_sums(
    matches: Matches, batch: TrainingBatch, config: LossConfig, trust: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums of the end-to-end losses, each over the pairs that it has the truth of.

    With rewards, each pair counts by its own: where no draw leads to a model, the gradient through the matches
    is that of wrong ones.
    """
    flat = batch.kinds == HOMOGRAPHY
    homography = pose = matches.confidence.new_zeros(())
    height, width = batch.image0.shape[-2:]
    share: Tensor | float = 1.0 if trust is None else trust
    if config.homography_weight > 0:
        result = homography_objective_of_matches(matches, (height, width), batch.H_0to1, config.end_to_end)
        homography = torch.where(flat, result.per_pair * share, 0).sum()
    if config.pose_weight > 0:
        result = pose_objective_of_matches(matches, batch.K0, batch.K1, batch.T_0to1, config.end_to_end)
        pose = torch.where(flat, 0, result.per_pair * share).sum()
    return homography, pose


def _predicted_pairs(matcher: EfficientLoFTR, batch: TrainingBatch) -> CoarsePairs:
    """What the matcher matches now, in evaluation mode, in which pairs do not depend on each other."""
    with evaluation_mode(matcher):
        features0, features1 = matcher.extract_pair(matcher.check_input(batch.matcher_input()))
        masks = features0.coarse_mask, features1.coarse_mask
        cells = match_cells(*matcher.transform(features0, features1), *masks, matcher.config)
        matches = select_matches(cells, matcher.config)
    return CoarsePairs(matches.batch, matches.cells0, matches.cells1)


def _padded_windows(batch: TrainingBatch, true: CoarsePairs, predicted: CoarsePairs, config: LossConfig) -> CoarsePairs:
    """Ground-truth padding of each pair of images with its share of the windows."""
    share = max(1, config.windows // batch.joined)
    least = min(share, round(config.least_true * share))
    parts = []
    for index, (seed, kind) in enumerate(zip(batch.seeds.tolist(), batch.kinds.tolist(), strict=True)):
        if kind != POSE:
            own = [_chosen(pairs, pairs.batch == index) for pairs in (predicted, true)]
            parts.append(pad_with_true_pairs(own[0], own[1], share, least, torch.Generator().manual_seed(seed)))
    if not parts:
        return _chosen(true, true.batch < 0)
    return CoarsePairs(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _valid_cells(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H, W) bool pixels -> (B, h, w) bool cells; those that complete the image are not valid."""
    cells = valid[:, ::8, ::8]
    return nn.functional.pad(cells, (0, grid[1] - cells.shape[2], 0, grid[0] - cells.shape[1]))


def _chosen(pairs: CoarsePairs, which: Tensor) -> CoarsePairs:
    return CoarsePairs(*(field[which] for field in pairs))
