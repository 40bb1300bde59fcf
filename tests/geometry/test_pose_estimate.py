# SPDX-License-Identifier: Apache-2.0
"""Relative poses and essential matrices from matches."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eloftr_ops.geometry import essential_from_matches, relative_pose_from_matches
from eloftr_ops.geometry.pose import PoseEstimate
from support.gradients import check_gradients
from support.two_view import Scene, angle_between, direction_between, scene

LINEAR: dict[str, Any] = {"refine_steps": 0}
REFINED: dict[str, Any] = {"refine_steps": 30}
CAUCHY: dict[str, Any] = {"robust": "cauchy", "robust_scale": 3.0}
ALL = pytest.mark.parametrize("options", [LINEAR, REFINED, CAUCHY], ids=["linear", "refined", "cauchy"])
few = settings(max_examples=8, deadline=None, derandomize=True)


def _estimate(views: Scene, **options: Any) -> PoseEstimate:
    return relative_pose_from_matches(*views.matches[:2], views.K0, views.K1, views.batch_indexes, **options)


def _errors(T: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation and translation direction errors in degrees."""
    return angle_between(T[:, :3, :3], truth[:, :3, :3]), direction_between(T[:, :3, 3], truth[:, :3, 3])


def _recover_pose(views: Scene, method: int, threshold: float) -> Tensor:
    """OpenCV's five-point essential matrix, threshold in pixels, and its cheirality check."""
    pairs = views.K0.shape[0]
    poses = torch.eye(4, dtype=torch.float64).repeat(pairs, 1, 1)
    x0, x1 = views.keypoints0.view(pairs, -1, 2).numpy(), views.keypoints1.view(pairs, -1, 2).numpy()
    for pair in range(pairs):
        K0, K1 = views.K0[pair].numpy(), views.K1[pair].numpy()
        a = cv2.undistortPoints(x0[pair][:, None], K0, None)
        b = cv2.undistortPoints(x1[pair][:, None], K1, None)
        E, mask = cv2.findEssentialMat(a, b, np.eye(3), method, 0.9999, threshold / 475.0)
        _, R, t, _ = cv2.recoverPose(E[:3], a, b, np.eye(3), mask=mask)
        poses[pair, :3, :3], poses[pair, :3, 3] = torch.from_numpy(R), torch.from_numpy(t[:, 0])
    return poses


@ALL
def test_recovers_the_pose_of_noiseless_matches(options: dict[str, Any]) -> None:
    views = scene(20, 14, seed=1)
    estimate = _estimate(views, **options)
    assert bool(estimate.valid.all())
    assert bool(estimate.converged.all())
    assert float((estimate.T_0to1 - views.T_0to1).abs().max()) < 1e-7


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_errors_are_not_above_opencvs(noise: float) -> None:
    views = scene(40, 40, seed=2, noise=noise)
    ours = _errors(_estimate(views).T_0to1, views.T_0to1)
    # The last one refines on the same error as we do, with weights of its own: equal but for those.
    for method, margin in ((cv2.LMEDS, 1.0), (cv2.RANSAC, 1.0), (cv2.USAC_MAGSAC, 1.05)):
        theirs = _errors(_recover_pose(views, method, 2.5 * noise), views.T_0to1)
        for our_error, their_error in zip(ours, theirs, strict=True):
            assert float(our_error.mean()) <= margin * float(their_error.mean())
            assert float(our_error.median()) <= margin * float(their_error.median())


def test_agrees_with_opencv_on_noiseless_matches() -> None:
    views = scene(10, 20, seed=3)
    gap = _estimate(views).T_0to1 - _recover_pose(views, cv2.RANSAC, 1e-6)
    assert float(gap.abs().max()) < 1e-6


