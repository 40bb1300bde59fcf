# SPDX-License-Identifier: Apache-2.0
"""Scenes in space: depth, pose and pictures agree, occlusion, the pixel frame, determinism and input errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_ops.data import procedural_textures
from eloftr_ops.data.scene_geometry import (
    Facets,
    Views,
    cast,
    draw_facets,
    look,
    reproject,
    scaled_coordinates,
    turn,
    view_rays,
    visible_share,
)
from eloftr_ops.data.scenes import SceneBatch, SceneConfig, ScenePairs, _Coats, _draw_cameras, pixel_centres

SIZE_HW = (72, 96)
GEOMETRY = SceneConfig(photometric=None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wave_texture(side: int, period: float) -> Tensor:
    phase = pixel_centres((side, side), torch.device("cpu")) * (2 * math.pi / period)
    return (127.5 + 60 * torch.sin(phase[..., 0]) + 60 * torch.sin(phase[..., 1] * 0.9)).round().to(torch.uint8)


def drawn_views(batch: int, seed: int) -> tuple[Views, Views]:
    """Float64 views of random scenes."""
    generator = seeded(seed)
    facets = draw_facets(batch, 3, 3, generator)
    K, T = _draw_cameras(facets, SIZE_HW, generator, GEOMETRY)
    return look(facets, K[:batch], T[:batch]), look(facets, K[batch:], T[batch:])


def planted() -> Facets:
    """A square with half side 1 at depth 5 before a wall at depth 10; no box."""
    eye = torch.eye(3, dtype=torch.float64)
    wall = torch.stack([100 * eye[0], 100 * eye[1], 10 * eye[2]], dim=-1)
    panel = torch.stack([eye[0], eye[1], 5 * eye[2]], dim=-1)
    return Facets(torch.stack([wall, panel])[None], torch.ones(1, 2, dtype=torch.bool), 2)


def planted_view(sideways: float = 0.0) -> Views:
    """A camera of 100 x 100 pixels and focal length 100, moved to the right."""
    K = torch.tensor([[[100.0, 0, 50], [0, 100, 50], [0, 0, 1]]], dtype=torch.float64)
    T = torch.eye(4, dtype=torch.float64)[None].clone()
    T[:, 0, 3] = -sideways
    return look(planted(), K, T)


def cast_image(views: Views, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Inverse depth (N, H, W) and facet in the scene (N, H, W)."""
    hits = cast(views, view_rays(views, pixel_centres(size_hw, views.K.device).flatten(0, 1)))
    return hits.inverse_depth.unflatten(1, size_hw), views.ids.gather(1, hits.facet).unflatten(1, size_hw)


def transfer_error(pair: SceneBatch, shift: float = 0.0) -> Tensor:
    """|image1(x1 + shift) - image0(x0)| at pixel centres x0 whose surface image 1 shows at x1."""
    batch, height, width = pair.depth0.shape
    centres = pixel_centres((height, width), pair.depth0.device).flatten(0, 1).expand(batch, -1, -1)
    points1, z1 = reproject(centres, pair.depth0.flatten(1), pair.K0, pair.K1, pair.T_0to1)
    grid = ((points1 + shift) / torch.tensor([width, height]) * 2 - 1)[:, None]
    # Inverse depth is linear on a plane: where all four neighbours show the surface, interpolating it is exact.
    inverse1 = F.grid_sample(1 / pair.depth1[:, None], grid, align_corners=False)[:, 0, 0]
    inside = ((points1 > 2) & (points1 < torch.tensor([width, height]) - 2)).all(-1)
    used = inside & (z1 > 0) & (pair.depth0.flatten(1) > 0)
    if shift == 0:
        used &= (inverse1 * z1 - 1).abs() < 1e-4
    assert used.float().mean() > 0.2
    sampled = F.grid_sample(pair.image1, grid, align_corners=False)[:, 0, 0]
    return (sampled - pair.image0.flatten(1)).abs()[used]


