# SPDX-License-Identifier: Apache-2.0
"""Fundamental matrices from matches and from poses: right where well-posed, against OpenCV."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.geometry.epipolar import sampson_epipolar_distance
from torch import Tensor

from eloftr_ops.geometry import fundamental_from_matches, fundamental_from_pose
from support.gradients import check_gradients
from support.two_view import Scene, scene

LINEAR: dict[str, Any] = {}
REFINED: dict[str, Any] = {"refine_steps": 30}
CAUCHY: dict[str, Any] = {"robust": "cauchy", "robust_scale": 3.0}
ALL = pytest.mark.parametrize("options", [LINEAR, REFINED, CAUCHY], ids=["linear", "refined", "cauchy"])
few = settings(max_examples=8, deadline=None, derandomize=True)


def _estimate(views: Scene, **options: Any) -> Tensor:
    estimate = fundamental_from_matches(*views.matches, batch_size=views.K0.shape[0], **options)
    assert bool(estimate.valid.all())
    return estimate.F_0to1


def _gap(F_a: Tensor, F_b: Tensor) -> Tensor:
    """Distance of matrices up to scale and sign."""
    a, b = (F / torch.linalg.matrix_norm(F)[:, None, None] for F in (F_a, F_b))
    return torch.minimum(torch.linalg.matrix_norm(a - b), torch.linalg.matrix_norm(a + b))


def _mean_square_sampson(F: Tensor, views: Scene) -> Tensor:
    pairs = F.shape[0]
    x0, x1 = views.keypoints0.view(pairs, -1, 2), views.keypoints1.view(pairs, -1, 2)
    return sampson_epipolar_distance(x0, x1, F).mean(1)


def _opencv(views: Scene) -> Tensor:
    pairs = views.K0.shape[0]
    x0, x1 = views.keypoints0.view(pairs, -1, 2).numpy(), views.keypoints1.view(pairs, -1, 2).numpy()
    found = [cv2.findFundamentalMat(a, b, cv2.FM_8POINT)[0] for a, b in zip(x0, x1, strict=True)]
    return torch.from_numpy(np.stack(found))


def _rounded(views: Scene) -> Scene:
    """The same matches at the precision to which OpenCV rounds them."""
    return views._replace(keypoints0=views.keypoints0.float().double(), keypoints1=views.keypoints1.float().double())


@ALL
def test_recovers_the_epipolar_geometry_of_noiseless_matches(options: dict[str, Any]) -> None:
    views = scene(20, 14, seed=1)
    F = _estimate(views, **options)
    assert float(_gap(F, fundamental_from_pose(views.T_0to1, views.K0, views.K1)).max()) < 1e-8
    assert float(torch.linalg.det(F).abs().max()) < 1e-15
    assert float((torch.linalg.matrix_norm(F) - 1.0).abs().max()) < 1e-12


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_linear_estimate_agrees_with_opencvs_eight_point(noise: float) -> None:
    views = _rounded(scene(20, 20, seed=2, noise=noise))
    assert float(_gap(_estimate(views), _opencv(views)).max()) < 1e-6


def test_sampson_error_is_not_above_opencvs_eight_point() -> None:
    views = _rounded(scene(40, 20, seed=3, noise=1.0))
    refined, linear = _estimate(views, **REFINED), _estimate(views)
    theirs = _mean_square_sampson(_opencv(views), views)
    assert bool((_mean_square_sampson(refined, views) <= theirs).all())
    # The same algorithm: equal but for the rounding of both.
    assert bool((_mean_square_sampson(linear, views) <= theirs * (1 + 1e-5)).all())


def test_robust_kernels_survive_wrong_matches() -> None:
    views = scene(20, 60, seed=4, noise=0.3, wrong=0.3)
    estimate = fundamental_from_matches(*views.matches, batch_size=20, robust="geman_mcclure")
    weights = estimate.inlier_weights.view(20, 60)
    # A wrong match falls within a pixel of its epipolar line about once in a hundred times.
    assert float(weights[:, 18:].mean()) > 0.75
    assert float(weights[:, :18].mean()) < 0.1
    truth = fundamental_from_pose(views.T_0to1, views.K0, views.K1)
    right = views._replace(
        keypoints0=views.keypoints0.view(20, 60, 2)[:, 18:],
        keypoints1=views.keypoints1.view(20, 60, 2)[:, 18:],
    )
    ours, exact = _mean_square_sampson(estimate.F_0to1, right), _mean_square_sampson(truth, right)
    assert float((ours / exact).median()) < 1.5
    assert float((_mean_square_sampson(_estimate(views), right) / exact).median()) > 50.0


@ALL
def test_gradient_agrees_with_finite_differences(options: dict[str, Any]) -> None:
    views = scene(1, 11, seed=5, noise=1.0)
    weights = 0.2 + torch.rand(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def lines(x0: Tensor, x1: Tensor, w: Tensor) -> Tensor | tuple[Tensor, ...]:
        estimate = fundamental_from_matches(x0, x1, views.batch_indexes, batch_size=1, weights=w, **options)
        F = 1e3 * estimate.F_0to1
        return (F, estimate.inlier_weights) if "robust" in options else F

    inputs = [views.keypoints0, views.keypoints1, weights]
    check_gradients(lines, inputs, eps=1e-4, rtol=1e-3, fast=options is not LINEAR)


def test_gradient_is_right_where_the_singular_values_coincide() -> None:
    # A camera moved sideways: F is skew-symmetric, its singular values are (s, s, 0).
    views = scene(1, 12, seed=6)
    shifted = views.keypoints0 + torch.tensor([30.0, 0.0]) * torch.linspace(0.5, 2.0, 12)[:, None].double()
    F = fundamental_from_matches(views.keypoints0, shifted, views.batch_indexes, batch_size=1).F_0to1
    values = torch.linalg.svdvals(F[0])
    assert float(values[0] - values[1]) < 1e-6

    def product(x1: Tensor) -> Tensor:
        F = fundamental_from_matches(views.keypoints0, x1, views.batch_indexes, batch_size=1).F_0to1
        return F[:, :, None, :, None] * F[:, None, :, None, :]  # free of the sign, which ties here

    check_gradients(product, [shifted], eps=1e-3, rtol=1e-3, atol=1e-5)


@given(seed=st.integers(0, 999), refined=st.booleans())
@few
def test_swapping_the_images_transposes_it(seed: int, refined: bool) -> None:
    views = scene(2, 14, seed=seed, noise=0.5)
    options = REFINED if refined else LINEAR
    swapped = views._replace(keypoints0=views.keypoints1, keypoints1=views.keypoints0)
    assert float(_gap(_estimate(views, **options), _estimate(swapped, **options).mT).max()) < 1e-6


@given(seed=st.integers(0, 999))
@few
def test_order_and_company_of_the_matches_do_not_matter(seed: int) -> None:
    views = scene(3, 12, seed=seed, noise=0.5)
    x0, x1, index = views.matches
    order = torch.randperm(36, generator=torch.Generator().manual_seed(seed))
    together = _estimate(views)
    shuffled = fundamental_from_matches(x0[order], x1[order], index[order], batch_size=3).F_0to1
    alone = fundamental_from_matches(x0[:12], x1[:12], index[:12], batch_size=1).F_0to1
    assert float(_gap(shuffled, together).max()) < 1e-8
    assert float(_gap(alone, together[:1]).max()) < 1e-8


@given(seed=st.integers(0, 999))
@few
def test_epipolar_constraint_of_a_pose_holds_for_its_own_points(seed: int) -> None:
    views = scene(2, 10, seed=seed)
    F = fundamental_from_pose(views.T_0to1, views.K0, views.K1)
    assert float(_mean_square_sampson(F, views).max()) < 1e-18


def test_pose_to_fundamental_is_differentiable_at_zero_translation() -> None:
    views = scene(1, 8, seed=7)
    T = views.T_0to1.clone()
    T[:, :3, 3] = 0.0
    assert not bool(fundamental_from_pose(T, views.K0, views.K1).any())
    check_gradients(lambda pose: 1e6 * fundamental_from_pose(pose, views.K0, views.K1), [T])
