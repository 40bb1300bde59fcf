# SPDX-License-Identifier: Apache-2.0
"""Pairs of one's own, from a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eloftr_ops.data.labelled import PairOptions
from eloftr_ops.data.pairs import JsonPairs
from eloftr_ops.io import FileError
from support.pair_files import Truth, integer_centers, rendered, save_image


def make_set(root: Path, truth: Truth, centers: float = 0.5, **extra: Any) -> Path:
    """A posed pair with depth and a pair with a homography; ``extra`` changes the first one, None takes away."""
    posed: dict[str, Any] = {"T_0to1": truth.T_0to1.double().tolist()}
    for side in (0, 1):
        save_image(root / "images" / f"{side}.png", truth.images[side])
        np.save(root / f"{side}.npy", truth.depths[side].numpy())
        K = truth.K[side].double().numpy() if centers else integer_centers(truth.K[side])
        posed |= {f"image{side}": f"images/{side}.png", f"depth{side}": f"{side}.npy", f"K{side}": K.tolist()}
    posed = {key: value for key, value in (posed | extra).items() if value is not None}
    shift = [[1, 0, 5.0], [0, 1, 2.0], [1e-3, 0, 1]]
    flat = {"image0": "images/0.png", "image1": "images/1.png", "H_0to1": shift, "scene": "ignored"}
    path = root / "pairs.json"
    path.write_text(json.dumps({"pixel_centers": centers, "pairs": [posed, flat]}))
    return path


def test_posed_and_flat_pairs(tmp_path: Path) -> None:
    truth = rendered()
    posed, flat = JsonPairs(make_set(tmp_path, truth))
    torch.testing.assert_close(posed.T_0to1, truth.T_0to1)
    torch.testing.assert_close(posed.depth1, truth.depths[1])
    torch.testing.assert_close(posed.image0[0], truth.images[0], atol=0.5 / 255 + 1e-6, rtol=0)
    assert posed.H_0to1 is None
    assert flat.T_0to1 is None
    torch.testing.assert_close(flat.H_0to1, torch.tensor([[1, 0, 5.0], [0, 1, 2.0], [1e-3, 0, 1]]))


@pytest.mark.parametrize("centers", [0, 0.5])
def test_the_file_says_where_pixel_centers_are(tmp_path: Path, centers: float) -> None:
    truth = rendered()
    path = make_set(tmp_path, truth, centers)
    posed, flat = JsonPairs(path)
    torch.testing.assert_close(posed.K0, truth.K[0])
    torch.testing.assert_close(posed.K1, truth.K[1])
    H = torch.tensor([[1, 0, 5.0], [0, 1, 2.0], [1e-3, 0, 1]], dtype=torch.float64)
    centre = torch.tensor([10.0, 20.0, 1.0], dtype=torch.float64)
    half = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64) * (centers == 0)
    expected = H @ centre / (H @ centre)[2] + half
    moved = flat.H_0to1.double() @ (centre + half)
    torch.testing.assert_close(moved / moved[2], expected, atol=1e-5, rtol=0)
    other = JsonPairs(path, pixel_centers=0.5 - centers).load(0)
    assert (other.K0 - truth.K[0])[0, 2].abs().item() == pytest.approx(0.5, abs=1e-4)


def test_depth_is_optional_and_root_can_be_elsewhere(tmp_path: Path) -> None:
    truth = rendered()
    path = make_set(tmp_path, truth, depth0=None, depth1=None)
    moved = tmp_path / "labels" / "pairs.json"
    moved.parent.mkdir()
    path.rename(moved)
    pair = JsonPairs(moved, tmp_path).load(0)
    assert pair.depth0 is None
    assert pair.T_0to1 is not None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"image0": None}, r"pairs\[0\].*image0"),
        ({"image0": "images/absent.png"}, r"absent\.png"),
        ({"depth0": "absent.npy"}, r"absent\.npy"),
        ({"depth0": None}, r"pairs\[0\].*depth of both"),
        ({"K0": None}, r"pairs\[0\].*all of K0, K1, T_0to1"),
        ({"H_0to1": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}, r"pairs\[0\].*either"),
        ({"K0": [[1, 2], [3]]}, r"pairs\[0\]: K0"),
        ({"K0": [[-5, 0, 1], [0, 5, 1], [0, 0, 1]]}, r"0\.png.*focal"),
        ({"T_0to1": [[1, 0], [0, 1]]}, r"pairs\[0\]: T_0to1.*\(2, 2\)"),
        ({"size0": [640, 480]}, r"0\.png: expected 640 x 480 pixels, got 64 x 48"),
    ],
)
def test_broken_pairs_are_skipped_or_named(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    path = make_set(tmp_path, rendered(), **extra)
    pairs = JsonPairs(path)
    with pytest.warns(UserWarning, match="1 of 2 pairs skipped"):
        assert len(list(pairs)) == 1
    with pytest.raises(FileError, match=message):
        JsonPairs(path, options=PairOptions(strict=True))[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [("no json", "not JSON"), ("[]", "pairs"), ('{"pairs": []}', "pixel_centers"), ('{"pairs": 3}', "pairs")],
)
def test_a_broken_file_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content)
    with pytest.raises(FileError, match=message):
        JsonPairs(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent\.json"):
        JsonPairs(tmp_path / "absent.json")
