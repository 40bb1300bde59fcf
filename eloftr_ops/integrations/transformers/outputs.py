# SPDX-License-Identifier: Apache-2.0
"""What the models return: transformers' output class and its fields."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

__all__ = ["EfficientLoFTRKeypointMatchingOutput"]


@dataclass
class EfficientLoFTRKeypointMatchingOutput(ModelOutput):
    """Matches of a batch of B pairs; M is the largest number of matches of a pair.

    Convention:
        Keypoint k of image 0 is matched with keypoint k of image 1. A pair with fewer than M matches is filled up:
        there ``matches`` is -1, and keypoints and scores are 0.

    Args:
        loss: scalar, where labels were given.
        matches: (B, 2, M) int64, index of the matched keypoint in the other image; -1 for none.
        matching_scores: (B, 2, M), confidence of the match, the same on both sides.
        keypoints: (B, 2, M, 2), (x / width, y / height) of the images as the model got them. The centre of pixel
            (x, y) is (x + 0.5, y + 0.5), so that 0 and 1 are the borders of the image.
        hidden_states: the map after each block of the backbone, (2 B, C, h, w), images of a pair side by side.
        attentions: attention weights, per layer: within the images (2 B, heads, N, N), then of image 0 to image 1,
            then of image 1 to image 0, both (B, heads, N, N).
    """

    loss: Tensor | None = None
    matches: Tensor | None = None
    matching_scores: Tensor | None = None
    keypoints: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def packed_matches(matches: dict[str, Tensor], batch: int, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The matcher's dictionary as ``matches``, ``matching_scores`` and ``keypoints`` of the output class."""
    owner, scores = matches["batch_indexes"], matches["confidence"]
    counts = owner.bincount(minlength=batch)
    longest = int(counts.max()) if batch else 0
    first = counts.cumsum(0) - counts
    place = torch.arange(len(owner), device=owner.device) - first[owner]
    size = scores.new_tensor([size_hw[1], size_hw[0]])
    both = torch.stack([matches["keypoints0"], matches["keypoints1"]], 1) / size  # (total, 2, 2)
    keypoints = both.new_zeros(batch, longest, 2, 2).index_put((owner, place), both)
    padded = scores.new_zeros(batch, longest).index_put((owner, place), scores)
    index = owner.new_full((batch, longest), -1).index_put((owner, place), place)
    return (
        index[:, None].repeat(1, 2, 1),
        padded[:, None].expand(-1, 2, -1).contiguous(),
        keypoints.transpose(1, 2).contiguous(),
    )
