# SPDX-License-Identifier: Apache-2.0
"""Coarse matching: streaming dual softmax, then the selection of mutual nearest cells.

``select_matches`` is one of the two places where gradients stop: indices have none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels import dual_softmax_best, dual_softmax_lse, mutual_best, pair_scores
from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.types import CoarseMatches, CoarseOutput, CoarseScores, NearestCells

_ROUNDING = 1e-2  # far above the rounding of a score; what lies within is decided by the reported confidence


def score_cells(
    coarse0: Tensor,
    coarse1: Tensor,
    mask0: Tensor | None,
    mask1: Tensor | None,
    config: EfficientLoFTRConfig,
    product_dtype: torch.dtype | None = None,
) -> CoarseOutput:
    """Score all pairs of cells by dual softmax, in O(B (L + S) C) memory (section 3.3); ``nearest`` is None.

    Args:
        coarse0: (B, C, h0, w0) transformer output.
        coarse1: (B, C, h1, w1).
        mask0: (B, h0, w0) bool.
        mask1: (B, h1, w1) bool.
        config: score kind and temperature.
        product_dtype: as for ``eloftr_kernels.dual_softmax_lse``.
    """
    cells = _cells(coarse0, coarse1, mask0, mask1, config, product_dtype)
    normalisers = dual_softmax_lse(**cells) if config.score == "dual_softmax" else (None, None)
    scores = CoarseScores(cells["features0"], cells["features1"], *normalisers)
    return CoarseOutput(coarse0, coarse1, mask0, mask1, scores, None)


def match_cells(
    coarse0: Tensor,
    coarse1: Tensor,
    mask0: Tensor | None,
    mask1: Tensor | None,
    config: EfficientLoFTRConfig,
    product_dtype: torch.dtype | None = None,
) -> CoarseOutput:
    """As :func:`score_cells`, with the nearest cell of every cell that has one above ``config.threshold``.

    The nearest cells have no gradient.
    """
    cells = _cells(coarse0, coarse1, mask0, mask1, config, product_dtype)
    features = cells["features0"], cells["features1"]
    if config.score == "similarity":
        scores, nearest = CoarseScores(*features, None, None), NearestCells(*mutual_best(**cells))
    else:
        row_lse, col_lse, *best = dual_softmax_best(threshold=config.threshold, **cells)
        scores, nearest = CoarseScores(*features, row_lse, col_lse), NearestCells(*best)
    return CoarseOutput(coarse0, coarse1, mask0, mask1, scores, nearest)


def select_matches(coarse: CoarseOutput, config: EfficientLoFTRConfig) -> CoarseMatches:
    """Pairs of cells that are each other's nearest, score above the threshold and lie off the border.

    Indices carry no gradient; ``confidence`` is computed for the selected pairs alone and does. The threshold holds
    for the confidence as it is returned. No match gives empty tensors.

    Args:
        coarse: of :func:`match_cells`.
        config: threshold, border, score kind.

    Raises:
        ValueError: ``coarse`` without nearest cells, as :func:`score_cells` gives it.
    """
    nearest = nearest_of(coarse)
    batch, cells0 = mutual_nearest(coarse, config).nonzero(as_tuple=True)
    cells1 = nearest.nearest01[batch, cells0]
    confidence = pair_confidence(coarse.scores, batch, cells0, cells1, config)
    passed = above_threshold(confidence, config)
    return CoarseMatches(batch[passed], cells0[passed], cells1[passed], confidence[passed])


def select_fixed(coarse: CoarseOutput, config: EfficientLoFTRConfig, count: int | None) -> tuple[CoarseMatches, Tensor]:
    """As :func:`select_matches` with fixed shapes: the ``count`` pairs of cells with the highest scores of each pair.

    Scores in descending order; of equal scores the cell of image 0 with the lower index comes first. Without ``count``
    there is a row for every cell of image 0, in their order. Nothing here waits for a device or branches on values.

    Returns:
        B * count matches, those of a pair together; and (B, count) bool, false for rows without a match, whose cells
        are (0, 0).
    """
    nearest, valid = nearest_of(coarse), mutual_nearest(coarse, config)
    if count is None:
        cells0 = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    else:
        top, cells0 = _descending(torch.where(valid, nearest.score01, -torch.inf), count)
        valid = top > -torch.inf
    cells0 = cells0 * valid
    cells1 = nearest.nearest01.gather(1, cells0) * valid
    batch = torch.arange(valid.shape[0], device=valid.device)[:, None].expand_as(cells0).flatten()
    cells0, cells1 = cells0.flatten(), cells1.flatten()
    confidence = pair_confidence(coarse.scores, batch, cells0, cells1, config)
    valid = valid & above_threshold(confidence, config).view_as(valid)
    return CoarseMatches(batch, cells0, cells1, confidence), valid


def _descending(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest values of each row and their indices, the first of equals first.

    Exported graphs have no stable sort. They get TopK, which ONNX defines with the same order.
    """
    if torch.compiler.is_exporting():
        values, indices = score.topk(count, 1)
        return values, indices
    values, indices = score.sort(stable=True, dim=1, descending=True)
    return values[:, :count], indices[:, :count]


