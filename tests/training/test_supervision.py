# SPDX-License-Identifier: Apache-2.0
"""Ground truth: against brute force, the pixel frame, masks, occlusion, precision, and batches without any pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eloftr_ops.data import HomographyConfig, sample_homographies
from eloftr_ops.data.scene_geometry import cast, draw_facets, look, reproject, view_rays
from eloftr_ops.data.scenes import SceneConfig, ScenePairs, _draw_cameras
from eloftr_ops.training.supervision import (
    DepthLabels,
    _inverse_depth,
    pad_with_true_pairs,
    pairs_consistent_with_pose,
    pairs_from_depth,
    pairs_from_homography,
    sample_pairs,
    window_targets_from_depth,
    window_targets_from_homography,
)
from eloftr_ops.types import CoarsePairs

GRID0, GRID1 = (6, 8), (7, 9)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def homographies(count: int, seed: int) -> Tensor:
    config = HomographyConfig(perspective=0.3)
    return sample_homographies(count, (48, 64), seeded(seed), config=config, dtype=torch.float64)


def apply(H: Tensor, x: float, y: float) -> tuple[float, float]:
    u, v, w = (H @ torch.tensor([x, y, 1.0], dtype=torch.float64)).tolist()
    return u / w, v / w


def as_set(pairs: CoarsePairs) -> set[tuple[int, int, int]]:
    return set(zip(*(field.tolist() for field in pairs), strict=True))


def brute_force(H: Tensor) -> set[tuple[int, int, int]]:
    """Pairs of cells, each the nearest of the other's infinite grid."""

    def nearest(matrix: Tensor, cell: int, grid: tuple[int, int], target: tuple[int, int]) -> int | None:
        x, y = apply(matrix, 8 * (cell % grid[1]), 8 * (cell // grid[1]))
        column, row = round(x / 8), round(y / 8)
        return row * target[1] + column if 0 <= column < target[1] and 0 <= row < target[0] else None

    found = set()
    for batch, matrix in enumerate(H):
        for cell0 in range(GRID0[0] * GRID0[1]):
            cell1 = nearest(matrix, cell0, GRID0, GRID1)
            if cell1 is not None and nearest(torch.linalg.inv(matrix), cell1, GRID1, GRID0) == cell0:
                found.add((batch, cell0, cell1))
    return found


def rendered(batch: int, seed: int, size_hw: tuple[int, int] = (96, 128)) -> DepthLabels:
    texture = torch.zeros(64, 64, dtype=torch.uint8)
    pair = ScenePairs([texture], SceneConfig(photometric=None, yaw=20.0))(batch, size_hw, seeded(seed))
    return DepthLabels(pair.depth0, pair.depth1, pair.K0, pair.K1, pair.T_0to1)


def plane(T_0to1: Tensor) -> tuple[DepthLabels, Tensor]:
    """Depth of the tilted plane Z = 5 + 0.3 X - 0.2 Y of camera 0 in both cameras, 96 x 128 pixels, and its H_0to1."""
    K = torch.tensor([[90.0, 0, 64], [0, 90, 48], [0, 0, 1]], dtype=torch.float64)
    normal = torch.tensor([-0.3, 0.2, 1.0], dtype=torch.float64) / 5  # normal . X = 1
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    pixels = torch.stack([x + 0.5, y + 0.5, torch.ones_like(x)], -1).double()
    R, t = T_0to1[:3, :3], T_0to1[:3, 3]
    normal1 = R @ normal / (1 + (R @ normal) @ t)
    depths = [1 / (pixels @ torch.linalg.inv(K).T @ n) for n in (normal, normal1)]
    H = K @ (R + torch.outer(t, normal)) @ torch.linalg.inv(K)
    return DepthLabels(depths[0][None], depths[1][None], K[None], K[None], T_0to1[None]), H[None]


def moved_sideways() -> Tensor:
    T = torch.eye(4, dtype=torch.float64)
    angle = torch.tensor(0.1, dtype=torch.float64)
    T[0, 0], T[0, 2], T[2, 0], T[2, 2] = angle.cos(), angle.sin(), -angle.sin(), angle.cos()
    T[:3, 3] = torch.tensor([-0.4, 0.1, 0.2])
    return T


@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_pairs_from_a_homography_equal_brute_force(seed: int) -> None:
    H = homographies(2, seed)
    assert as_set(pairs_from_homography(H, GRID0, GRID1)) == brute_force(H)


def test_scale_and_sign_of_a_homography_do_not_matter() -> None:
    H = homographies(2, 1)
    expected = as_set(pairs_from_homography(H, GRID0, GRID1))
    for factor in (-3.0, 0.01):
        assert as_set(pairs_from_homography(factor * H, GRID0, GRID1)) == expected


def test_points_beyond_the_horizon_have_no_pair() -> None:
    # The denominator 1 - x / 30 vanishes between columns 3 and 4; x / (1 - x / 30) + 72 takes column 7 to column 1
    # and back, through infinity, and the columns before the horizon off the image.
    H = torch.tensor([[[1 - 72 / 30, 0, 72.0], [0, 1, 0], [-1 / 30, 0, 1]]], dtype=torch.float64)
    assert len(brute_force(H)) > 0
    assert len(pairs_from_homography(H, GRID0, GRID1).batch) == 0


def test_masked_cells_have_no_pair() -> None:
    H = torch.eye(3)[None]
    valid0, valid1 = torch.ones(1, *GRID0, dtype=torch.bool), torch.ones(1, *GRID1, dtype=torch.bool)
    valid0[:, 2, 3] = valid1[:, 4, 5] = False
    kept = as_set(pairs_from_homography(H, GRID0, GRID1, valid0, valid1))
    everything = as_set(pairs_from_homography(H, GRID0, GRID1))
    assert everything - kept == {(0, 2 * 8 + 3, 2 * 9 + 3), (0, 4 * 8 + 5, 4 * 9 + 5)}


def test_window_targets_equal_brute_force() -> None:
    H = homographies(2, 3)
    pairs = pairs_from_homography(H, GRID0, GRID1)
    targets = window_targets_from_homography(H, pairs, GRID0, GRID1)
    assert targets.visible.any()
    for m, (batch, cell0, cell1) in enumerate(zip(*(field.tolist() for field in pairs), strict=True)):
        for q in range(64):
            x0, y0 = 8 * (cell0 % 8) + q % 8 - 3.5, 8 * (cell0 // 8) + q // 8 - 3.5
            x1, y1 = apply(H[batch], x0, y0)
            # Column and row of the pixel whose centre is nearest, in the image and in the window from -4 to 4.
            column, row = round(x1 - 0.5), round(y1 - 0.5)
            in_window = [column - 8 * (cell1 % 9) + 4, row - 8 * (cell1 // 9) + 4]
            visible = min(x0, y0) > 0 and min(column, row) >= 0 and 0 <= min(in_window) <= max(in_window) < 8
            assert targets.visible[m, q] == visible
            if visible:
                assert targets.pixels1[m, q] == 8 * in_window[1] + in_window[0]
                expected = torch.tensor([x1 - column - 0.5, y1 - row - 0.5], dtype=torch.float64)
                torch.testing.assert_close(targets.offsets[m, q], expected)


def test_a_shift_pins_the_frame() -> None:
    H = torch.eye(3)[None].clone()
    H[:, 0, 2], H[:, 1, 2] = 9.25, -0.25
    cells = torch.tensor([2 * 8 + 3])
    pairs = CoarsePairs(torch.zeros(1, dtype=torch.int64), cells, torch.tensor([2 * 9 + 4]))
    assert as_set(pairs) <= as_set(pairs_from_homography(H, GRID0, GRID1))
    targets = window_targets_from_homography(H, pairs, GRID0, GRID1)
    own = torch.arange(64)
    assert torch.equal(targets.visible[0], own % 8 < 7)  # one pixel to the right leaves the window at its last column
    assert torch.equal(targets.pixels1[0][targets.visible[0]], (own + 1)[own % 8 < 7])
    torch.testing.assert_close(targets.offsets[0, 0], torch.tensor([0.25, -0.25]))


def test_depth_of_a_plane_gives_what_its_homography_gives() -> None:
    labels, H = plane(moved_sideways())
    grid = (12, 16)
    by_depth, by_homography = pairs_from_depth(labels, grid, grid), pairs_from_homography(H, grid, grid)
    # Without the cells that see a point of the plane off the other image: depth is unknown there.
    common = as_set(by_depth)
    assert len(common) > 100
    missing = as_set(by_homography) - common
    assert common <= as_set(by_homography)
    for _, cell0, cell1 in missing:
        x, y = apply(H[0], 8 * (cell0 % 16), 8 * (cell0 // 16))
        u, v = apply(torch.linalg.inv(H[0]), 8 * (cell1 % 16), 8 * (cell1 // 16))
        assert min(x, u, y, v) < 0.5 or max(x, u) > 127.5 or max(y, v) > 95.5
    exact = window_targets_from_homography(H, by_depth, grid, grid)
    targets = window_targets_from_depth(labels, by_depth, grid, grid)
    # Interpolated inverse depth is exact on a plane; float32 labels of 100 pixels leave 1e-5.
    both = targets.visible & exact.visible
    assert both.sum() > 0.99 * exact.visible.sum()
    same = both & (targets.pixels1 == exact.pixels1)
    assert same.sum() > 0.999 * both.sum()
    torch.testing.assert_close(targets.offsets[same].double(), exact.offsets[same], atol=1e-4, rtol=0)


def test_pairs_in_scenes_are_seen_by_both_and_few_are_missed() -> None:
    generator = seeded(5)
    config = SceneConfig(photometric=None, yaw=20.0)
    facets = draw_facets(4, 3, 3, generator)
    K, T = _draw_cameras(facets, (96, 128), generator, config)
    views0, views1 = look(facets, K[:4], T[:4]), look(facets, K[4:], T[4:])
    labels, grid = rendered(4, 5), (12, 16)
    torch.testing.assert_close(labels.K1.double(), K[4:], atol=1e-4, rtol=0)
    cells = torch.arange(12 * 16)
    points = 8.0 * torch.stack([cells % 16, cells // 16], -1).double().expand(4, -1, -1)
    inverse0 = cast(views0, view_rays(views0, points)).inverse_depth
    T_0to1 = views1.T @ torch.linalg.inv(views0.T)
    points1, z1 = reproject(points, 1 / inverse0.clamp_min(1e-6), views0.K, views1.K, T_0to1)
    inverse1 = cast(views1, view_rays(views1, points1)).inverse_depth
    visible = (inverse0 > 0) & (z1 > 0) & ((inverse1 * z1 - 1).abs() < 1e-6)
    pairs = pairs_from_depth(labels, grid, grid)
    true = visible[pairs.batch, pairs.cells0]
    target = 8.0 * torch.stack([pairs.cells1 % 16, pairs.cells1 // 16], -1)
    near = ((points1[pairs.batch, pairs.cells0] - target).abs() <= 4.01).all(-1)
    # At the edge of a surface the depth of a pixel beside the cell's corner may be another surface's.
    assert (true & near).double().mean() > 0.97
    inside = ((points1 > 4) & (points1 < torch.tensor([116.0, 84.0]))).all(-1)
    found = torch.zeros_like(visible)
    found[pairs.batch, pairs.cells0] = True
    hidden = (inverse0 > 0) & (z1 > 0) & inside & (inverse1 * z1 > 1.1)
    assert hidden.sum() > 10
    assert (found & hidden).sum() <= 0.05 * hidden.sum()
    # Where image 1 is smaller than image 0, several cells share a nearest one, and one of them counts.
    assert (found & visible & inside).sum() > 0.6 * (visible & inside).sum()


def test_an_occluded_surface_has_no_pair_and_no_target() -> None:
    depth0, depth1 = torch.full((1, 48, 64), 10.0), torch.full((1, 48, 64), 10.0)
    depth1[:, 16:32, 24:48] = 5.0  # something before the wall that only camera 1 sees
    K = torch.tensor([[[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]])
    labels = DepthLabels(depth0, depth1, K, K, torch.eye(4)[None])
    pairs = pairs_from_depth(labels, GRID0, GRID0)
    row, column = pairs.cells0 // 8, pairs.cells0 % 8
    assert not ((row >= 2) & (row < 4) & (column >= 3) & (column < 6)).any()
    assert len(pairs.cells0) == 6 * 8 - 2 * 3
    assert torch.equal(pairs.cells0, pairs.cells1)
    targets = window_targets_from_depth(labels, pairs, GRID0, GRID0)
    beside = targets.visible[(pairs.cells0 == 2 * 8 + 2).nonzero()[0, 0]].view(8, 8)
    assert torch.equal(beside, torch.ones(8, 8, dtype=torch.bool))  # columns 12 ... 19: none is hidden
    corner = targets.visible[(pairs.cells0 == 2 * 8 + 6).nonzero()[0, 0]].view(8, 8)
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[4:, :4] = False  # columns 44 ... 47 of rows 16 ... 19
    assert torch.equal(corner, expected)


def test_depth_at_a_corner_is_between_its_four_pixels() -> None:
    depth = 1 / (1 + 0.04 * torch.rand(1, 6, 8, generator=seeded(10)))
    depth[0, 4, 5] = 2.0  # another surface: at its corners the pixel to the lower right counts
    points = torch.tensor([[[2.0, 3.0], [3.0, 1.0], [5.0, 4.0], [6.0, 5.0], [2.5, 3.5], [8.5, 1.0]]])
    near = [(1 / depth[0, y - 1 : y + 1, x - 1 : x + 1]).mean() for x, y in ((2, 3), (3, 1))]
    expected = torch.stack([*near, 1 / depth[0, 4, 5], 1 / depth[0, 5, 6], 1 / depth[0, 3, 2], torch.zeros(())])
    torch.testing.assert_close(_inverse_depth(depth, torch.zeros(1, dtype=torch.int64), points)[0], expected)


def test_tolerance_decides_what_is_one_surface() -> None:
    K = torch.tensor([[[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]])
    labels = DepthLabels(torch.full((1, 48, 64), 10.0), torch.full((1, 48, 64), 11.0), K, K, torch.eye(4)[None])
    assert len(pairs_from_depth(labels, GRID0, GRID0).batch) == 0
    assert len(pairs_from_depth(labels, GRID0, GRID0, tolerance=0.2).batch) == 48
    with pytest.raises(ValueError, match="tolerance"):
        pairs_from_depth(labels, GRID0, GRID0, tolerance=1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_unknown_depth_gives_no_pair_and_finite_targets(value: float) -> None:
    labels = rendered(2, 6)
    labels = labels._replace(depth0=torch.full_like(labels.depth0, value))
    pairs = pairs_from_depth(labels, (12, 16), (12, 16))
    assert len(pairs.batch) == 0
    empty = window_targets_from_depth(labels, pairs, (12, 16), (12, 16))
    assert empty.visible.shape == (0, 64)
    zero = torch.zeros(1, dtype=torch.int64)
    targets = window_targets_from_depth(labels, CoarsePairs(zero, zero + 40, zero + 40), (12, 16), (12, 16))
    assert not targets.visible.any()
    assert torch.isfinite(targets.offsets).all()


def test_cameras_that_see_nothing_in_common_give_no_pair() -> None:
    labels = rendered(2, 7)
    T = labels.T_0to1.clone()
    T[0] = torch.diag(torch.tensor([-1.0, 1, -1, 1]))  # camera 1 looks back
    pairs = pairs_from_depth(labels._replace(T_0to1=T), (12, 16), (12, 16))
    assert (pairs.batch == 1).all()
    assert len(pairs.batch) > 0


def test_singular_and_broken_homographies_give_no_pair() -> None:
    H = torch.stack([torch.zeros(3, 3), torch.full((3, 3), torch.nan), torch.eye(3)])
    pairs = pairs_from_homography(H, GRID0, GRID1)
    assert (pairs.batch == 2).all()
    assert len(pairs.batch) == 48


def test_depth_smaller_than_the_grid_is_unknown_beyond_it() -> None:
    K = torch.tensor([[[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]])
    depth = torch.full((1, 40, 50), 5.0)
    pairs = pairs_from_depth(DepthLabels(depth, depth, K, K, torch.eye(4)[None]), GRID0, GRID0)
    assert (8 * (pairs.cells0 // 8)).max() == 40
    assert (8 * (pairs.cells0 % 8)).max() == 48


@pytest.mark.parametrize("kind", ["homography", "depth", "pose"])
def test_labels_are_exact_under_autocast(kind: str) -> None:
    labels, grid = rendered(2, 8), (12, 16)
    H = homographies(2, 8).float()

    def run() -> list[Tensor]:
        if kind == "homography":
            pairs = pairs_from_homography(H, grid, grid)
            return [*pairs, *window_targets_from_homography(H, pairs, grid, grid)]
        pairs = pairs_from_depth(labels, grid, grid)
        if kind == "depth":
            return [*pairs, *window_targets_from_depth(labels, pairs, grid, grid)]
        return list(pairs_consistent_with_pose(pairs, labels.K0, labels.K1, labels.T_0to1, grid, grid))

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        actual = run()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def shuffled(pairs: CoarsePairs) -> CoarsePairs:
    order = torch.randperm(len(pairs.batch), generator=seeded(0))
    return CoarsePairs(pairs.batch, pairs.cells0, pairs.cells1[order])


def test_a_pose_admits_true_pairs_and_rules_out_most_wrong_ones() -> None:
    labels, grid = rendered(2, 9, (192, 256)), (24, 32)
    pairs = pairs_from_depth(labels, grid, grid)
    pose = (labels.K0, labels.K1, labels.T_0to1, grid, grid)
    assert len(pairs_consistent_with_pose(pairs, *pose).batch) > 0.99 * len(pairs.batch)
    assert len(pairs_consistent_with_pose(shuffled(pairs), *pose).batch) < 0.4 * len(pairs.batch)
    assert len(pairs_consistent_with_pose(CoarsePairs(*(field[:0] for field in pairs)), *pose).batch) == 0


def test_a_rotation_alone_admits_what_it_maps() -> None:
    K = torch.tensor([[[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]])
    turned = torch.eye(4)[None].clone()
    turned[:, :2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    H = K @ turned[:, :3, :3] @ torch.linalg.inv(K)
    pairs = pairs_from_homography(H, GRID0, GRID0)
    assert len(pairs.batch) > 20
    kept = pairs_consistent_with_pose(pairs, K, K, turned, GRID0, GRID0)
    assert as_set(kept) == as_set(pairs)
    kept = pairs_consistent_with_pose(shuffled(pairs), K, K, turned, GRID0, GRID0)
    assert len(kept.batch) < 0.3 * len(pairs.batch)


def numbered(count: int, start: int = 0) -> CoarsePairs:
    index = torch.arange(start, start + count)
    return CoarsePairs(torch.zeros_like(index), index, index)


@pytest.mark.parametrize(
    ("predicted", "true", "expected_predicted"),
    [(100, 50, 30), (10, 50, 10), (0, 50, 0), (30, 1, 30)],
)
def test_padding_with_true_pairs(predicted: int, true: int, expected_predicted: int) -> None:
    padded = pad_with_true_pairs(numbered(predicted), numbered(true, 1000), 40, 10, seeded(0))
    assert len(padded.batch) == 40
    assert (padded.cells0 < 1000).sum() == expected_predicted
    assert (padded.cells0[expected_predicted:] >= 1000).all()
    assert torch.equal(padded.cells0, padded.cells1)
    assert len(padded.cells0[:expected_predicted].unique()) == expected_predicted


def test_padding_without_true_pairs() -> None:
    assert len(pad_with_true_pairs(numbered(100), numbered(0), 40, 10, seeded(0)).batch) == 30
    assert len(pad_with_true_pairs(numbered(0), numbered(0), 40, 10, seeded(0)).batch) == 0
    with pytest.raises(ValueError, match="minimum"):
        pad_with_true_pairs(numbered(1), numbered(1), 5, 6, seeded(0))


def test_sampling_is_seeded_and_without_replacement() -> None:
    first, again = (sample_pairs(numbered(50), 20, seeded(3)).cells0 for _ in range(2))
    assert torch.equal(first, again)
    assert len(first.unique()) == 20
    assert len(sample_pairs(numbered(5), 20, seeded(3)).batch) == 5