def test_a_reprojected_point_meets_its_own_surface_or_a_nearer_one() -> None:
    views0, views1 = drawn_views(8, seed=1)
    points0 = pixel_centres(SIZE_HW, views0.K.device).flatten(0, 1).double().expand(8, -1, -1)
    rays0 = view_rays(views0, points0)
    hits0 = cast(views0, rays0)
    met = hits0.inverse_depth > 0
    depth0 = 1 / torch.where(met, hits0.inverse_depth, 1)
    points1, z1 = reproject(points0, depth0, views0.K, views1.K, views1.T @ torch.linalg.inv(views0.T))
    used = met & (z1 > 0.1)
    rays1 = view_rays(views1, points1)
    hits1 = cast(views1, rays1)
    # Float64 throughout, endless walls of half side 30 and rays of length up to about 2: 1e-9 is far above rounding.
    assert (hits1.inverse_depth * z1 > 1 - 1e-9)[used].all()
    visible = used & (hits1.inverse_depth * z1 < 1 + 1e-9)
    assert 0.3 < visible.double().mean() < 1
    assert (used & ~visible).any()
    surfaces = [views.ids.gather(1, hits.facet) for views, hits in ((views0, hits0), (views1, hits1))]
    where_on = [
        scaled_coordinates(views.inverse, rays, hits.facet) / hits.inverse_depth.clamp_min(1e-9)[:, None]
        for views, rays, hits in ((views0, rays0, hits0), (views1, rays1, hits1))
    ]
    same = visible & (surfaces[0] == surfaces[1])
    assert same.sum() > 0.999 * visible.sum()  # two surfaces share the points of an edge
    torch.testing.assert_close(where_on[0].mT[same], where_on[1].mT[same], atol=1e-9, rtol=0)


def test_images_agree_where_both_show_a_surface() -> None:
    pair = ScenePairs([wave_texture(512, 40.0)], GEOMETRY).sample(6, SIZE_HW, seeded(2))
    exact = transfer_error(pair).mean()
    assert exact < 0.02
    assert exact < 0.25 * transfer_error(pair, shift=0.5).mean()
    assert exact < 0.25 * transfer_error(pair, shift=-0.5).mean()


def test_float32_depth_is_exact_to_rounding() -> None:
    pairs, generator = ScenePairs([wave_texture(64, 9.0)], GEOMETRY), seeded(3)
    pair = pairs.sample(3, SIZE_HW, generator)
    again = seeded(3)
    facets = draw_facets(3, 3, 3, again)
    K, T = _draw_cameras(facets, SIZE_HW, again, GEOMETRY)
    inverse, _ = cast_image(look(facets, K[:3], T[:3]), SIZE_HW)
    error = (pair.depth0 * inverse - 1).abs()
    assert (error < 1e-5).double().mean() > 0.998  # at an edge rounding may choose the other surface
    torch.testing.assert_close(pair.T_0to1, (T[3:] @ torch.linalg.inv(T[:3])).float())


def test_the_nearer_surface_hides_the_wall() -> None:
    inverse, ids = cast_image(planted_view(), (100, 100))
    # The square reaches from 50 - 100 / 5 to 50 + 100 / 5: exactly pixels 30 ... 69, whose centres are 30.5 ... 69.5.
    expected = torch.zeros(1, 100, 100, dtype=torch.int64)
    expected[:, 30:70, 30:70] = 1
    assert torch.equal(ids, expected)
    torch.testing.assert_close(1 / inverse, torch.where(expected == 1, 5.0, 10.0).double())


def test_parallax_and_what_it_uncovers() -> None:
    _, ids = cast_image(planted_view(sideways=1.0), (100, 100))
    expected = torch.zeros(1, 100, 100, dtype=torch.int64)
    expected[:, 30:70, 10:50] = 1  # moved by 100 / 5 pixels
    assert torch.equal(ids, expected)
    points0 = torch.tensor([[[50.0, 50.0], [19.0, 50.0], [25.0, 50.0], [75.0, 50.0]]], dtype=torch.float64)
    views0, views1 = planted_view(), planted_view(sideways=1.0)
    inverse0 = cast(views0, view_rays(views0, points0)).inverse_depth
    points1, z1 = reproject(points0, 1 / inverse0, views0.K, views1.K, views1.T)
    # The square moves by 20 pixels, the wall by 10: of the wall, columns 20 ... 30 disappear behind the square.
    torch.testing.assert_close(points1[0, :, 0], torch.tensor([30.0, 9.0, 15.0, 65.0], dtype=torch.float64))
    hidden = cast(views1, view_rays(views1, points1)).inverse_depth * z1 > 1.5
    assert hidden.tolist() == [[False, False, True, False]]


