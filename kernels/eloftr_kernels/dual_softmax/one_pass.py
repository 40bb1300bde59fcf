# SPDX-License-Identifier: Apache-2.0
"""Normalisers and best partners from one pass over the scores, for matches above a threshold."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_kernels.arithmetic import tie_margin, upcast_for_accumulation
from eloftr_kernels.dual_softmax.cpu import (
    Block,
    add_block,
    block_memory,
    mutual_best,
    score_blocks,
)
from eloftr_kernels.dual_softmax.naive import MASKED

# Beyond these a second pass is sooner, and needs less memory.
MOST_CANDIDATES = 32  # per cell of image 0
MOST_GROUPS = 0.5  # of a block, that hold any
_SLACK = 1e-2, 1e-5  # of a logarithm, absolute and relative: far above rounding


class Candidates(NamedTuple):
    """Pairs of cells that may score above the threshold."""

    batch: Tensor  # (K,) int64
    cells0: Tensor  # (K,) int64
    cells1: Tensor  # (K,) int64
    scores: Tensor  # (K,)


@torch.no_grad()
def dual_softmax_best(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    threshold: float,
    mask0: Tensor | None = None,  # (B, L) bool
    mask1: Tensor | None = None,  # (B, S) bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""What ``dual_softmax_lse`` and ``mutual_best`` give, with half of their products; no gradient.

    The confidence of a pair is a product of two probabilities, that of :math:`j` in row :math:`i` and that of :math:`i`
    in column :math:`j`. Above a threshold :math:`\theta` it needs both above it:

    .. math:: P_{ij} = e^{s_{ij} - r_i}\, e^{s_{ij} - c_j} > \theta \;\Rightarrow\; s_{ij} > r_i + \log\theta.

    A row has at most :math:`1/\theta` such pairs. Of both normalisers a part is known with each block of scores, which
    is never more than the whole: pairs that are above the threshold by what is known are noted, and weighed against
    each other when all is known. A better partner of either cell of a pair above the threshold is above it itself, and
    noted.

    Should the pairs become too many, as with a tiny threshold where cells are alike, there is a second pass.

    Args:
        features0: as all arguments, for ``dual_softmax_lse``.
        features1: with a cell at least, like ``features0``.
        temperature: positive.
        threshold: positive.
        mask0: None for no mask.
        mask1: None for no mask.

    Returns:
        ``row_lse`` (B, L), ``col_lse`` (B, S), ``best1`` (B, L), ``best0`` (B, S), ``score1`` (B, L). A cell with no
        pair above the threshold has partner 0 and score -inf, or a pair that is no better than the threshold.
    """
    features0, features1 = upcast_for_accumulation(features0), upcast_for_accumulation(features1)
    row_lse = features0.new_full(features0.shape[:2], -torch.inf)
    col_lse = features1.new_full(features1.shape[:2], -torch.inf)
    held, scratch = block_memory(features0, features1), block_memory(features0, features1)
    found: list[Candidates] | None = []
    left = MOST_CANDIDATES * row_lse.numel()
    with torch.autocast(features0.device.type, enabled=False):
        for block in score_blocks(features0, features1, temperature, mask0, mask1, held):
            groups = block.scores.unflatten(2, (-1, math.gcd(block.scores.shape[2], 64)))
            tops = groups.amax(3)
            add_block(row_lse, col_lse, block, scratch, tops.amax(2, keepdim=True))
            if found is not None:
                some = _candidates(block, groups, tops, row_lse, col_lse, math.log(threshold))
                left -= left + 1 if some is None else len(some.scores)
                found = None if some is None or left < 0 else [*found, some]
    if found is None:
        lse = row_lse, col_lse
        return *lse, *mutual_best(features0, features1, temperature, *lse, mask0, mask1)
    candidates = Candidates(*(torch.cat(field) for field in zip(*found, strict=True)))
    return row_lse, col_lse, *_best(candidates, row_lse, col_lse)


def _candidates(
    block: Block,
    groups: Tensor,  # (B, R, G, K) its scores
    tops: Tensor,  # (B, R, G) largest of each group
    row_lse: Tensor,  # (B, L) of the blocks so far
    col_lse: Tensor,  # (B, S)
    log_threshold: float,
) -> Candidates | None:
    """Pairs that are above the threshold so far, found by way of the groups that hold any; None for too many groups."""
    own = row_lse[:, block.rows]
    slack = _SLACK[0] + _SLACK[1] * own.abs()
    # A masked cell, or one that has seen masked cells alone, has no candidates.
    least = (own + log_threshold - slack).masked_fill(own < MASKED / 2, torch.inf)
    others = col_lse[:, block.columns].unflatten(1, groups.shape[2:])
    # At most what a pair of the group could have: its probability in its row, and the confidence.
    most = torch.minimum(tops, 2 * tops - others.amin(2)[:, None])
    batch, row, group = (most >= least[..., None]).nonzero(as_tuple=True)
    if len(group) > MOST_GROUPS * tops.numel():
        return None
    members = groups[batch, row, group]
    of, member = (2 * members - others[batch, group] >= least[batch, row][:, None]).nonzero(as_tuple=True)
    cells0, cells1 = row[of] + block.rows.start, group[of] * groups.shape[3] + member + block.columns.start
    return Candidates(batch[of], cells0, cells1, members[of, member])


def _best(candidates: Candidates, row_lse: Tensor, col_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, cells0, cells1, scores = candidates
    # In the steps of ``mutual_best``, for the same bits.
    scores = 2 * (scores - row_lse[batch, cells0] / 2 - col_lse[batch, cells1] / 2)
    best1, score1 = _first_best(batch * row_lse.shape[1] + cells0, cells1, scores, row_lse)
    best0, _ = _first_best(batch * col_lse.shape[1] + cells1, cells0, scores, col_lse)
    return best1, best0, score1


def _first_best(owners: Tensor, partners: Tensor, scores: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The partner of each owner with the highest score, of ties the first, and the score; shape of ``lse``."""
    highest = lse.new_full((lse.numel(),), -torch.inf).scatter_reduce_(0, owners, scores, "amax")
    reached = scores >= (highest - tie_margin(2 * lse.flatten()))[owners]
    best = torch.zeros(lse.numel(), dtype=torch.int64, device=lse.device)
    best.scatter_reduce_(0, owners[reached], partners[reached], "amin", include_self=False)
    return best.view_as(lse), highest.view_as(lse)
