# SPDX-License-Identifier: Apache-2.0
"""Estimators, losses and labels on a device without float64: same results, gradients back on the device."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import (
    essential_from_matches,
    estimate_robust,
    fundamental_from_matches,
    fundamental_from_pose,
    homography_from_matches,
    relative_pose_from_matches,
)
from eloftr_ops.losses import (
    corner_error_loss,
    cycle_consistency_loss,
    photometric_loss,
    pose_loss,
    rotation_angle,
    sampson_loss,
    symmetric_epipolar_loss,
    symmetric_transfer_loss,
    translation_direction_angle,
    weak_homography_loss,
    weak_pose_loss,
)
from support.no_float64 import STAND_IN, NoFloat64Device, on_device
from support.two_view import planar_scene, scene

PLANAR, VIEWS = planar_scene(2, 20, seed=1, noise=0.3), scene(2, 20, seed=1, noise=0.3)
X0, X1, INDEX = PLANAR.keypoints0.float(), PLANAR.keypoints1.float(), PLANAR.batch_indexes
V0, V1, K0, K1, T = (x.float() for x in (VIEWS.keypoints0, VIEWS.keypoints1, VIEWS.K0, VIEWS.K1, VIEWS.T_0to1))
H, F = PLANAR.H_0to1.float(), fundamental_from_pose(T, K0, K1)
IMAGES = torch.rand(2, 2, 1, 32, 40, generator=torch.Generator().manual_seed(2))
NEAR = torch.eye(3) + 0.01 * torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(3)).tril(-3)
ROBUST = {"robust": "cauchy"}

Case = tuple[Callable[..., Tensor], Sequence[Tensor]]
CASES: dict[str, Case] = {
    "homography": (lambda a, b, i: homography_from_matches(a, b, i, batch_size=2).H_0to1, (X0, X1, INDEX)),
    "robust homography": (
        lambda a, b, i, w: homography_from_matches(a, b, i, batch_size=2, weights=w, **ROBUST).H_0to1,
        (X0, X1, INDEX, torch.ones(40)),
    ),
    "fundamental": (
        lambda a, b, i: fundamental_from_matches(a, b, i, batch_size=2, refine_steps=5).F_0to1,
        (V0, V1, INDEX),
    ),
    "essential": (lambda *x: essential_from_matches(*x).E_0to1, (V0, V1, K0, K1, INDEX)),
    "pose": (
        lambda *x: relative_pose_from_matches(*x[:5], initial_0to1=x[5], **ROBUST).T_0to1,
        (V0, V1, K0, K1, INDEX, T),
    ),
    "fundamental from pose": (fundamental_from_pose, (T, K0, K1)),
    "corner error": (lambda a, b: corner_error_loss(a, b, (480, 640)), (H, H.flip(0))),
    "cycle": (lambda a, b: cycle_consistency_loss(a, b, (480, 640)), (H, H.flip(0))),
    "transfer": (symmetric_transfer_loss, (X0, X1, INDEX, H, torch.ones(40))),
    "weak homography": (weak_homography_loss, (X0, X1, INDEX, H)),
    "sampson": (sampson_loss, (V0, V1, INDEX, F)),
    "epipolar": (symmetric_epipolar_loss, (V0, V1, INDEX, F)),
    "weak pose": (weak_pose_loss, (V0, V1, INDEX, T, K0, K1)),
    "pose loss": (pose_loss, (T, T.flip(0))),
    "rotation angle": (lambda a, b: rotation_angle(a[:, :3, :3], b[:, :3, :3]), (T, T.flip(0))),
    "direction": (lambda a, b: translation_direction_angle(a[:, :3, 3], b[:, :3, 3]), (T, T.flip(0))),
    "photometric": (photometric_loss, (IMAGES[0], IMAGES[1], NEAR)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_elsewhere_and_returns_to_the_device(name: str) -> None:
    function, inputs = CASES[name]
    expected_inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    expected = function(*expected_inputs)
    expected.square().sum().backward()
    with NoFloat64Device():
        there = [on_device(x) for x in inputs]
        for x in there:
            if x.is_floating_point():
                x.requires_grad_()
        value = function(*there)
        assert value.device == STAND_IN
        value.square().sum().backward()
        assert torch.allclose(value.detach().to("cpu"), expected.detach(), rtol=1e-5, atol=1e-7)
        moved = 0
        for x, y in zip(there, expected_inputs, strict=True):
            assert (x.grad is None) == (y.grad is None)
            if y.grad is not None and x.grad is not None:
                assert x.grad.device == STAND_IN
                assert torch.allclose(x.grad.to("cpu"), y.grad, rtol=1e-3, atol=1e-6)
                moved += bool(y.grad.any())
    assert moved > 0


def test_the_stand_in_refuses_float64() -> None:
    with NoFloat64Device():
        x = on_device(torch.ones(3))
        assert float((2 * x).sum()) == 6.0
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device=x.device)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)


@pytest.mark.parametrize("model", ["homography", "fundamental", "essential", "pose"])
def test_consensus_returns_to_the_device(model: str) -> None:
    x0, x1 = (X0, X1) if model == "homography" else (V0, V1)
    expected = estimate_robust(x0, x1, INDEX, batch_size=2, model=model, K0=K0, K1=K1)
    with NoFloat64Device():
        there = [on_device(x) for x in (x0, x1, INDEX, K0, K1)]
        found = estimate_robust(*there[:3], batch_size=2, model=model, K0=there[3], K1=there[4])
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.device == STAND_IN
            assert torch.allclose(ours.to("cpu").float(), theirs.float(), atol=1e-6)
