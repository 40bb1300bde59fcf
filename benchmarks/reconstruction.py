# SPDX-License-Identifier: Apache-2.0
"""Reconstructions of scenes with known cameras: our tracks beside rounding to a grid, and beside SIFT.

    python -m benchmarks.reconstruction INDEX.json --split dev --resize 768 --work runs/reconstruction

The index is of the form that `eloftr_ops.data.JsonPairs` reads, with the scene of each pair. All contenders go through
the same verification, the same mapper of COLMAP and the same last adjustment. Camera errors are those of the centres
after the similarity that fits best, in units of the index, and of the relative rotations.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pycolmap
import torch

from eloftr_ops.cli.match_pairs import watch_pairs
from eloftr_ops.reconstruction.bulk import PairChoice, match_pairs
from eloftr_ops.reconstruction.cameras import read_camera
from eloftr_ops.reconstruction.colmap import adjust_model, map_incrementally, verify_pairs, write_database
from eloftr_ops.reconstruction.engine import MatchSettings
from eloftr_ops.reconstruction.match_file import MatchFile
from eloftr_ops.reconstruction.reconstruct import Grid, make_tracks
from eloftr_ops.reconstruction.second_look import look_again
from eloftr_ops.reconstruction.tracks import TrackConfig

Array = npt.NDArray[np.float64]
_CAMERA_MODEL = "SIMPLE_RADIAL"


@dataclass
class Row:
    """A contender on a scene."""

    scene: str
    contender: str
    registered: int = 0
    images: int = 0
    points: int = 0
    track_length: float = 0.0
    reprojection_px: float = 0.0
    centre_error: float = 0.0  # median
    centre_error_held: float = 0.0  # before the last adjustment: with the principal point in the middle
    rotation_error_deg: float = 0.0  # median, of all pairs of images
    matching_seconds: float = 0.0
    tracks_cpu_seconds: float = 0.0
    mapping_cpu_seconds: float = 0.0


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--scene", nargs="*", help="of the index; default: all of the split")
    parser.add_argument("--contender", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--resize", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/reconstruction"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pairs = [p for p in json.loads(arguments.index.read_text())["pairs"] if p["split"] == arguments.split]
    rows = []
    for scene in arguments.scene or sorted({pair["scene"] for pair in pairs}):
        of_scene = [pair for pair in pairs if pair["scene"] == scene]
        images = arguments.index.parent / Path(of_scene[0]["image0"]).parent
        work = arguments.work / scene
        work.mkdir(parents=True, exist_ok=True)
        for contender in arguments.contender:
            row = Row(scene, contender)
            models = CONTENDERS[contender](row, images, work, arguments)
            _measure(row, models, true_poses(of_scene), arguments.threads)
            rows.append(row)
            print(json.dumps(dataclasses.asdict(row)), flush=True)
            (arguments.work / "rows.json").write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1))


def true_poses(pairs: list[dict[str, Any]]) -> dict[str, Array]:
    """World-to-camera (4, 4) of each image, chained from the relative poses of the pairs; image 0 is the world."""
    edges = [(Path(p["image0"]).name, Path(p["image1"]).name, np.array(p["T_0to1"])) for p in pairs]
    poses: dict[str, Array] = {edges[0][0]: np.eye(4)}
    before = 0
    while len(poses) > before:
        before = len(poses)
        for first, second, T in edges:
            if first in poses and second not in poses:
                poses[second] = T @ poses[first]
            elif second in poses and first not in poses:
                poses[first] = np.linalg.inv(T) @ poses[second]
    return poses


def _tracks_contender(keypoints: TrackConfig | Grid) -> Callable[[Row, Path, Path, Any], list[Any]]:
    def run(row: Row, images: Path, work: Path, arguments: Any) -> list[Any]:
        settings = MatchSettings(resize=arguments.resize)
        report = match_pairs(PairChoice(images), work / "matches.h5", settings, watch=watch_pairs)
        row.matching_seconds = report.seconds if report.matched else 0.0
        start = time.process_time()
        with MatchFile(work / "matches.h5") as file:
            matches = [file.read(pair) for pair in file.pairs()]
        make = functools.partial(make_tracks, resize=arguments.resize, keypoints=keypoints, images=images)
        tracks = make(matches)
        row.tracks_cpu_seconds = time.process_time() - start
        cameras = {name: read_camera(images / name) for name in tracks.names}
        place = work / row.contender
        place.mkdir(exist_ok=True)
        database = place / "database.db"
        write_database(database, tracks, cameras, camera_model=_CAMERA_MODEL)
        verify_pairs(database, threads=arguments.threads)
        models = _mapped(row, images, place, arguments.threads)
        if isinstance(keypoints, TrackConfig):
            sizes = {"resize": arguments.resize, "threads": arguments.threads}
            models, _ = look_again(models, matches, make, database, cameras, camera_model=_CAMERA_MODEL, **sizes)
        return models

    return run


def _sift(row: Row, images: Path, work: Path, arguments: Any) -> list[Any]:
    """COLMAP's own features and exhaustive matching, with its default options, on the CPU."""
    place = work / row.contender
    place.mkdir(exist_ok=True)
    database = place / "database.db"
    database.unlink(missing_ok=True)
    start = time.perf_counter()
    options = pycolmap.ImageReaderOptions()
    options.camera_model = _CAMERA_MODEL
    extraction = pycolmap.FeatureExtractionOptions()
    matching = pycolmap.FeatureMatchingOptions()
    extraction.num_threads = matching.num_threads = arguments.threads
    extraction.use_gpu = matching.use_gpu = False
    pycolmap.extract_features(
        database,
        images,
        camera_mode=pycolmap.CameraMode.SINGLE,
        reader_options=options,
        extraction_options=extraction,
        device=pycolmap.Device.cpu,
    )
    pycolmap.match_exhaustive(database, matching_options=matching, device=pycolmap.Device.cpu)
    row.matching_seconds = time.perf_counter() - start
    return _mapped(row, images, place, arguments.threads)  # the matches are verified already


