# SPDX-License-Identifier: Apache-2.0
"""Normalisers and best partners from one pass over the scores, for matches above a threshold."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_kernels.arithmetic import accumulation_dtype, two_way_logsumexp
from eloftr_kernels.dual_softmax.reference import MASKED, block_memory, score_blocks

LEAST_THRESHOLD = 0.01  # below it a row may have more candidates than are worth a list
_SLACK = 1e-2, 1e-5  # of a logarithm, absolute and relative: far above rounding


class Candidates(NamedTuple):
    """Pairs of cells that may score above the threshold, ordered by cell of image 0, then of image 1."""

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

    A row has at most :math:`1/\theta` such pairs, and its normaliser is known when its block of scores is. They are
    noted, and weighed against each other when the columns' normalisers are known too: a better partner of either cell
    of a pair above the threshold is above it itself.

    Returns:
        ``row_lse`` (B, L), ``col_lse`` (B, S), ``best1`` (B, L), ``best0`` (B, S), ``score1`` (B, L). A cell with no
        pair above the threshold has partner 0 and score -inf, or a pair that is no better than the threshold.
    """
    features0, features1 = accumulation_dtype(features0), accumulation_dtype(features1)
    row_lse = features0.new_empty(features0.shape[:2])
    col_lse = features1.new_full(features1.shape[:2], -torch.inf)
    held, scratch = block_memory(features0, features1), block_memory(features0, features1)
    found: list[Candidates] = []
    with torch.autocast(features0.device.type, enabled=False):
        for rows, scores, _ in score_blocks(features0, features1, temperature, mask0, mask1, held):
            groups = scores.unflatten(2, (-1, math.gcd(scores.shape[2], 64)))
            tops = groups.amax(3)
            row_lse[:, rows], block_col = two_way_logsumexp(
                scores, scratch.view(*scores.shape), tops.amax(2, keepdim=True)
            )
            col_lse = torch.logaddexp(col_lse, block_col)
            found.append(_candidates(groups, tops, row_lse[:, rows], threshold, rows.start))
    candidates = Candidates(*(torch.cat(field) for field in zip(*found, strict=True)))
    return row_lse, col_lse, *_best(candidates, row_lse, col_lse)


def _candidates(
    groups: Tensor,  # (B, R, G, K) scores
    tops: Tensor,  # (B, R, G) largest of each group
    row_lse: Tensor,  # (B, R)
    threshold: float,
    first_row: int,
) -> Candidates:
    """Pairs whose probability in their row is above the threshold, found by way of the groups that hold any."""
    least = row_lse + math.log(threshold) - _SLACK[0] - _SLACK[1] * row_lse.abs()
    least = least.masked_fill(
        row_lse < MASKED / 2, torch.inf
    )  # a masked cell, or one with masked cells alone
    batch, row, group = (tops >= least[..., None]).nonzero(as_tuple=True)
    members = groups[batch, row, group]
    of, member = (members >= least[batch, row][:, None]).nonzero(as_tuple=True)
    return Candidates(
        batch[of], row[of] + first_row, group[of] * groups.shape[3] + member, members[of, member]
    )


def _best(candidates: Candidates, row_lse: Tensor, col_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, cells0, cells1, scores = candidates
    # In the steps of ``mutual_best``, for the same bits.
    scores = 2 * (scores - row_lse[batch, cells0] / 2 - col_lse[batch, cells1] / 2)
    best1, score1 = _first_best(batch * row_lse.shape[1] + cells0, cells1, scores, row_lse)
    best0, _ = _first_best(batch * col_lse.shape[1] + cells1, cells0, scores, col_lse)
    return best1, best0, score1


def _first_best(owners: Tensor, partners: Tensor, scores: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The partner of each owner with the highest score, of equals the first, and the score; shape of ``like``."""
    highest = like.new_full((like.numel(),), -torch.inf).scatter_reduce_(0, owners, scores, "amax")
    reached = scores == highest[owners]
    best = torch.zeros(like.numel(), dtype=torch.int64, device=like.device)
    best.scatter_reduce_(0, owners[reached], partners[reached], "amin", include_self=False)
    return best.view_as(like), highest.view_as(like)
