# SPDX-License-Identifier: Apache-2.0
"""Corner error, transfer error and cycle consistency: values, gradients, and the ends of their range."""

from typing import Any

import pytest
import torch
from kornia.geometry.homography import oneway_transfer_error
from torch import Tensor

from eloftr_ops.losses import (
    corner_error_loss,
    cycle_consistency_loss,
    symmetric_transfer_loss,
    weak_homography_loss,
)
from support.gradients import check_gradients, finite_gradients
from support.two_view import PlanarScene, planar_scene, project

SIZE_HW = (480, 640)
EXACT: dict[str, Any] = {"smoothing": 1e-9, "reduction": "none"}  # the plain distance


def _homographies() -> tuple[Tensor, Tensor]:
    return planar_scene(3, 4, seed=1).H_0to1, planar_scene(3, 4, seed=2).H_0to1


def _singular(kind: str) -> Tensor:
    """A matrix that sends the corner (640, 0) to infinity, or everything to one point, or nowhere."""
    if kind == "horizon":
        return torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0 / 640.0, 0.0, 1.0]]])
    return torch.zeros(1, 3, 3) if kind == "zero" else torch.ones(1, 3, 3)


def test_corner_error_is_the_mean_distance_of_the_corners() -> None:
    estimate, truth = _homographies()
    corners = torch.tensor([[0.0, 0.0], [640.0, 0.0], [640.0, 480.0], [0.0, 480.0]]).double().expand(3, 4, 2)
    expected = (project(estimate, corners) - project(truth, corners)).norm(dim=-1).mean(1)
    assert torch.allclose(corner_error_loss(estimate, truth, SIZE_HW, **EXACT), expected, atol=1e-7)
    assert torch.allclose(corner_error_loss(-3.0 * estimate, 0.2 * truth, SIZE_HW, **EXACT), expected, atol=1e-7)
    assert torch.allclose(corner_error_loss(estimate, truth, SIZE_HW), expected.mean(), atol=0.011)


def test_shift_of_three_and_four_pixels_costs_five() -> None:
    shift = torch.tensor([[[1.0, 0.0, 3.0], [0.0, 1.0, 4.0], [0.0, 0.0, 1.0]]])
    assert float(corner_error_loss(shift, torch.eye(3)[None], (48, 64), smoothing=1e-6)) == pytest.approx(5.0)


