# SPDX-License-Identifier: Apache-2.0
"""Covariances of matches: what they change in estimates, residuals and losses, and what is refused."""

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
    sampson_residuals,
    transfer_residuals,
)
from eloftr_ops.geometry._covariances import Covariances
from eloftr_ops.geometry._residuals import Residual, SampsonResidual, TransferResidual
from eloftr_ops.losses import sampson_loss, symmetric_transfer_loss, weak_homography_loss, weak_pose_loss
from support.gradients import check_gradients, finite_gradients
from support.two_view import PlanarScene, Scene, angle_between, planar_scene, project, scene

Estimate = Callable[..., Tensor]


def ellipses(count: int, seed: int, *, widest: float = 4.0) -> Tensor:
    """Covariances `(count, 2, 2)` whose axes are between 0.25 and `widest` pixels, float64."""
    generator = torch.Generator().manual_seed(seed)
    axes = 0.25 * (widest / 0.25) ** torch.rand(count, 2, generator=generator, dtype=torch.float64)
    angle = 3.0 * torch.rand(count, generator=generator, dtype=torch.float64)
    c, s = angle.cos(), angle.sin()
    turn = torch.stack([c, -s, s, c], dim=1).view(-1, 2, 2)
    return turn @ torch.diag_embed(axes.square()) @ turn.mT


