# SPDX-License-Identifier: Apache-2.0
"""Tracks into COLMAP's database, and from there to a sparse model, through pycolmap.

Source: Schonberger, Frahm: "Structure-from-Motion Revisited", CVPR 2016.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.reconstruction.cameras import PhotoCamera
from eloftr_ops.reconstruction.tracks import Tracks

__all__ = [
    "adjust_model",
    "check_camera_model",
    "map_incrementally",
    "require_pycolmap",
    "triangulate",
    "verify_pairs",
    "write_database",
]

_SEED = 0
_LEAST_SHARED = 5  # images of one camera whose principal point is looked for
_CENTRAL = 0.05  # of the long side: how far a principal point may lie from the middle
_LEAST_SCALE = 0.05  # pixels
_ROUNDS = 50  # of the last adjustment, at most


def require_pycolmap() -> ModuleType:
    """The package pycolmap.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        import pycolmap
    except ImportError as error:
        raise ArgumentError(
            "output", "COLMAP needs the package pycolmap. Install it with pip install 'eloftr-ops[sfm]'."
        ) from error
    return pycolmap


def check_camera_model(name: str) -> None:
    """Refuse a camera model that COLMAP does not know.

    Raises:
        ArgumentError: it does not.
    """
    known = set(require_pycolmap().CameraModelId.__members__) - {"INVALID"}
    if name not in known:
        raise ArgumentError("camera_model", f"expected one of {', '.join(sorted(known))}, got {name}.")


def write_database(
    path: Path, tracks: Tracks, cameras: Mapping[str, PhotoCamera], *, camera_model: str = "SIMPLE_RADIAL"
) -> dict[str, int]:
    """Write cameras, keypoints and matches into a new database.

    Convention:
        COLMAP puts the centre of the first pixel at (0.5, 0.5), as this project does: keypoints go in as they are.

    Args:
        path: a database that is there is replaced.
        tracks: keypoints and matches.
        cameras: of each image. Images of equal cameras share one.
        camera_model: of COLMAP, such as "SIMPLE_RADIAL", "PINHOLE" or "OPENCV".

    Returns:
        COLMAP's number of each image.

    Raises:
        ArgumentError: no such camera model, or pycolmap is not installed.
        FileError: the database cannot be written.
    """
    pycolmap = require_pycolmap()
    check_camera_model(camera_model)
    try:
        for leftover in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))):
            leftover.unlink(missing_ok=True)
        with (
            quiet(pycolmap),
            pycolmap.Database.open(path) as database,
            pycolmap.DatabaseTransaction(database),
        ):
            ids = _write_images(pycolmap, database, tracks, cameras, camera_model)
            for name, keypoints in zip(tracks.names, tracks.keypoints, strict=True):
                database.write_keypoints(ids[name], np.ascontiguousarray(keypoints, np.float32))
            for (first, second), matches in tracks.pairs.items():
                if len(matches):
                    rows = np.ascontiguousarray(matches, np.uint32)
                    database.write_matches(ids[first], ids[second], rows)
    except (OSError, RuntimeError) as error:
        reason = str(error).rstrip(".")
        raise FileError(f"{path}: cannot be written: {reason}. Look whether the disk is full.") from error
    return ids


def verify_pairs(path: Path, *, threads: int = -1) -> int:
    """Keep the matches of each pair that one two-view geometry explains; COLMAP's RANSAC. How many are kept."""
    pycolmap = require_pycolmap()
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.random_seed = _SEED
    verifier = pycolmap.GeometricVerifierOptions()
    verifier.num_threads = threads
    with quiet(pycolmap):
        pycolmap.geometric_verification(path, verifier, two_view_geometry_options=options)
        with pycolmap.Database.open(path) as database:
            return int(database.num_inlier_matches())


def map_incrementally(
    database: Path, images: Path, output: Path, *, threads: int = -1, least_images: int = 3
) -> list[Any]:
    """Models from a verified database, the one with most images first; written to ``output/0``, ``output/1``, ...

    Args:
        database: of `verify_pairs`.
        images: folder of the images.
        output: folder, made if need be.
        threads: of the mapper; -1: all.
        least_images: of a model.
    """
    pycolmap = require_pycolmap()
    output.mkdir(parents=True, exist_ok=True)
    options = _options(pycolmap, threads)
    options.min_model_size = least_images
    with quiet(pycolmap):
        models = pycolmap.incremental_mapping(database, images, output, options)
    large = [model for model in models.values() if model.num_reg_images() >= least_images]
    return sorted(large, key=lambda model: (-model.num_reg_images(), -model.num_points3D()))


