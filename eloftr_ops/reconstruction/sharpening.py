# SPDX-License-Identifier: Apache-2.0
"""Tracks whose keypoints are aligned by the pixels around them.

Matches put a keypoint to some tenths of a pixel as matched, and those of neighbouring keypoints err alike, so that many
of them do not help. So the window around each keypoint is compared with that of one keypoint of its track, where the
surest matches meet, and moved until both agree (`eloftr_ops.reconstruction.alignment`). Images that are larger than
they were matched are then compared at twice that size. Keypoints that do not look like their track are left out: the
match was wrong, or something stands before the point.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eloftr_ops.images import read_image
from eloftr_ops.reconstruction.alignment import align_windows, prepare_image
from eloftr_ops.reconstruction.field import sample_field
from eloftr_ops.reconstruction.match_table import Array
from eloftr_ops.reconstruction.pairs import Pair, reading_order
from eloftr_ops.reconstruction.tracks import Indexes, Tracks, TrackTable, collect_tracks

__all__ = ["sharpen_tracks"]

_LEAST_LIKENESS = 0.7
_FARTHEST = 1.5  # pixels of the image as compared; what moves farther has gone astray
_REACH = 12.0  # pixels as matched; of the neighbours that say how a window is distorted
_KEPT = 32  # images in memory
_ZOOMS = (1, 2)  # sizes at which images are compared, in sizes as matched


class _Plane(NamedTuple):
    """An image, ready to be compared."""

    values: Tensor  # of `prepare_image`
    scale_xy: Array  # pixels of the original per pixel


def sharpen_tracks(tracks: Tracks, images: Path, resize: int = 640) -> Tracks:
    """Align the keypoints of each track by their pixels; see the module for how.

    Convention:
        See `Tracks`: keypoints before and after are in pixels of the upright originals.

    Args:
        tracks: of `eloftr_ops.reconstruction.tracks.build_tracks`.
        images: folder that the names belong to.
        resize: long side that larger images were reduced to for matching; 0: none was.

    Returns:
        Tracks with the keypoints that agree, at least two of each; in the report their number and length are told
        anew, and how many were left out. Keypoints at which an image is blank are left out.

    Raises:
        FileError: an image cannot be read any more.
    """
    table = _table(tracks)
    reference = _references(table)
    kept = np.ones(len(table.track), bool)
    for zoom in _ZOOMS:
        size = zoom * resize
        if zoom > 1 and (not resize or all(max(wh) <= resize for wh in table.sizes_wh)):
            break
        read = functools.lru_cache(_KEPT)(functools.partial(_read, images, size))
        position, agrees = _compared(table, reference, resize, read)
        table = table._replace(position=np.where(agrees[:, None], position, table.position))
        if zoom == 1:  # what agrees here and not in the larger image stays where it is
            kept = agrees
    label = np.unique(table.track, return_inverse=True)[1]
    length = np.bincount(label, kept)[label]
    used = kept & (length > 1)
    count = len(np.unique(table.track[used]))
    report = dataclasses.replace(
        tracks.report,
        tracks=count,
        mean_length=float(used.sum() / count) if count else 0.0,
        unlike=int((~used).sum()),
    )
    return collect_tracks(table, used, report)


def _table(tracks: Tracks) -> TrackTable:
    image = np.repeat(np.arange(len(tracks.names)), [len(each) for each in tracks.keypoints])
    none = np.zeros(0)
    return TrackTable(
        tracks.names,
        tracks.sizes_wh,
        list(tracks.pairs),
        image,
        np.concatenate([none.astype(np.int64), *tracks.track]),
        np.concatenate([none.reshape(0, 2), *tracks.keypoints]).astype(np.float64),
        np.concatenate([none, *tracks.scores]).astype(np.float64),
    )


def _references(table: TrackTable) -> Indexes:
    """(K,) the keypoint of the same track with the highest score."""
    label = np.unique(table.track, return_inverse=True)[1]
    order = np.lexsort([-table.score, label])
    first = order[np.flatnonzero(np.diff(label[order], prepend=-1))]
    return first[label]


def _read(images: Path, size: int, name: str) -> _Plane:
    loaded = read_image(images / name, resize=size or None)
    return _Plane(prepare_image(loaded.image), np.array(loaded.scale_xy))


def _compared(
    table: TrackTable, reference: Indexes, resize: int, read: Callable[[str], _Plane]
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Where each keypoint (K, 2) looks like its reference, and whether it does there; references stay."""
    position = table.position.copy()
    agrees = reference == np.arange(len(reference))
    matched = np.array([max(1.0, max(wh) / resize) if resize else 1.0 for wh in table.sizes_wh])
    of_image = [np.flatnonzero(table.image == k) for k in range(len(table.names))]
    groups = _by_images(table, reference, np.flatnonzero(~agrees))
    pairs: list[Pair] = [(table.names[i], table.names[j]) for i, j in groups]
    number = {name: k for k, name in enumerate(table.names)}
    for names in itertools.chain(*reading_order(pairs, _KEPT)):  # so that few images are read twice
        i, j = (number[name] for name in names)
        rows = groups[i, j]
        first, second = (read(name) for name in names)
        places0, places1 = table.position[reference[rows]] / first.scale_xy, table.position[rows] / second.scale_xy
        jacobian = _jacobians(table, of_image[i], of_image[j], reference[rows], (matched[i], matched[j]))
        jacobian *= first.scale_xy / second.scale_xy[:, None]
        aligned = align_windows(first.values, second.values, *map(torch.from_numpy, (places0, places1, jacobian)))
        moved = aligned.position.numpy()
        near = np.linalg.norm(moved - places1, axis=1) <= _FARTHEST
        agrees[rows] = near & (aligned.likeness.numpy() >= _LEAST_LIKENESS)
        position[rows] = moved * second.scale_xy
    return position, agrees


def _by_images(table: TrackTable, reference: Indexes, rows: Indexes) -> dict[tuple[int, int], Indexes]:
    """The rows by the images of their reference and of themselves."""
    images = np.stack([table.image[reference[rows]], table.image[rows]], 1)
    order = np.lexsort([images[:, 1], images[:, 0]])
    starts = np.flatnonzero((np.diff(images[order], axis=0, prepend=-1) != 0).any(1))
    groups = np.split(rows[order], starts[1:]) if len(rows) else []
    return {(int(i), int(j)): group for (i, j), group in zip(images[order[starts]], groups, strict=True)}


def _jacobians(
    table: TrackTable, rows0: Indexes, rows1: Indexes, places: Indexes, matched: tuple[float, float]
) -> Array:
    """(N, 2, 2) of the map between two images with these keypoints, in pixels of the originals, at some of the first.

    It is that of the tracks that both have.
    """
    _, both0, both1 = np.intersect1d(table.track[rows0], table.track[rows1], return_indices=True)
    points0, points1 = table.position[rows0[both0]] / matched[0], table.position[rows1[both1]] / matched[1]
    field = sample_field(points0, points1, np.ones(len(points0)), table.position[places] / matched[0], _REACH)
    jacobian: Array = field.jacobian * (matched[1] / matched[0])
    return jacobian
