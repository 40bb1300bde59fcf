# SPDX-License-Identifier: Apache-2.0
"""Tiles cover the images once: no match twice, none missing at a seam, in pixels of the images at full size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from eloftr_ops import match_images
from eloftr_ops.errors import ArgumentError
from eloftr_ops.geometry import apply_homography
from eloftr_ops.images import LoadedImage
from eloftr_ops.io import demo_pair
from eloftr_ops.tiles import _undisputed, match_tiles

SIZE0, SIZE1 = (1216, 840), (1400, 900)
LEVELS = 2**24  # integers below it are exact in float32


def numbered(size_wh: tuple[int, int]) -> LoadedImage:
    """Each pixel holds its number, so that a part of the image says where it lies."""
    width, height = size_wh
    pixels = torch.arange(width * height, dtype=torch.float32).reshape(1, 1, height, width) / LEVELS
    return LoadedImage(pixels, None, size_wh)


def corner(part: LoadedImage, size_wh: tuple[int, int]) -> Tensor:
    """(left, top) of a part of a numbered image."""
    top, left = divmod(int(part.image[0, 0, 0, 0] * LEVELS), size_wh[0])
    return torch.tensor([left, top], dtype=torch.float64)


class Reader:
    """Stands for a matcher: true matches of a grid of 8 pixels, wherever both parts show them."""

    def __init__(self, H_0to1: Tensor) -> None:
        self.H, self.largest = H_0to1, 0

    def __call__(self, part0: LoadedImage, part1: LoadedImage) -> tuple[Tensor, Tensor, Tensor]:
        self.largest = max(self.largest, *part0.size_wh, *part1.size_wh)
        local0 = grid(part0.size_wh)
        local1 = apply_homography(self.H[None], (local0 + corner(part0, SIZE0))[None])[0] - corner(part1, SIZE1)
        seen = inside(local1, part1.size_wh)
        return local0[seen].float(), local1[seen].float(), torch.linspace(0.5, 0.9, int(seen.sum()))


def grid(size_wh: tuple[int, int]) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(4, side, 8, dtype=torch.float64) for side in size_wh))


def inside(points: Tensor, size_wh: tuple[int, int]) -> Tensor:
    return ((points >= 0) & (points < torch.tensor(size_wh))).all(1)


@pytest.mark.parametrize("shift", [0.0, 300.0, -250.0])
@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_every_match_is_found_once_and_none_is_missing_at_a_seam(shift: float, wrong: float) -> None:
    H_0to1 = torch.tensor([[1.05, 0.05, shift], [-0.05, 1.05, 40.0], [2e-5, 0, 1]], dtype=torch.float64)
    expected = grid(SIZE0)
    coarse0 = expected[::97]
    coarse1 = apply_homography(H_0to1[None], coarse0[None])[0]
    seen = inside(coarse1, SIZE1)
    coarse0, coarse1 = coarse0[seen], coarse1[seen]
    generator = torch.Generator().manual_seed(0)
    bad = torch.rand(len(coarse1), generator=generator) < wrong
    anywhere = torch.rand(len(coarse1), 2, generator=generator, dtype=torch.float64) * torch.tensor(SIZE1)
    coarse1 = torch.where(bad[:, None], anywhere, coarse1)
    match = Reader(H_0to1)
    found = match_tiles(match, numbered(SIZE0), numbered(SIZE1), coarse0.numpy(), coarse1.numpy(), tile=512)
    truth = apply_homography(H_0to1[None], expected[None])[0]
    expected = expected[inside(truth, SIZE1)]
    order = (found.keypoints0[:, 0] * 10_000 + found.keypoints0[:, 1]).argsort()
    torch.testing.assert_close(found.keypoints0[order].double(), expected)
    mapped = apply_homography(H_0to1[None], found.keypoints0.double()[None])[0]
    torch.testing.assert_close(found.keypoints1.double(), mapped, atol=1e-3, rtol=0)
    assert match.largest <= 1.5 * 512


def test_images_that_share_nothing_give_no_match() -> None:
    none = np.zeros((0, 2))
    found = match_tiles(Reader(torch.eye(3)), numbered(SIZE0), numbered(SIZE1), none, none, tile=512)
    assert [len(field) for field in found] == [0, 0, 0]


def test_the_embedded_weights_match_in_tiles_more_finely_than_reduced() -> None:
    image0, image1, H_0to1 = demo_pair()
    H_0to1 = torch.diag(torch.tensor([2.0, 2, 1], dtype=torch.float64)) @ H_0to1
    H_0to1 = H_0to1 @ torch.diag(torch.tensor([0.5, 0.5, 1], dtype=torch.float64))
    large0, large1 = (torch.nn.functional.interpolate(image, scale_factor=2) for image in (image0, image1))
    reduced = match_images(large0, large1, resize=320)
    tiled = match_images(large0, large1, resize=320, tile=512)
    errors = [
        (apply_homography(H_0to1[None], m.keypoints0.double()[None])[0] - m.keypoints1).norm(dim=1).median()
        for m in (reduced, tiled)
    ]
    assert errors[1] < 0.5 * errors[0]
    assert len(tiled) > 4 * len(reduced)
    assert tiled.verdict.related
    homography = tiled.homography().matrix
    assert homography is not None
    corners = torch.tensor([[0.0, 0], [1280, 0], [0, 960], [1280, 960]], dtype=torch.float64)
    shift = apply_homography(homography[None], corners[None]) - apply_homography(H_0to1[None], corners[None])
    assert shift.norm(dim=-1).max() < 2


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_scales_are_evened_out(factor: float) -> None:
    sizes: list[tuple[tuple[int, int], tuple[int, int]]] = []

    def note(part0: LoadedImage, part1: LoadedImage) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append((part0.size_wh, part1.size_wh))
        return torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0)

    coarse0 = grid(SIZE0)[::97].numpy()
    size1 = (round(SIZE0[0] * factor), round(SIZE0[1] * factor))
    match_tiles(note, numbered(SIZE0), numbered(size1), coarse0, coarse0 * factor, tile=512)
    assert len(sizes) == 4 * 3
    for size0, other in sizes:
        assert max(size0) <= 512
        assert max(other) <= 1.5 * 512
        assert 0.9 < max(other) / max(size0) < 1.6  # a window is a tile and its margin


def test_tiles_refuse_sizes_that_make_no_sense() -> None:
    image = np.zeros((64, 64))
    for tile in (64, 0, 1024.0):
        with pytest.raises(ArgumentError, match="tile: expected an integer of at least 256"):
            match_images(image, image, lambda data: {}, tile=tile)


def test_a_cell_of_image_1_belongs_to_its_most_confident_tile() -> None:
    keypoints1 = torch.tensor([[1.0, 1], [7, 7], [2, 2], [9, 1], [1, 9]])
    confidence = torch.tensor([0.3, 0.9, 0.5, 0.4, 0.4])
    owners = torch.tensor([0, 1, 0, 0, 0])
    assert _undisputed(keypoints1, confidence, owners).tolist() == [1, 3, 4]
    # Equals go to the earlier tile; two matches of one tile in one cell both stay.
    assert _undisputed(keypoints1[:3], torch.ones(3), owners[:3]).tolist() == [0, 2]
    assert _undisputed(keypoints1[:0], confidence[:0], owners[:0]).tolist() == []
