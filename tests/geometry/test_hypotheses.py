# SPDX-License-Identifier: Apache-2.0
"""Differentiable consensus: right with many wrong matches, exact gradient, quiet at degenerate pairs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import consensus_from_matches, estimate_robust
from eloftr_ops.geometry._search import Problem, search
from eloftr_ops.losses import corner_error_loss, sampson_loss
from support.gradients import check_gradients, finite_gradients
from support.two_view import angle_between, direction_between, planar_scene, scene

Case = tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], Tensor]
MODELS = pytest.mark.parametrize("model", ["homography", "fundamental", "essential", "pose"])


def _problem(model: str, pairs: int, count: int, **options: Any) -> Case:
    """Matches, arguments and truth."""
    if model == "homography":
        planar = planar_scene(pairs, count, **options)
        return planar.matches, {"batch_size": pairs, "model": model}, planar.H_0to1
    views = scene(pairs, count, **options)
    cameras = {} if model == "fundamental" else {"K0": views.K0, "K1": views.K1}
    return views.matches, {"batch_size": pairs, "model": model, **cameras}, views.T_0to1


@MODELS
@pytest.mark.parametrize("refine_steps", [0, 20])
def test_gradients_are_those_of_finite_differences(model: str, refine_steps: int) -> None:
    (x0, x1, index), arguments, _ = _problem(model, 1, 12, seed=3, noise=0.3, wrong=0.2)
    weights = 0.5 + torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def expectation(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        found = consensus_from_matches(
            a, b, index, weights=w, hypotheses=3, refine_steps=refine_steps, max_iterations=64, **arguments
        )
        # Weighted by a fixed direction: a sum of squares of a matrix of unit norm would be constant.
        direction = torch.linspace(0.3, 1.0, found.models_0to1[0, 0].numel(), dtype=torch.float64)
        size = found.models_0to1.abs().amax((2, 3), keepdim=True)
        values = ((found.models_0to1 / size).flatten(2) * direction).sum(2)
        return found.expected(values), found.scores

    check_gradients(expectation, [x0, x1, weights], eps=1e-6, atol=1e-5, rtol=1e-3, fast=True)


@MODELS
def test_right_with_half_of_the_matches_wrong(model: str) -> None:
    matches, arguments, truth = _problem(model, 4, 100, seed=5, noise=0.5, wrong=0.5)
    found = consensus_from_matches(*matches, hypotheses=4, **arguments)
    assert bool(found.valid.all())
    assert torch.allclose(found.probabilities.sum(1), torch.ones(4, dtype=torch.float64))
    agreeing = (found.inlier_weights > 0.5).view(4, 100).double()
    assert float(agreeing[:, 50:].mean()) > 0.9
    assert float(agreeing[:, :50].mean()) < (0.02 if model == "homography" else 0.15)
    if model == "homography":
        assert float(corner_error_loss(found.best_0to1, truth, (480, 640), reduction="none").max()) < 3.0
    if model == "pose":
        assert float(angle_between(found.best_0to1[:, :3, :3], truth[:, :3, :3]).max()) < 1.0
        assert float(direction_between(found.best_0to1[:, :3, 3], truth[:, :3, 3]).max()) < 4.0


@MODELS
@pytest.mark.parametrize("refine_steps", [0, 10])
def test_pairs_that_determine_nothing_get_no_probability_and_no_gradient(model: str, refine_steps: int) -> None:
    (x0, x1, index), arguments, _ = _problem(model, 5, 30, seed=6, noise=0.3)
    x0, x1 = x0.view(5, 30, 2).clone(), x1.view(5, 30, 2).clone()
    x0[1], x1[1] = 7.0, 9.0  # one point
    line = torch.linspace(0.0, 500.0, 30, dtype=torch.float64)[:, None]
    x0[2], x1[2] = line * torch.tensor([1.0, 0.6]), line * torch.tensor([0.7, 0.2]) + 9.0
    keep = (index != 3) & ~((index == 4) & (torch.arange(150) % 30 > 2))  # pair 3 is empty, pair 4 has three matches
    leaves = [x.flatten(0, 1)[keep].requires_grad_() for x in (x0, x1)]
    weights = torch.ones_like(leaves[0][:, 0]).requires_grad_()
    found = consensus_from_matches(
        *leaves, index[keep], weights=weights, hypotheses=4, refine_steps=refine_steps, **arguments
    )
    assert found.valid.tolist() == [True, False, False, False, False]
    assert float(found.probabilities[0].sum().detach()) == pytest.approx(1.0)
    loss = (
        found.expected(found.models_0to1.flatten(2).square().sum(2) + found.scores).sum() + found.inlier_weights.sum()
    )
    gradients = finite_gradients(loss, [*leaves, weights])
    assert bool(gradients[0].any())
    assert not any(bool(g[30:60].any()) for g in gradients)  # one point repeated: exactly zero


def test_each_round_improves_its_own_candidates() -> None:
    """An improved model of wrong matches does not keep the raw models of later rounds from being improved."""
    planar = planar_scene(1, 40, seed=12, noise=0.5, wrong=0.6)
    unit = torch.diag(torch.tensor([1 / 320.0, 1 / 320.0, 1.0], dtype=torch.float64))
    points0, points1 = (x[None] / 320.0 for x in planar.matches[:2])
    problem = Problem("homography", points0, points1, torch.ones_like(points0[..., 0]), points0.new_full((1,), 0.01))
    truth = unit @ planar.H_0to1 @ unit.inverse()
    seen: list[Tensor] = []

    def improve(_: Problem, matrices: Tensor) -> Tensor:
        seen.append(matrices)
        return truth.expand_as(matrices)

    found = search(problem, 4, max_samples=1024, improve=improve)
    assert len(seen) == 3
    assert torch.equal(found.matrices, truth.expand(1, 4, 3, 3))  # nothing raw is better
    assert not any(torch.equal(raw, truth[0]) for raw in torch.cat(seen).flatten(0, 1))


def test_a_pair_gets_the_same_answer_alone_and_in_a_batch() -> None:
    matches, arguments, _ = _problem("fundamental", 3, 40, seed=7, noise=0.5, wrong=0.4)
    rows = matches[2] == 1
    together = consensus_from_matches(*matches, **arguments)
    alone = consensus_from_matches(
        matches[0][rows], matches[1][rows], matches[2][rows] * 0, batch_size=1, model="fundamental"
    )
    assert torch.allclose(alone.models_0to1[0], together.models_0to1[1], atol=1e-8)


def test_confidences_learn_which_matches_are_right() -> None:
    """Gradient descent on the expected loss of minimal hypotheses raises the weights of right matches."""
    planar = planar_scene(2, 30, seed=8, noise=0.5, wrong=0.5)
    logits = torch.zeros(60, dtype=torch.float64, requires_grad=True)
    found = consensus_from_matches(
        *planar.matches, batch_size=2, weights=logits.sigmoid(), refine_steps=0, hypotheses=32
    )
    many = found.probabilities.shape[1]
    losses = corner_error_loss(
        found.models_0to1.flatten(0, 1), planar.H_0to1.repeat_interleave(many, 0), (480, 640),
        saturation=32.0, reduction="none",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.expected(losses.view(2, many)).sum(), logits)
    right = (torch.arange(30) >= 15).repeat(2)
    assert float(gradient[right].mean()) < 0.0 < float(gradient[~right].mean())


def test_the_torch_backend_agrees_with_opencv() -> None:
    for model in ("homography", "fundamental", "pose"):
        matches, arguments, truth = _problem(model, 4, 120, seed=9, noise=0.5, wrong=0.5)
        ours, theirs = (
            estimate_robust(*matches, threshold=2.0, backend=backend, **arguments) for backend in ("torch", "opencv")
        )
        assert ours.valid.tolist() == theirs.valid.tolist() == [True] * 4
        right = (torch.arange(120) >= 60).repeat(4)
        assert float((ours.inliers & right).sum()) >= 0.97 * float((theirs.inliers & right).sum())
        if model == "fundamental":
            clean = scene(4, 120, seed=9).matches
            clean = tuple(x[right] for x in clean)
            errors = [sampson_loss(*clean, found.model_0to1, reduction="none") for found in (ours, theirs)]
            assert float(errors[0].median()) <= 1.25 * float(errors[1].median())
        if model == "pose":
            assert float(direction_between(ours.model_0to1[:, :3, 3], truth[:, :3, 3]).max()) < 4.0


def test_poselib_says_how_to_get_it_or_agrees() -> None:
    pytest.importorskip("poselib")
    for model in ("homography", "fundamental", "pose"):
        matches, arguments, _ = _problem(model, 3, 80, seed=10, noise=0.3, wrong=0.4)
        found = estimate_robust(*matches, backend="poselib", threshold=2.0, **arguments)
        assert bool(found.valid.all())
        assert float(found.inliers.view(3, 80)[:, 32:].double().mean()) > 0.9


def test_arguments_that_make_no_sense_are_named() -> None:
    matches, arguments, _ = _problem("pose", 1, 10, seed=11)
    for wrong, message in (
        ({"model": "affine"}, "model: expected one of 'homography'"),
        ({"K0": None}, "K0, K1: expected intrinsics"),
        ({"hypotheses": 0}, "hypotheses, refine_steps: expected at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"confidence": 1.0}, "confidence"),
        ({"max_iterations": 0}, "max_iterations"),
    ):
        with pytest.raises(ValueError, match=message):
            consensus_from_matches(*matches, **{**arguments, **wrong})
    found = consensus_from_matches(*matches, **arguments)
    with pytest.raises(ValueError, match="values: expected shape"):
        found.expected(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="backend: expected one of"):
        estimate_robust(*matches, backend="numpy", **arguments)
