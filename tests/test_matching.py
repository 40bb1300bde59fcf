# SPDX-License-Identifier: Apache-2.0
"""``match_images``: whatever an image comes as, its matches are in its own pixels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import eloftr_ops
from eloftr_ops import ImageMatches, match_images
from eloftr_ops.errors import ArgumentError, FileError
from support.models import tiny_model

DEMO = [Path(str(resources.files("eloftr_ops") / "assets" / f"demo_{side}.jpg")) for side in "01"]


class Corners:
    """A matcher that is no module: matches the corners of both images and the centre, with known confidence."""

    def __init__(self) -> None:
        self.seen: list[Mapping[str, Any]] = []

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        self.seen.append(data)
        points = [
            torch.tensor([[0, 0], [w, 0], [w, h], [0, h], [w / 2, h / 2]], dtype=torch.float32)
            for h, w in (data[f"image{side}"].shape[-2:] for side in "01")
        ]
        confidence = torch.tensor([0.5, 0.9, 0.3, 0.9, 0.7])
        return {"keypoints0": points[0], "keypoints1": points[1], "confidence": confidence}


def photograph(height: int = 96, width: int = 128) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(DEMO[0]) as image:
        return np.array(image.convert("RGB").resize((width, height)))


def test_the_embedded_weights_match_the_bundled_pair() -> None:
    matches = match_images(*DEMO, resize=320)
    assert len(matches) > 300
    assert matches.keypoints0.max() > 320  # pixels of the files, not of the reduced images
    homography, fundamental = matches.homography(), matches.fundamental()
    assert homography.matrix is not None
    assert homography.inliers.float().mean() > 0.9
    assert fundamental.inliers.shape == (len(matches),)
    assert fundamental.matrix is None  # one image is a warp of the other
    assert "a plane, or a camera that only rotates" in fundamental.reason


@pytest.mark.parametrize("resize", [64, None, 0])
def test_keypoints_are_in_pixels_of_the_images_as_given(resize: int | None) -> None:
    matches = match_images(photograph(96, 128), photograph(200, 100), Corners(), resize=resize)
    torch.testing.assert_close(matches.keypoints0, torch.tensor([[0.0, 0], [128, 0], [128, 96], [0, 96], [64, 48]]))
    torch.testing.assert_close(matches.keypoints1, torch.tensor([[0.0, 0], [100, 0], [100, 200], [0, 200], [50, 100]]))


def test_every_kind_of_image_is_the_same_image(tmp_path: Path) -> None:
    pixels = photograph()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    floating = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    matcher = Corners()
    for source in (
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        Image.fromarray(pixels),
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
        floating,
        floating[None].double(),
        floating.numpy().transpose(1, 2, 0),
        pixels.astype(np.uint16) * 257,
    ):
        matches = match_images(source, floating, matcher)
        torch.testing.assert_close(matcher.seen[-1]["image0"], matcher.seen[-1]["image1"], atol=1e-6, rtol=0)
        assert matches.image0.color is not None
        np.testing.assert_array_equal(matches.image0.color, pixels)


def test_transparent_pixels_of_arrays_are_masked() -> None:
    pixels = np.dstack([photograph(), np.full((96, 128), 255, np.uint8)])
    pixels[:32, :, 3] = 0
    matcher = Corners()
    for source in (pixels, pixels / np.float32(255)):
        match_images(source, source, matcher)
        mask = matcher.seen[-1]["mask0"]
        assert not mask[0, :32].any()
        assert mask[0, 32:].all()


def test_a_mask_is_given_at_the_size_of_its_image() -> None:
    mask = np.zeros((96, 128), dtype=bool)
    mask[:, 64:] = True
    matcher = Corners()
    match_images(photograph(), photograph(), matcher, resize=64, mask1=mask)
    assert "mask0" not in matcher.seen[0]
    np.testing.assert_array_equal(matcher.seen[0]["mask1"][0], mask[::2, ::2])


def test_threshold_and_max_matches_choose_by_confidence() -> None:
    pair = photograph(), photograph()
    assert match_images(*pair, Corners(), threshold=0.5).confidence.tolist() == pytest.approx([0.9, 0.9, 0.7])
    matches = match_images(*pair, Corners(), max_matches=3)
    assert matches.confidence.tolist() == pytest.approx([0.9, 0.9, 0.7])
    assert matches.keypoints0[0].tolist() == [128, 0]


def test_the_matcher_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    load = eloftr_ops.EfficientLoFTR.from_pretrained
    monkeypatch.setattr(eloftr_ops.EfficientLoFTR, "from_pretrained", lambda name: made.append(name) or load(name))
    monkeypatch.setattr("eloftr_ops.matchers._MATCHERS", type(eloftr_ops.matchers._MATCHERS)())
    for threshold in (None, None, 0.5, None):
        match_images(photograph(), photograph(), threshold=threshold)
    assert len(made) == 2


def test_a_matcher_of_ones_own_is_used_as_it_is() -> None:
    model = tiny_model(threshold=0.2)
    direct = model({f"image{side}": match_images(*DEMO, Corners(), resize=96).image0.image for side in "01"})
    for matcher in (model, model.optimize_for_inference()):
        matches = match_images(DEMO[0], DEMO[0], matcher, resize=96)
        assert len(matches) == len(direct["confidence"])


def test_blank_images_give_no_match() -> None:
    for level in (0.0, 0.5, 1.0):
        blank = np.full((64, 64), level)
        assert len(match_images(blank, blank, Corners())) == 0
        assert len(match_images(photograph(), blank + 1 / 255 * (level < 1), Corners())) == 0
    hidden = np.dstack([photograph(), np.zeros((96, 128), np.uint8)])
    assert len(match_images(hidden, photograph(), Corners())) == 0
    assert not match_images(blank, blank, Corners()).verdict.related


def test_one_image_twice_determines_no_fundamental_matrix() -> None:
    found = match_images(DEMO[0], DEMO[0], resize=320).fundamental()
    assert found.matrix is None
    assert not found.inliers.any()


def test_unrelated_images_are_not_called_related() -> None:
    with Image.open(DEMO[0]) as image:
        turned = image.rotate(137).crop((200, 120, 440, 360))
    noise = np.random.default_rng(0).random((240, 240))
    assert not match_images(turned, noise, resize=240).verdict.related
    assert match_images(*DEMO, resize=240).verdict.related


def test_repr_says_how_many_and_how_sure() -> None:
    pair = photograph(), photograph(200, 100)
    assert "5 matches, confidence 0.30 to 0.90, median 0.70, not known to be related, 128x96" in repr(
        match_images(*pair, Corners())
    )
    assert "128x96 and 100x200" in repr(match_images(*pair, Corners()))
    assert "no match" in repr(match_images(*pair, Corners(), threshold=0.95))
    assert isinstance(match_images(*pair, Corners()), ImageMatches)


def test_save_and_plot_write_what_the_suffix_says(tmp_path: Path) -> None:
    matches = match_images(photograph(), photograph(), Corners())
    for name in ("m.npz", "m.csv", "m.json", "m.png"):
        matches.save(tmp_path / name)
    np.testing.assert_array_equal(np.load(tmp_path / "m.npz")["keypoints0"], matches.keypoints0)
    figure = matches.plot()
    assert figure.axes[0].images[0].get_array().shape == (96, 128, 3)  # colours
    with pytest.raises(FileError, match=r"m\.txt: expected a name that ends in"):
        matches.save(tmp_path / "m.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image0": 7}, "image0: expected a path, a URL"),
        ({"image0": np.zeros((4, 4, 2))}, r"image0: expected one gray, RGB or RGBA image.*\(4, 4, 2\)"),
        (
            {"image1": np.full((64, 64), 200.0)},
            r"image1: expected finite values in \[0, 1\].*Divide it by 255",
        ),
        ({"image1": np.full((64, 64), np.nan)}, "image1: expected finite values"),
        ({"image1": np.zeros((64, 64), np.int32)}, "image1: expected uint8"),
        ({"image0": np.zeros((20, 64))}, "image0: 64x20 pixels, expected at least 32"),
        ({"resize": 40}, "image0: 40x30 pixels after a resize to 40, .* Pass a larger resize"),
        ({"resize": -1}, "resize: expected an integer of at least 0"),
        ({"resize": 64.0}, "resize: expected an integer"),
        ({"max_matches": 0}, "max_matches: expected an integer of at least 1"),
        ({"threshold": float("nan")}, "threshold: expected a confidence"),
        ({"mask0": np.ones((5, 5))}, r"mask0: expected the size of its image, .*\(96, 128\), got \(5, 5\)"),
        ({"mask1": [1, 2]}, "mask1: expected an array"),
        ({"mask1": np.full((96, 128), np.nan)}, "mask1: expected finite"),
        ({"device": "abacus"}, "device: expected a device"),
        ({"weights": "no/such/weights.ckpt"}, "weights: no/such/weights.ckpt"),
        ({"weights": 3}, "weights: expected a name, a path or a matcher"),
        ({"weights": tiny_model().train()}, "weights: expected a matcher in evaluation mode"),
        ({"weights": tiny_model(threshold=0.2), "threshold": 0.1}, "threshold: expected at least 0.2"),
        ({"weights": tiny_model(), "device": "meta"}, "device: expected"),
    ],
)
def test_mistakes_are_one_clear_sentence(arguments: dict[str, Any], message: str) -> None:
    given = {"image0": photograph(), "image1": photograph(), **arguments}
    if "resize" in arguments and arguments["resize"] == 40:
        given["image0"] = photograph(60, 80)
    with pytest.raises((ArgumentError, FileError), match=message) as error:
        match_images(**given)
    assert "\n" not in str(error.value)


def test_the_package_imports_without_what_reads_images() -> None:
    code = "import sys, eloftr_ops; print('eloftr_ops.matching' in sys.modules, 'match_images' in eloftr_ops.__all__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]


def test_more_effort_matches_a_turned_image(tmp_path: Path) -> None:
    upright = Image.fromarray(photograph(192, 256)).convert("L")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    once, again = (match_images(upright, turned, resize=224, effort=effort) for effort in ("fast", "thorough"))
    assert (once.looks, once.views) == (1, ("as they are",))
    assert again.looks > 1
    assert "image 1 turned by 90 degrees" in again.views
    x, y = again.keypoints0.T
    error = (again.keypoints1 - torch.stack([y, 256 - x], 1)).norm(dim=1)  # in pixels of the images as given
    assert (error < 3).sum() > 200
    assert again.verdict.related
    assert again.image1.size_wh == (168, 224)  # as matched
    again.save(tmp_path / "matches.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"effort": "high"}, "effort: expected one of fast, normal, thorough"),
        ({"effort": "normal", "tile": 256}, "effort: expected fast with tile, got normal"),
        ({"seconds": 1.0}, "seconds: expected None with effort fast"),
        ({"effort": "normal", "seconds": -1.0}, "seconds: expected a number of seconds"),
    ],
)
def test_efforts_that_cannot_be_are_named(arguments: dict[str, Any], message: str) -> None:
    image = photograph()
    with pytest.raises(ArgumentError, match=message):
        match_images(image, image, Corners(), **arguments)


def test_blank_images_give_no_match_with_any_effort() -> None:
    blank = np.full((64, 64), 128, dtype=np.uint8)
    matches = match_images(blank, blank, Corners(), effort="thorough")
    assert len(matches) == 0
    assert not matches.verdict.related