def noise(covariance: Tensor, seed: int) -> Tensor:
    """Normal errors `(M, 2)` of those covariances."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(len(covariance), 2, 1, generator=generator, dtype=torch.float64)
    return (torch.linalg.cholesky(covariance) @ draws)[..., 0]


def homographies(data: Any, x0: Tensor, x1: Tensor, S0: Tensor | None, S1: Tensor | None, **options: Any) -> Tensor:
    return homography_from_matches(
        x0, x1, data.batch_indexes, batch_size=len(data.H_0to1), covariance0=S0, covariance1=S1, **options
    ).H_0to1


def fundamentals(data: Any, x0: Tensor, x1: Tensor, S0: Tensor | None, S1: Tensor | None, **options: Any) -> Tensor:
    return fundamental_from_matches(
        x0, x1, data.batch_indexes, batch_size=len(data.T_0to1), covariance0=S0, covariance1=S1, **options
    ).F_0to1


def essentials(data: Any, x0: Tensor, x1: Tensor, S0: Tensor | None, S1: Tensor | None, **options: Any) -> Tensor:
    return essential_from_matches(
        x0, x1, data.K0, data.K1, data.batch_indexes, covariance0=S0, covariance1=S1, **options
    ).E_0to1


def poses(data: Any, x0: Tensor, x1: Tensor, S0: Tensor | None, S1: Tensor | None, **options: Any) -> Tensor:
    return relative_pose_from_matches(
        x0, x1, data.K0, data.K1, data.batch_indexes, covariance0=S0, covariance1=S1, **options
    ).T_0to1


CASES = pytest.mark.parametrize(
    ("estimate", "options"),
    [
        (homographies, {}),
        (homographies, {"refine_steps": 10}),
        (homographies, {"robust": "geman_mcclure"}),
        (fundamentals, {}),
        (fundamentals, {"refine_steps": 10}),
        (poses, {"refine_steps": 0}),
        (poses, {"refine_steps": 20}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(map(str, value.values())) or "linear",
)


def problem(estimate: Estimate, *, pairs: int = 2, points: int = 14) -> Scene | PlanarScene:
    if estimate is homographies:
        return planar_scene(pairs, points, seed=5, noise=0.5)
    return scene(pairs, points, seed=5, noise=0.5)


@CASES
def test_equal_covariances_change_nothing(estimate: Estimate, options: dict[str, Any]) -> None:
    data = problem(estimate)
    round_ones = 7.0 * torch.eye(2, dtype=torch.float64).expand(len(data.keypoints0), 2, 2)
    # A homography is fitted to errors in image 1 alone; with equal focal lengths, a pose is fitted to both.
    if isinstance(data, Scene):
        data = data._replace(K1=data.K0)
    first = None if estimate is homographies else round_ones
    plain = estimate(data, *data.matches[:2], None, None, **options)
    assert torch.allclose(estimate(data, *data.matches[:2], first, round_ones, **options), plain, atol=1e-8)


@CASES
def test_gradients(estimate: Estimate, options: dict[str, Any]) -> None:
    data = problem(estimate, pairs=1, points=10)
    count = len(data.keypoints0)

    def of(x0: Tensor, x1: Tensor, S0: Tensor, S1: Tensor) -> Tensor:
        result = estimate(data, x0, x1, S0, S1, **options)
        # Entries of a homography differ by orders of magnitude; where it maps points to does not.
        return 0.01 * project(result, data.keypoints0[None]) if estimate is homographies else result

    inputs = [*data.matches[:2], ellipses(count, 1), ellipses(count, 2)]
    check_gradients(of, inputs, eps=1e-6, atol=1e-5, rtol=1e-3, fast=True)


def test_estimates_are_better_where_errors_are_as_stated() -> None:
    planar = planar_scene(40, 30, seed=6)
    S1 = ellipses(len(planar.keypoints0), 3, widest=8.0)
    x1 = planar.keypoints1 + noise(S1, 4)
    corners = torch.tensor([[0.0, 0.0], [640.0, 0.0], [640.0, 480.0], [0.0, 480.0]], dtype=torch.float64).expand(
        40, 4, 2
    )
    errors = [
        (project(homographies(planar, planar.keypoints0, x1, None, S, refine_steps=10), corners)
         - project(planar.H_0to1, corners)).norm(dim=-1).mean()
        for S in (None, S1)
    ]  # fmt: skip
    assert errors[1] < 0.5 * errors[0]
    views = scene(40, 40, seed=7)
    S0, S1 = (ellipses(len(views.keypoints0), seed, widest=8.0) for seed in (5, 6))
    points = views.keypoints0 + noise(S0, 7), views.keypoints1 + noise(S1, 8)
    turns = [
        angle_between(poses(views, *points, *given)[:, :3, :3], views.T_0to1[:, :3, :3]).median()
        for given in ((None, None), (S0, S1))
    ]
    assert turns[1] < 0.75 * turns[0]


def test_whitened_errors_follow_the_chi_square_law() -> None:
    planar = planar_scene(4, 2000, seed=8)
    S0, S1 = (ellipses(len(planar.keypoints0), seed, widest=1.0) for seed in (1, 2))
    x0, x1 = planar.keypoints0 + noise(S0, 3), planar.keypoints1 + noise(S1, 4)
    residual = transfer_residuals(x0, x1, planar.batch_indexes, planar.H_0to1, covariance0=S0, covariance1=S1)
    assert abs(float(residual.square().sum(1).mean()) - 2.0) < 0.1  # three standard errors
    assert abs(float((residual[:, :1] * residual[:, 1:]).mean())) < 0.05
    views = scene(4, 2000, seed=9)
    F = fundamental_from_pose(views.T_0to1, views.K0, views.K1)
    x0, x1 = views.keypoints0 + noise(S0, 3), views.keypoints1 + noise(S1, 4)
    residual = sampson_residuals(x0, x1, views.batch_indexes, F, covariance0=S0, covariance1=S1)
    assert abs(float(residual.square().mean()) - 1.0) < 0.06


@pytest.mark.parametrize("residual", [TransferResidual(), SampsonResidual()], ids=["transfer", "sampson"])
@pytest.mark.parametrize("given", ["both", "first", "second"])
def test_jacobians(residual: Residual, given: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x0, x1 = (torch.randn(2, 4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    M = torch.eye(3, dtype=torch.float64) + 0.2 * torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    S0, S1 = (ellipses(8, seed, widest=2.0).view(2, 4, 2, 2) for seed in (3, 4))
    covariances = Covariances(None if given == "second" else S0, None if given == "first" else S1)
    found = residual.jacobian(M, x0, x1, covariances)
    full = torch.autograd.functional.jacobian(lambda m: residual.value(m, x0, x1, covariances), M)
    expected = torch.stack([full[k, :, :, k].flatten(2) for k in range(2)])
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@CASES
def test_extreme_covariances_give_finite_answers(estimate: Estimate, options: dict[str, Any]) -> None:
    data = problem(estimate)
    count = len(data.keypoints0)
    size = 10.0 ** torch.linspace(-140.0, 140.0, count, dtype=torch.float64)[:, None, None]
    for scale in (size, size.flip(0), torch.full_like(size, 1e-140), torch.full_like(size, 1e140)):
        leaves = [
            x.clone().requires_grad_() for x in (*data.matches[:2], *(scale * ellipses(count, s) for s in (1, 2)))
        ]
        finite_gradients(estimate(data, *leaves, **options), leaves)


@pytest.mark.parametrize("estimate", [homographies, fundamentals, essentials, poses])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.eye(2).expand(3, 2, 2), r"covariance1: expected shape \(M, 2, 2\)"),
        (torch.full((2, 2), float("nan")), "covariance1: expected finite values, got .* at match 3"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "covariance1: expected symmetric matrices, got .* at match 3"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "covariance1: expected positive definite matrices, got .* at match 3"),
        (torch.zeros(2, 2), "positive definite .* add a floor"),
    ],
    ids=["shape", "nan", "asymmetric", "indefinite", "zero"],
)
def test_bad_covariances_are_named(estimate: Estimate, bad: Tensor, message: str) -> None:
    data = problem(estimate)
    S1 = bad.double()
    if bad.ndim == 2:
        S1 = torch.eye(2, dtype=torch.float64).repeat(len(data.keypoints0), 1, 1)
        S1[3] = bad
    with pytest.raises(ValueError, match=message):
        estimate(data, *data.matches[:2], None, S1)
    with pytest.raises(TypeError, match="covariance1: expected a floating point dtype"):
        estimate(data, *data.matches[:2], None, torch.ones(len(data.keypoints0), 2, 2, dtype=torch.long))


def test_a_pair_is_estimated_as_alone() -> None:
    both = planar_scene(2, 12, seed=10, noise=1.0)
    S0, S1 = ellipses(24, 1), ellipses(24, 2)
    together = homographies(both, *both.matches[:2], S0, S1, robust="cauchy")
    alone = both._replace(batch_indexes=both.batch_indexes[:12], H_0to1=both.H_0to1[:1])
    single = homographies(alone, *(x[:12] for x in (*both.matches[:2], S0, S1)), robust="cauchy")
    assert torch.equal(together[:1], single)


def test_losses_count_standard_deviations_and_leave_covariances_alone() -> None:
    planar, views = planar_scene(2, 9, seed=11, noise=1.0), scene(2, 9, seed=11, noise=1.0)
    F = fundamental_from_pose(views.T_0to1, views.K0, views.K1)
    sides = {
        f"covariance{k}": ellipses(len(planar.keypoints0), k, widest=1.0).requires_grad_() for k in (0, 1)
    }  # fmt: skip
    keypoints = [x.clone().requires_grad_() for x in (*planar.matches[:2], *views.matches[:2])]
    index = planar.batch_indexes
    flat, deep = keypoints[:2], keypoints[2:]
    T = views.T_0to1, views.K0, views.K1
    values = [
        symmetric_transfer_loss(*flat, index, planar.H_0to1, **sides, smoothing=1e-9),
        weak_homography_loss(*flat, index, planar.H_0to1, **sides),
        sampson_loss(*deep, index, F, **sides, smoothing=1e-9),
        weak_pose_loss(*deep, index, *T, **sides),
    ]
    for value, leaves in zip(values, (flat, flat, deep, deep), strict=True):
        gradients = torch.autograd.grad(value, [*leaves, *sides.values()], allow_unused=True)
        assert all(g is not None and bool(g.any()) for g in gradients[:2])
        assert gradients[2:] == (None, None)
    residual = sampson_residuals(*views.matches, F, **sides)
    assert torch.allclose(values[2], residual.abs().mean(), atol=1e-6)
    larger = {name: 9.0 * S for name, S in sides.items()}
    assert torch.allclose(3.0 * sampson_loss(*deep, index, F, **larger, smoothing=1e-9), values[2], atol=1e-6)
