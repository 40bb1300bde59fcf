# SPDX-License-Identifier: Apache-2.0
"""Coarse matching: streaming dual softmax, then the selection of mutual best cells.

``select_matches`` is one of the two places where gradients stop by nature: indices have none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels import dual_softmax_best, dual_softmax_lse, mutual_best, pair_scores
from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.types import BestCells, CoarseMatches, CoarseScores


def score_cells(
    coarse0: Tensor,
    coarse1: Tensor,
    mask0: Tensor | None,
    mask1: Tensor | None,
    config: EfficientLoFTRConfig,
) -> CoarseScores:
    """What scoring any pair of cells needs, in O(B (L + S) C) memory (section 3.3).

    Args:
        coarse0: (B, C, h0, w0) transformer output.
        coarse1: (B, C, h1, w1).
        mask0: (B, h0, w0) bool.
        mask1: (B, h1, w1) bool.
        config: score kind and temperature.
    """
    cells = _cells(coarse0, coarse1, mask0, mask1, config)
    normalisers = dual_softmax_lse(**cells) if config.score == "dual_softmax" else (None, None)
    return CoarseScores(cells["features0"], cells["features1"], *normalisers)


def match_cells(
    coarse0: Tensor,
    coarse1: Tensor,
    mask0: Tensor | None,
    mask1: Tensor | None,
    config: EfficientLoFTRConfig,
) -> tuple[CoarseScores, BestCells]:
    """What :func:`score_cells` gives, and the best partner of every cell that has one above ``config.threshold``.

    Arguments as :func:`score_cells`. The best partners have no gradient.
    """
    cells = _cells(coarse0, coarse1, mask0, mask1, config)
    features = cells["features0"], cells["features1"]
    if config.score == "similarity":
        return CoarseScores(*features, None, None), BestCells(*mutual_best(**cells))
    row_lse, col_lse, *best = dual_softmax_best(threshold=config.threshold, **cells)
    return CoarseScores(*features, row_lse, col_lse), BestCells(*best)


def select_matches(
    scores: CoarseScores,
    best: BestCells,
    grid0: tuple[int, int],
    grid1: tuple[int, int],
    mask0: Tensor | None,
    mask1: Tensor | None,
    config: EfficientLoFTRConfig,
) -> CoarseMatches:
    """Pairs of cells that are each other's best, score above the threshold and lie off the border.

    Indices carry no gradient; ``confidence`` is computed for the selected pairs alone and does. No match gives empty
    tensors.

    Args:
        scores: of :func:`match_cells`.
        best: of :func:`match_cells`.
        grid0: (h0, w0).
        grid1: (h1, w1).
        mask0: (B, h0, w0) bool.
        mask1: (B, h1, w1) bool.
        config: threshold, border, score kind.
    """
    batch_size, cells = best.best1.shape
    interior0 = interior_cells(grid0, mask0, config.border_removal, best.best1.device)
    interior1 = interior_cells(grid1, mask1, config.border_removal, best.best1.device)
    own = torch.arange(cells, device=best.best1.device)
    threshold = config.threshold
    if config.score == "dual_softmax":
        threshold = math.log(threshold) if threshold > 0 else -math.inf
    accepted = (
        (best.best0.gather(1, best.best1) == own)
        & (best.score1 > threshold)
        & interior0
        & interior1.expand(batch_size, -1).gather(1, best.best1)
    )
    batch, cells0 = accepted.nonzero(as_tuple=True)
    cells1 = best.best1[batch, cells0]
    return CoarseMatches(batch, cells0, cells1, pair_confidence(scores, batch, cells0, cells1, config))


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
    # rounding can lift the logarithm of a certain match above zero
    return score.clamp(max=0).exp() if config.score == "dual_softmax" else score


def interior_cells(grid: tuple[int, int], mask: Tensor | None, border: int, device: torch.device) -> Tensor:
    """(1 or B, h * w) bool: cells with nothing but valid cells within ``border`` of them, the outside being invalid."""
    valid = torch.ones((1, *grid), device=device) if mask is None else mask.float()
    padded = F.pad(valid, [border] * 4)
    return (-F.max_pool2d(-padded[:, None], 2 * border + 1, stride=1)[:, 0] > 0).flatten(1)


def _cells(
    coarse0: Tensor,
    coarse1: Tensor,
    mask0: Tensor | None,
    mask1: Tensor | None,
    config: EfficientLoFTRConfig,
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
    }
