# SPDX-License-Identifier: Apache-2.0
"""The MegaDepth layout, on a set of three images."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from eloftr_ops.data.labelled import PairOptions
from eloftr_ops.data.megadepth import MegaDepthPairs
from eloftr_ops.io import FileError
from support.pair_files import Truth, objects, rendered, save_image

IMAGES = "Undistorted_SfM/0015/images"
DEPTHS = "phoenix/S6/zl548/MegaDepth_v1/0015/dense0/depths"


def make_set(root: Path, truth: Truth) -> Path:
    """Images 0 and 1 of the scene, a missing image 2, and an index of four pairs with object arrays."""
    for side in (0, 1):
        save_image(root / IMAGES / f"{side}.png", truth.images[side])
        path = root / DEPTHS / f"{side}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["depth"] = truth.depths[side].numpy()
    world_to_0 = np.eye(4)
    world_to_0[:3, 3] = (1.0, 2.0, 3.0)
    world_to_1 = truth.T_0to1.double().numpy() @ world_to_0
    index = root / "scene_info" / "0015.npz"
    index.parent.mkdir()
    central = np.zeros((2, 4))
    np.savez(
        index,
        image_paths=objects(f"{IMAGES}/0.png", f"{IMAGES}/1.png", None),
        depth_paths=objects(f"{DEPTHS}/0.h5", f"{DEPTHS}/1.h5", None),
        intrinsics=objects(truth.K[0].double().numpy(), truth.K[1].double().numpy(), None),
        poses=objects(world_to_0, world_to_1, None),
        pair_infos=objects(
            (np.array([0, 1]), 0.6, central),
            (np.array([1, 0]), 0.5, central),
            ((0, 2), 0.5, None),
            ((0, 0), 0.05, None),
        ),
    )
    return index


def test_pairs_have_the_scene_s_geometry(tmp_path: Path) -> None:
    truth = rendered()
    pairs = MegaDepthPairs(tmp_path, make_set(tmp_path, truth))
    assert len(pairs) == 4
    pair = pairs[0]
    torch.testing.assert_close(pair.T_0to1, truth.T_0to1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pair.depth0, truth.depths[0])
    torch.testing.assert_close(pair.depth1, truth.depths[1])
    torch.testing.assert_close(pair.image1[0], truth.images[1], atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(pairs[1].T_0to1, torch.linalg.inv(truth.T_0to1), atol=1e-5, rtol=1e-5)


def test_colmap_intrinsics_are_in_the_project_s_frame(tmp_path: Path) -> None:
    truth = rendered()
    pair = MegaDepthPairs(tmp_path, make_set(tmp_path, truth)).load(0)
    torch.testing.assert_close(pair.K0, truth.K[0])
    torch.testing.assert_close(pair.K1, truth.K[1])


def test_scores_select(tmp_path: Path) -> None:
    index = make_set(tmp_path, rendered())
    assert len(MegaDepthPairs(tmp_path, index, min_score=0.4)) == 3
    assert len(MegaDepthPairs(tmp_path, index, min_score=0.4, max_score=0.55)) == 2
    with pytest.raises(ValueError, match="min_score"):
        MegaDepthPairs(tmp_path, index, min_score=0.9)


def test_a_folder_and_a_list_of_index_files(tmp_path: Path) -> None:
    index = make_set(tmp_path, rendered())
    assert len(MegaDepthPairs(tmp_path, index.parent)) == 4
    assert len(MegaDepthPairs(tmp_path, [index, index])) == 8
    with pytest.raises(ValueError, match="scene_info"):
        MegaDepthPairs(tmp_path, tmp_path)


def test_broken_pairs_are_skipped_or_named(tmp_path: Path) -> None:
    index = make_set(tmp_path, rendered())
    pairs = MegaDepthPairs(tmp_path, index)
    with pytest.warns(UserWarning, match=r"1 of 4 pairs skipped.*0015\.npz: .*\[2\]"):
        assert len(list(pairs)) == 3
    strict = MegaDepthPairs(tmp_path, index, options=PairOptions(strict=True))
    with pytest.raises(FileError, match=r"0015\.npz"):
        strict[2]
    (tmp_path / DEPTHS / "1.h5").unlink()
    with pytest.raises(FileError, match=r"1\.h5: no such depth map"):
        strict[0]
    (tmp_path / DEPTHS / "1.h5").write_bytes(b"no depth")
    with pytest.raises(FileError, match=r"1\.h5"):
        strict[0]
    with h5py.File(tmp_path / DEPTHS / "1.h5", "w") as file:
        file["depth"] = np.ones((5, 5))
    with pytest.raises(FileError, match=r"1\.png: the image has 64 x 48"):
        strict[0]
    assert MegaDepthPairs(tmp_path, index, depth=False).load(0).depth0 is None
    (tmp_path / IMAGES / "0.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match=r"0\.png"):
        MegaDepthPairs(tmp_path, index, depth=False).load(0)


def test_a_broken_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent\.npz"):
        MegaDepthPairs(tmp_path, tmp_path / "absent.npz")
    np.savez(tmp_path / "part.npz", image_paths=np.zeros(2))
    with pytest.raises(FileError, match=r"part\.npz.*depth_paths"):
        MegaDepthPairs(tmp_path, tmp_path / "part.npz")


def test_a_pose_of_zeros_is_skipped_or_named(tmp_path: Path) -> None:
    index = make_set(tmp_path, rendered())
    with np.load(index, allow_pickle=True) as stored:
        arrays = dict(stored)
    arrays["poses"][0] = np.zeros((4, 4))
    np.savez(index, **arrays)
    with pytest.raises(FileError, match=r"poses\[0\]: expected a rotation"):
        MegaDepthPairs(tmp_path, index, options=PairOptions(strict=True)).load(0)