def above_threshold(confidence: Tensor, config: EfficientLoFTRConfig) -> Tensor:
    """Bool of the shape of ``confidence``; a probability passes the threshold zero even where it is rounded to zero."""
    if config.score == "dual_softmax" and config.threshold == 0:
        return torch.ones_like(confidence, dtype=torch.bool)
    return confidence.detach() > config.threshold


def mutual_nearest(coarse: CoarseOutput, config: EfficientLoFTRConfig) -> Tensor:
    """(B, L) bool: cells of image 0 whose nearest cell has them as its nearest, and neither lies at a border."""
    nearest = nearest_of(coarse)
    batch_size, cells = nearest.nearest01.shape
    device = nearest.nearest01.device
    interior0 = interior_cells(coarse.grid0, coarse.mask0, config.border_removal, device)
    interior1 = interior_cells(coarse.grid1, coarse.mask1, config.border_removal, device)
    return (
        (nearest.nearest10.gather(1, nearest.nearest01) == torch.arange(cells, device=device))
        & (nearest.score01 > _least_score(config))
        & interior0
        & interior1.expand(batch_size, -1).gather(1, nearest.nearest01)
    )


def nearest_of(coarse: CoarseOutput) -> NearestCells:
    """The nearest cells of a coarse output.

    Raises:
        ValueError: there are none.
    """
    if coarse.nearest is None:
        raise ValueError("coarse: expected the output of match_cells, got that of score_cells.")
    return coarse.nearest


def _least_score(config: EfficientLoFTRConfig) -> float:
    """A score that every accepted pair exceeds: a little below the threshold, to leave rounding to the last check."""
    if config.score == "similarity":
        return config.threshold - _ROUNDING * abs(config.threshold)
    return math.log(config.threshold) - _ROUNDING if config.threshold > 0 else -math.inf


def pair_confidence(
    scores: CoarseScores, batch: Tensor, cells0: Tensor, cells1: Tensor, config: EfficientLoFTRConfig
) -> Tensor:
    """(M,) confidence of given pairs: dual-softmax probability, or the raw similarity. Differentiable."""
    score = pair_scores(
        scores.features0,
        scores.features1,
        config.temperature,
        batch,
        cells0,
        cells1,
        scores.row_lse,
        scores.col_lse,
    )
    # Rounding can lift the logarithm of a certain match above zero
    return score.clamp(max=0).exp() if config.score == "dual_softmax" else score


def interior_cells(grid: tuple[int, int], mask: Tensor | None, border: int, device: torch.device) -> Tensor:
    """(1 or B, h * w) bool: cells with nothing but valid cells within ``border`` of them, the outside being invalid."""
    valid = torch.ones((1, *grid), device=device) if mask is None else mask.float()
    border = min(border, max(grid))  # more leaves no cell either
    padded = -F.pad(valid, [border] * 4)[:, None]
    for sides in ((2 * border + 1, 1), (1, 2 * border + 1)):  # one axis after the other: linear in the border
        padded = F.max_pool2d(padded, sides, stride=1)
    return (-padded[:, 0] > 0).flatten(1)


def _cells(
    coarse0: Tensor,
    coarse1: Tensor,
    mask0: Tensor | None,
    mask1: Tensor | None,
    config: EfficientLoFTRConfig,
    product_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The arguments that all ops on pairs of cells share."""
    features0, features1 = (x.flatten(2).mT / math.sqrt(config.coarse_channels) for x in (coarse0, coarse1))
    masks = [None if mask is None else mask.flatten(1) for mask in (mask0, mask1)]
    return {
        "features0": features0,
        "features1": features1,
        "temperature": config.temperature,
        "mask0": masks[0],
        "mask1": masks[1],
        "product_dtype": product_dtype,
    }
