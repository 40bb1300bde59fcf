# SPDX-License-Identifier: Apache-2.0
"""From M matches of B pairs to padded batches and back."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._covariances import Covariances, symmetrised
from eloftr_ops.geometry._linalg import extreme_unit, power_of_two
from eloftr_ops.geometry._precision import to_work, work_device

# Pairs with at most this many matches share one padded batch whatever their numbers.
SMALL_PAIR = 64


class Matches(NamedTuple):
    """Checked matches of B pairs, as the user passed them."""

    keypoints0: Tensor  # (M, 2)
    keypoints1: Tensor  # (M, 2)
    batch_indexes: Tensor  # (M,)
    batch_size: int
    weights: Tensor | None  # (M,)
    covariances: Covariances | None = None  # (M, 2, 2) each

    def of_rows(self, rows: Tensor, batch_indexes: Tensor, batch_size: int) -> "Matches":
        """Return some of the matches, with new batch indexes."""
        keypoints0, keypoints1 = (x[rows.to(x.device)] for x in (self.keypoints0, self.keypoints1))
        weights = None if self.weights is None else self.weights[rows.to(self.weights.device)]
        covariances = None if self.covariances is None else self.covariances.map(lambda x: x[rows.to(x.device)])
        return Matches(keypoints0, keypoints1, batch_indexes, batch_size, weights, covariances)


class PaddedMatches(NamedTuple):
    """Matches as a batch; rows beyond a pair's own matches have weight 0 and coordinates 0."""

    points0: Tensor  # (B, N, 2) float64, in units of unit0
    points1: Tensor  # (B, N, 2), in units of unit1
    weights: Tensor  # (B, N), non-negative, at most 2
    slots: Tensor  # (M,), place of each match in the flattened (B * N)
    eps: float  # machine epsilon of the dtype the coordinates came in
    unit0: Tensor  # (B,), pixels; 1 for coordinates of ordinary magnitude
    unit1: Tensor  # (B,)
    covariances: Covariances | None = None  # in squares of these units; the identity beyond a pair's own matches

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


def pad_matches(matches: Matches, *, one_unit: bool = False) -> PaddedMatches:
    """Lay matches out as one row per pair, in float64 and in canonical order; the gradient flows through.

    Args:
        matches: checked matches.
        one_unit: scale both images of a pair by the same power of two, not each by its own.

    Returns:
        A batch of N columns, N the largest number of matches of a pair and at least 1. Weights are divided by
        a power of two per pair, which changes no ratio.
    """
    keypoints0, keypoints1 = to_work(matches.keypoints0), to_work(matches.keypoints1)
    weights = torch.ones_like(keypoints0[:, 0]) if matches.weights is None else to_work(matches.weights)
    batch_size, index = matches.batch_size, matches.batch_indexes.to(keypoints0.device).long()
    weights = weights.to(keypoints0.device)
    counts = torch.bincount(index, minlength=batch_size)
    order = canonical_order(index, keypoints0, keypoints1, weights)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(index)
    rank[order] = torch.arange(index.shape[0], device=index.device) - starts[index[order]]
    columns = max(int(counts.max()), 1)
    slots = index * columns + rank

    def laid_out(values: Tensor, beyond: Tensor | float = 0.0) -> Tensor:
        empty = values.new_zeros((batch_size * columns, *values.shape[1:])) + beyond
        return empty.index_copy(0, slots, values).view(batch_size, columns, *values.shape[1:])

    eps = max(torch.finfo(x.dtype).eps for x in (matches.keypoints0, matches.keypoints1))
    points0, points1, shares = laid_out(keypoints0), laid_out(keypoints1), laid_out(weights)
    unit0, unit1 = extreme_unit(points0, (1, 2)), extreme_unit(points1, (1, 2))
    if one_unit:
        unit0 = unit1 = torch.maximum(unit0, unit1)
    shares = shares / power_of_two(shares, (1,))
    covariances = None
    if matches.covariances is not None:
        eye = torch.eye(2, dtype=points0.dtype, device=points0.device)
        units = (unit0[..., None], unit1[..., None])
        covariances = Covariances(
            *(
                None if x is None else laid_out(symmetrised(x).to(eye.device), eye) / unit / unit
                for x, unit in zip(matches.covariances, units, strict=True)
            )
        )
    frame = (unit0[:, 0, 0], unit1[:, 0, 0])
    return PaddedMatches(points0 / unit0, points1 / unit1, shares, slots, eps, *frame, covariances)


def solve_in_pieces(
    matches: Matches,
    solve: Callable[[PaddedMatches, Tensor], tuple[Tensor, ...]],
    *,
    one_unit: bool = False,
) -> list[Tensor]:
    """Solve pairs of about equal length together, so that a long pair does not make the others long.

    Args:
        matches: checked matches.
        solve: padded matches and the pairs `(P,)` they belong to, to results `(P, ...)`, the last of which is
            `(P, N)`, one value per match.
        one_unit: see `pad_matches`.

    Returns:
        The results `(B, ...)`, the last one `(M,)` in the order of the matches.
    """
    index = matches.batch_indexes.to(work_device(matches.keypoints0.device)).long()
    pieces = _pieces(torch.bincount(index, minlength=matches.batch_size))
    if len(pieces) == 1:
        padded = pad_matches(matches, one_unit=one_unit)
        *per_pair, per_match = solve(padded, pieces[0])
        return [*per_pair, padded.gather(per_match)]
    results, rows_of_pieces = [], []
    for pairs in pieces:
        position = torch.full((matches.batch_size,), -1, device=index.device)
        position[pairs] = torch.arange(pairs.shape[0], device=index.device)
        rows = (position[index] >= 0).nonzero()[:, 0]
        padded = pad_matches(matches.of_rows(rows, position[index[rows]], pairs.shape[0]), one_unit=one_unit)
        *per_pair, per_match = solve(padded, pairs)
        results.append([*per_pair, padded.gather(per_match)])
        rows_of_pieces.append(rows)
    to_pairs, to_rows = torch.argsort(torch.cat(pieces)), torch.argsort(torch.cat(rows_of_pieces))
    joined = [torch.cat(parts) for parts in zip(*results, strict=True)]
    return [*(field[to_pairs] for field in joined[:-1]), joined[-1][to_rows]]


def _pieces(counts: Tensor) -> list[Tensor]:
    """Pairs grouped by length, each group at most twice as long as its shortest; one group where that is cheap."""
    pairs = torch.arange(counts.shape[0], device=counts.device)
    padded, present = counts.shape[0] * int(counts.max()), int(counts.sum())
    if padded <= 2 * present + SMALL_PAIR * counts.shape[0]:
        return [pairs]
    length = torch.frexp(counts.clamp_min(SMALL_PAIR).double() - 0.5)[1]
    return [pairs[length == step] for step in length.unique().tolist()]