def _mapped(row: Row, images: Path, place: Path, threads: int) -> list[Any]:
    start = time.process_time()
    models = map_incrementally(place / "database.db", images, place / "sparse", threads=threads)
    row.mapping_cpu_seconds = time.process_time() - start
    return models


def _measure(row: Row, models: list[Any], truth: dict[str, Array], threads: int) -> None:
    row.images = len(truth)
    if not models:
        return
    before, model = models[0], adjust_model(models[0], threads=threads)
    row.registered, row.points = model.num_reg_images(), model.num_points3D()
    row.track_length = model.compute_mean_track_length()
    row.reprojection_px = model.compute_mean_reprojection_error()
    row.centre_error_held, _ = _errors_of(before, truth)
    row.centre_error, row.rotation_error_deg = _errors_of(model, truth)


def _errors_of(model: Any, truth: dict[str, Array]) -> tuple[float, float]:
    posed = [image for image in model.images.values() if image.has_pose and image.name in truth]
    found = np.array([image.cam_from_world().matrix() for image in posed])
    return camera_errors(found, np.array([truth[image.name] for image in posed]))


def camera_errors(found: Array, true: Array) -> tuple[float, float]:
    """Medians over the cameras (N, 3 or 4, 4): of the centres, aligned, and of the relative rotations in degrees."""
    R, G = found[:, :3, :3], true[:, :3, :3]
    centres, goals = (-(np.swapaxes(T[:, :3, :3], 1, 2) @ T[:, :3, 3:4])[:, :, 0] for T in (found, true))
    centres, goals = centres - centres.mean(0), goals - goals.mean(0)
    U, S, Vt = np.linalg.svd(goals.T @ centres)
    sign = np.array([1, 1, np.sign(np.linalg.det(U @ Vt))])
    scale = (S * sign).sum() / np.square(centres).sum()
    moved = scale * centres @ (U * sign @ Vt).T
    relative, expected = (rotations[:, None] @ np.swapaxes(rotations, 1, 2)[None] for rotations in (R, G))
    cosine = (np.trace(relative @ np.swapaxes(expected, 2, 3), axis1=2, axis2=3) - 1) / 2
    angles = np.degrees(np.arccos(np.clip(cosine, -1, 1)))[np.triu_indices(len(R), 1)]
    return float(np.median(np.linalg.norm(moved - goals, axis=1))), float(np.median(angles))


CONTENDERS: dict[str, Callable[[Row, Path, Path, Any], list[Any]]] = {
    "tracks": _tracks_contender(TrackConfig()),
    "rounding-1": _tracks_contender(Grid(1, 1)),
    "rounding-4": _tracks_contender(Grid(4, 4)),
    "hloc-8-2": _tracks_contender(Grid(8, 2)),
    "sift": _sift,
}


if __name__ == "__main__":
    main()