def test_visible_share_counts_borders_and_occlusion() -> None:
    share = visible_share(planted_view(), planted_view(sideways=1.0), (100, 100))
    # Columns and rows stand at 100 (k + 0.5) / 12 = 4.2, 12.5, 20.8, 29.2, 37.5 ... The first column leaves the image;
    # of the wall beside the square, the columns 20.8 and 29.2 are hidden in the four rows 37.5 ... 62.5.
    assert share.item() == pytest.approx((11 * 12 - 2 * 4) / 144)


def test_of_two_opposite_faces_the_nearer_one_suffices() -> None:
    facets = draw_facets(6, 2, 4, seeded(4))
    K, T = _draw_cameras(facets, SIZE_HW, seeded(5), GEOMETRY)
    chosen, ids = cast_image(look(facets, K[:6], T[:6]), SIZE_HW)
    everything, all_ids = cast_image(look(facets._replace(single=facets.frames.shape[1]), K[:6], T[:6]), SIZE_HW)
    assert torch.equal(chosen, everything)
    assert (ids == all_ids).double().mean() > 0.999


def test_a_frontal_facet_is_a_copy_of_its_texture() -> None:
    texture = wave_texture(100, 9.0)
    pairs = ScenePairs([texture], GEOMETRY)
    views = planted_view()
    views = views._replace(inverse=views.inverse.float())
    rays = view_rays(views, pixel_centres((100, 100), views.K.device).flatten(0, 1))
    hits = cast(views, rays)
    # The wall's half side of 100 at depth 10 is 1000 pixels; the square's of 1 at depth 5 is 20. One texture pixel per
    # image pixel: the wall shows the texture in place, the square shows it moved by 7 pixels.
    coats = _Coats(
        torch.zeros(1, 2, dtype=torch.int64),
        torch.tensor([[[50.0, 50.0], [43.0, 50.0]]]),
        torch.tensor([[[1000.0, 1000.0], [20.0, 20.0]]]),
        torch.tensor([[1.0, 0.5]]),
    )
    gray = pairs._shade(views, rays, hits, coats).view(100, 100)
    expected = texture / 255
    expected[30:70, 30:70] = 0.5 * texture[30:70, 23:63] / 255
    torch.testing.assert_close(gray, expected, atol=1e-4, rtol=0)  # coordinates of up to 1000, in float32


def test_reduced_textures_are_averaged() -> None:
    texture = wave_texture(256, 3.0)  # finer than eight texture pixels per image pixel can show
    reduced = ScenePairs([texture], replace(GEOMETRY, zoom=(8.0, 8.0), shading=0.0)).sample(4, SIZE_HW, seeded(6))
    magnified = ScenePairs([texture], replace(GEOMETRY, zoom=(0.5, 0.5), shading=0.0)).sample(4, SIZE_HW, seeded(6))
    assert torch.equal(reduced.depth0, magnified.depth0)
    spread = [pair.image0[pair.depth0[:, None] > 0].std() for pair in (reduced, magnified)]
    assert spread[0] < 0.2 * spread[1]


@pytest.mark.parametrize("overlap", [0.2, 0.7])
def test_overlap_is_kept(overlap: float) -> None:
    config = replace(GEOMETRY, min_overlap=overlap)
    generator = seeded(7)
    facets = draw_facets(24, 3, 3, generator)
    K, T = _draw_cameras(facets, SIZE_HW, generator, config)
    views0, views1 = look(facets, K[:24], T[:24]), look(facets, K[24:], T[24:])
    share = torch.minimum(visible_share(views0, views1, SIZE_HW), visible_share(views1, views0, SIZE_HW))
    assert (share >= overlap).all()


