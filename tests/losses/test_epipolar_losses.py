# SPDX-License-Identifier: Apache-2.0
"""Sampson and symmetric epipolar losses: against kornia where it is defined, finite where it is not."""

from typing import Any

import pytest
import torch
from kornia.geometry.epipolar import (
    left_to_right_epipolar_distance,
    right_to_left_epipolar_distance,
    sampson_epipolar_distance,
)
from torch import Tensor

from eloftr_ops.geometry import fundamental_from_pose
from eloftr_ops.losses import (
    sampson_loss,
    symmetric_epipolar_loss,
    symmetric_transfer_loss,
    weak_homography_loss,
    weak_pose_loss,
)
from support.gradients import check_gradients, finite_gradients
from support.two_view import Scene, planar_scene, scene

EXACT: dict[str, Any] = {"smoothing": 1e-9, "reduction": "none"}
BOTH = pytest.mark.parametrize("loss", [sampson_loss, symmetric_epipolar_loss], ids=["sampson", "symmetric"])


def _fundamental(views: Scene) -> Tensor:
    return fundamental_from_pose(views.T_0to1, views.K0, views.K1)


def test_sampson_agrees_with_kornia() -> None:
    views = scene(3, 12, seed=1, noise=2.0)
    F = _fundamental(views)
    x0, x1 = views.keypoints0.view(3, 12, 2), views.keypoints1.view(3, 12, 2)
    expected = sampson_epipolar_distance(x0, x1, F, squared=False).mean(1)
    assert torch.allclose(sampson_loss(*views.matches, F, **EXACT), expected, atol=1e-7)


def test_symmetric_distance_agrees_with_kornia() -> None:
    views = scene(3, 12, seed=2, noise=2.0)
    F = _fundamental(views)
    x0, x1 = views.keypoints0.view(3, 12, 2), views.keypoints1.view(3, 12, 2)
    in_1 = left_to_right_epipolar_distance(x0, x1, F)
    in_0 = right_to_left_epipolar_distance(x0, x1, F)
    expected = 0.5 * (in_0 + in_1).mean(1)
    assert torch.allclose(symmetric_epipolar_loss(*views.matches, F, **EXACT), expected, atol=1e-6)


@BOTH
def test_scale_of_the_matrix_and_order_of_the_images_do_not_matter(loss: Any) -> None:
    views = scene(2, 10, seed=3, noise=2.0)
    F = _fundamental(views)
    value = loss(*views.matches, F)
    assert torch.allclose(loss(*views.matches, -1e-5 * F), value, rtol=1e-9)
    swapped = loss(views.keypoints1, views.keypoints0, views.batch_indexes, F.mT)
    assert torch.allclose(swapped, value, rtol=1e-9)


@BOTH
def test_gradient_agrees_with_finite_differences(loss: Any) -> None:
    views = scene(2, 5, seed=4, noise=2.0)
    weights = torch.linspace(0.2, 1.0, 10, dtype=torch.float64)
    # In units of a thousand pixels, so that one step of the finite differences suits every entry.
    unit = torch.diag(torch.tensor([1e-3, 1e-3, 1.0], dtype=torch.float64))
    matrix = torch.linalg.inv(unit) @ _fundamental(views) @ torch.linalg.inv(unit)

    def value(x0: Tensor, x1: Tensor, m: Tensor, w: Tensor) -> Tensor:
        F = unit @ m @ unit
        return loss(x0, x1, views.batch_indexes, F, w, saturation=6.0, reduction="none")

    inputs = [views.keypoints0, views.keypoints1, matrix / matrix.abs().max(), weights]
    check_gradients(value, inputs, eps=1e-7, atol=1e-4, rtol=1e-3)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_matches_cost_nothing(loss: Any, dtype: torch.dtype) -> None:
    # A camera moved sideways: matches keep their row exactly, in any dtype.
    F = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]], dtype=dtype, requires_grad=True)
    x0 = (100.0 * torch.rand(6, 2, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    x1 = (x0.detach() + torch.tensor([7.0, 0.0], dtype=dtype)).requires_grad_()
    value = loss(x0, x1, torch.zeros(6, dtype=torch.long), F)
    assert float(value.detach()) == 0.0
    assert not any(bool(g.any()) for g in finite_gradients(value, [x0, x1, F]))


@BOTH
def test_matches_at_the_epipoles_and_a_zero_matrix_are_finite(loss: Any) -> None:
    # Forward motion: both epipoles are in the image centre, which here is the origin.
    F = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    x0 = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1e-20, 0.0], [3.0, 4.0]], requires_grad=True)
    x1 = torch.tensor([[0.0, 0.0], [5.0, 1.0], [0.0, 1e-20], [6.0, 8.5]], requires_grad=True)
    index = torch.zeros(4, dtype=torch.long)
    finite_gradients(loss(x0, x1, index, F), [x0, x1, F])
    assert bool(torch.isinf(sampson_epipolar_distance(x0[None], x1[None], F)).any())  # kornia's value there
    nothing = torch.zeros(1, 3, 3, requires_grad=True)
    value = loss(x0, x1, index, nothing)
    assert float(value.detach()) == 0.0
    finite_gradients(value, [x0, x1, nothing])


