# SPDX-License-Identifier: Apache-2.0
"""Matches that cameras explain, and the last adjustment of a model, on a scene with known cameras."""

import copy
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch

from eloftr_ops.reconstruction.cameras import PhotoCamera
from eloftr_ops.reconstruction.colmap import adjust_model, map_incrementally, quiet, verify_pairs, write_database
from eloftr_ops.reconstruction.second_look import explained_matches, look_again
from eloftr_ops.reconstruction.tracks import build_tracks
from support.photographs import Photographs, photographs

SIZE_WH = (160, 120)


@pytest.fixture(scope="module")
def scene() -> Photographs:
    return photographs(5, SIZE_WH)


@pytest.fixture(scope="module")
def cameras(scene: Photographs) -> dict[str, PhotoCamera]:
    return dict.fromkeys(scene.names, PhotoCamera(SIZE_WH, "", "", float(scene.K[0, 0])))


@pytest.fixture(scope="module")
def database(scene: Photographs, cameras: dict[str, PhotoCamera], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("colmap") / "database.db"
    write_database(path, build_tracks(scene.matches(), 160), cameras, camera_model="SIMPLE_PINHOLE")
    verify_pairs(path, threads=1)
    return path


@pytest.fixture(scope="module")
def model(database: Path) -> pycolmap.Reconstruction:
    (found,) = map_incrementally(database, database.parent, database.parent / "sparse", threads=1)
    return found


def test_matches_beside_the_epipolar_lines_are_left_out(scene: Photographs, model: pycolmap.Reconstruction) -> None:
    right, wrong = scene.matches(), scene.matches(wrong=0.5)
    for exact, found, explained in zip(right, wrong, explained_matches(wrong, [model], 160), strict=True):
        moved = np.linalg.norm(exact.keypoints1 - found.keypoints1, axis=1) > 0.1
        kept = {tuple(point) for point in explained.keypoints0}
        assert all(tuple(point) in kept for point in found.keypoints0[~moved])
        # A place anywhere lies within 2 px of a line by chance: a band of 4 to 6 px of 120 to 160.
        assert np.mean([tuple(point) in kept for point in found.keypoints0[moved]]) < 0.15
        assert len(explained.keypoints0) == len(explained.keypoints1) == len(explained.confidence)


def test_pairs_without_cameras_stay(scene: Photographs, model: pycolmap.Reconstruction) -> None:
    other = scene.matches(wrong=0.5)[0]._replace(pair=("00.png", "elsewhere.png"))
    assert explained_matches([other], [model], 160)[0] is other
    assert explained_matches([other], [], 160)[0] is other


def test_errors_are_in_pixels_as_matched(scene: Photographs, model: pycolmap.Reconstruction) -> None:
    """3 px of the originals are less than 2 px of images that were matched at half of the size."""
    pair = scene.matches()[0]
    off = pair._replace(keypoints1=pair.keypoints1 + np.array([0, 3], np.float32))  # lines are nearly horizontal
    assert len(explained_matches([off], [model], 0)[0].confidence) < 0.3 * len(off.confidence)
    assert len(explained_matches([off], [model], 80)[0].confidence) > 0.9 * len(off.confidence)


def test_a_second_look_is_without_the_wrong_matches(
    scene: Photographs, cameras: dict[str, PhotoCamera], database: Path, model: pycolmap.Reconstruction
) -> None:
    wrong = scene.matches(wrong=0.3)
    (again,), tracks = look_again(
        [copy.deepcopy(model)],
        wrong,
        lambda matches: build_tracks(matches, 160),
        database,
        cameras,
        resize=160,
        camera_model="SIMPLE_PINHOLE",
        threads=1,
    )
    assert again.num_reg_images() == 5
    assert tracks.report.matches < 0.8 * sum(len(found.confidence) for found in wrong)
    assert again.compute_mean_track_length() > 3.5
    assert again.compute_mean_reprojection_error() < 0.3


def test_the_last_adjustment_finds_the_principal_point(
    model: pycolmap.Reconstruction, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of cameras whose image is cut at one side, so that the middle of the image is not the middle of the lens."""
    cut = copy.deepcopy(model)
    camera = next(iter(cut.cameras.values()))
    true = camera.params.copy()
    camera.params = true + np.array([0, 3, -3])
    adjusted = adjust_model(cut, threads=1)
    found = next(iter(adjusted.cameras.values())).params
    assert np.abs(found - true)[1:].max() < 1.0
    np.testing.assert_array_equal(camera.params, true + np.array([0, 3, -3]))  # the model itself stays
    assert capfd.readouterr().err == ""  # COLMAP's commentary is left out


def test_few_images_leave_the_principal_point_in_the_middle(model: pycolmap.Reconstruction) -> None:
    few = copy.deepcopy(model)
    few.deregister_frame(next(image.frame_id for image in few.images.values()))
    camera = next(iter(adjust_model(few, threads=1).cameras.values()))
    np.testing.assert_array_equal(camera.params[1:], [80, 60])


def test_wrong_observations_bend_the_cameras_less(model: pycolmap.Reconstruction) -> None:
    spoilt = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for image in spoilt.images.values():
        for point in image.points2D:
            if point.has_point3D() and torch.rand(1, generator=generator) < 0.1:
                point.xy = point.xy + np.array([4.0, 0])
    plain = copy.deepcopy(spoilt)
    with quiet(pycolmap):
        pycolmap.bundle_adjustment(plain)
    off = [
        max(
            np.linalg.norm(found.images[k].projection_center() - model.images[k].projection_center())
            for k in model.images
        )
        for found in (adjust_model(spoilt, threads=1), plain)
    ]
    assert off[0] < 0.5 * off[1]
