# SPDX-License-Identifier: Apache-2.0
"""Homographies from matches: right where well-posed, against OpenCV and against finite differences."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eloftr_ops.geometry import apply_homography, homography_from_matches
from support.gradients import check_gradients
from support.two_view import SIZE, PlanarScene, pair_index, planar_scene, project

LINEAR: dict[str, Any] = {}
REFINED: dict[str, Any] = {"refine_steps": 20}
CAUCHY: dict[str, Any] = {"robust": "cauchy"}
GEMAN: dict[str, Any] = {"robust": "geman_mcclure", "robust_scale": 8.0}
ALL = pytest.mark.parametrize("options", [LINEAR, REFINED, CAUCHY, GEMAN], ids=["linear", "refined", "cauchy", "geman"])
few = settings(max_examples=8, deadline=None, derandomize=True)


def _estimate(scene: PlanarScene, **options: Any) -> Tensor:
    estimate = homography_from_matches(*scene.matches, batch_size=scene.H_0to1.shape[0], **options)
    assert bool(estimate.valid.all())
    assert bool(estimate.converged.all())
    return estimate.H_0to1


def _corners(H: Tensor) -> Tensor:
    outline = torch.tensor([[0.0, 0.0], [SIZE[0], 0.0], [SIZE[0], SIZE[1]], [0.0, SIZE[1]]], dtype=H.dtype)
    return project(H, outline.expand(H.shape[0], 4, 2))


def _mean_square_transfer(H: Tensor, scene: PlanarScene) -> Tensor:
    pairs = H.shape[0]
    x0, x1 = scene.keypoints0.view(pairs, -1, 2), scene.keypoints1.view(pairs, -1, 2)
    return (project(H, x0) - x1).square().sum(-1).mean(1)


@ALL
def test_recovers_the_homography_of_noiseless_matches(options: dict[str, Any]) -> None:
    scene = planar_scene(20, 12, seed=1)
    error = _corners(_estimate(scene, **options)) - _corners(scene.H_0to1)
    assert float(error.abs().max()) < 1e-8


def _opencv(scene: PlanarScene) -> Tensor:
    pairs = scene.H_0to1.shape[0]
    x0, x1 = scene.keypoints0.view(pairs, -1, 2).numpy(), scene.keypoints1.view(pairs, -1, 2).numpy()
    return torch.from_numpy(np.stack([cv2.findHomography(a, b, 0)[0] for a, b in zip(x0, x1, strict=True)]))


def _rounded(scene: PlanarScene) -> PlanarScene:
    """The same matches at the precision to which OpenCV rounds them."""
    return scene._replace(keypoints0=scene.keypoints0.float().double(), keypoints1=scene.keypoints1.float().double())


@pytest.mark.parametrize(("points", "options"), [(4, LINEAR), (4, REFINED), (5, REFINED), (30, REFINED)])
def test_agrees_with_opencv_on_noiseless_matches(points: int, options: dict[str, Any]) -> None:
    scene = _rounded(planar_scene(20, points, seed=2))
    ours = _estimate(scene, **options)
    theirs = _opencv(scene)
    gap = torch.linalg.matrix_norm(ours / ours[:, 2:, 2:] - theirs)
    assert float((gap / torch.linalg.matrix_norm(theirs)).max()) < 1e-6


def test_transfer_error_is_not_above_opencvs_least_squares() -> None:
    scene = _rounded(planar_scene(50, 15, seed=3, noise=2.0))
    ours = _mean_square_transfer(_estimate(scene, **REFINED), scene)
    # Both descend to a minimum of the same cost; 1e-9 is the share at which the iterations stop.
    assert bool((ours <= _mean_square_transfer(_opencv(scene), scene) * (1 + 1e-9)).all())
    assert bool((ours <= _mean_square_transfer(_estimate(scene), scene) * (1 + 1e-9)).all())


@pytest.mark.parametrize("robust", ["cauchy", "geman_mcclure"])
@pytest.mark.parametrize("wrong", [0.2, 0.5])
def test_robust_kernels_survive_wrong_matches(robust: str, wrong: float) -> None:
    scene = planar_scene(20, 40, seed=4, noise=0.5, wrong=wrong)
    estimate = homography_from_matches(*scene.matches, batch_size=20, robust=robust)
    gap = (_corners(estimate.H_0to1) - _corners(scene.H_0to1)).norm(dim=-1).mean(1)
    # 20 right matches with half a pixel of noise leave about a pixel at the corners, which extrapolate.
    assert float(gap.max()) < 4.0
    weights = estimate.inlier_weights.view(20, 40)
    count = round(wrong * 40)
    # Half a pixel of noise on a scale of two: 1 / (1 + 1/8)^2 = 0.79 for the steeper kernel.
    assert float(weights[:, count:].mean()) > 0.75
    assert float(weights[:, :count].mean()) < 0.05
    plain = homography_from_matches(*scene.matches, batch_size=20).H_0to1
    assert float((_corners(plain) - _corners(scene.H_0to1)).norm(dim=-1).mean(1).min()) > 10.0


def test_one_match_at_1e5_does_not_move_the_robust_estimate() -> None:
    scene = planar_scene(10, 12, seed=5, noise=0.2)
    far = scene.keypoints1.clone()
    far[::12] = 1e5
    estimate = homography_from_matches(scene.keypoints0, far, scene.batch_indexes, batch_size=10, robust="cauchy")
    assert float((_corners(estimate.H_0to1) - _corners(scene.H_0to1)).norm(dim=-1).max()) < 4.0
    assert float(estimate.inlier_weights[::12].max()) < 1e-6


@ALL
def test_gradient_agrees_with_finite_differences(options: dict[str, Any]) -> None:
    scene = planar_scene(2, 6, seed=6, noise=2.0)
    weights = 0.2 + torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def corners(x0: Tensor, x1: Tensor, w: Tensor) -> Tensor | tuple[Tensor, ...]:
        estimate = homography_from_matches(x0, x1, scene.batch_indexes, batch_size=2, weights=w, **options)
        mapped = _corners(estimate.H_0to1)
        return (mapped, estimate.inlier_weights) if "robust" in options else (mapped, estimate.H_0to1)

    check_gradients(
        corners, [scene.keypoints0, scene.keypoints1, weights], eps=1e-4, rtol=1e-3, fast="robust" in options
    )


@pytest.mark.parametrize("options", [LINEAR, REFINED], ids=["linear", "refined"])
def test_gradient_is_right_at_an_exact_fit_of_the_unit_square(options: dict[str, Any]) -> None:
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    index = torch.zeros(4, dtype=torch.long)

    def mapped(x0: Tensor, x1: Tensor) -> Tensor:
        H = homography_from_matches(x0, x1, index, batch_size=1, **options).H_0to1
        return project(H, torch.tensor([[[0.3, 0.4], [2.0, 1.0]]], dtype=torch.float64))

    check_gradients(mapped, [square, square.clone()], eps=1e-5)


def test_linear_estimate_is_twice_differentiable_and_refined_refuses() -> None:
    scene = planar_scene(1, 5, seed=7, noise=1.0)
    x0 = scene.keypoints0.clone().requires_grad_()

    def grad(x: Tensor, **options: Any) -> Tensor:
        H = homography_from_matches(x, scene.keypoints1, scene.batch_indexes, batch_size=1, **options).H_0to1
        return torch.autograd.grad(_corners(H).square().sum(), x, create_graph=True)[0]

    check_gradients(grad, [scene.keypoints0], eps=1e-4, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(grad(x0, **REFINED).square().sum(), x0)


def test_an_initial_estimate_replaces_the_linear_start() -> None:
    scene = planar_scene(5, 40, seed=8, noise=0.5, wrong=0.4)
    near = scene.H_0to1 + torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, -3.0], [0.0, 0.0, 0.0]])
    estimate = homography_from_matches(*scene.matches, batch_size=5, robust="geman_mcclure", initial_0to1=near)
    assert float((_corners(estimate.H_0to1) - _corners(scene.H_0to1)).norm(dim=-1).max()) < 4.0


@given(seed=st.integers(0, 999), linear=st.booleans())
@few
def test_swapping_the_images_inverts_it(seed: int, linear: bool) -> None:
    scene = planar_scene(3, 6, seed=seed)
    options = LINEAR if linear else REFINED
    swapped = homography_from_matches(
        scene.keypoints1, scene.keypoints0, scene.batch_indexes, batch_size=3, **options
    ).H_0to1
    product = swapped @ _estimate(scene, **options)
    # Determinant 1 on both sides: the product is the identity itself, not a multiple of it.
    assert torch.allclose(product, torch.eye(3, dtype=torch.float64).expand(3, 3, 3), atol=1e-6)


@given(seed=st.integers(0, 999), factor=st.floats(1e-3, 1e3))
@few
def test_scaling_the_coordinates_scales_the_homography(seed: int, factor: float) -> None:
    scene = planar_scene(2, 9, seed=seed, noise=1.0)
    S = torch.diag(torch.tensor([factor, factor, 1.0], dtype=torch.float64))
    larger = scene._replace(keypoints0=factor * scene.keypoints0, keypoints1=factor * scene.keypoints1)
    for options in (LINEAR, REFINED):
        expected = _corners(_estimate(scene, **options))
        scaled_back = torch.linalg.inv(S) @ _estimate(larger, **options) @ S
        assert torch.allclose(_corners(scaled_back), expected, atol=1e-5)


@given(seed=st.integers(0, 999))
@few
def test_order_of_the_matches_does_not_matter(seed: int) -> None:
    scene = planar_scene(3, 8, seed=seed, noise=1.0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    shuffled = scene._replace(
        keypoints0=scene.keypoints0[order],
        keypoints1=scene.keypoints1[order],
        batch_indexes=scene.batch_indexes[order],
    )
    assert torch.allclose(_corners(_estimate(shuffled)), _corners(_estimate(scene)), atol=1e-7)


@given(seed=st.integers(0, 999), robust=st.sampled_from([None, "cauchy"]))
@few
def test_a_batch_gives_what_its_pairs_give_alone(seed: int, robust: str | None) -> None:
    scene = planar_scene(3, 12, seed=seed, noise=0.5)
    keep = torch.tensor([*range(12), *range(12, 17), *range(24, 32)])  # 12, 5 and 8 matches
    x0, x1, index = (v[keep] for v in scene.matches)
    together = homography_from_matches(x0, x1, index, batch_size=3, robust=robust).H_0to1
    for pair in range(3):
        mine = index == pair
        alone = homography_from_matches(x0[mine], x1[mine], index[mine] * 0, batch_size=1, robust=robust).H_0to1
        assert torch.allclose(_corners(alone), _corners(together[pair : pair + 1]), atol=1e-6)


@given(seed=st.integers(0, 999), factor=st.floats(1e-6, 1e6))
@few
def test_only_the_ratios_of_weights_matter(seed: int, factor: float) -> None:
    scene = planar_scene(2, 9, seed=seed, noise=1.0)
    weights = 0.1 + torch.rand(18, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain, scaled = _estimate(scene, weights=weights), _estimate(scene, weights=factor * weights)
    assert torch.allclose(_corners(plain), _corners(scaled), atol=1e-6)


def test_a_zero_weight_leaves_a_match_out_and_a_double_weight_counts_twice() -> None:
    scene = planar_scene(1, 10, seed=9, noise=2.0)
    weights = torch.ones(10, dtype=torch.float64)
    weights[0], weights[1] = 0.0, 2.0
    rows = torch.tensor([1, 1, *range(2, 10)])
    x0, x1 = scene.keypoints0, scene.keypoints1
    repeated = homography_from_matches(x0[rows], x1[rows], scene.batch_indexes, batch_size=1).H_0to1
    weighted = homography_from_matches(x0, x1, scene.batch_indexes, batch_size=1, weights=weights).H_0to1
    assert torch.allclose(_corners(weighted), _corners(repeated), atol=1e-7)


def test_float32_and_half_inputs_give_the_float64_answer_at_their_own_rounding() -> None:
    scene = planar_scene(4, 20, seed=10, noise=1.0)
    x0, x1, index = scene.matches
    single = homography_from_matches(x0.float(), x1.float(), index, batch_size=4)
    assert single.H_0to1.dtype == torch.float32
    # 32-bit pixels are rounded at 3e-5; 20 of them with unit leverage stay near that.
    assert float((_corners(single.H_0to1.double()) - _corners(_estimate(scene))).abs().max()) < 5e-3
    half = homography_from_matches(x0.half(), x1.half(), index, batch_size=4)
    assert half.H_0to1.dtype == torch.float32
    assert bool(half.valid.all())


def test_autocast_and_inference_mode_change_nothing() -> None:
    scene = planar_scene(2, 10, seed=11, noise=1.0)
    expected = _estimate(scene, **CAUCHY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_estimate(scene, **CAUCHY), expected)
    with torch.inference_mode():
        assert torch.equal(_estimate(scene, **CAUCHY), expected)


def test_apply_homography_divides_and_stays_finite_on_the_horizon() -> None:
    H = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [0.5, 0.0, -1.0]]], requires_grad=True)
    points = torch.tensor([[[4.0, 3.0], [2.0, 1.0], [2.0 + 1e-7, 1.0]]])  # the line x = 2 goes to infinity
    mapped = apply_homography(H, points)
    assert torch.allclose(mapped[0, 0], torch.tensor([6.0, 3.0]))
    assert bool(torch.isfinite(mapped).all())
    assert float(mapped[0, 1:, 0].detach().min()) > 1e5
    (gradient,) = torch.autograd.grad(mapped.sum(), H)
    assert bool(torch.isfinite(gradient).all())


def test_apply_homography_names_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"points0: expected shape \(B, N, 2\)"):
        apply_homography(torch.eye(3)[None], torch.zeros(4, 2))
    with pytest.raises(ValueError, match="H_0to1"):
        apply_homography(torch.eye(3), torch.zeros(1, 4, 2))


def test_pairs_without_matches_are_flagged_and_leave_the_others_alone() -> None:
    scene = planar_scene(1, 10, seed=12, noise=1.0)
    estimate = homography_from_matches(scene.keypoints0, scene.keypoints1, pair_index(1, 10) + 1, batch_size=3)
    assert estimate.valid.tolist() == [False, True, False]
    assert torch.allclose(_corners(estimate.H_0to1[1:2]), _corners(_estimate(scene)), atol=1e-9)
    assert torch.equal(estimate.H_0to1[0], torch.eye(3, dtype=torch.float64))


def test_apply_homography_keeps_its_precision_under_autocast_and_takes_two_dtypes() -> None:
    scene = planar_scene(1, 50, seed=21)
    H, points = scene.H_0to1.float(), scene.keypoints0.float()[None]
    plain = apply_homography(H, points)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_homography(H, points), plain)
    assert torch.equal(apply_homography(scene.H_0to1, points), apply_homography(scene.H_0to1, points.double()))
    assert apply_homography(H.bfloat16(), points.half()).dtype is torch.float32
    # bfloat16 points are read exactly, and computed with in float32.
    rounded = points.bfloat16()
    assert torch.equal(apply_homography(H, rounded), apply_homography(H, rounded.float()))


def test_apply_homography_takes_every_scale() -> None:
    scene = planar_scene(1, 50, seed=22)
    H, points = scene.H_0to1.float(), scene.keypoints0.float()[None]
    for scale in (2.0**-100, 2.0**110):
        assert torch.equal(apply_homography(scale * H, points), apply_homography(H, points))