def test_refinement_is_better_than_the_linear_estimate() -> None:
    views = scene(60, 30, seed=4, noise=1.0)
    linear, refined = (_errors(_estimate(views, **o).T_0to1, views.T_0to1) for o in (LINEAR, REFINED))
    assert float(refined[0].median()) < 0.9 * float(linear[0].median())
    assert float(refined[1].median()) < 0.9 * float(linear[1].median())


def test_robust_kernels_survive_wrong_matches() -> None:
    views = scene(20, 80, seed=5, noise=0.3, wrong=0.25)
    estimate = _estimate(views, robust="geman_mcclure")
    turn, slide = _errors(estimate.T_0to1, views.T_0to1)
    assert float(turn.median()) < 0.3
    assert float(slide.median()) < 1.0
    assert float(_errors(_estimate(views).T_0to1, views.T_0to1)[1].median()) > 10.0


@ALL
def test_gradient_agrees_with_finite_differences(options: dict[str, Any]) -> None:
    views = scene(1, 11, seed=6, noise=1.0)
    weights = 0.2 + torch.rand(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def motion(x0: Tensor, x1: Tensor, w: Tensor, focal: Tensor) -> tuple[Tensor, ...]:
        K1 = torch.stack([focal, zero, 320 * one, zero, focal, 240 * one, zero, zero, one], dim=1).view(1, 3, 3)
        estimate = relative_pose_from_matches(x0, x1, views.K0, K1, views.batch_indexes, weights=w, **options)
        pose = estimate.T_0to1[:, :3]
        return (pose, estimate.inlier_weights) if "robust" in options else (pose,)

    inputs = [views.keypoints0, views.keypoints1, weights, 450.0 * one]
    check_gradients(motion, inputs, eps=1e-3, rtol=1e-3, fast=options is not LINEAR)


@pytest.mark.parametrize("options", [LINEAR, REFINED], ids=["linear", "refined"])
def test_gradient_is_right_at_an_exact_fit(options: dict[str, Any]) -> None:
    views = scene(1, 9, seed=7)

    def motion(x0: Tensor, x1: Tensor) -> Tensor:
        return relative_pose_from_matches(x0, x1, views.K0, views.K1, views.batch_indexes, **options).T_0to1[:, :3]

    check_gradients(motion, [views.keypoints0, views.keypoints1], eps=1e-3, rtol=1e-3, atol=1e-5)


def test_essential_matrix_is_that_of_the_pose() -> None:
    views = scene(5, 14, seed=8, noise=0.5)
    E = essential_from_matches(*views.matches[:2], views.K0, views.K1, views.batch_indexes)
    T = _estimate(views).T_0to1
    x, y, z = T[:, :3, 3].unbind(1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    expected = skew @ T[:, :3, :3] / 2.0**0.5
    sign = (expected * E.E_0to1).sum((1, 2)).sign()[:, None, None]
    assert torch.allclose(E.E_0to1, sign * expected, atol=1e-12)
    values = torch.linalg.svdvals(E.E_0to1)
    assert torch.allclose(values, torch.tensor([0.5**0.5, 0.5**0.5, 0.0]).double().expand(5, 3), atol=1e-12)


def test_gradient_reaches_the_matches_through_the_essential_matrix() -> None:
    views = scene(1, 10, seed=9, noise=1.0)

    def essential(x0: Tensor, x1: Tensor) -> Tensor:
        return essential_from_matches(x0, x1, views.K0, views.K1, views.batch_indexes).E_0to1

    check_gradients(essential, [views.keypoints0, views.keypoints1], eps=1e-3, rtol=1e-3)


def test_points_on_a_plane_need_an_initial_pose_and_are_right_with_one() -> None:
    views = scene(6, 20, seed=10, flat=True)
    assert not bool(_estimate(views).valid.any())
    turned = views.T_0to1.clone()
    turned[:, :3, 3] = torch.nn.functional.normalize(turned[:, :3, 3] + 0.05, dim=1)
    estimate = _estimate(views, initial_0to1=turned)
    assert bool(estimate.valid.all())
    assert float((estimate.T_0to1 - views.T_0to1).abs().max()) < 1e-7


def test_five_matches_suffice_with_an_initial_pose() -> None:
    views = scene(6, 5, seed=11)
    assert not bool(_estimate(views).valid.any())
    assert bool(_estimate(views, initial_0to1=views.T_0to1).valid.all())


@given(seed=st.integers(0, 999), refined=st.booleans())
@few
def test_swapping_the_images_inverts_it(seed: int, refined: bool) -> None:
    views = scene(2, 16, seed=seed, noise=0.2)
    options = REFINED if refined else LINEAR
    back = relative_pose_from_matches(
        views.keypoints1, views.keypoints0, views.K1, views.K0, views.batch_indexes, **options
    ).T_0to1
    product = back @ _estimate(views, **options).T_0to1
    tolerance = 1e-6 if refined else 1e-5
    assert torch.allclose(product, torch.eye(4, dtype=torch.float64).expand(2, 4, 4), atol=tolerance)


@given(seed=st.integers(0, 999))
@few
def test_poses_compose_along_a_chain_of_cameras(seed: int) -> None:
    first = scene(1, 16, seed=seed)
    second = scene(1, 16, seed=seed + 1000)
    # The points of the first scene, seen by a third camera that moves on by the second scene's motion.
    T_01, T_12 = first.T_0to1, second.T_0to1
    x0h = torch.cat([first.keypoints0, torch.ones(16, 1, dtype=torch.float64)], 1) @ torch.linalg.inv(first.K0[0]).T
    depth = torch.linspace(4.0, 8.0, 16, dtype=torch.float64)[torch.randperm(16)][:, None]
    X0 = x0h * depth
    X1 = X0 @ T_01[0, :3, :3].T + T_01[0, :3, 3]
    X2 = X1 @ T_12[0, :3, :3].T + T_12[0, :3, 3]

    def pixels(X: Tensor) -> Tensor:
        p = X @ first.K0[0].T
        return p[:, :2] / p[:, 2:]

    def rotation(a: Tensor, b: Tensor) -> Tensor:
        estimate = relative_pose_from_matches(a, b, first.K0, first.K0, first.batch_indexes)
        assert bool(estimate.valid.all())
        return estimate.rotation_0to1[0]

    direct = rotation(pixels(X0), pixels(X2))
    chained = rotation(pixels(X1), pixels(X2)) @ rotation(pixels(X0), pixels(X1))
    assert torch.allclose(direct, chained, atol=1e-6)


@given(seed=st.integers(0, 999), factor=st.floats(0.01, 100.0))
@few
def test_pixel_units_do_not_matter(seed: int, factor: float) -> None:
    views = scene(2, 14, seed=seed, noise=0.5)
    S = torch.diag(torch.tensor([factor, factor, 1.0], dtype=torch.float64))
    scaled = views._replace(
        keypoints0=factor * views.keypoints0,
        keypoints1=factor * views.keypoints1,
        K0=S @ views.K0,
        K1=S @ views.K1,
    )
    assert torch.allclose(_estimate(scaled).T_0to1, _estimate(views).T_0to1, atol=1e-6)


def test_a_batch_gives_what_its_pairs_give_alone() -> None:
    views = scene(3, 16, seed=12, noise=0.5)
    keep = torch.tensor([*range(16), *range(16, 26), *range(32, 45)])
    x0, x1, index = (v[keep] for v in views.matches)
    together = relative_pose_from_matches(x0, x1, views.K0, views.K1, index).T_0to1
    for pair in range(3):
        mine = index == pair
        K0, K1 = views.K0[pair : pair + 1], views.K1[pair : pair + 1]
        alone = relative_pose_from_matches(x0[mine], x1[mine], K0, K1, 0 * index[mine]).T_0to1
        assert torch.allclose(alone, together[pair : pair + 1], atol=1e-8)
