# SPDX-License-Identifier: Apache-2.0
"""The estimators under `torch.func.grad` and `torch.compile`: the same values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import (
    fundamental_from_matches,
    homography_from_matches,
    relative_pose_from_matches,
)
from support.two_view import planar_scene, scene

PLANAR, VIEWS = planar_scene(2, 12, seed=0, noise=0.5), scene(2, 12, seed=0, noise=0.5)
ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: homography_from_matches(x, *PLANAR.matches[1:], batch_size=2).H_0to1,
    "robust": lambda x: homography_from_matches(x, *PLANAR.matches[1:], batch_size=2, robust="cauchy").H_0to1,
    "fundamental": lambda x: fundamental_from_matches(x, *VIEWS.matches[1:], batch_size=2, refine_steps=5).F_0to1,
    "pose": lambda x: relative_pose_from_matches(x, VIEWS.keypoints1, VIEWS.K0, VIEWS.K1, VIEWS.batch_indexes).T_0to1,
}


def _points(name: str) -> Tensor:
    return (PLANAR if name in ("linear", "robust") else VIEWS).keypoints0


@pytest.mark.parametrize("name", ESTIMATES)
def test_torch_func_grad_is_the_gradient(name: str) -> None:
    live = _points(name).clone().requires_grad_()
    ESTIMATES[name](live).sum().backward()
    assert bool(live.grad.any())
    functional = torch.func.grad(lambda x: ESTIMATES[name](x).sum())(_points(name))
    assert torch.allclose(functional, live.grad, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["robust"])
def test_compiled_estimates_keep_their_values_and_gradients(name: str) -> None:
    live, traced = (_points(name).clone().requires_grad_() for _ in range(2))
    plain, compiled = ESTIMATES[name](live), torch.compile(ESTIMATES[name], backend="eager")(traced)
    assert torch.equal(compiled, plain)
    plain.sum().backward()
    compiled.sum().backward()
    assert bool(live.grad.any())
    assert torch.allclose(traced.grad, live.grad, rtol=1e-9, atol=1e-15)
