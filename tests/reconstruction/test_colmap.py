# SPDX-License-Identifier: Apache-2.0
"""COLMAP's database and mapper: known cameras are found again; EXIF data; the whole command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pycolmap
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from eloftr_ops.cli import app
from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.reconstruction.cameras import PhotoCamera, read_camera
from eloftr_ops.reconstruction.colmap import map_incrementally, verify_pairs, write_database
from eloftr_ops.reconstruction.tracks import build_tracks
from support.photographs import Photographs, photographs


def camera_errors(model: Any, scene: Photographs) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Distances of the camera centres after a similarity, in units of the scene, and angles in degrees."""
    images = [image for image in model.images.values() if image.has_pose]
    true = scene.T[[scene.names.index(image.name) for image in images]].numpy()
    R = np.array([image.cam_from_world().rotation.matrix() for image in images])
    found = np.array([image.projection_center() for image in images])
    centres = -(np.swapaxes(true[:, :3, :3], 1, 2) @ true[:, :3, 3:])[:, :, 0]
    U, _, Vt = np.linalg.svd((np.swapaxes(true[:, :3, :3], 1, 2) @ R).mean(0))
    turn = U @ Vt  # by the rotations: the centres are nearly on a line
    offsets = (found - found.mean(0)) @ turn.T
    scale = (offsets * (centres - centres.mean(0))).sum() / np.square(offsets).sum()
    moved = scale * offsets + centres.mean(0)
    cosine = (np.trace(R @ turn.T @ np.swapaxes(true[:, :3, :3], 1, 2), axis1=1, axis2=2) - 1) / 2
    return np.linalg.norm(moved - centres, axis=1), np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def test_known_cameras_are_found_again(tmp_path: Path) -> None:
    """From exact matches, focal length known: what is left is the affine approximation, 0.06 px in the median."""
    scene = photographs(4, (160, 120))
    tracks = build_tracks(scene.matches(), 160)
    focal = float(scene.K[0, 0])
    cameras = dict.fromkeys(scene.names, PhotoCamera((160, 120), "", "", focal))
    database = tmp_path / "database.db"
    write_database(database, tracks, cameras, camera_model="SIMPLE_PINHOLE")
    with pycolmap.Database.open(database) as opened:
        assert (opened.num_cameras(), opened.num_images()) == (1, 4)
        first = opened.read_image_with_name("00.png").image_id
        np.testing.assert_array_equal(opened.read_keypoints(first), tracks.keypoints[0])
        assert opened.read_camera(1).has_prior_focal_length
    assert verify_pairs(database, threads=1) > 0.8 * sum(len(rows) for rows in tracks.pairs.values())
    (model,) = map_incrementally(database, tmp_path, tmp_path / "sparse", threads=1)
    assert model.num_reg_images() == 4
    centres, angles = camera_errors(model, scene)
    assert centres.max() < 0.02  # of cameras 4 away from the scene
    assert angles.max() < 0.2
    assert model.compute_mean_reprojection_error() < 0.2
    # A database of another run is replaced, not added to.
    write_database(database, tracks, cameras)
    with pycolmap.Database.open(database) as opened:
        assert opened.num_images() == 4


def exif_image(path: Path, tags: dict[int, Any], details: dict[int, Any], size: tuple[int, int] = (60, 40)) -> Path:
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    exif.get_ifd(0x8769).update(details)
    Image.new("L", size).save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    ("details", "focal"),
    [
        ({0xA405: 28}, 28 * 72.111 / 43.267),  # 35 mm equivalent, by the diagonal
        ({0x920A: 5.0, 0xA20E: 100.0, 0xA210: 3}, 50.0),  # 5 mm at 100 pixels per cm
        ({0x920A: 5.0, 0xA20E: 254.0, 0xA210: 2, 0xA002: 120, 0xA003: 80}, 25.0),  # a copy of half the size
        ({0x920A: 5.0}, None),
        ({0xA405: 0}, None),
        ({0xA405: 65535}, None),  # no lens
        ({}, None),
    ],
)
def test_focal_lengths_of_exif_data(tmp_path: Path, details: dict[int, Any], focal: float | None) -> None:
    camera = read_camera(exif_image(tmp_path / "a.jpg", {0x010F: "Maker", 0x0110: "One"}, details))
    assert camera[:3] == ((60, 40), "Maker", "One")
    assert camera.focal == (None if focal is None else pytest.approx(focal, rel=1e-3))
    assert camera.start_focal == pytest.approx(72 if focal is None else focal, rel=1e-3)


def test_a_turned_photograph_has_the_size_of_the_upright_image(tmp_path: Path) -> None:
    assert read_camera(exif_image(tmp_path / "a.jpg", {0x0112: 6}, {})).size_wh == (40, 60)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    with pytest.raises(FileError, match=r"b\.jpg: cannot be read"):
        read_camera(tmp_path / "b.jpg")


def test_images_of_two_cameras_have_two_cameras(tmp_path: Path) -> None:
    scene = photographs(4, (128, 96))
    tracks = build_tracks(scene.matches(), 128)
    cameras = {
        name: PhotoCamera((128, 96), "Maker", "One" if k < 2 else "Two", 100.0 if k < 2 else None)
        for k, name in enumerate(scene.names)
    }
    write_database(tmp_path / "database.db", tracks, cameras)
    with pycolmap.Database.open(tmp_path / "database.db") as opened:
        found = {image.name: opened.read_camera(image.camera_id) for image in opened.read_all_images()}
    assert [found[name].camera_id for name in scene.names] == [1, 1, 2, 2]
    assert [found[name].has_prior_focal_length for name in scene.names] == [True, True, False, False]
    assert found["03.png"].params[0] == pytest.approx(1.2 * 128)
    with pytest.raises(ArgumentError, match="camera_model: expected one of"):
        write_database(tmp_path / "database.db", tracks, cameras, camera_model="CAMERA")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["reconstruct", *(str(argument) for argument in arguments)])


def test_the_command_reconstructs_rendered_photographs(tmp_path: Path) -> None:
    """With the embedded weights."""
    scene = photographs(4, (192, 144))
    scene.save(tmp_path / "photos")
    result = run(tmp_path / "photos", "-o", tmp_path / "out", "--devices", "cpu", "--camera-model", "SIMPLE_PINHOLE")
    assert result.exit_code == 0, result.stderr
    assert "registered   4 of 4 images" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"]
    assert set(report["seconds"]) == {"matching", "tracks", "verification", "mapping", "refinement"}
    assert report["mean_track_length"] > 3
    assert report["reprojection_error"] < 0.7
    with Image.open(tmp_path / "out" / "reconstruction.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100  # points are drawn in their colours
    model = pycolmap.Reconstruction(tmp_path / "out" / "sparse" / "0")
    centres, angles = camera_errors(model, scene)
    assert np.median(centres) < 0.1
    assert np.median(angles) < 0.5


def test_photographs_of_nothing_in_common_are_an_error_and_what_was_found_is_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(2):
        noise = rng.integers(0, 255, (64, 64)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
    result = run(tmp_path / "photos", "-o", tmp_path / "out", "--devices", "cpu")
    assert result.exit_code == 2
    assert "no model: too few images" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "out" / "matches.h5").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not report["complete"]
    assert "no model" in report["note"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--camera-model", "CAMERA"), "--camera-model: expected one of"),
        (("--max-error", "2"), "--max-error: it needs --cell-size"),
        ((), "no image in this folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    (tmp_path / "photos").mkdir()
    result = run(tmp_path / "photos", "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
