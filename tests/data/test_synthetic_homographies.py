# SPDX-License-Identifier: Apache-2.0
"""Homography pairs: exact geometry, the pixel frame, ranges, determinism and input errors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.geometry import transform_points
from PIL import Image

from eloftr_ops.data import (
    HomographyBatch,
    HomographyConfig,
    HomographyPairs,
    PhotometricConfig,
    PhotoTextures,
    SyntheticConfig,
    homography_overlap,
    photometric_change,
    procedural_textures,
    sample_homographies,
)

SIZE_HW = (64, 80)
STILL = HomographyConfig(rotation_sigma=0.0, scale=(1.0, 1.0), anisotropy=1.0, translation=0.0, perspective=0.0)
GEOMETRY = SyntheticConfig(photometric=None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixel_centres(size_hw: tuple[int, int]) -> torch.Tensor:
    height, width = size_hw
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], dim=-1).float() + 0.5


def wave_texture(size_hw: tuple[int, int], period: float) -> torch.Tensor:
    """A product of two sines, in gray levels; its values at pixel centres."""
    phase = pixel_centres(size_hw) * (2 * math.pi / period)
    gray = 127.5 + 60 * torch.sin(phase[..., 0]) + 60 * torch.sin(phase[..., 1] * 0.9)
    return gray.round().to(torch.uint8)


def transfer_error(pair: HomographyBatch, offset: float = 0.0) -> torch.Tensor:
    """|image1(H x0 + offset) - image0(x0)| at the pixel centres x0 whose both views show the texture."""
    batch, _, height, width = pair.image0.shape
    centres = pixel_centres((height, width)).reshape(1, -1, 2).expand(batch, -1, -1)
    target = transform_points(pair.H_0to1, centres) + offset
    extent = torch.tensor([width, height])
    grid = (target / extent * 2 - 1).view(batch, height, width, 2)
    sampled = F.grid_sample(pair.image1, grid, align_corners=False)
    shown = F.grid_sample(pair.valid1.float(), grid, align_corners=False) == 1
    inside = ((target > 1) & (target < extent - 1)).all(dim=-1).view(batch, 1, height, width)
    used = inside & shown & pair.valid0
    assert used.float().mean() > 0.2
    return (sampled - pair.image0).abs()[used]


@pytest.mark.parametrize("mirror", [0.0, 1.0])
@pytest.mark.parametrize("zoom", [(0.8, 1.2), (2.5, 5.0)])
def test_image1_at_warped_points_is_image0(mirror: float, zoom: tuple[float, float]) -> None:
    # Three linear interpolations of a smooth texture (each view's, and this test's): each errs by
    # h^2 / 8 * (|f_xx| + |f_yy|) = h^2 / 8 * 2 * A w^2 with A = 60 / 255 and w = 2 pi / period. Steps h are
    # at most 2.2 * zoom texture pixels (pyramid level and scale together); area averaging errs by less.
    period = 60.0 * zoom[1]
    step = 2.2 * zoom[1]
    bound = 3 * step**2 / 8 * 2 * (60 / 255) * (2 * math.pi / period) ** 2
    rounding = 3 / 255  # 8-bit texture and pyramid levels
    config = replace(GEOMETRY, mirror_probability=mirror, border_probability=0.5, zoom=zoom)
    pairs = HomographyPairs([wave_texture((500, 640), period)], config)
    pair = pairs.sample(12, SIZE_HW, seeded(1))
    if mirror:
        # The fold at the border is a crease, which interpolation rounds off: it stays a small share.
        assert (transfer_error(pair) < bound + rounding).float().mean() > 0.97
    else:
        assert transfer_error(pair).max() < bound + rounding


@pytest.mark.parametrize("zoom", [1.0, 3.0])
def test_a_half_pixel_shift_is_noticed(zoom: float) -> None:
    texture = wave_texture((int(400 * zoom), int(400 * zoom)), 24.0 * zoom)
    pairs = HomographyPairs([texture], replace(GEOMETRY, zoom=(zoom, zoom)))
    pair = pairs.sample(8, SIZE_HW, seeded(2))
    exact = transfer_error(pair).mean()
    assert exact < 0.25 * transfer_error(pair, offset=0.5).mean()
    assert exact < 0.25 * transfer_error(pair, offset=-0.5).mean()


def test_identity_gives_equal_images() -> None:
    pairs = HomographyPairs([wave_texture((200, 200), 9.0)], replace(GEOMETRY, homography=STILL))
    pair = pairs(4, SIZE_HW, seeded(3))
    torch.testing.assert_close(pair.H_0to1, torch.eye(3).expand(4, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(pair.image0, pair.image1, atol=1e-5, rtol=0)
    assert pair.valid0.all()


def test_a_still_view_is_a_copy_of_the_texture() -> None:
    texture = wave_texture(SIZE_HW, 9.0)
    config = replace(GEOMETRY, homography=STILL, view=STILL, zoom=(1.0, 1.0))
    pair = HomographyPairs([texture], config).sample(1, SIZE_HW, seeded(4))
    # The view fills the texture, so the only placement is pixel upon pixel.
    torch.testing.assert_close(pair.image0[0, 0], texture / 255, atol=1e-5, rtol=0)


def test_a_reduced_view_averages_the_texture() -> None:
    texture = wave_texture((4 * SIZE_HW[0], 4 * SIZE_HW[1]), 37.0)
    config = replace(GEOMETRY, homography=STILL, view=STILL, zoom=(4.0, 4.0))
    pair = HomographyPairs([texture], config).sample(1, SIZE_HW, seeded(4))
    # Two pyramid levels, each rounded to 8 bits.
    expected = F.avg_pool2d(texture[None].float(), 4) / 255
    torch.testing.assert_close(pair.image0[0], expected, atol=1 / 255 + 1e-5, rtol=0)


def test_black_borders_are_marked_invalid() -> None:
    config = replace(GEOMETRY, border_probability=1.0, mirror_probability=0.0)
    texture = torch.full((90, 90), 200, dtype=torch.uint8)
    pair = HomographyPairs([texture], config).sample(16, SIZE_HW, seeded(5))
    assert not pair.valid1.all()
    torch.testing.assert_close(pair.image1, pair.valid1 * (200 / 255))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(seed=st.integers(0, 10_000), tries=st.integers(1, 4), overlap=st.sampled_from([0.3, 0.6, 0.95]))
def test_overlap_is_guaranteed_and_horizon_stays_away(seed: int, tries: int, overlap: float) -> None:
    config = HomographyConfig(rotation_max=180.0, perspective=0.45, min_overlap=overlap, tries=tries)
    H = sample_homographies(16, SIZE_HW, seeded(seed), config=config, dtype=torch.float64)
    assert (homography_overlap(H, SIZE_HW) >= overlap).all()
    height, width = SIZE_HW
    corners = torch.tensor([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]]).double()
    assert (corners @ H[:, 2, :, None] > 0).all()
    assert (torch.linalg.det(H) > 0).all()


def test_overlap_of_a_shift_is_the_common_area() -> None:
    H = torch.eye(3).repeat(1, 1, 1)
    H[:, 0, 2] = SIZE_HW[1] / 4
    assert homography_overlap(H, SIZE_HW).item() == pytest.approx(0.75)


def test_rotation_and_scale_stay_within_the_config() -> None:
    config = HomographyConfig(anisotropy=1.0, perspective=0.0, min_overlap=0.0)
    H = sample_homographies(200, SIZE_HW, seeded(6), config=config, dtype=torch.float64)
    scale = torch.linalg.det(H[:, :2, :2]).sqrt()
    angle = torch.rad2deg(torch.atan2(H[:, 1, 0], H[:, 0, 0]))
    assert scale.min() >= 0.6 - 1e-9
    assert scale.max() <= 1.6 + 1e-9
    assert angle.abs().max() <= 45 + 1e-9
    assert angle.std() == pytest.approx(15, rel=0.2)


def test_same_seed_same_pairs_other_seed_other_pairs() -> None:
    pairs = HomographyPairs(procedural_textures(seeded(7), 3, 128))
    first, again, other = (pairs(3, SIZE_HW, seeded(seed)) for seed in (8, 8, 9))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.image0, other.image0)
    assert not torch.equal(first.H_0to1, other.H_0to1)


@pytest.mark.parametrize("size_hw", [(32, 32), (96, 65), (160, 200)])
def test_pairs_are_finite_and_in_range(size_hw: tuple[int, int]) -> None:
    pairs = HomographyPairs(procedural_textures(seeded(10), 4, 100))
    pair = pairs(6, size_hw, seeded(11))
    for image in (pair.image0, pair.image1):
        assert image.shape == (6, 1, *size_hw)
        assert image.dtype == torch.float32
        assert torch.isfinite(image).all()
        assert image.min() >= 0
        assert image.max() <= 1
    assert pair.H_0to1.shape == (6, 3, 3)
    assert (pair.H_0to1[:, 2, 2] == 1).all()


def test_weights_choose_textures() -> None:
    textures = [torch.full((128, 128), gray, dtype=torch.uint8) for gray in (51, 204)]
    pairs = HomographyPairs(textures, replace(GEOMETRY, mirror_probability=1.0), weights=[0.0, 1.0])
    torch.testing.assert_close(pairs(4, SIZE_HW, seeded(12)).image0, torch.full((4, 1, *SIZE_HW), 0.8))


@pytest.mark.parametrize("effect", ["shadow", "blur", "motion", "noise", "jpeg"])
def test_each_photometric_effect_acts_alone(effect: str) -> None:
    still = PhotometricConfig(
        gamma=1, contrast=1, brightness=0, illumination=0, shadow_probability=0, blur_probability=0,
        motion_probability=0, noise_probability=0, jpeg_probability=0,
    )  # fmt: skip
    image = (wave_texture((60, 52), 7.0) / 255)[None, None].repeat(3, 1, 1, 1)
    torch.testing.assert_close(photometric_change(image, seeded(13), still), image, atol=1e-6, rtol=0)
    acting = replace(still, **{f"{effect}_probability": 1.0})
    changed = photometric_change(image, seeded(13), acting)
    difference = (changed - image).abs().flatten(1).mean(dim=1)
    assert (difference > 1e-4).all()
    assert (difference < 0.3).all()
    # No effect moves the picture: the unshifted image resembles the changed one best.
    centred = changed[..., 4:-4, 4:-4] - changed[..., 4:-4, 4:-4].mean()
    scores = {
        (dy, dx): (centred * image.roll((dy, dx), (2, 3))[..., 4:-4, 4:-4]).sum().item()
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert max(scores, key=scores.__getitem__) == (0, 0)


def test_photos_are_read_turned_and_broken_ones_counted(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (30, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "b.jpg", exif=exif, quality=95)
    Image.fromarray(ramp[:5]).save(tmp_path / "small.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("not a photo")
    with pytest.warns(UserWarning, match=r"2 photo\(s\).*broken\.jpg, cut\.png"):
        photos = PhotoTextures(tmp_path, min_side=16)
    assert [tuple(p.shape) for p in photos] == [(30, 40), (40, 30)]
    assert torch.equal(photos[0], torch.from_numpy(ramp))
    assert [p.name for p in photos.broken] == ["broken.jpg", "cut.png"]


def test_large_photos_are_reduced(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), (10, 20, 30)).save(tmp_path / "a.png")
    assert PhotoTextures(tmp_path, min_side=8, max_side=50)[0].shape == (25, 50)


def test_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder must hold"):
        PhotoTextures(tmp_path)
    with pytest.raises(ValueError, match="folder must be a directory"):
        PhotoTextures(tmp_path / "absent")
    with pytest.raises(ValueError, match="textures"):
        HomographyPairs([])
    with pytest.raises(TypeError, match="uint8"):
        HomographyPairs([torch.rand(32, 32)])
    with pytest.raises(ValueError, match="weights"):
        HomographyPairs([torch.zeros(32, 32, dtype=torch.uint8)], weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="batch"):
        sample_homographies(0, SIZE_HW, seeded(0))
    with pytest.raises(ValueError, match="perspective"):
        HomographyConfig(perspective=0.5)
    with pytest.raises(ValueError, match="zoom"):
        SyntheticConfig(zoom=(2.0, 1.0))
    with pytest.raises(ValueError, match="gamma"):
        PhotometricConfig(gamma=0.5)
    with pytest.raises(ValueError, match="images"):
        photometric_change(torch.rand(2, 3, 8, 8), seeded(0))
