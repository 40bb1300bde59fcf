# SPDX-License-Identifier: Apache-2.0
"""Affine maps and similarities from matches."""

from collections.abc import Callable
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import PlanarEstimate, affine_from_matches, similarity_from_matches
from support.gradients import check_gradients, finite_gradients
from support.two_view import pair_index, project

Estimator = Callable[..., PlanarEstimate]
BOTH = pytest.mark.parametrize("estimator", [affine_from_matches, similarity_from_matches])
WAYS = pytest.mark.parametrize(
    "options", [{}, {"refine_steps": 5}, {"robust": "geman_mcclure"}], ids=["linear", "refined", "robust"]
)
CORNERS = torch.tensor([[0.0, 0.0], [500.0, 0.0], [500.0, 500.0], [0.0, 500.0]], dtype=torch.float64)


def problem(
    estimator: Estimator, pairs: int, count: int, *, seed: int, noise: float = 0.0, wrong: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keypoints in both images, batch indexes, true maps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    M = torch.eye(3, dtype=torch.float64).repeat(pairs, 1, 1)
    if estimator is affine_from_matches:
        M[:, :2, :2] += 0.2 * draw(pairs, 2, 2)
    else:
        a, b = (1.0 + 0.3 * draw(pairs)), draw(pairs)
        M[:, 0, 0], M[:, 0, 1], M[:, 1, 0], M[:, 1, 1] = a, -b, b, a
    M[:, :2, 2] = 50.0 * draw(pairs, 2)
    x0 = 500.0 * torch.rand(pairs, count, 2, generator=generator, dtype=torch.float64)
    x1 = project(M, x0) + noise * draw(pairs, count, 2)
    bad = round(wrong * count)
    x1[:, :bad] = 500.0 * torch.rand(pairs, bad, 2, generator=generator, dtype=torch.float64)
    return x0.flatten(0, 1), x1.flatten(0, 1), pair_index(pairs, count), M


def corner_errors(found: Tensor, truth: Tensor) -> Tensor:
    corners = CORNERS.expand(len(truth), 4, 2)
    return (project(found, corners) - project(truth, corners)).norm(dim=-1).mean(1)


@BOTH
@WAYS
def test_exact_matches_give_the_exact_map(estimator: Estimator, options: dict[str, Any]) -> None:
    x0, x1, index, M = problem(estimator, 5, 8, seed=1)
    found = estimator(x0, x1, index, batch_size=5, **options)
    assert bool(found.valid.all() & found.converged.all())
    assert torch.allclose(found.A_0to1, M, atol=1e-7)
    assert torch.equal(found.A_0to1[:, 2], M[:, 2])


def test_least_squares_are_least() -> None:
    x0, x1, index, _ = problem(affine_from_matches, 1, 12, seed=2, noise=2.0)
    found = affine_from_matches(x0, x1, index, batch_size=1).A_0to1[0, :2]
    design = torch.cat([x0, torch.ones_like(x0[:, :1])], dim=1)
    assert torch.allclose(found, torch.linalg.lstsq(design, x1).solution.mT, atol=1e-8)
    similar = similarity_from_matches(x0, x1, index, batch_size=1).A_0to1[0]
    estimate = cv2.estimateAffinePartial2D(x0.numpy(), x1.numpy(), ransacReprojThreshold=1e6)[0]  # refines by LM
    opencv = torch.eye(3, dtype=torch.float64)
    opencv[:2] = torch.from_numpy(estimate)
    errors = [(project(A[None], x0[None])[0] - x1).square().sum() for A in (similar, opencv)]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@BOTH
def test_half_of_the_matches_wrong(estimator: Estimator) -> None:
    x0, x1, index, M = problem(estimator, 12, 50, seed=3, noise=1.0, wrong=0.5)
    found = estimator(x0, x1, index, batch_size=12, robust="geman_mcclure")
    assert bool(found.converged.all())
    assert corner_errors(found.A_0to1, M).max() < 3.0
    x0, x1, index, _ = problem(estimator, 12, 30, seed=4, wrong=1.0)
    assert not bool(estimator(x0, x1, index, batch_size=12, robust="geman_mcclure").valid.any())


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (affine_from_matches, {}),
        (affine_from_matches, {"refine_steps": 5}),
        (similarity_from_matches, {}),
        (similarity_from_matches, {"robust": "geman_mcclure"}),
    ],
    ids=["affine-linear", "affine-refined", "similarity-linear", "similarity-robust"],
)
def test_gradients(estimator: Estimator, options: dict[str, Any]) -> None:
    x0, x1, index, _ = problem(estimator, 1, 7, seed=5, noise=1.0)
    S = torch.eye(2, dtype=torch.float64) + torch.rand(7, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    weights = S[:, 0, 0] / 2

    def of(a: Tensor, b: Tensor, w: Tensor, S0: Tensor, S1: Tensor) -> Tensor:
        given = {"weights": w, "covariance0": S0, "covariance1": S1}
        found = estimator(a, b, index, batch_size=1, **given, **options).A_0to1
        return 0.01 * project(found, CORNERS[None])

    check_gradients(of, [x0, x1, weights, S, S.flip(0)], eps=1e-6, atol=1e-6, rtol=1e-3, fast=True)


def ill_posed(estimator: Estimator) -> dict[str, tuple[Tensor, Tensor]]:
    x0, x1, _, _ = problem(estimator, 1, 12, seed=6)
    line = torch.linspace(0.0, 1.0, 12, dtype=torch.float64)[:, None] * torch.tensor([400.0, 130.0])
    cases = {
        "none": (x0[:0], x1[:0]),
        "one": (x0[:1], x1[:1]),
        "one point": (x0[:1].repeat(12, 1), x1[:1].repeat(12, 1)),
        "one point in image 0": (x0[:1].repeat(12, 1), x1),
        "one point in image 1": (x0, x1[:1].repeat(12, 1)),
        "zeros": (torch.zeros_like(x0), torch.zeros_like(x1)),
    }
    if estimator is affine_from_matches:
        cases |= {"two": (x0[:2], x1[:2]), "a line": (line, x1), "onto a line": (x0, x0[:, :1].repeat(1, 2))}
    return cases


@BOTH
@WAYS
def test_ill_posed_matches_are_flagged(estimator: Estimator, options: dict[str, Any]) -> None:
    dtype = torch.float32
    good = problem(estimator, 1, 20, seed=7, noise=0.5)[:2]
    cases = ill_posed(estimator)
    for x0, x1 in cases.values():
        index = torch.cat([torch.zeros(len(x0), dtype=torch.long), torch.ones(20, dtype=torch.long)])
        leaves = [torch.cat(parts).to(dtype).requires_grad_() for parts in ((x0, good[0]), (x1, good[1]))]
        found = estimator(*leaves, index, batch_size=2, **options)
        assert found.valid.tolist() == [False, True]
        assert torch.equal(found.A_0to1[0], torch.eye(3, dtype=dtype))
        for gradient in finite_gradients(found.A_0to1, leaves):
            assert not bool(gradient[: len(x0)].any())


@BOTH
def test_bad_input_is_named(estimator: Estimator) -> None:
    x0, x1, index, _ = problem(estimator, 1, 5, seed=8)
    with pytest.raises(ValueError, match="keypoints1: expected the shape of keypoints0"):
        estimator(x0, x1[:4], index, batch_size=1)
    with pytest.raises(ValueError, match="refine_steps: expected >= 1 with robust"):
        estimator(x0, x1, index, batch_size=1, robust="cauchy", refine_steps=0)
    with pytest.raises(ValueError, match="covariance0: expected positive definite"):
        estimator(x0, x1, index, batch_size=1, covariance0=torch.zeros(5, 2, 2))