def test_poses_are_rigid_and_cameras_move() -> None:
    pair = ScenePairs([wave_texture(64, 9.0)], GEOMETRY).sample(16, (32, 32), seeded(8))
    R = pair.T_0to1[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(16, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(16))
    assert (pair.T_0to1[:, 3] == torch.tensor([0.0, 0, 0, 1])).all()
    assert (pair.T_0to1[:, :3, 3].norm(dim=1) > 0.05).all()
    for K in (pair.K0, pair.K1):
        assert (K[:, 0, 0] == K[:, 1, 1]).all()
        assert ((K[:, :2, 2] > 0.4 * 32) & (K[:, :2, 2] < 0.6 * 32)).all()


def test_turning_about_an_axis_leaves_it_alone() -> None:
    for axis in range(3):
        R = turn(torch.tensor(0.3), axis)
        torch.testing.assert_close(R @ torch.eye(3)[axis], torch.eye(3)[axis])
        assert R[(axis + 2) % 3, (axis + 1) % 3] == pytest.approx(math.sin(0.3))  # right-handed


def test_same_seed_same_pairs_other_seed_other_pairs() -> None:
    pairs = ScenePairs(procedural_textures(seeded(9), 3, 128))
    first, again, other = (pairs(2, SIZE_HW, seeded(seed)) for seed in (10, 10, 11))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.image0, other.image0)
    assert not torch.equal(first.T_0to1, other.T_0to1)


def test_rendering_takes_no_part_in_autocast() -> None:
    pairs = ScenePairs([wave_texture(64, 9.0)], GEOMETRY)
    expected = pairs(1, (32, 32), seeded(17))
    with torch.autocast("cpu", torch.bfloat16):
        actual = pairs(1, (32, 32), seeded(17))
        points1, _ = reproject(torch.rand(1, 9, 2) * 32, torch.full((1, 9), 4.0), actual.K0, actual.K1, actual.T_0to1)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert points1.dtype == torch.float32


@pytest.mark.parametrize("size_hw", [(32, 32), (65, 40)])
@pytest.mark.parametrize("objects", [0, 3])
def test_pairs_are_finite_and_in_range(size_hw: tuple[int, int], objects: int) -> None:
    config = SceneConfig(panels=objects, boxes=objects)
    pair = ScenePairs(procedural_textures(seeded(12), 2, 100), config)(3, size_hw, seeded(13))
    for image, depth in ((pair.image0, pair.depth0), (pair.image1, pair.depth1)):
        assert image.shape == (3, 1, *size_hw)
        assert depth.shape == (3, *size_hw)
        assert image.dtype == depth.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1
        assert torch.isfinite(depth).all()
        assert depth.min() >= 0
        assert (depth > 0).float().mean() > 0.9
    assert all(torch.isfinite(x).all() for x in pair)


def test_reprojection_there_and_back() -> None:
    views0, views1 = drawn_views(4, seed=14)
    T_0to1 = views1.T @ torch.linalg.inv(views0.T)
    points0 = torch.rand(4, 50, 2, dtype=torch.float64, generator=seeded(15)) * 80
    depth0 = torch.rand(4, 50, dtype=torch.float64, generator=seeded(16)) + 3
    points1, z1 = reproject(points0, depth0, views0.K, views1.K, T_0to1)
    back, depth = reproject(points1, z1, views1.K, views0.K, torch.linalg.inv(T_0to1))
    torch.testing.assert_close(back, points0)
    torch.testing.assert_close(depth, depth0)


def test_points_in_the_camera_plane_are_finite() -> None:
    K, T = torch.eye(3)[None], torch.eye(4)[None].clone()
    T[:, 2, 3] = -2.0
    points0 = torch.tensor([[[1.0, 2.0]] * 3], requires_grad=True)
    points1, z1 = reproject(points0, torch.tensor([[1.0, 2.0, 3.0]]), K, K, T)
    assert z1.tolist() == [[-1.0, 0.0, 1.0]]
    (gradient,) = torch.autograd.grad(points1.square().sum(), points0)
    assert torch.isfinite(points1).all()
    assert torch.isfinite(gradient).all()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="textures"):
        ScenePairs([])
    with pytest.raises(TypeError, match="uint8"):
        ScenePairs([torch.rand(32, 32)])
    with pytest.raises(ValueError, match="weights"):
        ScenePairs([torch.zeros(32, 32, dtype=torch.uint8)], weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="batch"):
        ScenePairs([torch.zeros(32, 32, dtype=torch.uint8)])(0, SIZE_HW, seeded(0))
    for options in (
        {"boxes": -1}, {"focal_ratio": 0.5}, {"zoom": (2.0, 1.0)}, {"min_overlap": 0.9}, {"tries": 0}, {"shading": 1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            SceneConfig(**options)
