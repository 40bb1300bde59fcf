# SPDX-License-Identifier: Apache-2.0
"""Pairs from a folder of unlabelled images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eloftr_ops.data import SyntheticConfig
from eloftr_ops.data.folders import folder_pairs, read_textures
from eloftr_ops.io import FileError
from support.pair_files import save_image


def make_set(root: Path) -> None:
    for number, name in enumerate(("a.png", "b.jpg", "sub/c.ppm", "sub/deep/d.webp")):
        save_image(root / name, torch.full((40, 60), 0.2 + 0.1 * number))
    (root / "notes.txt").write_text("no image")


def test_images_are_found_in_all_folders(tmp_path: Path) -> None:
    make_set(tmp_path)
    textures = read_textures(tmp_path, min_side=16)
    assert [tuple(texture.shape) for texture in textures] == [(40, 60)] * 4
    assert [texture.dtype for texture in textures] == [torch.uint8] * 4
    torch.testing.assert_close(textures[0].float().mean() / 255, torch.tensor(0.2), atol=1 / 255, rtol=0)


def test_large_images_are_reduced(tmp_path: Path) -> None:
    make_set(tmp_path)
    assert {tuple(texture.shape) for texture in read_textures(tmp_path, min_side=8, max_side=30)} == {(20, 30)}


def test_a_seeded_choice_of_many(tmp_path: Path) -> None:
    make_set(tmp_path)
    chosen = [read_textures(tmp_path, min_side=16, max_images=2, seed=seed) for seed in (1, 1)]
    assert len(chosen[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))


def test_unusable_images_are_counted_or_named(tmp_path: Path) -> None:
    make_set(tmp_path)
    (tmp_path / "x_broken.jpg").write_bytes(b"no picture")
    save_image(tmp_path / "z_small.png", torch.rand(10, 60))
    with pytest.warns(UserWarning, match=r"2 of 6 images left out; the last: .*z_small\.png"):
        assert len(read_textures(tmp_path, min_side=16)) == 4
    with pytest.raises(FileError, match=r"x_broken\.jpg"):
        read_textures(tmp_path, min_side=16, strict=True)
    (tmp_path / "x_broken.jpg").unlink()
    with pytest.raises(FileError, match=r"z_small\.png.*at least 16"):
        folder_pairs(tmp_path, min_side=16, strict=True)


def test_pairs_are_rendered_from_the_images(tmp_path: Path) -> None:
    make_set(tmp_path)
    pairs = folder_pairs(tmp_path, SyntheticConfig(photometric=None, mirror_probability=1.0), min_side=16)
    batch = pairs(6, (32, 32), torch.Generator().manual_seed(0))
    grays = torch.tensor([0.2, 0.3, 0.4, 0.5])
    means = batch.image0.mean(dim=(1, 2, 3))
    assert ((means[:, None] - grays).abs().amin(1) < 0.01).all()


def test_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder: expected a folder"):
        read_textures(tmp_path / "absent")
    with pytest.raises(ValueError, match="folder: expected at least one"):
        read_textures(tmp_path)
    with pytest.raises(ValueError, match="min_side"):
        read_textures(tmp_path, min_side=100, max_side=50)
