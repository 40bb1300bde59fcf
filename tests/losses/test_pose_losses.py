# SPDX-License-Identifier: Apache-2.0
"""Angles and the pose loss: right in between, finite and smooth at the ends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eloftr_ops.losses import pose_loss, rotation_angle, translation_direction_angle
from support.gradients import check_gradients, finite_gradients
from support.two_view import rotation, scene

AXIS = torch.nn.functional.normalize(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), dim=1)
EYE = torch.eye(3, dtype=torch.float64)[None]
few = settings(max_examples=25, deadline=None, derandomize=True)


def _pose(angle: float, t: tuple[float, float, float] = (0.0, 0.0, 1.0), dtype: torch.dtype = torch.float64) -> Tensor:
    T = torch.eye(4, dtype=dtype)[None].clone()
    T[:, :3, :3] = rotation(angle * AXIS)
    T[:, :3, 3] = torch.tensor(t)
    return T


@given(angle=st.floats(0.0, math.pi))
@few
def test_rotation_angle_is_the_angle_turned_by(angle: float) -> None:
    base = rotation(torch.tensor([[0.3, 0.2, -0.9]], dtype=torch.float64))
    turned = base @ rotation(angle * AXIS)
    assert float(rotation_angle(base, turned)) == pytest.approx(angle, abs=1e-9)
    assert float(rotation_angle(turned, base)) == pytest.approx(angle, abs=1e-9)


def test_small_angles_keep_their_digits_in_float32() -> None:
    # The arc cosine of the trace would return 0 for any of these.
    for angle in (1e-3, 1e-4, 1e-5):
        turned = rotation(angle * AXIS).float()
        assert float(rotation_angle(EYE.float(), turned)) == pytest.approx(angle, rel=1e-2)


@pytest.mark.parametrize("angle", [1e-4, 0.7, 3.1])
def test_rotation_angle_gradient_agrees_with_finite_differences(angle: float) -> None:
    check_gradients(rotation_angle, [EYE, rotation(angle * AXIS)], eps=1e-8, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("angle", [0.0, math.pi])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_angle_is_finite_at_both_ends(angle: float, dtype: torch.dtype) -> None:
    half_turn = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=dtype))[None]
    turned = (half_turn if angle else torch.eye(3, dtype=dtype)[None]).requires_grad_()
    value = rotation_angle(torch.eye(3, dtype=dtype)[None], turned)
    assert float(value.detach()) == pytest.approx(angle)
    finite_gradients(value, [turned])


def test_direction_angle_ignores_length_and_on_request_sign() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    b = torch.tensor([[5.0, 5.0, 0.0], [0.0, -1e-3, 0.0]])
    angle = translation_direction_angle(a, b)
    assert angle.tolist() == pytest.approx([math.pi / 4, math.pi])
    assert translation_direction_angle(a, b, ignore_sign=True).tolist() == pytest.approx([math.pi / 4, 0.0])
    check_gradients(translation_direction_angle, [a.double()[:1], b.double()[:1]])


@pytest.mark.parametrize("case", ["equal", "opposite", "zero", "both zero", "huge"])
def test_direction_angle_is_finite_everywhere(case: str) -> None:
    a = torch.tensor([[0.0, 1.0, 0.0]])
    b = {"equal": a, "opposite": -a, "zero": 0 * a, "both zero": 0 * a, "huge": 1e30 * a}[case].clone().requires_grad_()
    a = (0 * a if case == "both zero" else a).requires_grad_()
    angle = translation_direction_angle(a, b)
    assert float(angle.detach()) == pytest.approx(math.pi if case == "opposite" else 0.0)
    finite_gradients(angle, [a, b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pose_loss_is_smooth_at_perfection(dtype: torch.dtype) -> None:
    truth = scene(3, 1, seed=1).T_0to1.to(dtype)
    estimate = truth.clone().requires_grad_()
    loss = pose_loss(estimate, truth)
    assert float(loss.detach()) < 1e-9
    (gradient,) = finite_gradients(loss, [estimate])
    # In float32 a rotation times its transpose is off by 1e-7: a thousandth of the smoothing.
    assert float(gradient.abs().max()) < 1e-3
    # Quadratic below the smoothing: the gradient shrinks in proportion.
    slopes = []
    for angle in (1e-5, 2e-5):
        pose = _pose(angle).requires_grad_()
        slopes.append(float(torch.autograd.grad(pose_loss(pose, _pose(0.0)), pose)[0].abs().max()))
    assert slopes[1] == pytest.approx(2 * slopes[0], rel=1e-3)


def test_pose_loss_gradient_agrees_with_finite_differences() -> None:
    truth = scene(2, 1, seed=2).T_0to1
    estimate = scene(2, 1, seed=3).T_0to1
    check_gradients(lambda T: pose_loss(T, truth, reduction="none"), [estimate])


def test_pose_loss_is_the_weighted_sum_of_both_angles() -> None:
    loss = pose_loss(
        _pose(0.3, (0.0, 2.0, 0.0)), _pose(0.0), rotation_weight=2.0, translation_weight=0.5, smoothing=1e-9
    )
    assert float(loss) == pytest.approx(2.0 * 0.3 + 0.5 * math.pi / 2)


def test_a_true_pose_without_translation_leaves_the_rotation_term() -> None:
    estimate = _pose(0.2).requires_grad_()
    loss = pose_loss(estimate, _pose(0.0, (0.0, 0.0, 0.0)), smoothing=1e-9)
    assert float(loss.detach()) == pytest.approx(0.2)
    (gradient,) = finite_gradients(loss, [estimate])
    assert not bool(gradient[:, :3, 3].any())


def test_opposite_poses_are_finite_and_saturate() -> None:
    half_turn = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))[None].clone()
    half_turn[:, :3, 3] = torch.tensor([0.0, 0.0, -1.0])
    estimate = half_turn.requires_grad_()
    truth = torch.eye(4)[None].clone()
    truth[:, 2, 3] = 1.0
    loss = pose_loss(estimate, truth)
    assert float(loss.detach()) == pytest.approx(2 * math.pi, rel=1e-2)
    finite_gradients(loss, [estimate])
    assert float(pose_loss(estimate, truth, saturation=1.0).detach()) < 1.0


def test_invalid_pairs_count_for_nothing() -> None:
    estimate, truth = scene(3, 1, seed=4).T_0to1, scene(3, 1, seed=5).T_0to1
    each = pose_loss(estimate, truth, reduction="none")
    valid = torch.tensor([False, True, True])
    assert torch.equal(pose_loss(estimate, truth, valid=valid), each[1:].sum() / 2)


def test_arguments_that_make_no_sense_are_named() -> None:
    pose = _pose(0.1)
    with pytest.raises(ValueError, match=r"T_gt_0to1: expected shape \(B, 4, 4\)"):
        pose_loss(pose, pose[:, :3, :3])
    with pytest.raises(ValueError, match="rotation_weight, translation_weight: expected >= 0"):
        pose_loss(pose, pose, rotation_weight=-1.0)
    with pytest.raises(ValueError, match=r"t_b: expected shape \(B, 3\)"):
        translation_direction_angle(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"R_b: expected shape"):
        rotation_angle(EYE, pose)
    with pytest.raises(TypeError, match="R_a: expected a floating point dtype"):
        rotation_angle(EYE.long(), EYE)
