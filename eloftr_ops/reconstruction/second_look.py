# SPDX-License-Identifier: Apache-2.0
"""Tracks once more, from the matches that the cameras of a first model explain.

Two images alone do not tell a wrong match from a right one where things repeat, such as windows of a house: one
fundamental matrix explains a whole row of them. Cameras that many images agree on do. So a first model is made of few
keypoints, matches that its cameras do not explain are left out, all keypoints are made anew, and their points are
triangulated from these cameras.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eloftr_ops.geometry import sampson_residuals
from eloftr_ops.reconstruction.cameras import PhotoCamera
from eloftr_ops.reconstruction.colmap import triangulate, verify_pairs, write_database
from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.match_table import Array
from eloftr_ops.reconstruction.tracks import Tracks

__all__ = ["explained_matches", "look_again"]

_THRESHOLD = 2.0  # pixels as matched


def look_again(
    models: Sequence[Any],
    matches: Sequence[PairMatches],
    make: Callable[[list[PairMatches]], Tracks],
    database: Path,
    cameras: Mapping[str, PhotoCamera],
    *,
    resize: int,
    camera_model: str,
    threads: int = -1,
) -> tuple[list[Any], Tracks]:
    """The models with new points, and the tracks that these come from. The database is replaced.

    Args:
        models: of `eloftr_ops.reconstruction.colmap.map_incrementally`, from this database.
        matches: of all pairs.
        make: tracks from matches.
        database: of COLMAP.
        cameras: of each image.
        resize: long side that larger images were reduced to for matching; 0: none was.
        camera_model: of COLMAP.
        threads: of verification and triangulation; -1: all.
    """
    tracks = make(explained_matches(matches, models, resize))
    write_database(database, tracks, cameras, camera_model=camera_model)
    verify_pairs(database, threads=threads)
    return [triangulate(model, database, threads=threads) for model in models], tracks


def explained_matches(matches: Sequence[PairMatches], models: Sequence[Any], resize: int) -> list[PairMatches]:
    """The matches without those that the cameras of both images do not explain.

    Pairs of images that no model has both of stay as they are.
    """
    posed = [{image.name: image for image in model.images.values() if image.has_pose} for model in models]
    explained = []
    for found in matches:
        model = next((k for k, names in enumerate(posed) if names.keys() >= set(found.pair)), None)
        if model is not None:
            images = [posed[model][name] for name in found.pair]
            rows = np.abs(_errors(found, images[0], images[1], resize)) <= _THRESHOLD
            found = found._replace(
                keypoints0=found.keypoints0[rows],
                keypoints1=found.keypoints1[rows],
                confidence=found.confidence[rows],
            )
        explained.append(found)
    return explained


def _errors(found: PairMatches, image0: Any, image1: Any, resize: int) -> Array:
    """(M,) Sampson distances in pixels as matched, without the distortion of the lenses."""
    relative = (image1.cam_from_world() * image0.cam_from_world().inverse()).matrix()
    t = relative[:, 3]
    F = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]]) @ relative[:, :3]
    points = []
    sides = ((image0, found.keypoints0, found.size0_wh), (image1, found.keypoints1, found.size1_wh))
    for side, (image, keypoints, size_wh) in enumerate(sides):
        scale = max(1.0, max(size_wh) / resize) if resize else 1.0
        focal = image.camera.mean_focal_length() / scale
        points.append(torch.from_numpy(focal * image.camera.cam_from_img(keypoints.astype(np.float64))))
        unit = np.diag([1 / focal, 1 / focal, 1.0])
        F = F @ unit if side == 0 else unit @ F
    batch = torch.zeros(len(points[0]), dtype=torch.int64)
    errors: Array = sampson_residuals(points[0], points[1], batch, torch.from_numpy(F)[None]).numpy()
    return errors
