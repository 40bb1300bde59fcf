# SPDX-License-Identifier: Apache-2.0
"""hloc's way to keypoints that pairs share: rounding to a grid. Here to compare with.

Matches of an image that fall into one cell of ``cell_size`` pixels become one keypoint. It lies where most confidence
is gathered, on a grid of ``max_error`` pixels. With both at 1 this is the plain rounding to whole pixels.

Source: hloc, ``match_dense``; Sarlin, Cadena, Siegwart, Dymczyk, CVPR 2019.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eloftr_ops.errors import ArgumentError
from eloftr_ops.reconstruction.adjustment import Constraints, constraint_errors
from eloftr_ops.reconstruction.field import sample_field
from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.match_table import Array, MatchTable, TablePair, read_table
from eloftr_ops.reconstruction.pairs import Pair
from eloftr_ops.reconstruction.tracks import Indexes, Tracks, components, track_report

__all__ = ["quantised_tracks"]

_REACH = 6.0  # pixels as matched, of the field that errors are told by


class _Cells(NamedTuple):
    """The keypoints of one image."""

    member: Indexes  # (N,) keypoint of each point that was matched
    position: Array  # (K, 2) pixels of the original
    score: Array  # (K,)


def quantised_tracks(
    matches: Iterable[PairMatches], resize: int = 640, *, cell_size: float = 1.0, max_error: float = 1.0
) -> Tracks:
    """One set of keypoints per image by rounding.

    Convention:
        As `eloftr_ops.reconstruction.tracks.build_tracks`; cells and grid are in pixels of the originals, as in hloc.
        The grid's points are whole multiples in the frame where the centre of the first pixel is (0.5, 0.5).

    Args:
        matches: of each pair once.
        resize: as for matching; for the report alone.
        cell_size: side of the cells, at least ``max_error``.
        max_error: side of the grid's squares.

    Returns:
        ``track`` numbers components of matched keypoints; here a track may have two points in one image.

    Raises:
        ArgumentError: sizes that cannot be used.
    """
    if not 0 < max_error <= cell_size:
        raise ArgumentError("cell_size", f"expected at least max_error = {max_error}, got {cell_size}.")
    table = read_table(matches, resize)
    cells = [_rounded(*_original_points(table, image), cell_size, max_error) for image in range(len(table.names))]
    start = np.cumsum([0, *(len(each.position) for each in cells)])
    used = [0] * len(cells)  # members of each image that pairs before took
    pairs: dict[Pair, Indexes] = {}
    errors, edges = [np.zeros(0)], [np.zeros((0, 2), np.int64)]
    for pair in table.pairs:
        ids = []
        for image in pair.images:
            ids.append(cells[image].member[used[image] :][: len(pair.confidence)])
            used[image] += len(pair.confidence)
        rows = _unique_best(np.stack(ids, 1), pair.confidence)
        pairs[pair.pair] = np.stack(ids, 1)[rows]
        edges.append(pairs[pair.pair] + start[list(pair.images)])
        errors.append(_errors(table, pair, rows, cells, pairs[pair.pair]))
    label = components(np.concatenate(edges), int(start[-1]))
    matched = np.unique(np.concatenate(edges))
    return Tracks(
        table.names,
        table.sizes_wh,
        [each.position.astype(np.float32) for each in cells],
        [each.score.astype(np.float32) for each in cells],
        [label[first:last] for first, last in itertools.pairwise(start)],
        pairs,
        track_report(table, np.concatenate(errors), label[matched]),
    )


def _original_points(table: MatchTable, image: int) -> tuple[Array, Array]:
    points, confidence = table.points_of(image)
    return points * table.scales[image], confidence


def _rounded(points: Array, weights: Array, cell_size: float, max_error: float) -> _Cells:
    cells, member = np.unique(np.rint(points / cell_size), axis=0, return_inverse=True)
    member = member.ravel()
    squares = np.column_stack([member, np.rint(points / max_error)])
    bins, inside = np.unique(squares, axis=0, return_inverse=True)
    total = np.bincount(inside.ravel(), weights, len(bins))
    order = np.lexsort([total, bins[:, 0]])
    chosen = order[np.flatnonzero(np.diff(bins[order, 0], append=-1))]  # the heaviest square of each cell
    return _Cells(member, bins[chosen, 1:] * max_error, np.bincount(member, weights, len(cells)).astype(np.float64))


def _unique_best(ids: Indexes, confidence: Array) -> Indexes:
    """Rows of ids (M, 2) that are the surest of both their keypoints."""
    order = np.argsort(-confidence, kind="stable")
    first = [np.unique(ids[order, column], return_index=True)[1] for column in (0, 1)]
    return np.sort(order[np.intersect1d(first[0], first[1])])


def _errors(
    table: MatchTable, pair: TablePair, rows: Indexes, cells: list[_Cells], ids: Indexes
) -> npt.NDArray[np.float64]:
    """(M,) how far keypoints are from each other, by the matches; pixels as matched."""
    i, j = pair.images
    points0, points1 = (points[rows] for points in pair.points)
    field = sample_field(*pair.points, pair.confidence, points0, _REACH)
    positions = np.concatenate(
        [cells[i].position[ids[:, 0]] / table.scales[i], cells[j].position[ids[:, 1]] / table.scales[j]]
    )
    first = np.arange(len(rows))
    ties = Constraints(first, first + len(rows), points0, points1, field.jacobian, pair.confidence[rows])
    errors: npt.NDArray[np.float64] = np.linalg.norm(constraint_errors(ties, positions), axis=1)
    return errors
