# SPDX-License-Identifier: Apache-2.0
"""The ScanNet test layout, on one pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eloftr_ops.data.labelled import PairOptions
from eloftr_ops.data.scannet import ScanNetPairs
from eloftr_ops.io import FileError
from support.pair_files import Truth, integer_centers, rendered, save_image

SCENE = "scene0707_00"
SIZE_WH = (64, 48)


def make_set(root: Path, truth: Truth, *, rel_pose: bool = True) -> None:
    """Frames 15 and 585; intrinsics as of camera 0 for both, in ScanNet's frame; a second pair with a missing frame."""
    to_world = np.eye(4)
    to_world[:3, 3] = (3.0, 1.0, 2.0)
    T_0to1 = truth.T_0to1.double().numpy()
    for side, frame, pose in ((0, 15, to_world), (1, 585, to_world @ np.linalg.inv(T_0to1))):
        save_image(root / SCENE / "color" / f"{frame}.jpg", truth.images[side])
        for kind in ("pose", "depth"):
            (root / SCENE / kind).mkdir(exist_ok=True)
        np.savetxt(root / SCENE / "pose" / f"{frame}.txt", pose, fmt="%.17g")
        millimetres = (truth.depths[side] * 1000).round().numpy().astype(np.uint16)
        Image.fromarray(millimetres).save(root / SCENE / "depth" / f"{frame}.png")
    arrays = {"name": np.array([[707, 0, 15, 585], [707, 0, 15, 99], [708, 0, 15, 585]], dtype=np.uint16)}
    if rel_pose:
        arrays["rel_pose"] = np.stack([T_0to1[:3].ravel()] * 3)
    np.savez(root / "test.npz", **arrays)
    np.savez(root / "intrinsics.npz", **{SCENE: integer_centers(truth.K[0])})


@pytest.mark.parametrize("rel_pose", [True, False], ids=["relative", "files"])
def test_pose_from_the_index_or_from_files(tmp_path: Path, rel_pose: bool) -> None:
    truth = rendered()
    make_set(tmp_path, truth, rel_pose=rel_pose)
    pairs = ScanNetPairs(tmp_path, intrinsics_size_wh=SIZE_WH)
    assert len(pairs) == 3
    pair = pairs.load(0)
    torch.testing.assert_close(pair.T_0to1, truth.T_0to1, atol=1e-5, rtol=1e-5)
    assert (pair.image0[0] - truth.images[0]).abs().mean() < 0.1  # JPEG
    assert pair.depth0 is None


def test_intrinsics_move_from_integer_centers(tmp_path: Path) -> None:
    truth = rendered()
    make_set(tmp_path, truth)
    pair = ScanNetPairs(tmp_path, intrinsics_size_wh=SIZE_WH).load(0)
    torch.testing.assert_close(pair.K0, truth.K[0])


def test_intrinsics_are_scaled_to_the_image(tmp_path: Path) -> None:
    truth = rendered()
    make_set(tmp_path, truth)
    pair = ScanNetPairs(tmp_path, intrinsics_size_wh=(128, 96)).load(0)
    # 0.5 is added in the frame of the intrinsics, before the scale: that is what the two frames have in common.
    expected = torch.diag(torch.tensor([0.5, 0.5, 1.0])) @ truth.K[0]
    torch.testing.assert_close(pair.K0, expected)


def test_depth_in_millimetres(tmp_path: Path) -> None:
    truth = rendered()
    make_set(tmp_path, truth)
    options = PairOptions(min_overlap=None)  # camera 1 has other intrinsics than the file gives it
    pair = ScanNetPairs(tmp_path, intrinsics_size_wh=SIZE_WH, depth=True, options=options).load(0)
    shallow = truth.depths[0] < 65
    torch.testing.assert_close(pair.depth0[shallow], truth.depths[0][shallow], atol=6e-4, rtol=0)


def test_broken_pairs_are_skipped_or_named(tmp_path: Path) -> None:
    make_set(tmp_path, rendered(), rel_pose=False)
    pairs = ScanNetPairs(tmp_path, intrinsics_size_wh=SIZE_WH)
    with pytest.warns(UserWarning, match="2 of 3 pairs skipped"):
        assert len(list(pairs)) == 1
    assert "99.jpg" in pairs.skipped[1]
    assert "scene0708_00" in pairs.skipped[2]
    strict = ScanNetPairs(tmp_path, intrinsics_size_wh=SIZE_WH, options=PairOptions(strict=True))
    with pytest.raises(FileError, match=r"99\.jpg"):
        strict[1]
    np.savetxt(tmp_path / SCENE / "pose" / "15.txt", np.full((4, 4), -np.inf))
    with pytest.raises(FileError, match=r"15\.txt"):
        strict[0]
    wide = ScanNetPairs(tmp_path, intrinsics_size_wh=(640, 360))
    with pytest.raises(FileError, match=r"15\.jpg.*640 x 360.*64 x 48"):
        wide.load(0)


def test_a_broken_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"test\.npz"):
        ScanNetPairs(tmp_path)
    np.savez(tmp_path / "test.npz", name=np.zeros((3, 2)))
    with pytest.raises(FileError, match=r"test\.npz.*\(3, 2\)"):
        ScanNetPairs(tmp_path)
    np.savez(tmp_path / "test.npz", name=np.zeros((3, 4)))
    with pytest.raises(FileError, match=r"intrinsics\.npz"):
        ScanNetPairs(tmp_path)
