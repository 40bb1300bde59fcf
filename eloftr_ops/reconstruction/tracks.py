# SPDX-License-Identifier: Apache-2.0
"""One set of keypoints per image from the matches of all its pairs, and the tracks between them.

A semi-dense matcher finds other points of an image in every pair, so that nothing becomes a track. Rounding to a grid
makes them equal, and moves each by up to half a square, in each image another way. Here a match is never moved in one
image alone:

1. Matches that the two-view geometry of their pair does not explain are left out.
2. Keypoints are put where many pairs have matches, and go along with the matches around them into all other images
   (`eloftr_ops.reconstruction.propagation`): a track with at most one point per image.
3. The points of all tracks are moved together to agree with all matches, weighted by the confidences
   (`eloftr_ops.reconstruction.adjustment`).
4. Ties that still disagree are dropped, and tracks that hang on them fall apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eloftr_ops.errors import ArgumentError
from eloftr_ops.reconstruction.adjustment import adjust_keypoints, constraint_errors
from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.match_table import Array, MatchTable, read_table, verified
from eloftr_ops.reconstruction.pairs import Pair
from eloftr_ops.reconstruction.propagation import grow_tracks

__all__ = [
    "TrackConfig",
    "TrackReport",
    "TrackTable",
    "Tracks",
    "build_tracks",
    "collect_tracks",
    "components",
    "track_report",
]

Indexes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrackConfig:
    """How tracks are made; lengths are in pixels as matched.

    Attributes:
        spacing: between the keypoints of an image where new ones are put.
        reach: a keypoint goes along with matches at most so far away.
        join: keypoints that arrive so near to another one are taken for the same.
        max_error: largest disagreement of a tie with the keypoints at the end.
        min_confidence: matches that are less sure are left out.
        verification: largest error of a match to the two-view geometry of its pair; None: not looked at.
    """

    spacing: float = 4.0
    reach: float = 6.0
    join: float = 1.5
    max_error: float = 1.5
    min_confidence: float = 0.0
    verification: float | None = 2.0

    def __post_init__(self) -> None:
        for name in ("spacing", "reach", "join", "max_error"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ArgumentError(name, f"expected a positive number of pixels, got {getattr(self, name)}.")


@dataclass(frozen=True)
class TrackReport:
    """What became of the matches; errors are in pixels as matched.

    Attributes:
        matches: that were given.
        ties: between two keypoints that agree with the matches around them.
        tracks: points of the scene.
        mean_length: images per track.
        median_error: of the ties: how far a keypoint is from where the matches put it for the other one.
        mean_error: likewise.
        conflicts: times that two points of an image would have become one track.
        broken: ties that did not agree.
        unlike: keypoints left out since their pixels do not look like their track's
            (`eloftr_ops.reconstruction.sharpening`).
    """

    matches: int
    ties: int
    tracks: int
    mean_length: float
    median_error: float
    mean_error: float
    conflicts: int = 0
    broken: int = 0
    unlike: int = 0


@dataclass(frozen=True, eq=False)
class Tracks:
    """Keypoints of images, and matches between them by number.

    Convention:
        Keypoints are (x, y) in pixels of the upright original images; the centre of pixel (x, y) is
        (x + 0.5, y + 0.5), as in COLMAP.
    """

    names: list[str]  # N images, sorted
    sizes_wh: list[tuple[int, int]]
    keypoints: list[npt.NDArray[np.float32]]  # (K, 2) of each image
    scores: list[npt.NDArray[np.float32]]  # (K,) sum of the confidences of the matches
    track: list[Indexes]  # (K,) number of the point of the scene
    pairs: dict[Pair, npt.NDArray[np.int64]]  # (M, 2) keypoints of both images that are one point
    report: TrackReport


class TrackTable(NamedTuple):
    """The K keypoints of all images in one table."""

    names: list[str]
    sizes_wh: list[tuple[int, int]]
    pairs: list[Pair]
    image: Indexes  # (K,)
    track: Indexes  # (K,) any number
    position: Array  # (K, 2) pixels of the originals
    score: Array  # (K,)


def build_tracks(matches: Iterable[PairMatches], resize: int = 640, config: TrackConfig | None = None) -> Tracks:
    """Make one set of keypoints per image from the matches of many pairs; see the module for how.

    Convention:
        See `Tracks` and `PairMatches`: both are in pixels of the originals, and in the project's frame.

    Args:
        matches: of each pair once, for instance from `eloftr_ops.reconstruction.match_file.MatchFile`.
        resize: long side that larger images were reduced to for matching; 0: none was.
        config: the defaults if left out.

    Returns:
        Tracks of at least two images. Without any match, images without keypoints. Pairs without a common track are
        there, with no match.
    """
    config = config or TrackConfig()
    table = given = read_table(matches, resize, config.min_confidence)
    if config.verification is not None:
        table = verified(given, config.verification)
    grown = grow_tracks(table, spacing=config.spacing, reach=config.reach, join=config.join)
    position = adjust_keypoints(grown.constraints, grown.position)
    errors = np.linalg.norm(constraint_errors(grown.constraints, position), axis=1)
    agree = errors <= config.max_error
    ties = grown.constraints.select(agree)
    edges = np.stack([ties.keypoint0, ties.keypoint1], 1)
    label = components(edges, len(position))
    used = np.zeros(len(position), bool)
    used[edges] = True
    weight = np.bincount(edges.ravel(), np.repeat(ties.weight, 2), len(position)).astype(np.float64)
    report = track_report(given, errors[agree], label[used], conflicts=grown.conflicts, broken=int((~agree).sum()))
    position *= table.scales[grown.image][:, None]
    pairs = [pair.pair for pair in table.pairs]
    keypoints = TrackTable(table.names, table.sizes_wh, pairs, grown.image, label, position, weight)
    return collect_tracks(keypoints, used, report)


def track_report(
    table: MatchTable, errors: Array, label: Indexes, *, conflicts: int = 0, broken: int = 0
) -> TrackReport:
    """Of ties with these errors (T,) and keypoints of these tracks (K,)."""
    tracks = len(np.unique(label))
    return TrackReport(
        matches=table.total,
        ties=len(errors),
        tracks=tracks,
        mean_length=len(label) / tracks if tracks else 0.0,
        median_error=float(np.median(errors)) if len(errors) else 0.0,
        mean_error=float(errors.mean()) if len(errors) else 0.0,
        conflicts=conflicts,
        broken=broken,
    )


def collect_tracks(table: TrackTable, used: npt.NDArray[np.bool_], report: TrackReport) -> Tracks:
    """Sort the keypoints that are used by image and by track, and match those of a track in every pair."""
    label = np.zeros(len(table.track), np.int64)
    label[used] = np.unique(table.track[used], return_inverse=True)[1]
    by_image = [np.flatnonzero(used & (table.image == k)) for k in range(len(table.names))]
    by_image = [rows[np.argsort(label[rows], kind="stable")] for rows in by_image]
    number = {name: k for k, name in enumerate(table.names)}
    pairs = {}
    for pair in table.pairs:
        first, second = (label[by_image[number[name]]] for name in pair)
        _, rows0, rows1 = np.intersect1d(first, second, assume_unique=True, return_indices=True)
        pairs[pair] = np.stack([rows0, rows1], 1).astype(np.int64)
    return Tracks(
        table.names,
        table.sizes_wh,
        [table.position[rows].astype(np.float32) for rows in by_image],
        [table.score[rows].astype(np.float32) for rows in by_image],
        [label[rows] for rows in by_image],
        pairs,
        report,
    )


def components(edges: Indexes, count: int) -> Indexes:
    """(count,) the least number of each keypoint's component."""
    label = np.arange(count)
    while True:
        least = label.copy()
        np.minimum.at(least, edges[:, 0], label[edges[:, 1]])
        np.minimum.at(least, edges[:, 1], label[edges[:, 0]])
        least = least[least]
        if (least == label).all():
            return label
        label = least