def test_corner_error_gradient_agrees_with_finite_differences() -> None:
    estimate, truth = _homographies()
    check_gradients(lambda a, b: corner_error_loss(a, b, SIZE_HW, reduction="none"), [estimate, truth], eps=1e-7)
    check_gradients(
        lambda a: corner_error_loss(a, truth, SIZE_HW, saturation=20.0, reduction="none"),
        [estimate],
        eps=1e-7,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_zero_at_perfection(dtype: torch.dtype) -> None:
    planar = planar_scene(2, 6, seed=3)
    H = planar.H_0to1.to(dtype).requires_grad_()
    loss = corner_error_loss(H, H.detach().clone(), SIZE_HW)
    assert float(loss.detach()) == 0.0
    assert not any(bool(g.any()) for g in finite_gradients(loss, [H]))
    identity = torch.eye(3, dtype=dtype).expand(2, 3, 3).clone().requires_grad_()
    x = planar.keypoints0.to(dtype).requires_grad_()
    transfer = symmetric_transfer_loss(x, x.detach().clone(), planar.batch_indexes, identity)
    assert float(transfer.detach()) == 0.0
    assert not any(bool(g.any()) for g in finite_gradients(transfer, [x, identity]))


@pytest.mark.parametrize("kind", ["horizon", "ones", "zero"])
def test_corners_at_infinity_cost_a_finite_amount(kind: str) -> None:
    estimate = _singular(kind).requires_grad_()
    for saturation in (None, 50.0):
        loss = corner_error_loss(estimate, torch.eye(3)[None], SIZE_HW, saturation=saturation)
        finite_gradients(loss, [estimate])
        assert saturation is None or float(loss.detach()) <= 50.0


def test_symmetric_transfer_agrees_with_kornia() -> None:
    planar = planar_scene(2, 10, seed=4, noise=3.0)
    H = planar.H_0to1
    x0, x1 = planar.keypoints0.view(2, 10, 2), planar.keypoints1.view(2, 10, 2)
    there = oneway_transfer_error(x0, x1, H, squared=False)
    back = oneway_transfer_error(x1, x0, torch.linalg.inv(H), squared=False)
    ours = symmetric_transfer_loss(*planar.matches, H, **EXACT)
    assert torch.allclose(ours, 0.5 * (there + back).mean(1), atol=1e-7)


def test_symmetric_transfer_does_not_change_when_the_images_are_swapped() -> None:
    planar = planar_scene(2, 10, seed=5, noise=3.0)
    swapped = symmetric_transfer_loss(
        planar.keypoints1, planar.keypoints0, planar.batch_indexes, torch.linalg.inv(planar.H_0to1)
    )
    assert torch.allclose(symmetric_transfer_loss(*planar.matches, planar.H_0to1), swapped, rtol=1e-10)


def test_symmetric_transfer_gradient_agrees_with_finite_differences() -> None:
    planar = planar_scene(2, 4, seed=6, noise=2.0)
    weights = torch.linspace(0.2, 1.0, 8, dtype=torch.float64)

    def loss(x0: Tensor, x1: Tensor, H: Tensor, w: Tensor) -> Tensor:
        return symmetric_transfer_loss(x0, x1, planar.batch_indexes, H, w, saturation=9.0, reduction="none")

    inputs = [planar.keypoints0, planar.keypoints1, planar.H_0to1, weights]
    check_gradients(loss, inputs, eps=1e-7, rtol=1e-3)


def test_confidence_of_a_wrong_match_is_pushed_down_and_scale_is_not_rewarded() -> None:
    planar = planar_scene(1, 8, seed=7)
    wrong = planar.keypoints1.clone()
    wrong[0] += 30.0
    weights = torch.ones(8, dtype=torch.float64, requires_grad=True)
    loss = symmetric_transfer_loss(planar.keypoints0, wrong, planar.batch_indexes, planar.H_0to1, weights)
    (gradient,) = torch.autograd.grad(loss, weights)
    assert float(gradient[0]) > 0
    assert bool((gradient[1:] < 0).all())
    smaller = symmetric_transfer_loss(planar.keypoints0, wrong, planar.batch_indexes, planar.H_0to1, 0.1 * weights)
    assert torch.allclose(smaller, loss)


def test_weak_supervision_bounds_what_a_wrong_match_costs() -> None:
    planar = planar_scene(1, 10, seed=8)
    x1 = planar.keypoints1.clone()
    x1[0] += 400.0
    far = PlanarScene(planar.keypoints0, x1.requires_grad_(), planar.batch_indexes, planar.H_0to1)
    loss = weak_homography_loss(*far.matches, far.H_0to1, saturation=8.0)
    assert float(loss.detach()) < 8.0 / 10
    (gradient,) = finite_gradients(loss, [x1])
    assert float(gradient[0].abs().max()) < 1e-3
    assert float(symmetric_transfer_loss(*far.matches, far.H_0to1).detach()) > 10.0


def test_cycle_is_closed_by_the_inverse_only() -> None:
    H, other = _homographies()
    assert float(cycle_consistency_loss(H, torch.linalg.inv(H), SIZE_HW)) < 1e-6
    assert float(cycle_consistency_loss(H, torch.linalg.inv(other), SIZE_HW)) > 1.0
    check_gradients(
        lambda a, b: cycle_consistency_loss(a, b, SIZE_HW, reduction="none"),
        [H, torch.linalg.inv(other)],
        eps=1e-8,
    )


def test_reduction_is_over_valid_pairs_and_empty_is_zero() -> None:
    estimate, truth = _homographies()
    estimate.requires_grad_()
    each = corner_error_loss(estimate, truth, SIZE_HW, reduction="none")
    valid = torch.tensor([True, False, True])
    options: dict[str, Any] = {"valid": valid}
    assert torch.equal(corner_error_loss(estimate, truth, SIZE_HW, **options), each[[0, 2]].mean())
    assert torch.equal(corner_error_loss(estimate, truth, SIZE_HW, reduction="sum", **options), each[[0, 2]].sum())
    masked = corner_error_loss(estimate, truth, SIZE_HW, reduction="none", **options)
    assert float(masked[1].detach()) == 0.0
    (gradient,) = torch.autograd.grad(masked.sum(), estimate)
    assert not bool(gradient[1].any())
    nothing = corner_error_loss(estimate, truth, SIZE_HW, valid=torch.zeros(3, dtype=torch.bool))
    assert float(nothing.detach()) == 0.0
    assert not any(bool(g.any()) for g in finite_gradients(nothing, [estimate]))


def test_pairs_without_matches_cost_nothing() -> None:
    planar = planar_scene(1, 5, seed=9, noise=1.0)
    H = planar.H_0to1.expand(2, 3, 3)
    each = symmetric_transfer_loss(*planar.matches, H, reduction="none")
    assert float(each[1]) == 0.0
    assert float(each[0]) > 0.1
    none = torch.zeros(0, 2, requires_grad=True)
    empty = symmetric_transfer_loss(none, none, torch.zeros(0, dtype=torch.long), H)
    assert float(empty.detach()) == 0.0
    assert finite_gradients(empty, [none])[0].shape == (0, 2)


def test_arguments_that_make_no_sense_are_named() -> None:
    estimate, truth = _homographies()
    with pytest.raises(ValueError, match="reduction: expected one of 'none', 'mean', 'sum'"):
        corner_error_loss(estimate, truth, SIZE_HW, reduction="avg")
    with pytest.raises(ValueError, match="smoothing: expected a positive"):
        corner_error_loss(estimate, truth, SIZE_HW, smoothing=0.0)
    with pytest.raises(ValueError, match="saturation: expected a positive"):
        corner_error_loss(estimate, truth, SIZE_HW, saturation=-1.0)
    with pytest.raises(ValueError, match="size_hw"):
        corner_error_loss(estimate, truth, (0, 640))
    with pytest.raises(ValueError, match=r"H_gt_0to1: expected shape \(B, 3, 3\)"):
        corner_error_loss(estimate, truth[:2], SIZE_HW)
    with pytest.raises(ValueError, match=r"H_0to1: expected finite values.*batch element 0"):
        corner_error_loss(estimate * torch.nan, truth, SIZE_HW)
    with pytest.raises(TypeError, match=r"valid: expected dtype torch\.bool"):
        corner_error_loss(estimate, truth, SIZE_HW, valid=torch.ones(3))
    with pytest.raises(ValueError, match=r"valid: expected shape \(B,\)"):
        corner_error_loss(estimate, truth, SIZE_HW, valid=torch.ones(2, dtype=torch.bool))
