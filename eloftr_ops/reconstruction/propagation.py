# SPDX-License-Identifier: Apache-2.0
"""Grows tracks: points of one image go along with the matches into all images that it was matched with.

Images take turns, those with the most matches first. An image has the keypoints that arrived from images before it, and
new ones where it was matched and has none. Each of them is looked up in the match field of every pair of the image.
Where it arrives, the other image

- has a keypoint of the same track already: the match ties both;
- has a keypoint of another track right there: the tracks become one, unless they have an image in common;
- has none: it gets one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eloftr_ops.reconstruction.adjustment import Constraints
from eloftr_ops.reconstruction.anchors import find_anchors, nearest_anchor
from eloftr_ops.reconstruction.field import sample_field
from eloftr_ops.reconstruction.match_table import Array, MatchTable

__all__ = ["Grown", "grow_tracks"]

Indexes = npt.NDArray[np.int64]


class Grown(NamedTuple):
    """K keypoints of all images, and what ties them."""

    position: Array  # (K, 2) pixels as matched
    image: Indexes  # (K,)
    track: Indexes  # (K,)
    constraints: Constraints
    conflicts: int  # times that two points of an image would have become one track


class _Keypoints:
    """Keypoints and their tracks, as they come."""

    def __init__(self, images: int) -> None:
        self.position: list[Array] = []
        self.image: list[int] = []
        self.of_image: list[list[int]] = [[] for _ in range(images)]
        self.parent: list[int] = []
        self.members: list[dict[int, int]] = []  # of each root: image to keypoint

    def add(self, image: int, position: Array, track: int | None = None) -> int:
        """A new keypoint, of a track or of its own."""
        number = len(self.parent)
        self.position.append(position)
        self.image.append(image)
        self.of_image[image].append(number)
        self.parent.append(number if track is None else track)
        self.members.append({image: number})
        if track is not None:
            self.members[track][image] = number
        return number

    def root(self, number: int) -> int:
        """The track of a keypoint."""
        parent = self.parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def tie(self, number: int, image: int, near: int, position: Array) -> int:
        """The keypoint of an image that is the same point as ``number``; -1: there would be two.

        Args:
            number: a keypoint of another image.
            image: where its partner is looked for.
            near: keypoint of that image right where the partner would be; -1: none.
            position: of the partner.
        """
        track = self.root(number)
        own = self.members[track].get(image)
        if own is not None:
            return own
        if near < 0:
            return self.add(image, position, track)
        other = self.root(near)
        if self.members[track].keys() & self.members[other].keys():
            return -1
        if len(self.members[other]) > len(self.members[track]):
            track, other = other, track
        self.parent[other] = track
        self.members[track] |= self.members[other]
        return near


def grow_tracks(table: MatchTable, *, spacing: float, reach: float, join: float) -> Grown:
    """Keypoints of all images, in tracks; lengths are in pixels as matched.

    Args:
        table: the matches.
        spacing: new keypoints keep this distance from each other and from those that are there.
        reach: a keypoint goes along with matches at most so far away.
        join: keypoints that arrive so near to another one are taken for the same.
    """
    keypoints = _Keypoints(len(table.names))
    parts: list[tuple[npt.NDArray[np.generic], ...]] = []
    conflicts = 0
    matched = np.zeros(len(table.names))
    for pair in table.pairs:
        matched[list(pair.images)] += pair.confidence.sum()
    for image in np.argsort(-matched, kind="stable").tolist():
        _sow(keypoints, table, image, spacing)
        numbers = np.array(keypoints.of_image[image], np.int64)
        places = _positions(keypoints, numbers)
        for pair in table.pairs:
            if image not in pair.images or not len(numbers):
                continue
            side = pair.images.index(image)
            other = pair.images[1 - side]
            field = sample_field(pair.points[side], pair.points[1 - side], pair.confidence, places, reach)
            rows = np.flatnonzero(field.weight > 0)
            there = np.array(keypoints.of_image[other], np.int64)
            near = nearest_anchor(_positions(keypoints, there), np.maximum(field.target[rows], 0), join)
            ends = np.full(len(rows), -1)
            for k, row in enumerate(rows.tolist()):
                close = int(there[near[k]]) if near[k] >= 0 else -1
                ends[k] = keypoints.tie(int(numbers[row]), other, close, field.target[row])
            conflicts += int((ends < 0).sum())
            rows, ends = rows[ends >= 0], ends[ends >= 0]
            parts.append(
                (
                    numbers[rows],
                    ends,
                    places[rows],
                    field.target[rows],
                    field.jacobian[rows],
                    field.weight[rows],
                )
            )
    return _grown(keypoints, parts, conflicts)


def _sow(keypoints: _Keypoints, table: MatchTable, image: int, spacing: float) -> None:
    """New keypoints where the image was matched and has none."""
    points, confidence = table.points_of(image)
    points = np.maximum(points, 0)
    there = _positions(keypoints, np.array(keypoints.of_image[image], np.int64))
    free = nearest_anchor(there, points, spacing) < 0
    for anchor in find_anchors(points[free], confidence[free], spacing):
        keypoints.add(image, anchor)


def _positions(keypoints: _Keypoints, numbers: Indexes) -> Array:
    return np.array([keypoints.position[number] for number in numbers.tolist()]).reshape(-1, 2)


def _grown(keypoints: _Keypoints, parts: list[tuple[npt.NDArray[np.generic], ...]], conflicts: int) -> Grown:
    shapes = ((), (), (2,), (2,), (2, 2), ())
    none = tuple(np.zeros((0, *shape), np.int64 if k < 2 else np.float64) for k, shape in enumerate(shapes))
    columns = [np.concatenate(column) for column in zip(none, *parts, strict=True)]
    count = len(keypoints.parent)
    return Grown(
        _positions(keypoints, np.arange(count)),
        np.array(keypoints.image, np.int64),
        np.array([keypoints.root(k) for k in range(count)], np.int64),
        Constraints(*columns),
        conflicts,
    )
