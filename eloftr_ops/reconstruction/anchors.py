# SPDX-License-Identifier: Apache-2.0
"""Few points per image that stand for all that was matched there: the peaks of the confidence on a grid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["find_anchors", "nearest_anchor"]

Array = npt.NDArray[np.float64]
Indexes = npt.NDArray[np.int64]

_ROUNDS = 8


def find_anchors(points: Array, weights: Array, radius: float) -> Array:
    """Points (K, 2) such that each given point has one within ``radius``, and dense places have them at their middle.

    The weights are added up on a grid of whole pixels and blurred. Peaks that are the highest within ``radius``
    become anchors, what lies within ``radius`` of them is covered, and the rest goes through the same again.

    Args:
        points: (N, 2), not negative.
        weights: (N,), positive.
        radius: pixels, positive.
    """
    anchors: list[Array] = []
    left = np.arange(len(points))
    while len(left):
        peaks = _peaks(points[left], weights[left], radius) if len(anchors) < _ROUNDS else points[left[:1]]
        covered = nearest_anchor(peaks, points[left], radius) >= 0
        if not covered.any():  # a peak of the blur may lie between the points
            peaks, covered = points[left[:1]], np.arange(len(left)) == 0
        anchors.append(peaks)
        left = left[~covered]
    return np.concatenate(anchors) if anchors else np.zeros((0, 2))


def nearest_anchor(anchors: Array, points: Array, radius: float) -> Indexes:
    """(N,) the nearest of the anchors (K, 2) to each of the points (N, 2); -1: none within ``radius``."""
    nearest = np.full(len(points), -1)
    if not len(anchors):
        return nearest
    cells, queries = (np.floor(values / radius).astype(np.int64) for values in (anchors, points))
    width = int(max(cells[:, 0].max(), queries[:, 0].max() if len(queries) else 0)) + 3
    keys = _keys(cells, width)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    best = np.full(len(points), radius * radius)
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            wanted = _keys(queries + np.array([dx, dy]), width)
            first, last = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
            for step in range(int((last - first).max(initial=0))):
                rows = np.flatnonzero(first + step < last)
                candidate = order[first[rows] + step]
                distance = np.square(anchors[candidate] - points[rows]).sum(1)
                closer = distance <= best[rows]
                nearest[rows[closer]], best[rows[closer]] = candidate[closer], distance[closer]
    return nearest


def _peaks(points: Array, weights: Array, radius: float) -> Array:
    """The mean of the points near each place of the grid whose blurred weight is the highest within ``radius``."""
    import cv2  # not loaded by commands that need none of this

    height, width = (int(side) + 1 for side in np.floor(points.max(0)[::-1]))
    columns, rows = np.floor(points).astype(np.int64).T
    added = np.zeros((height, width), np.float32)
    np.add.at(added, (rows, columns), weights)
    heat: npt.NDArray[Any] = cv2.GaussianBlur(added, (0, 0), max(0.5, radius / 2), borderType=cv2.BORDER_CONSTANT)
    reach = max(1, math.ceil(radius))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    # Equal heights must not give two peaks side by side: a slope far below any weight decides.
    slope = np.linspace(0, 1e-4 * float(heat.max()), heat.size, dtype=np.float32).reshape(heat.shape)
    heat += slope
    highest = (heat == cv2.dilate(heat, kernel)) & (heat > slope)
    y, x = np.nonzero(highest)
    centres = np.stack([x, y], 1).astype(np.float64) + 0.5
    owner = nearest_anchor(centres, points, radius)
    found = owner >= 0
    total = np.bincount(owner[found], weights[found], len(centres))
    means = [np.bincount(owner[found], weights[found] * points[found, k], len(centres)) for k in (0, 1)]
    kept = total > 0
    peaks: Array = np.stack(means, 1)[kept] / total[kept, None]
    return peaks


def _keys(cells: Indexes, width: int) -> Indexes:
    keys: Indexes = (cells[:, 1] + 1) * width + cells[:, 0] + 1
    return keys
