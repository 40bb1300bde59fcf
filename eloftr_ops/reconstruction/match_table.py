# SPDX-License-Identifier: Apache-2.0
"""The matches of all pairs, in pixels as matched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.pairs import Pair

__all__ = ["MatchTable", "TablePair", "read_table", "verified"]

Array = npt.NDArray[np.float64]
_LEAST_WEIGHT = 1e-6
_LEAST_MATCHES = 16  # of a pair that is verified


class TablePair(NamedTuple):
    """The matches of a pair; the centre of the first pixel is (0.5, 0.5)."""

    pair: Pair
    images: tuple[int, int]  # numbers of the images
    points: tuple[Array, Array]  # (M, 2) each, pixels as matched
    confidence: Array  # (M,) positive


class MatchTable(NamedTuple):
    """Pairs of N images."""

    names: list[str]  # N, sorted
    sizes_wh: list[tuple[int, int]]  # N, of the originals
    scales: Array  # (N,) pixels of the original per pixel as matched
    pairs: list[TablePair]

    @property
    def total(self) -> int:
        """Matches of all pairs together."""
        return sum(len(pair.confidence) for pair in self.pairs)

    def points_of(self, image: int) -> tuple[Array, Array]:
        """All that was matched in an image: points (K, 2) and confidences (K,)."""
        points, confidence = [np.zeros((0, 2))], [np.zeros(0)]
        for pair in self.pairs:
            for side in (0, 1):
                if pair.images[side] == image:
                    points.append(pair.points[side])
                    confidence.append(pair.confidence)
        return np.concatenate(points), np.concatenate(confidence)


def verified(table: MatchTable, threshold: float) -> MatchTable:
    """The table without matches that the two-view geometry of their pair does not explain.

    Of images with nothing in common, the few matches are left that some geometry explains by chance. Pairs of fewer
    than sixteen matches, which determine none, stay as they are.

    Args:
        table: the matches.
        threshold: largest epipolar error, pixels as matched.
    """
    from eloftr_ops.geometry import estimate_robust  # OpenCV is not loaded for anything else

    pairs = []
    for pair in table.pairs:
        count = len(pair.confidence)
        if count >= _LEAST_MATCHES:
            keypoints0, keypoints1 = (torch.from_numpy(points) for points in pair.points)
            batch = torch.zeros(count, dtype=torch.int64)
            found = estimate_robust(
                keypoints0, keypoints1, batch, batch_size=1, model="fundamental", threshold=threshold
            )
            kept = found.inliers.numpy() & found.valid.item()
            points0, points1 = (points[kept] for points in pair.points)
            pair = pair._replace(points=(points0, points1), confidence=pair.confidence[kept])
        pairs.append(pair)
    return table._replace(pairs=pairs)


def read_table(matches: Iterable[PairMatches], resize: int, least: float = 0.0) -> MatchTable:
    """Collect the matches of many pairs.

    Args:
        matches: of each pair once.
        resize: long side that larger images were reduced to for matching; 0: none was.
        least: confidence; matches below it are left out.
    """
    collected = list(matches)
    sizes: dict[str, tuple[int, int]] = {}
    for found in collected:
        sizes[found.pair[0]], sizes[found.pair[1]] = found.size0_wh, found.size1_wh
    names = sorted(sizes)
    number = {name: k for k, name in enumerate(names)}
    scales = np.array([max(1.0, max(sizes[name]) / resize) if resize else 1.0 for name in names])
    pairs = []
    for found in collected:
        i, j = number[found.pair[0]], number[found.pair[1]]
        rows = found.confidence >= least
        points0 = found.keypoints0[rows].astype(np.float64) / scales[i]
        points1 = found.keypoints1[rows].astype(np.float64) / scales[j]
        confidence = np.maximum(found.confidence[rows].astype(np.float64), _LEAST_WEIGHT)
        pairs.append(TablePair(found.pair, (i, j), (points0, points1), confidence))
    return MatchTable(names, [sizes[name] for name in names], scales, pairs)
