# SPDX-License-Identifier: Apache-2.0
"""Where a pair's matches put any point nearby: the matches as a field, sampled by moving least squares.

With it a point between matches has a partner, too, and a match can be moved to a point nearby in both images at once: a
shift by d in one image is one by J d in the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Field", "sample_field"]

Array = npt.NDArray[np.float64]

_NEIGHBOURS = 10
_ROUNDS = 3
_SCALE = 0.7  # pixels, of Cauchy's weights
_SLOPE = 0.5  # how much two neighbours may move unlike each other, per pixel between them, at the start
_RIDGE = 0.1  # square pixels: pulls towards the identity where neighbours say nothing
_TINY = 1e-9  # keeps places without any neighbour solvable
_FIT = 0.5  # weight of Cauchy above which a neighbour counts as agreeing
_SHARE = 0.35  # of the weight around a place that has to agree


class Field(NamedTuple):
    """A field at N places."""

    target: Array  # (N, 2) where the place lies in the other image
    jacobian: Array  # (N, 2, 2) of the map there
    weight: Array  # (N,) sum of the confidences that agree, less with distance; 0: no match is near enough


def sample_field(points: Array, targets: Array, confidence: Array, places: Array, reach: float) -> Field:
    """Fit an affine map to the matches around each place; those that do not fit lose their weight.

    Convention:
        (x, y) in pixels as matched, any frame.

    Args:
        points: (M, 2) of the matches, in the image of the places.
        targets: (M, 2) in the other image.
        confidence: (M,) positive.
        places: (N, 2).
        reach: pixels; a place needs a match that agrees within it. Weights fall with the square of distance / reach.
    """
    count, matches = len(places), len(points)
    if not count or not matches:
        return Field(places.copy(), np.tile(np.eye(2), (count, 1, 1)), np.zeros(count))
    neighbours, distance = _nearest(points, places, reach)
    offsets = points[neighbours] - places[:, None]
    shift = targets[neighbours] - points[neighbours]
    base = confidence[neighbours] * np.exp(-0.5 * (distance / reach) ** 2)
    robust = _likeness(shift, offsets, base)
    design = np.concatenate([np.ones((*offsets.shape[:2], 1)), offsets], 2)  # (N, k, 3)
    prior = np.diag([_TINY, _RIDGE, _RIDGE])
    for _ in range(_ROUNDS):
        weight = (base * robust)[:, :, None]
        transposed = np.swapaxes(design * weight, 1, 2)
        # What is fitted is the shift, so that nothing to fit gives the identity.
        scale = weight.sum((1, 2))[:, None, None] + 1e-30
        solution = np.linalg.solve(transposed @ design / scale + prior, transposed @ shift / scale)
        error = np.linalg.norm(design @ solution - shift, axis=2)
        robust = 1 / (1 + (error / _SCALE) ** 2)
    agreeing = (base * robust).sum(1)
    supported = ((robust > _FIT) & (distance <= reach)).any(1) & (agreeing > _SHARE * base.sum(1))
    jacobian = np.eye(2) + np.swapaxes(solution[:, 1:], 1, 2)
    return Field(places + solution[:, 0], jacobian, np.where(supported, agreeing, 0.0))


def _likeness(shift: Array, offsets: Array, base: Array) -> Array:
    """(N, k) how much each neighbour moves like the one that most others move like.

    A fit from all neighbours would begin between both sides of an object's edge, or be drawn by a wrong match.
    """
    unlike = np.linalg.norm(shift[:, :, None] - shift[:, None], axis=3)
    away = np.linalg.norm(offsets[:, :, None] - offsets[:, None], axis=3)
    like = 1 / (1 + (unlike / (_SCALE + _SLOPE * away)) ** 2)
    leader = (base[:, :, None] * like * base[:, None]).sum(2).argmax(1)
    likeness: Array = like[np.arange(len(like)), leader]
    return likeness


def _nearest(points: Array, places: Array, reach: float) -> tuple[npt.NDArray[np.int64], Array]:
    """(N, k) indexes of points near each place and their distances, the nearest first; infinity fills up the rows.

    The points lie in square cells of twice the reach; the nine cells around a place hold what counts for it.
    """
    corner = np.minimum(points.min(0), places.min(0))
    cells, own = (np.floor((values - corner) / (2 * reach)).astype(np.int64) + 1 for values in (points, places))
    width = int(max(cells[:, 0].max(), own[:, 0].max())) + 2
    keys = cells[:, 1] * width + cells[:, 0]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    around = np.array([dy * width + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    wanted = (own[:, 1] * width + own[:, 0])[:, None] + around
    first, last = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
    most = int((last - first).max())
    places_in_cell = first[:, :, None] + np.arange(most)
    filled = places_in_cell < last[:, :, None]
    candidates = order[np.minimum(places_in_cell, len(points) - 1)].reshape(len(places), -1)
    distance = np.hypot(*np.moveaxis(points[candidates] - places[:, None], 2, 0))
    distance = np.where(filled.reshape(distance.shape), distance, np.inf)
    if distance.shape[1] > _NEIGHBOURS:
        chosen = np.argpartition(distance, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]
        candidates, distance = (np.take_along_axis(x, chosen, 1) for x in (candidates, distance))
    ranking = np.argsort(distance, axis=1, kind="stable")
    return np.take_along_axis(candidates, ranking, 1), np.take_along_axis(distance, ranking, 1)
