# SPDX-License-Identifier: Apache-2.0
"""The field's data sets in their published layouts, opened for evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eloftr_ops.data.hpatches import LARGE_SEQUENCES
from eloftr_ops.evaluation import DATASETS, EvaluationConfig, evaluate, open_pairs
from eloftr_ops.io import FileError
from support.pair_files import Truth, integer_centers, objects, rendered, save_image

SIZE_HW = (96, 128)


def make_megadepth(root: Path, truth: Truth) -> Path:
    """One scene of LoFTR's index; the depth maps it names do not exist."""
    for side in (0, 1):
        save_image(root / f"Undistorted_SfM/0015/images/{side}.jpg", truth.images[side])
    index = root / "megadepth_test_1500_scene_info"
    index.mkdir()
    np.savez(
        index / "0015_0.1_0.3.npz",
        image_paths=objects(*[f"Undistorted_SfM/0015/images/{side}.jpg" for side in (0, 1)]),
        depth_paths=objects("0.h5", "1.h5"),
        intrinsics=objects(*[K.double().numpy() for K in truth.K]),
        poses=objects(np.eye(4), truth.T_0to1.double().numpy()),
        pair_infos=objects((np.array([0, 1]), 0.2, np.zeros((2, 4)))),
    )
    return index


def make_scannet(root: Path, truth: Truth) -> None:
    """One pair of LoFTR's index; the file of intrinsics is for 640 x 480."""
    for side, frame in ((0, 15), (1, 585)):
        save_image(root / f"scene0707_00/color/{frame}.jpg", truth.images[side])
    T = truth.T_0to1.double().numpy()
    np.savez(root / "test.npz", name=np.array([[707, 0, 15, 585]]), rel_pose=T[:3].reshape(1, 12))
    up = torch.diag(torch.tensor([640 / SIZE_HW[1], 480 / SIZE_HW[0], 1.0]))
    np.savez(root / "intrinsics.npz", scene0707_00=integer_centers(up @ truth.K[0]))


def true_matches(truth: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres of image 0 and where the depth map puts them."""
    rows, columns = (torch.arange(3.0, side, 6).long() for side in SIZE_HW)
    row, column = torch.cartesian_prod(rows, columns).unbind(-1)
    x0 = torch.stack([column, row], -1).double() + 0.5
    ray = torch.nn.functional.pad(x0, (0, 1), value=1.0) @ torch.linalg.inv(truth.K[0].double()).T
    X1 = ray * truth.depths[0][row, column, None] @ truth.T_0to1[:3, :3].double().T + truth.T_0to1[:3, 3]
    x1 = X1 @ truth.K[1].double().T
    return x0, x1[:, :2] / x1[:, 2:]


def test_megadepth_s_true_matches_have_no_error(tmp_path: Path) -> None:
    truth = rendered(size_hw=SIZE_HW)
    pairs = open_pairs("megadepth", tmp_path, make_megadepth(tmp_path, truth), resize=64)
    assert pairs.load(0).image0.shape == (1, 48, 64)
    x0, x1 = true_matches(truth)
    half = {"keypoints0": x0 / 2, "keypoints1": x1 / 2, "confidence": torch.ones(len(x0))}
    result = evaluate(lambda data: half, pairs, EvaluationConfig(runs=1))
    assert result.pairs[0].errors["rotation"][0] < 0.01
    assert result.totals()["pose"]["precision@0.0001"] == 100


def test_scannet_s_intrinsics_are_those_of_the_images_as_matched(tmp_path: Path) -> None:
    truth = rendered(size_hw=SIZE_HW)
    make_scannet(tmp_path, truth)
    pairs = open_pairs("scannet", tmp_path)
    torch.testing.assert_close(pairs.load(0).K0, truth.K[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(pairs.load(0).T_0to1, truth.T_0to1)
    assert not DATASETS["scannet"].original_pixels
    assert DATASETS["scannet"].epipolar_threshold == 5e-4


def test_hpatches_reduces_the_shorter_side_and_leaves_out_the_large_sequences(tmp_path: Path) -> None:
    names = ("i_ajuntament", "v_wall", sorted(LARGE_SEQUENCES)[0])
    for name in names:
        for number in range(1, 7):
            save_image(tmp_path / name / f"{number}.ppm", torch.rand(96, 120))
        for number in range(2, 7):
            np.savetxt(tmp_path / name / f"H_1_{number}", np.eye(3))
    pairs = open_pairs("hpatches", tmp_path, resize=48)
    assert len(pairs) == 10
    assert pairs.load(7).image1.shape == (1, 48, 60)
    assert len(open_pairs("hpatches", tmp_path, all_sequences=True)) == 15
    assert open_pairs("hpatches", tmp_path).options.resize == 480
    assert open_pairs("hpatches", tmp_path, resize=0).options.resize is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for arguments, name in (
        (("kitti", tmp_path), "dataset"),
        (("hpatches",), "root"),
        (("hpatches", tmp_path, tmp_path), "index"),
        (("megadepth", tmp_path), "index"),
        (("json",), "index"),
        (("hpatches", tmp_path), "root"),
    ):
        with pytest.raises(ValueError, match=name):
            open_pairs(*arguments)
    with pytest.raises(FileError, match=r"test\.npz"):
        open_pairs("scannet", tmp_path)
    with pytest.raises(FileError, match=r"pairs\.json"):
        open_pairs("json", None, tmp_path / "pairs.json")
