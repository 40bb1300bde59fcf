# SPDX-License-Identifier: Apache-2.0
"""Warps put points and pixels in the same place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eloftr_ops.guided.warps import Source, Warp, scaling, seen_through, tilted

SIZE = (96, 64)  # (width, height)


def ramp(size_wh: tuple[int, int], working: tuple[int, int]) -> Tensor:
    """(1, 1, H, W) float64: a linear function of position, 0.2 + 0.004 x + 0.002 y in working pixels."""
    width, height = size_wh
    xs = (torch.arange(width, dtype=torch.float64) + 0.5) * working[0] / width
    ys = (torch.arange(height, dtype=torch.float64) + 0.5) * working[1] / height
    return (0.2 + 0.004 * xs[None] + 0.002 * ys[:, None])[None, None]


def values_at(points: Tensor) -> Tensor:
    return 0.2 + points @ torch.tensor([0.004, 0.002], dtype=torch.float64)


def slight_homography() -> Warp:
    matrix = torch.tensor([[0.9, 0.1, 8.0], [-0.1, 0.8, 12.0], [5e-4, -3e-4, 1.0]], dtype=torch.float64)
    return Warp(matrix, SIZE)


@pytest.mark.parametrize("larger", [1, 2, 3])
@pytest.mark.parametrize(
    "warp",
    [
        scaling(SIZE, (48, 32)),
        tilted(SIZE, 1.0, 90.0),
        tilted(SIZE, 2.0, 45.0),
        tilted(SIZE, 1.0, 0.0, 2.5),
        slight_homography(),
    ],
    ids=["reduced", "turned", "slanted", "zoomed", "homography"],
)
def test_a_frame_shows_the_image_where_the_warp_says(warp: Warp, larger: int) -> None:
    """An interpolated, or averaged, linear function is that function: any shift of half a pixel would show."""
    image = ramp((SIZE[0] * larger, SIZE[1] * larger), SIZE)
    pixels, mask = seen_through(Source.of(image, None, SIZE), warp)
    assert pixels.shape[-2:] == warp.size_wh[::-1]
    ys, xs = torch.meshgrid(*(torch.arange(side) + 0.5 for side in pixels.shape[-2:]), indexing="ij")
    mapped = warp.to_image(torch.stack([xs, ys], -1).view(-1, 2).double())
    inner = ((mapped > 8) & (mapped < mapped.new_tensor(SIZE) - 8)).all(1)
    if mask is not None:
        assert mask.flatten()[inner].all()
    assert inner.sum() > 50
    # Within a pixel a homography is not linear: second derivatives of 1e-3, times the ramp.
    torch.testing.assert_close(pixels.flatten()[inner], values_at(mapped[inner]), atol=2e-5, rtol=0)


def test_what_lies_outside_the_image_is_masked() -> None:
    warp = Warp(torch.tensor([[1.0, 0, -20], [0, 1, 0], [0, 0, 1]], dtype=torch.float64), SIZE)
    _, mask = seen_through(Source.of(ramp(SIZE, SIZE), None, SIZE), warp)
    assert mask is not None
    assert not mask[0, :, :20].any()
    assert mask[0, :, 20:].all()


def test_a_mask_of_the_image_is_seen_through_the_warp() -> None:
    hidden = torch.ones(1, *SIZE[::-1])
    hidden[:, :, :48] = 0
    _, mask = seen_through(Source.of(ramp(SIZE, SIZE), hidden, SIZE), scaling(SIZE, (48, 32)))
    assert mask is not None
    assert not mask[0, :, :24].any()
    assert mask[0, :, 24:].all()


def test_the_image_itself_is_not_resampled() -> None:
    image = torch.rand(1, 1, *SIZE[::-1])
    pixels, mask = seen_through(Source.of(image, None, SIZE), scaling(SIZE, SIZE))
    assert pixels is image
    assert mask is None


def test_a_reduction_does_not_alias() -> None:
    """A chessboard of single pixels, slanted four times: its mean, not its pattern."""
    board = (torch.arange(64)[:, None] + torch.arange(96)[None]).remainder(2).double()[None, None]
    warp = tilted(SIZE, 4.0, 0.0)
    pixels, mask = seen_through(Source.of(board, None, SIZE), warp)
    assert mask is not None  # a frame has at least 32 pixels on each side: this one shows more than the image
    assert (pixels[0][mask] - 0.5).abs().max() < 0.05


@given(
    tilt=st.floats(1, 5),
    degrees=st.floats(0, 360),
    zoom=st.floats(1, 5),
    x=st.floats(0, 1),
    y=st.floats(0, 1),
)
def test_a_view_shows_all_of_the_image(tilt: float, degrees: float, zoom: float, x: float, y: float) -> None:
    warp = tilted(SIZE, tilt, degrees, zoom)
    points = torch.tensor([[x * SIZE[0], y * SIZE[1]]], dtype=torch.float64)
    seen = warp.from_image(points)
    assert ((seen >= -1e-6) & (seen <= seen.new_tensor(warp.size_wh) + 1e-6)).all()
    torch.testing.assert_close(warp.to_image(seen), points, atol=1e-8, rtol=0)


def test_points_behind_the_camera_lie_nowhere() -> None:
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-0.02, 0, 1]], dtype=torch.float64)  # the horizon is x = 50
    mapped = Warp(matrix, SIZE).to_image(torch.tensor([[40.0, 10.0], [50.0, 10.0], [60.0, 10.0]]))
    assert torch.isfinite(mapped).all()
    assert (mapped[0] > 0).all()
    assert (mapped[1:] < -1e5).all()


def test_a_field_moves_points_between_its_vertices() -> None:
    field = torch.zeros(2, 2, 2, dtype=torch.float64)
    field[0, :, 1] = 6.0  # x moves by 6 at the right border, by nothing at the left one
    warp = scaling(SIZE, SIZE)._replace(field=field)
    mapped = warp.to_image(torch.tensor([[24.0, 10.0], [96.0, 64.0]]))
    torch.testing.assert_close(mapped, torch.tensor([[25.5, 10.0], [102.0, 64.0]], dtype=torch.float64))


@pytest.mark.parametrize("with_field", [False, True])
def test_points_carry_gradient_through_a_warp(with_field: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    warp = slight_homography()
    if with_field:
        warp = warp._replace(field=torch.randn(2, 3, 4, dtype=torch.float64, generator=generator))
    points = (torch.rand(5, 2, dtype=torch.float64, generator=generator) * 60).requires_grad_()
    assert torch.autograd.gradcheck(warp.to_image, (points,))


def test_pixels_carry_gradient_through_a_warp() -> None:
    image = torch.rand(1, 1, 32, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    image = (0.2 + 0.6 * image).requires_grad_()

    def seen(pixels: Tensor) -> Tensor:
        return seen_through(Source.of(pixels, None, (40, 32)), tilted((40, 32), 2.0, 30.0))[0]

    assert torch.autograd.gradcheck(seen, (image,), fast_mode=True)