@BOTH
def test_zero_weights_and_no_matches_cost_nothing(loss: Any) -> None:
    views = scene(2, 6, seed=5, noise=1.0)
    F = _fundamental(views)
    weights = torch.ones(12)
    weights[:6] = 0.0
    weights.requires_grad_()
    each = loss(*views.matches, F, weights, reduction="none")
    assert float(each[0].detach()) == 0.0
    assert float(each[1].detach()) > 0.0
    (gradient,) = finite_gradients(each, [weights])
    assert bool(gradient[6:].any())
    none = torch.zeros(0, 2)
    assert float(loss(none, none, torch.zeros(0, dtype=torch.long), F)) == 0.0


def test_supervision_by_the_pose_alone_pulls_matches_to_their_lines() -> None:
    views = scene(1, 10, seed=6, noise=3.0)
    x1 = views.keypoints1.clone().requires_grad_()

    def loss() -> Tensor:
        return weak_pose_loss(
            views.keypoints0, x1, views.batch_indexes, views.T_0to1, views.K0, views.K1, saturation=50.0
        )

    before = float(loss().detach())
    for _ in range(300):
        (gradient,) = torch.autograd.grad(loss(), x1)
        with torch.no_grad():
            x1 -= gradient
    assert float(loss().detach()) < 0.1 * before
    wrong = views.keypoints1 + 300.0 * torch.eye(10, 2, dtype=torch.float64)
    bounded = weak_pose_loss(
        views.keypoints0, wrong, views.batch_indexes, views.T_0to1, views.K0, views.K1, saturation=8.0
    )
    assert float(bounded) < 8.0


def test_a_pose_without_translation_supervises_nothing() -> None:
    views = scene(1, 5, seed=7, noise=1.0)
    T = views.T_0to1.clone()
    T[:, :3, 3] = 0.0
    x1 = views.keypoints1.requires_grad_()
    loss = weak_pose_loss(views.keypoints0, x1, views.batch_indexes, T, views.K0, views.K1)
    assert float(loss.detach()) == 0.0
    assert not bool(finite_gradients(loss, [x1])[0].any())


@BOTH
def test_arguments_that_make_no_sense_are_named(loss: Any) -> None:
    views = scene(2, 5, seed=8)
    F = _fundamental(views)
    with pytest.raises(ValueError, match=r"F_0to1: expected shape \(B, 3, 3\)"):
        loss(*views.matches, F[:, :2])
    with pytest.raises(IndexError, match="batch_indexes"):
        loss(*views.matches, F[:1])
    with pytest.raises(ValueError, match="reduction"):
        loss(*views.matches, F, reduction="")


def test_weak_losses_do_not_teach_the_confidence_to_fall() -> None:
    views, planar = scene(2, 20, seed=30, noise=1.0), planar_scene(2, 20, seed=30, noise=1.0)
    weights = torch.linspace(0.1, 1.0, 40, dtype=torch.float64).requires_grad_()
    for loss, matches, known in (
        (weak_pose_loss, views, (views.T_0to1, views.K0, views.K1)),
        (weak_homography_loss, planar, (planar.H_0to1,)),
    ):
        keypoints1 = matches.keypoints1.clone().requires_grad_()
        value = loss(matches.keypoints0, keypoints1, matches.batch_indexes, *known, weights)
        assert not torch.equal(value, loss(matches.keypoints0, keypoints1, matches.batch_indexes, *known))
        to_points, to_weights = torch.autograd.grad(value, (keypoints1, weights), allow_unused=True)
        assert bool(to_points.any())
        assert to_weights is None


def test_losses_that_carry_a_gradient_to_the_weights_keep_the_right_matches() -> None:
    """Forty steps on the confidences alone: wrong matches fall below the threshold, right ones do not."""
    views, planar = (draw(2, 40, seed=1, noise=0.5, wrong=0.25) for draw in (scene, planar_scene))
    right = (torch.arange(40) >= 10).repeat(2)
    for loss, matches, known in (
        (sampson_loss, views.matches, _fundamental(views)),
        (symmetric_epipolar_loss, views.matches, _fundamental(views)),
        (symmetric_transfer_loss, planar.matches, planar.H_0to1),
    ):
        logits = torch.ones(80, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logits], 0.1)
        for _ in range(40):
            optimizer.zero_grad()
            loss(*matches, known, logits.sigmoid()).backward()
            optimizer.step()
        confident = logits.detach().sigmoid() > 0.2
        assert bool(confident[right].all())
        assert int(confident[~right].sum()) <= 2


@pytest.mark.parametrize("loss", [sampson_loss, symmetric_epipolar_loss])
def test_whatever_stands_in_rows_that_are_not_valid_counts_for_nothing(loss: Any) -> None:
    views = scene(2, 6, seed=40, noise=1.0)
    F, x0 = _fundamental(views).clone(), views.keypoints0.clone()
    expected = loss(*views.matches, F, valid=torch.tensor([True, False]))
    F[1], x0[6:] = float("nan"), float("inf")
    F.requires_grad_()
    value = loss(x0, *views.matches[1:], F, valid=torch.tensor([True, False]))
    assert torch.equal(value, expected)
    (gradient,) = torch.autograd.grad(value, F)
    assert bool(gradient[0].any())
    assert not bool(gradient[1].any())
    with pytest.raises(ValueError, match="finite"):
        loss(x0, *views.matches[1:], F)
