# SPDX-License-Identifier: Apache-2.0
"""Numbers whose squares overflow or vanish give the right answer or a flag, never NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import (
    essential_from_matches,
    fundamental_from_matches,
    fundamental_from_pose,
    homography_from_matches,
    relative_pose_from_matches,
)
from eloftr_ops.losses import (
    corner_error_loss,
    cycle_consistency_loss,
    pose_loss,
    sampson_loss,
    symmetric_epipolar_loss,
    symmetric_transfer_loss,
    weak_pose_loss,
)
from support.two_view import planar_scene, scene

HUGE, TINY = 2.0**530, 2.0**-530  # about 1e160: the squares are beyond float64
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"refine_steps": 8}, {"robust": "cauchy"}, {"robust": "geman_mcclure"}],
    ids=["linear", "refined", "cauchy", "geman"],
)


@OPTIONS
@pytest.mark.parametrize(("scale0", "scale1"), [(HUGE, HUGE), (TINY, TINY), (HUGE, 1.0), (1.0, TINY)])
def test_homography_of_coordinates_at_any_scale(options: dict[str, Any], scale0: float, scale1: float) -> None:
    planar = planar_scene(2, 20, seed=1, noise=0.3)
    x0, x1, index = planar.matches
    plain = homography_from_matches(x0, x1, index, batch_size=2, robust_scale=2.0, **options)
    a, b = (x0 * scale0).requires_grad_(), (x1 * scale1).requires_grad_()
    scaled = homography_from_matches(a, b, index, batch_size=2, robust_scale=2.0 * scale1, **options)
    assert bool(scaled.valid.all())
    back = scaled.H_0to1.detach().clone()
    back[:, :2] /= scale1
    back[:, :, :2] *= scale0
    expected = plain.H_0to1 / plain.H_0to1.abs().amax((1, 2), keepdim=True)
    assert torch.allclose(back / back.abs().amax((1, 2), keepdim=True), expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(scaled.inlier_weights.detach(), plain.inlier_weights, atol=1e-9)
    # The sum of the normalised entries: a loss at the scale of the matrix itself would overflow by right.
    (scaled.H_0to1 / scaled.H_0to1.detach().abs().amax((1, 2), keepdim=True)).sum().backward()
    assert bool(torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all())


@OPTIONS
@pytest.mark.parametrize("scale", [HUGE, TINY])
def test_fundamental_matrix_of_coordinates_at_any_scale(options: dict[str, Any], scale: float) -> None:
    views = scene(2, 20, seed=2, noise=0.3)
    x0, x1, index = views.matches
    plain = fundamental_from_matches(x0, x1, index, batch_size=2, **options)
    a = (x0 * scale).requires_grad_()
    scaled = fundamental_from_matches(a, x1 * scale, index, batch_size=2, robust_scale=scale, **options)
    assert bool(scaled.valid.all())
    assert torch.allclose(scaled.inlier_weights.detach(), plain.inlier_weights, atol=1e-9)
    assert bool(torch.isfinite(scaled.F_0to1).all())
    scaled.F_0to1.sum().backward()
    assert bool(torch.isfinite(a.grad).all())


@pytest.mark.parametrize("weight", [1e308, 1e-320])
@OPTIONS
def test_weights_count_by_their_ratios_at_any_scale(options: dict[str, Any], weight: float) -> None:
    planar, views = planar_scene(2, 20, seed=3, noise=0.3), scene(2, 20, seed=3, noise=0.3)
    weights = torch.full((40,), weight, dtype=torch.float64)
    for estimate, matches in ((homography_from_matches, planar), (fundamental_from_matches, views)):
        plain = estimate(*matches.matches, batch_size=2, **options)
        heavy = estimate(*matches.matches, batch_size=2, weights=weights, **options)
        assert torch.allclose(heavy[0], plain[0], rtol=1e-9)
        assert bool(heavy.valid.all())
    plain = symmetric_transfer_loss(*planar.matches, planar.H_0to1)
    assert torch.allclose(symmetric_transfer_loss(*planar.matches, planar.H_0to1, weights), plain)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e200, 1e-200])
def test_matrices_count_up_to_scale_at_any_scale(scale: float) -> None:
    planar, views = planar_scene(2, 20, seed=4, noise=0.3), scene(2, 20, seed=4, noise=0.3)
    H, F = planar.H_0to1, fundamental_from_pose(views.T_0to1, views.K0, views.K1)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda M: symmetric_transfer_loss(*planar.matches, M), H),
        (lambda M: corner_error_loss(M, planar.H_0to1.flip(0), (480, 640)), H),
        (lambda M: cycle_consistency_loss(M, planar.H_0to1, (480, 640)), H),
        (lambda M: sampson_loss(*views.matches, M), F),
        (lambda M: symmetric_epipolar_loss(*views.matches, M), F),
        (lambda M: weak_pose_loss(*views.matches, views.T_0to1, M, views.K1), views.K0),
        (
            lambda M: essential_from_matches(*views.matches[:2], M, views.K1, views.batch_indexes).E_0to1,
            views.K0,
        ),
    ]
    for loss, matrix in cases:
        live = (scale * matrix).requires_grad_()
        value = loss(live)
        assert torch.allclose(value, loss(matrix), rtol=1e-9)
        (gradient,) = torch.autograd.grad(value.sum(), live)
        assert bool(torch.isfinite(gradient * scale).all())
        assert bool(gradient.any())


@pytest.mark.parametrize("scale", [HUGE, TINY])
def test_losses_of_coordinates_at_any_scale_are_finite_and_scale_with_them(scale: float) -> None:
    planar, views = planar_scene(2, 20, seed=5, noise=0.3), scene(2, 20, seed=5, noise=0.3)
    x0, x1, index = planar.matches
    S = torch.diag(torch.tensor([1.0, 1.0, scale], dtype=torch.float64))
    D = torch.diag(torch.tensor([scale, scale, 1.0], dtype=torch.float64))
    live = (x0 * scale).requires_grad_()
    H = D @ planar.H_0to1 @ D.inverse()
    value = symmetric_transfer_loss(live, x1 * scale, index, H, smoothing=0.01 * scale)
    assert torch.allclose(value / scale, symmetric_transfer_loss(x0, x1, index, planar.H_0to1), rtol=1e-6)
    value.backward()
    assert bool(torch.isfinite(live.grad).all())
    F = fundamental_from_pose(views.T_0to1, views.K0, views.K1)
    for loss in (sampson_loss, symmetric_epipolar_loss):
        value = loss(
            views.keypoints0 * scale,
            views.keypoints1 * scale,
            index,
            S @ (F / scale) @ S,
            smoothing=0.01 * scale,
        )
        assert torch.allclose(value / scale, loss(*views.matches, F), rtol=1e-6)


@pytest.mark.parametrize("robust", [None, "cauchy", "geman_mcclure"])
def test_any_mixture_of_magnitudes_gives_finite_values_and_gradients(robust: str | None) -> None:
    generator = torch.Generator().manual_seed(6)
    pairs, count = 60, 12
    exponents = torch.randint(-1000, 1000, (2, pairs * count, 2), generator=generator).double()
    exponents[:, : 20 * count] = exponents[:, : 20 * count, :1] % 30  # ordinary numbers
    exponents[0, ::count] = 1000  # and one far away in each pair
    points = torch.randn(2, pairs * count, 2, generator=generator).double() * torch.exp2(exponents)
    index = torch.arange(pairs).repeat_interleave(count)
    K = torch.eye(3, dtype=torch.float64).expand(pairs, 3, 3)
    for estimate in (
        lambda a, b: homography_from_matches(a, b, index, batch_size=pairs, robust=robust),
        lambda a, b: fundamental_from_matches(a, b, index, batch_size=pairs, robust=robust),
        lambda a, b: relative_pose_from_matches(a, b, K, K, index, robust=robust),
    ):
        x0, x1 = (x.clone().requires_grad_() for x in points)
        found = estimate(x0, x1)
        assert bool(torch.isfinite(found[0]).all())
        assert bool(torch.isfinite(found.conditioning).all())
        assert bool(torch.isfinite(found.inlier_weights).all())
        (found[0] / found[0].detach().abs().amax((1, 2), keepdim=True).clamp_min(1.0)).sum().backward()
        assert bool(torch.isfinite(x0.grad).all() and torch.isfinite(x1.grad).all())


def test_translations_at_any_scale() -> None:
    views, other = scene(2, 12, seed=7), scene(2, 12, seed=8)
    far = views.T_0to1.clone()
    far[:, :3, 3] *= 1e200
    assert torch.allclose(pose_loss(far, other.T_0to1), pose_loss(views.T_0to1, other.T_0to1), rtol=1e-9)
    start = relative_pose_from_matches(*views.matches[:2], views.K0, views.K1, views.batch_indexes, initial_0to1=far)
    assert torch.allclose(start.T_0to1, views.T_0to1, atol=1e-6)
