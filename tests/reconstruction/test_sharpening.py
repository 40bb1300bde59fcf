# SPDX-License-Identifier: Apache-2.0
"""Keypoints that are aligned by their pixels: exact on images that are known, and true on rendered photographs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from eloftr_ops.errors import FileError
from eloftr_ops.reconstruction import sharpening
from eloftr_ops.reconstruction.alignment import align_windows, prepare_image
from eloftr_ops.reconstruction.sharpening import sharpen_tracks
from eloftr_ops.reconstruction.tracks import Tracks, build_tracks
from support.photographs import Photographs, photographs

RNG = np.random.default_rng(0)
A = torch.tensor([[1.1, 0.2], [-0.15, 0.9]], dtype=torch.float64)
SHIFT = torch.tensor([4.3, -2.6], dtype=torch.float64)
PLACES = torch.from_numpy(RNG.uniform(25, 60, (40, 2)))


def rendered(shade: Callable[[Tensor], Tensor]) -> Tensor:
    """An image (1, 1, 96, 96) of a function of the place, (x, y) with pixel centres at 0.5."""
    y, x = torch.meshgrid(torch.arange(96.0) + 0.5, torch.arange(96.0) + 0.5, indexing="ij")
    return shade(torch.stack([x, y], -1).double())[None, None].float()


def waves(places: Tensor) -> Tensor:
    """Texture of wavelengths of 6 to 20 pixels in all directions."""
    angles = torch.linspace(0, 5, 9, dtype=torch.float64)
    frequencies = torch.stack([angles.cos(), angles.sin()]) / torch.linspace(6, 20, 9, dtype=torch.float64)
    return 0.5 + 0.05 * torch.sin(2 * torch.pi * places @ frequencies + angles**2).sum(-1)


def edge(places: Tensor) -> Tensor:
    """Changes along x alone."""
    return torch.sigmoid((places[..., 0] - 45) / 2)


def seen(shade: Callable[[Tensor], Tensor], gain: float = 1.0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Image 0, and image 1 that shows the place A x + SHIFT of it where image 0 shows x."""
    back = torch.linalg.inv(A)
    second = rendered(lambda places: gain * shade((places - SHIFT) @ back.T) + offset)
    return prepare_image(rendered(shade)), prepare_image(second)


def test_windows_find_their_place_whatever_the_brightness() -> None:
    true = PLACES @ A.T + SHIFT
    start = true + torch.from_numpy(RNG.uniform(-0.8, 0.8, (40, 2)))
    aligned = align_windows(*seen(waves, 0.6, 0.2), PLACES, start, A.expand(40, 2, 2))
    # Bilinear sampling of waves of 6 px is off by up to 0.03 px here; the start was off by 0.6 px.
    assert (aligned.position - true).norm(dim=1).max() < 0.05
    assert aligned.likeness.min() > 0.99


def test_a_window_does_not_slide_along_an_edge() -> None:
    places = torch.stack([torch.full((5,), 45.0), torch.linspace(30, 60, 5)], 1).double()
    true = places @ A.T + SHIFT
    along = A @ torch.tensor([0.0, 1.0], dtype=torch.float64)
    across = torch.tensor([along[1], -along[0]]) / along.norm()
    start = true + 0.4 * across + 0.3 * along / along.norm()
    moved = align_windows(*seen(edge), places, start, A.expand(5, 2, 2)).position - true
    assert (moved @ across).abs().max() < 0.03  # found again across the edge
    assert (moved @ along / along.norm() - 0.3).abs().max() < 0.03  # along it nothing is known: it stays


def test_blank_windows_stay_and_look_like_nothing() -> None:
    blank = prepare_image(torch.full((1, 1, 96, 96), 0.4))
    for image0, image1 in ((blank, blank), (blank, seen(waves)[1]), (seen(waves)[0], blank)):
        aligned = align_windows(image0, image1, PLACES, PLACES, torch.eye(2).expand(40, 2, 2))
        assert torch.isfinite(aligned.position).all()
        assert aligned.likeness.abs().max() < 0.1
    none = align_windows(blank, blank, PLACES[:0], PLACES[:0], torch.eye(2).expand(0, 2, 2))
    assert none.position.shape == (0, 2)


@pytest.fixture(scope="module")
def scene() -> Photographs:
    return photographs(4, (160, 120))


@pytest.fixture(scope="module")
def images(scene: Photographs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    scene.save(folder)
    return folder


@pytest.fixture(scope="module")
def noisy(scene: Photographs) -> Tracks:
    return build_tracks(scene.matches(noise=0.5), 160)


def errors(scene: Photographs, tracks: Tracks) -> npt.NDArray[np.float64]:
    """How far matched keypoints are from each other by the true geometry, where both see the point; pixels."""
    found = []
    for pair, rows in tracks.pairs.items():
        i, j = (tracks.names.index(name) for name in pair)
        points0, points1 = tracks.keypoints[i][rows[:, 0]], tracks.keypoints[j][rows[:, 1]]
        true, visible = scene.partners(i, j, torch.from_numpy(points0).double())
        found.append(np.linalg.norm(true.numpy() - points1, axis=1)[visible.numpy()])
    return np.concatenate(found)


def test_keypoints_get_sharper(scene: Photographs, images: Path, noisy: Tracks) -> None:
    sharp = sharpen_tracks(noisy, images, 160)
    assert np.median(errors(scene, sharp)) < 0.6 * np.median(errors(scene, noisy))
    assert sharp.report.tracks > 0.8 * noisy.report.tracks
    lengths = np.bincount(np.concatenate(sharp.track))
    assert lengths.min() >= 2
    assert lengths.mean() == pytest.approx(sharp.report.mean_length)
    left = sum(len(keypoints) for keypoints in noisy.keypoints) - sum(len(keypoints) for keypoints in sharp.keypoints)
    assert sharp.report.unlike == left
    for (first, second), rows in sharp.pairs.items():
        i, j = sharp.names.index(first), sharp.names.index(second)
        np.testing.assert_array_equal(sharp.track[i][rows[:, 0]], sharp.track[j][rows[:, 1]])


def test_keypoints_that_look_unlike_are_left_out(images: Path, noisy: Tracks) -> None:
    wrong = [keypoints.copy() for keypoints in noisy.keypoints]
    wrong[1][:, 0] = (wrong[1][:, 0] + 40) % 150  # all of one image
    sharp = sharpen_tracks(dataclasses.replace(noisy, keypoints=wrong), images, 160)
    share = [len(after) / len(before) for after, before in zip(sharp.keypoints, noisy.keypoints, strict=True)]
    assert share[1] < 0.3 < 0.6 < min(share[0], *share[2:])


def test_larger_originals_are_compared_at_twice_the_size(
    scene: Photographs, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = build_tracks(scene.matches(noise=0.5), 80)  # as if matched at half of their size
    twice = errors(scene, sharpen_tracks(coarse, images, 80))
    monkeypatch.setattr(sharpening, "_ZOOMS", (1,))
    once = errors(scene, sharpen_tracks(coarse, images, 80))
    assert np.median(twice) < 0.8 * np.median(once)
    assert np.median(twice) < 0.2


def test_nothing_to_align(images: Path) -> None:
    assert sharpen_tracks(build_tracks([], 160), images, 160).report.tracks == 0


def test_an_image_that_is_gone_is_named(noisy: Tracks, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"\.png"):
        sharpen_tracks(noisy, tmp_path, 160)
