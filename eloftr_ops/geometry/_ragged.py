# SPDX-License-Identifier: Apache-2.0
"""From M matches of B pairs to a padded batch and back."""

from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._linalg import work_dtype


class PaddedMatches(NamedTuple):
    """Matches as a batch; rows beyond a pair's own matches have weight 0 and coordinates 0."""

    points0: Tensor  # (B, N, 2), work dtype
    points1: Tensor  # (B, N, 2)
    weights: Tensor  # (B, N), non-negative
    slots: Tensor  # (M,), place of each match in the flattened (B * N)
    eps: float  # machine epsilon of the dtype the coordinates came in

    def gather(self, values: Tensor) -> Tensor:
        """Values `(B, N)` of the padded batch, as `(M,)` in the order of the matches."""
        return values.flatten()[self.slots]


def canonical_order(index: Tensor, points0: Tensor, points1: Tensor, weights: Tensor | None = None) -> Tensor:
    """Order of matches by pair, then by coordinates and weight, whatever order they came in.

    Sums and samples that follow it do not depend on the order of the matches. Matches that tie are equal.
    """
    keys = [*points0.detach().unbind(1), *points1.detach().unbind(1)]
    keys += [] if weights is None else [weights.detach()]
    order = torch.arange(index.shape[0], device=index.device)
    for key in [*reversed(keys), index]:
        order = order[torch.argsort(key[order], stable=True)]
    return order


def pad_matches(
    keypoints0: Tensor, keypoints1: Tensor, batch_indexes: Tensor, batch_size: int, weights: Tensor | None
) -> PaddedMatches:
    """Lay matches out as one row per pair, in the work dtype; the gradient flows through.

    Args:
        keypoints0: `(M, 2)`.
        keypoints1: `(M, 2)`.
        batch_indexes: `(M,)`, in any order.
        batch_size: B.
        weights: `(M,)` or None for ones.

    Returns:
        A batch of N columns, N the largest number of matches of a pair and at least 1.
    """
    work = work_dtype(keypoints0.device)
    index = batch_indexes.long()
    counts = torch.bincount(index, minlength=batch_size)
    order = canonical_order(index, keypoints0, keypoints1, weights)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(index)
    rank[order] = torch.arange(index.shape[0], device=index.device) - starts[index[order]]
    columns = max(int(counts.max()), 1)
    slots = index * columns + rank

    def laid_out(values: Tensor) -> Tensor:
        empty = torch.zeros((batch_size * columns, *values.shape[1:]), dtype=work, device=values.device)
        return empty.index_copy(0, slots, values.to(work)).view(batch_size, columns, *values.shape[1:])

    weights = torch.ones_like(keypoints0[:, 0]) if weights is None else weights
    eps = max(torch.finfo(keypoints0.dtype).eps, torch.finfo(keypoints1.dtype).eps)
    return PaddedMatches(laid_out(keypoints0), laid_out(keypoints1), laid_out(weights), slots, eps)
