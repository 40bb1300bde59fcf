# SPDX-License-Identifier: Apache-2.0
"""The metrics, by their laws and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eloftr_ops.evaluation import (
    auc,
    corner_error,
    epipolar_errors,
    matching_precision,
    overlap_error,
    pose_errors,
    transfer_errors,
)
from support.two_view import planar_scene, rotation, scene

INF = float("inf")
LAWS = settings(deadline=None, max_examples=30, derandomize=True)
ERRORS = st.lists(st.one_of(st.floats(0, 30), st.just(INF)), min_size=1, max_size=12)


def pose(vector: tuple[float, float, float], t: tuple[float, float, float]) -> Tensor:
    """Rotation vector in degrees, translation."""
    T = torch.eye(4, dtype=torch.float64)
    T[:3, :3] = rotation(torch.tensor([vector], dtype=torch.float64).deg2rad())[0]
    T[:3, 3] = torch.tensor(t, dtype=torch.float64)
    return T


# --- area under the recall curve ---


def test_auc_of_perfect_failed_and_no_results() -> None:
    assert auc([0.0] * 7, (5, 10, 20)) == pytest.approx([100.0] * 3)
    assert auc([INF] * 7, (5, 10, 20)) == [0.0] * 3
    assert all(math.isnan(area) for area in auc([], (5, 10)))


def test_auc_by_hand() -> None:
    # Recall rises from (0, 0) to (1, 1/3) and (2, 2/3), then stays: 1/6 + 1/2 + 4/3 = 2 of 4.
    assert auc([2.0, INF, 1.0], [4.0]) == pytest.approx([50.0])
    # The error beyond the threshold does not bend the curve before it: 1/6 + 1/3 * 0.5 of 1.5.
    assert auc([2.0, INF, 1.0], [1.5]) == pytest.approx([100 * (1 / 6 + 1 / 6) / 1.5])
    assert auc([3.0], [3.0]) == [0.0]


@LAWS
@given(ERRORS, st.floats(0.1, 10))
def test_auc_depends_on_no_order_and_on_no_unit(errors: list[float], unit: float) -> None:
    expected = auc(errors, (5, 20))
    assert auc(errors[::-1], (5, 20)) == expected
    # A power of two, so that no error crosses a threshold by rounding.
    assert auc([4 * error for error in errors], (20, 80)) == pytest.approx(expected)
    assert all(0 <= area <= 100 + 1e-9 for area in auc([unit * error for error in errors], (5, 20)))


@LAWS
@given(ERRORS, st.floats(0, 30))
def test_a_failure_costs_its_share(errors: list[float], threshold: float) -> None:
    """One more pair that fails scales the area by N / (N + 1)."""
    bound = threshold + 0.5
    more = auc([*errors, INF], [bound])[0]
    assert more == pytest.approx(auc(errors, [bound])[0] * len(errors) / (len(errors) + 1))


def test_auc_refuses_what_has_no_place_on_the_curve() -> None:
    for errors in ([1.0, float("nan")], [-1.0]):
        with pytest.raises(ValueError, match="errors"):
            auc(errors, [5])
    for bound in (0.0, INF, float("nan")):
        with pytest.raises(ValueError, match="thresholds"):
            auc([1.0], [bound])


# --- pose ---


@LAWS
@given(st.floats(0.001, 179.9), st.floats(0.001, 89.9), st.sampled_from([-2.5, 1.0]))
def test_pose_errors_are_the_angles_put_in(turn: float, bend: float, factor: float) -> None:
    truth = pose((10, -20, 5), (0, 0, 2))
    aside = math.radians(bend)
    t = (factor * math.sin(aside), 0.0, factor * math.cos(aside))
    estimate = pose((0, 0, turn), t)
    estimate[:3, :3] = truth[:3, :3] @ estimate[:3, :3]
    errors = pose_errors(estimate, truth)
    # The matrix exponential is good to 1e-9 degrees; an arc cosine would leave 1e-5 at small angles.
    assert errors.rotation == pytest.approx(turn, abs=1e-7)
    assert errors.translation == pytest.approx(bend, abs=1e-7)
    assert errors.largest == max(errors)


def test_a_pure_rotation_has_no_translation_direction() -> None:
    truth = pose((0, 30, 0), (0, 0, 0))
    assert pose_errors(pose((0, 31, 0), (1, 0, 0)), truth) == pytest.approx((1.0, 0.0))
    tiny = pose((0, 30, 0), (0, 1e-9, 0))
    assert pose_errors(pose((0, 31, 0), (1, 0, 0)), tiny).translation == 0


def test_poses_that_say_nothing_are_wrong() -> None:
    truth = pose((0, 30, 0), (1, 0, 0))
    assert pose_errors(torch.full((4, 4), float("nan")), truth) == (INF, INF)
    assert pose_errors(pose((0, 30, 0), (0, 0, 0)), truth).translation == 90
    with pytest.raises(ValueError, match="T_0to1: expected finite"):
        pose_errors(truth, torch.full((4, 4), float("nan")))
    with pytest.raises(ValueError, match=r"T_0to1_estimated: expected shape \(4, 4\)"):
        pose_errors(truth[:3], truth)


# --- homography ---


def test_corner_error_of_a_shift_is_its_length() -> None:
    H = planar_scene(1, 1, seed=0).H_0to1[0]
    shift = torch.tensor([[1.0, 0, 3], [0, 1, 4], [0, 0, 1]], dtype=torch.float64)
    assert corner_error(shift @ H, H, (640, 480)) == pytest.approx(5)
    assert overlap_error(shift @ H, H, (640, 480), (640, 480)) == pytest.approx(5)


@LAWS
@given(st.floats(1e-3, 1e3), st.sampled_from([-1.0, 1.0]), st.integers(0, 5))
def test_homography_errors_do_not_see_scale(scale: float, sign: float, seed: int) -> None:
    estimate, truth = planar_scene(2, 1, seed=seed).H_0to1
    sizes = ((640, 480), (600, 400))
    scaled = scale * sign * estimate
    assert corner_error(scaled, truth, sizes[0]) == pytest.approx(corner_error(estimate, truth, sizes[0]))
    assert overlap_error(scaled, truth, *sizes) == pytest.approx(overlap_error(estimate, truth, *sizes))
    assert overlap_error(estimate, scale * sign * truth, *sizes) == pytest.approx(
        overlap_error(estimate, truth, *sizes)
    )


def test_corners_are_the_centres_of_the_corner_pixels() -> None:
    """Doubling moves a point by its distance to the origin, which is the corner of the first pixel."""
    double = torch.diag(torch.tensor([2.0, 2.0, 1.0]))
    corners = ((0.5, 0.5), (9.5, 0.5), (9.5, 5.5), (0.5, 5.5))
    expected = sum(math.hypot(*corner) for corner in corners) / 4
    assert corner_error(double, torch.eye(3), (10, 6)) == pytest.approx(expected)


def test_overlap_error_looks_at_what_both_images_show() -> None:
    size = (100, 80)
    truth = torch.tensor([[1.0, 0, 60], [0, 1, 0], [0, 0, 1]])
    # An error in the perspective row that grows with x: the overlap is image 0's left 40 %.
    estimate = truth + torch.tensor([[0.0, 0, 0], [0, 0, 0], [1e-3, 0, 0]])
    assert overlap_error(estimate, truth, size, size) < corner_error(estimate, truth, size) / 2
    away = torch.tensor([[1.0, 0, 200], [0, 1, 0], [0, 0, 1]])
    assert overlap_error(away, away, size, size) == INF


@pytest.mark.parametrize("matrix", [torch.full((3, 3), float("nan")), torch.zeros(3, 3)], ids=["nan", "zero"])
def test_no_homography_is_an_infinite_error(matrix: Tensor) -> None:
    assert corner_error(matrix, torch.eye(3), (64, 48)) == INF
    assert overlap_error(matrix, torch.eye(3), (64, 48), (64, 48)) == INF


def test_a_corner_at_infinity_is_no_crash() -> None:
    H = torch.eye(3)
    H[2, 0] = -1 / 0.5  # the first corner's depth is zero
    assert corner_error(H, torch.eye(3), (64, 48)) > 1e3


# --- precision ---


def test_epipolar_errors_by_hand() -> None:
    """A camera that moves sideways has horizontal epipolar lines: the distance is that in y, in each image."""
    K = torch.tensor([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    T = pose((0, 0, 0), (-3, 0, 0))
    x0 = torch.tensor([[100.0, 50], [320, 240], [1, 2]])
    x1 = x0 + torch.tensor([[30.0, 0], [-7, 10], [0, -2]])
    expected = [2 * (dy / 500) ** 2 for dy in (0, 10, 2)]
    errors = epipolar_errors(x0, x1, K, K, T)
    torch.testing.assert_close(errors, torch.tensor(expected, dtype=torch.float64), atol=1e-18, rtol=1e-9)
    # 7e-3 in normalised coordinates, 3.5 pixels at this focal length, is the usual bound outdoors.
    assert matching_precision(errors, 1e-4) == pytest.approx(2 / 3)


def test_epipolar_errors_are_symmetric_and_zero_for_true_matches() -> None:
    view = scene(1, 40, seed=1, wrong=0.5)
    x0, x1, K0, K1, T = view.keypoints0, view.keypoints1, view.K0[0], view.K1[0], view.T_0to1[0]
    errors = epipolar_errors(x0, x1, K0, K1, T)
    assert errors[20:].max() < 1e-20
    assert errors[:20].median() > 1e-4
    torch.testing.assert_close(errors, epipolar_errors(x1, x0, K1, K0, torch.linalg.inv(T)))
    assert matching_precision(errors, 1e-4) >= 0.5


def test_epipolar_errors_of_a_pure_rotation_are_distances() -> None:
    view = scene(1, 20, seed=2, baseline=0.0)
    T = view.T_0to1[0].clone()
    T[:3, 3] = 0
    moved = view.keypoints1 + torch.tensor([4.5, 0.0])  # 0.01 at the focal length of 450
    assert epipolar_errors(view.keypoints0, view.keypoints1, view.K0[0], view.K1[0], T).max() < 1e-20
    errors = epipolar_errors(view.keypoints0, moved, view.K0[0], view.K1[0], T)
    assert (errors > 1e-4).all()  # of image 1 alone, exactly 1e-4
    assert (errors < 4e-4).all()


def test_transfer_errors_and_precision() -> None:
    H = torch.tensor([[1.0, 0, 5], [0, 1, 0], [0, 0, 1]])
    x0 = torch.tensor([[0.0, 0], [10, 10], [20, 3]])
    x1 = torch.tensor([[5.0, 0], [15, 12], [22, 7]])
    errors = transfer_errors(x0, x1, -2 * H)
    torch.testing.assert_close(errors, torch.tensor([0.0, 2, 5], dtype=torch.float64))
    assert matching_precision(errors, 3) == pytest.approx(2 / 3)


def test_no_match_is_precision_zero() -> None:
    none = torch.zeros(0, 2)
    assert matching_precision(transfer_errors(none, none, torch.eye(3)), 3) == 0
    K = torch.eye(3)
    assert matching_precision(epipolar_errors(none, none, K, K, pose((0, 0, 0), (1, 0, 0))), 1e-4) == 0
