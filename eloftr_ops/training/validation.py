# SPDX-License-Identifier: Apache-2.0
"""Precision of the matches on rendered pairs of known homography."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from kornia.geometry import transform_points

from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.training.batches import TrainingBatch
from eloftr_ops.training.optimization import evaluation_mode
from eloftr_ops.types import Matches


class Validation(NamedTuple):
    """Means over the pairs; a match is right within so many pixels of image 1."""

    matches: float  # per pair
    right_1px: float  # per pair
    right_3px: float  # per pair

    @property
    def precision_1px(self) -> float:
        """Share of the matches; 0 if there are none."""
        return self.right_1px / max(self.matches, 1e-12)

    @property
    def precision_3px(self) -> float:
        """Share of the matches; 0 if there are none."""
        return self.right_3px / max(self.matches, 1e-12)

    @property
    def score(self) -> float:
        """What weights are chosen by: right matches (3 px) per pair, times their share."""
        return self.right_3px * self.precision_3px


@torch.no_grad()
def validate(matcher: EfficientLoFTR, batches: Iterable[TrainingBatch]) -> Validation:
    """Match pairs of known homography as at inference: ``hard`` positions, in evaluation mode.

    Args:
        matcher: left in the mode that it was in.
        batches: with ``H_0to1``, on any device.
    """
    device = next(matcher.parameters()).device
    pairs = total = right_1px = right_3px = 0
    with evaluation_mode(matcher):
        for batch in batches:
            data = {name: value.to(device) for name, value in batch.matcher_input().items()}
            matches = Matches(**matcher(data, mode="hard"))
            pairs += len(batch.kinds)
            total += len(matches.confidence)
            keypoints0, keypoints1, index = (
                x.cpu() for x in (matches.keypoints0, matches.keypoints1, matches.batch_indexes)
            )
            H = batch.H_0to1.cpu().double()[index]
            if len(H):
                truth = transform_points(H, keypoints0.double()[:, None])[:, 0]
                error = (truth - keypoints1).norm(dim=-1)
                right_1px += int((error <= 1).sum())
                right_3px += int((error <= 3).sum())
    pairs = max(pairs, 1)
    return Validation(total / pairs, right_1px / pairs, right_3px / pairs)