def triangulate(model: Any, database: Path, *, threads: int = -1) -> Any:
    """The model with the points of a verified database in place of its own; its cameras stay.

    Where the database gives none, the model stays as it is.

    Args:
        model: of `map_incrementally`. The database has the same images under the same numbers.
        database: of `verify_pairs`.
        threads: -1: all.
    """
    pycolmap = require_pycolmap()
    with quiet(pycolmap), tempfile.TemporaryDirectory() as folder:
        options = _options(pycolmap, threads)
        found = pycolmap.triangulate_points(copy.deepcopy(model), database, folder, folder, options=options)
    return found if found.num_points3D() else model


def adjust_model(model: Any, *, threads: int = -1) -> Any:
    """The model after all of it, points, poses and intrinsics, was adjusted together once more.

    Two things are other than in the mapper. Observations that do not fit count less (Cauchy's weights, whose scale is
    the mean reprojection error): wrong ones bend a long row of cameras. And principal points are looked for, as
    COLMAP's manual advises for a complete model, where at least five images share each camera: if it is held at the
    middle of the image and is not there, all centres move. One that ends far from the middle is not believed.
    """
    pycolmap = require_pycolmap()
    shared = collections.Counter(image.camera_id for image in model.images.values() if image.has_pose)
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
    options.ceres.loss_function_scale = max(model.compute_mean_reprojection_error(), _LEAST_SCALE)
    options.ceres.solver_options.max_num_iterations = _ROUNDS
    options.ceres.solver_options.num_threads = threads
    for refine in (True, False) if min(shared.values()) >= _LEAST_SHARED else (False,):
        options.refine_principal_point = refine
        adjusted = copy.deepcopy(model)
        config = pycolmap.BundleAdjustmentConfig()
        config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
        for image in adjusted.images.values():
            if image.has_pose:
                config.add_image(image.image_id)
        with quiet(pycolmap):
            pycolmap.create_default_bundle_adjuster(options, config, adjusted).solve()
        adjusted.update_point_3d_errors()
        if all(_is_central(adjusted.cameras[camera]) for camera in shared):
            break
    return adjusted


def _is_central(camera: Any) -> bool:
    away = max(abs(camera.principal_point_x - camera.width / 2), abs(camera.principal_point_y - camera.height / 2))
    return bool(away <= _CENTRAL * max(camera.width, camera.height))


def _options(pycolmap: ModuleType, threads: int) -> Any:
    options = pycolmap.IncrementalPipelineOptions()
    options.num_threads = threads
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = _SEED
    options.extract_colors = False  # it would look into images that are not turned upright
    return options


@contextlib.contextmanager
def quiet(pycolmap: ModuleType) -> Iterator[None]:
    """Without COLMAP's running commentary."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before


def _write_images(
    pycolmap: ModuleType, database: Any, tracks: Tracks, cameras: Mapping[str, PhotoCamera], model: str
) -> dict[str, int]:
    """Each image with its camera; images of one camera have its rig and a frame of their own."""
    ids: dict[str, int] = {}
    known: dict[PhotoCamera, tuple[int, int]] = {}
    for name in tracks.names:
        photo = cameras[name]
        if photo not in known:
            width, height = photo.size_wh
            camera = pycolmap.Camera.create_from_model_name(0, model, photo.start_focal, width, height)
            camera.has_prior_focal_length = photo.focal is not None
            camera = database.read_camera(database.write_camera(camera))
            rig = pycolmap.Rig()
            rig.add_ref_sensor(camera.sensor_id)
            known[photo] = camera.camera_id, database.write_rig(rig)
        camera_id, rig_id = known[photo]
        image = database.read_image(database.write_image(pycolmap.Image(name=name, camera_id=camera_id)))
        frame = pycolmap.Frame()
        frame.rig_id = rig_id
        frame.add_data_id(image.data_id)
        database.write_frame(frame)
        ids[name] = image.image_id
    return ids
