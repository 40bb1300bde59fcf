# SPDX-License-Identifier: Apache-2.0
"""A folder of photographs in, a sparse model out: matches, tracks, COLMAP's database, verification, mapping.

Everything lies in one folder: ``matches.h5``, ``database.db``, the models ``sparse/0`` (the largest), ``sparse/1`` and
so on, ``report.json`` and ``reconstruction.png``. The report is written after every step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.reconstruction.bulk import PairChoice, Watch, match_pairs
from eloftr_ops.reconstruction.cameras import read_camera
from eloftr_ops.reconstruction.colmap import (
    adjust_model,
    check_camera_model,
    map_incrementally,
    require_pycolmap,
    verify_pairs,
    write_database,
)
from eloftr_ops.reconstruction.engine import MatchSettings
from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.match_file import MatchFile
from eloftr_ops.reconstruction.picture import color_points, draw_model
from eloftr_ops.reconstruction.quantisation import quantised_tracks
from eloftr_ops.reconstruction.sharpening import sharpen_tracks
from eloftr_ops.reconstruction.tracks import TrackConfig, TrackReport, Tracks, build_tracks
from eloftr_ops.storage import folder_lock, write_file

__all__ = ["Grid", "ReconstructionReport", "make_tracks", "reconstruct"]


@dataclass(frozen=True)
class Grid:
    """Rounding of keypoints as hloc does it, in place of tracks; pixels of the originals."""

    cell_size: float = 1.0
    max_error: float = 1.0


@dataclass
class ReconstructionReport:
    """What :func:`reconstruct` found; all but the first two fields are of the largest model."""

    images: int = 0  # in the pairs that were matched
    refused_pairs: int = 0
    registered: int = 0  # images with a pose
    points: int = 0
    mean_track_length: float = 0.0
    reprojection_error: float = 0.0  # pixels of the originals, mean
    models: list[int] = field(default_factory=list)  # images of each
    known_focals: int = 0  # images whose EXIF data give the focal length
    verified_matches: int = 0
    tracks: TrackReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of each step that ended
    complete: bool = False
    note: str = ""  # why it is not complete


def reconstruct(
    choice: PairChoice,
    output: Path,
    settings: MatchSettings | None = None,
    keypoints: TrackConfig | Grid | None = None,
    *,
    devices: str = "auto",
    camera_model: str = "SIMPLE_RADIAL",
    threads: int = -1,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> ReconstructionReport:
    """Match, build tracks, verify and map; see the module for the files.

    Matches of an earlier run on the same folder are used again; the other steps are done anew.

    Convention:
        Models are COLMAP's: keypoints in pixels of the upright original images, the centre of pixel (x, y) at
        (x + 0.5, y + 0.5). Poses map world to camera; the unit of length is arbitrary.

    Args:
        choice: which pairs are matched.
        output: folder, made if need be.
        settings: how to match.
        keypoints: how matches become keypoints: tracks, or rounding to a grid.
        devices: as `match_pairs`.
        camera_model: of COLMAP. Images of the same camera, focal length and size share their intrinsics.
        threads: of verification and mapping; -1: all.
        overwrite: match anew, too.
        watch: as `match_pairs`.

    Raises:
        FileError: no image, a folder that cannot be written, or no model: the images do not overlap enough. What was
            found until then is kept.
        ArgumentError: arguments that cannot be used; pycolmap is not installed.
        FolderInUseError: another run works in the folder.
    """
    require_pycolmap()
    check_camera_model(camera_model)
    settings = settings or MatchSettings()
    report = ReconstructionReport()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{output}: the folder cannot be made: {error.strerror}.") from error
    with folder_lock(output, "reconstruct"):
        with _step(report, output, "matching"):
            options: dict[str, Any] = {"devices": devices, "overwrite": overwrite, "watch": watch}
            bulk = match_pairs(choice, output / "matches.h5", settings, **options)
            report.refused_pairs = len(bulk.refused)
        with _step(report, output, "tracks"):
            with MatchFile(output / "matches.h5") as file:
                matches = [file.read(pair) for pair in file.pairs()]
            make = functools.partial(
                make_tracks, resize=settings.resize, keypoints=keypoints or TrackConfig(), images=choice.folder
            )
            tracks = make(matches)
            report.images, report.tracks = len(tracks.names), tracks.report
        with _step(report, output, "verification"):
            cameras = {name: read_camera(choice.folder / name) for name in tracks.names}
            report.known_focals = sum(camera.focal is not None for camera in cameras.values())
            write_database(output / "database.db", tracks, cameras, camera_model=camera_model)
            report.verified_matches = verify_pairs(output / "database.db", threads=threads)
        with _step(report, output, "mapping"):
            models = _mapped(report, output, choice.folder, threads)
        with _step(report, output, "refinement"):
            if not isinstance(keypoints, Grid):
                from eloftr_ops.reconstruction.second_look import look_again  # brings OpenCV

                models, tracks = look_again(
                    models,
                    matches,
                    make,
                    output / "database.db",
                    cameras,
                    resize=settings.resize,
                    camera_model=camera_model,
                    threads=threads,
                )
                report.tracks = tracks.report
            models = [adjust_model(model, threads=threads) for model in models]
            _write_models(report, models, output, choice.folder)
        report.complete, report.note = True, ""
        _write_report(report, output)
    return report


def make_tracks(matches: Sequence[PairMatches], resize: int, keypoints: TrackConfig | Grid, images: Path) -> Tracks:
    """Keypoints and tracks from the matches of all pairs, which were made at this size from this folder."""
    if isinstance(keypoints, Grid):
        return quantised_tracks(matches, resize, cell_size=keypoints.cell_size, max_error=keypoints.max_error)
    return sharpen_tracks(build_tracks(matches, resize, keypoints), images, resize)


def _mapped(report: ReconstructionReport, output: Path, images: Path, threads: int) -> list[Any]:
    shutil.rmtree(output / "sparse", ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".mapping-") as folder:
        models = map_incrementally(output / "database.db", images, Path(folder), threads=threads)
    if not models:
        raise FileError(
            f"{output}: no model: too few images show enough of the same scene ({report.verified_matches} verified "
            "matches). Matches and database are kept. Pass more images with more overlap, or more pairs."
        )
    return models


def _write_models(report: ReconstructionReport, models: list[Any], output: Path, images: Path) -> None:
    for number, model in enumerate(models):
        place = output / "sparse" / str(number)
        place.mkdir(parents=True)
        color_points(model, images)
        model.write(place)
    best = models[0]
    report.models = [model.num_reg_images() for model in models]
    report.registered, report.points = best.num_reg_images(), best.num_points3D()
    report.mean_track_length = best.compute_mean_track_length()
    report.reprojection_error = best.compute_mean_reprojection_error()
    draw_model(best, output / "reconstruction.png")


@contextlib.contextmanager
def _step(report: ReconstructionReport, output: Path, name: str) -> Iterator[None]:
    """Take the time of a step, and keep the report up to date."""
    start = time.perf_counter()
    report.note = f"ended during {name}"
    try:
        yield
    except (FileError, ArgumentError) as error:
        report.note = str(error)
        raise
    finally:
        report.seconds[name] = round(time.perf_counter() - start, 3)
        _write_report(report, output)


def _write_report(report: ReconstructionReport, output: Path) -> None:
    text = json.dumps(dataclasses.asdict(report), indent=1) + "\n"
    with contextlib.suppress(OSError):  # a full disk is told by what could not be written before
        write_file(output / "report.json", text.encode())
