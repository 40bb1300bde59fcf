# SPDX-License-Identifier: Apache-2.0
"""Each exporter with a known camera: what the program reads leads back to the true rays, to the half pixel."""

import gzip
import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pycolmap
import pytest
import torch
from typer.testing import CliRunner

from eloftr_ops.cli import app
from eloftr_ops.errors import FileError
from eloftr_ops.reconstruction.cameras import PhotoCamera
from eloftr_ops.reconstruction.exporters import export_tracks
from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.match_file import write_match_file
from eloftr_ops.reconstruction.tracks import TrackReport, Tracks
from support.pair_files import save_image

SIZE_WH = (200, 100)
FOCAL = 150.0
NAMES = ["sub/a.png", "b.png"]
# Points of the scene in front of a camera in the middle; the second camera is moved along x.
POINTS = np.array([[0.1, 0.2, 2.0], [-0.5, 0.1, 3.0], [0.4, -0.3, 2.5]])
RAYS = [POINTS[:, :2] / POINTS[:, 2:], (POINTS[:, :2] - [0.2, 0]) / POINTS[:, 2:]]
CAMERAS = dict.fromkeys(NAMES, PhotoCamera(SIZE_WH, "", "", FOCAL))
TOLERANCE = 1e-6  # of a ray; half a pixel is 3e-3


def tracks(names: list[str] = NAMES) -> Tracks:
    """The keypoints of a camera whose principal point is the middle of the image, [0, W] x [0, H]."""
    keypoints = [(FOCAL * rays + np.array(SIZE_WH) / 2).astype(np.float32) for rays in RAYS]
    keypoints[1] = keypoints[1][::-1]  # another order in the second image
    order = np.array([[0, 2], [1, 1], [2, 0]])
    scores = [np.ones(3, np.float32)] * 2
    report = TrackReport(3, 3, 3, 2.0, 0.0, 0.0)
    numbers = [np.arange(3), np.arange(3)[::-1]]
    return Tracks(names, [SIZE_WH] * 2, keypoints, scores, numbers, {(names[0], names[1]): order}, report)


def assert_rays(points: npt.NDArray[np.floating], principal_point: tuple[float, float], image: int) -> None:
    rays = (points - np.array(principal_point)) / FOCAL
    np.testing.assert_allclose(rays, RAYS[0] if image == 0 else RAYS[1][::-1], atol=TOLERANCE)


def test_colmap(tmp_path: Path) -> None:
    (path,) = export_tracks("colmap", tmp_path, tracks(), CAMERAS)
    with pycolmap.Database.open(path) as database:
        for k, name in enumerate(NAMES):
            image = database.read_image_with_name(name)
            camera = database.read_camera(image.camera_id)
            points = database.read_keypoints(image.image_id)[:, :2].astype(np.float64)
            rays = camera.cam_from_img(points)  # by COLMAP's own intrinsics: principal point W / 2, H / 2
            np.testing.assert_allclose(rays, RAYS[0] if k == 0 else RAYS[1][::-1], atol=TOLERANCE)
        ids = [database.read_image_with_name(name).image_id for name in NAMES]
        assert database.read_matches(*ids).tolist() == [[0, 2], [1, 1], [2, 0]]


def test_hloc(tmp_path: Path) -> None:
    """As hloc reads it: 0.5 is added to the keypoints, and COLMAP's principal point is the middle of the image."""
    export_tracks("hloc", tmp_path, tracks(), CAMERAS)
    with h5py.File(tmp_path / "features.h5") as file:
        for k, name in enumerate(NAMES):
            assert_rays(file[name]["keypoints"][()] + 0.5, (100, 50), k)
    with h5py.File(tmp_path / "matches.h5") as file:
        matches = file["sub-a.png/b.png"]["matches0"][()]
        assert matches.tolist() == [2, 1, 0]
        assert file["sub-a.png/b.png"]["matching_scores0"].shape == (3,)
    assert (tmp_path / "pairs.txt").read_text() == "sub/a.png b.png\n"


def test_opensfm(tmp_path: Path) -> None:
    """Its cameras have the focal length in long sides, and rays are normalised coordinates divided by it."""
    export_tracks("opensfm", tmp_path, tracks(), CAMERAS)
    for k, name in enumerate(NAMES):
        features = np.load(tmp_path / "features" / f"{name}.features.npz")
        rays = features["points"][:, :2] / (FOCAL / 200)
        np.testing.assert_allclose(rays, RAYS[0] if k == 0 else RAYS[1][::-1], atol=TOLERANCE)
        assert features["points"].shape == (3, 4)
        assert features["OPENSFM_FEATURES_VERSION"] == 1
    matches = pickle.loads(gzip.decompress((tmp_path / "matches" / "sub/a.png_matches.pkl.gz").read_bytes()))
    assert matches["b.png"].tolist() == [[0, 2], [1, 1], [2, 0]]
    assert pickle.loads(gzip.decompress((tmp_path / "matches" / "b.png_matches.pkl.gz").read_bytes())) == {}


def test_openmvg(tmp_path: Path) -> None:
    export_tracks("openmvg", tmp_path, tracks(), CAMERAS)
    data = json.loads((tmp_path / "sfm_data.json").read_text())
    (intrinsic,) = (entry["value"]["ptr_wrapper"]["data"] for entry in data["intrinsics"])
    assert intrinsic["focal_length"] == FOCAL
    views = [entry["value"]["ptr_wrapper"]["data"] for entry in data["views"]]
    assert [(view["local_path"], view["filename"]) for view in views] == [("sub", "a.png"), ("", "b.png")]
    for k, view in enumerate(views):
        lines = (tmp_path / f"{Path(view['filename']).stem}.feat").read_text().splitlines()
        points = np.array([[float(value) for value in line.split()[:2]] for line in lines])
        assert_rays(points, intrinsic["principal_point"], k)
        # The middle of the image, where integer centres put it.
        assert intrinsic["principal_point"] == [99.5, 49.5]
        assert (tmp_path / f"{Path(view['filename']).stem}.desc").stat().st_size == 8 + 3 * 128
    assert (tmp_path / "matches.putative.txt").read_text() == "0 1\n3\n0 2\n1 1\n2 0\n"
    names = ["sub/a.png", "other/a.png"]
    cameras = dict.fromkeys(names, CAMERAS["b.png"])
    with pytest.raises(FileError, match="a: two images of this name"):
        export_tracks("openmvg", tmp_path, tracks(names), cameras)


@pytest.mark.parametrize("program", ["colmap", "hloc", "opensfm", "openmvg"])
def test_the_command(tmp_path: Path, program: str) -> None:
    picture = torch.rand(40, 60)
    save_image(tmp_path / "a.png", picture)
    save_image(tmp_path / "b.png", picture.roll((1, 1), (0, 1)))
    points = np.array([[10.5, 20.5], [30.25, 30.75]], np.float32)
    pair = PairMatches(("a.png", "b.png"), points, points + 1, np.ones(2, np.float32), (60, 40), (60, 40))
    write_match_file(tmp_path / "m.h5", [pair], {"resize": 640})
    command = [
        "export-matches",
        tmp_path / "m.h5",
        "--images",
        tmp_path,
        "-o",
        tmp_path / "out",
        "--to",
        program,
    ]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.stderr
    assert "4 of 2 images" in result.stdout
    assert any((tmp_path / "out").iterdir())
    (tmp_path / "m.h5").write_bytes(b"no matches")
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 2
    assert "m.h5: not a file of matches" in result.stderr
