# SPDX-License-Identifier: Apache-2.0
"""Sample consensus: right with many wrong matches, quiet with too few, blind to the rest of the batch."""

import cv2
import pytest
import torch

from eloftr_ops.geometry import (
    essential_from_matches,
    estimate_robust,
    homography_from_matches,
    relative_pose_from_matches,
)
from support.two_view import angle_between, direction_between, pair_index, planar_scene, project, scene


def test_homography_with_seven_wrong_matches_in_ten() -> None:
    planar = planar_scene(6, 100, seed=1, noise=0.3, wrong=0.7)
    estimate = estimate_robust(*planar.matches, batch_size=6, model="homography", threshold=2.0)
    assert bool(estimate.valid.all())
    corners = torch.tensor([[0.0, 0.0], [640.0, 0.0], [640.0, 480.0], [0.0, 480.0]]).double().expand(6, 4, 2)
    gap = (project(estimate.model_0to1, corners) - project(planar.H_0to1, corners)).norm(dim=-1)
    assert float(gap.max()) < 4.0
    assert torch.allclose(torch.linalg.det(estimate.model_0to1), torch.ones(6, dtype=torch.float64))
    inliers = estimate.inliers.view(6, 100)
    assert float(inliers[:, 70:].double().mean()) > 0.95
    assert float(inliers[:, :70].double().mean()) < 0.02


def test_pose_with_half_wrong_matches_starts_the_differentiable_estimate() -> None:
    views = scene(6, 100, seed=2, noise=0.3, wrong=0.5)
    found = estimate_robust(*views.matches, batch_size=6, model="pose", K0=views.K0, K1=views.K1)
    assert bool(found.valid.all())
    refined = relative_pose_from_matches(
        *views.matches[:2],
        views.K0,
        views.K1,
        views.batch_indexes,
        weights=found.inliers.double(),
        initial_0to1=found.model_0to1,
    )
    assert bool(refined.converged.all())
    for T in (found.model_0to1, refined.T_0to1):
        assert float(angle_between(T[:, :3, :3], views.T_0to1[:, :3, :3]).max()) < 1.0
        assert float(direction_between(T[:, :3, 3], views.T_0to1[:, :3, 3]).max()) < 4.0


def test_fundamental_matrix_holds_for_its_inliers() -> None:
    views = scene(4, 80, seed=3, noise=0.2, wrong=0.4)
    found = estimate_robust(*views.matches, batch_size=4, model="fundamental")
    assert bool(found.valid.all())
    inliers = found.inliers.view(4, 80)
    assert float(inliers[:, 32:].double().mean()) > 0.9
    assert float(inliers[:, :32].double().mean()) < 0.15
    assert float(torch.linalg.det(found.model_0to1).abs().max()) < 1e-12


@pytest.mark.parametrize("model", ["homography", "fundamental", "pose"])
def test_pairs_that_determine_nothing_are_flagged(model: str) -> None:
    line = torch.linspace(0.0, 500.0, 20)[:, None] * torch.tensor([1.0, 0.6])
    views = scene(1, 60, seed=4)
    if model == "homography":
        good0, good1 = (p.float() for p in planar_scene(1, 60, seed=4).matches[:2])
    else:
        good0, good1 = views.keypoints0.float(), views.keypoints1.float()
    x0, x1 = torch.cat([line[:2], line, good0]), torch.cat([line[:2], 0.7 * line + 9.0, good1])
    index = torch.cat([torch.full((2,), 1), torch.full((20,), 3), torch.zeros(60)]).long()  # pair 2 is empty
    K0, K1 = (K.float().expand(4, 3, 3) for K in (views.K0, views.K1))
    found = estimate_robust(x0, x1, index, batch_size=4, model=model, K0=K0, K1=K1)
    assert found.valid.tolist() == [True, False, False, False]
    assert not bool(found.inliers[:22].any())
    assert float(found.inliers[22:].float().mean()) > 0.95
    assert found.model_0to1.dtype == torch.float32
    empty = torch.zeros(3, 3) if model == "fundamental" else torch.eye(4 if model == "pose" else 3)
    assert torch.equal(found.model_0to1[1:], empty.expand(3, *empty.shape))


def test_same_seed_same_answer_without_touching_global_state() -> None:
    planar = planar_scene(2, 60, seed=5, noise=1.0, wrong=0.5)
    state = torch.get_rng_state()
    runs = [estimate_robust(*planar.matches, batch_size=2, model="homography", seed=3) for _ in range(2)]
    assert torch.equal(runs[0].model_0to1, runs[1].model_0to1)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_carries_a_gradient() -> None:
    planar = planar_scene(1, 30, seed=6)
    found = estimate_robust(planar.keypoints0.requires_grad_(), *planar.matches[1:], batch_size=1, model="homography")
    assert not found.model_0to1.requires_grad


def test_its_inliers_as_weights_remove_the_wrong_matches() -> None:
    planar = planar_scene(3, 60, seed=7, noise=0.2, wrong=0.5)
    found = estimate_robust(*planar.matches, batch_size=3, model="homography")
    H = homography_from_matches(*planar.matches, batch_size=3, weights=found.inliers.double(), refine_steps=10).H_0to1
    corners = torch.tensor([[0.0, 0.0], [640.0, 480.0]]).double().expand(3, 2, 2)
    assert float((project(H, corners) - project(planar.H_0to1, corners)).norm(dim=-1).max()) < 2.0


def test_arguments_that_make_no_sense_are_named() -> None:
    planar = planar_scene(1, 10, seed=8)
    with pytest.raises(ValueError, match="model: expected one of 'homography'"):
        estimate_robust(*planar.matches, batch_size=1, model="affine")
    with pytest.raises(ValueError, match="K0, K1: expected intrinsics"):
        estimate_robust(*planar.matches, batch_size=1, model="pose")
    with pytest.raises(ValueError, match="confidence"):
        estimate_robust(*planar.matches, batch_size=1, model="homography", confidence=1.0)
    with pytest.raises(ValueError, match="threshold"):
        estimate_robust(*planar.matches, batch_size=1, model="homography", threshold=0.0)
    K = torch.eye(3).expand(1, 3, 3)
    with pytest.raises(ValueError, match="K1: expected invertible intrinsics"):
        estimate_robust(*planar.matches, batch_size=1, model="pose", K0=K, K1=0.0 * K)


@pytest.mark.parametrize("model", ["homography", "fundamental", "essential", "pose"])
def test_a_pair_at_which_opencv_raises_is_flagged_and_spares_the_others(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = scene(3, 60, seed=4)
    matches = planar_scene(3, 60, seed=4).matches if model == "homography" else views.matches
    name = {"homography": "findHomography", "fundamental": "findFundamentalMat"}.get(model, "findEssentialMat")
    find = getattr(cv2, name)
    calls = []

    def raising(*arguments: object) -> object:
        calls.append(name)
        if len(calls) == 2:
            raise cv2.error("(-215:Assertion failed) !model.empty() in function 'setModelParameters'")
        return find(*arguments)

    monkeypatch.setattr(cv2, name, raising)
    found = estimate_robust(*matches, batch_size=3, model=model, K0=views.K0, K1=views.K1)
    assert found.valid.tolist() == [True, False, True]
    assert found.inliers.view(3, 60).any(1).tolist() == [True, False, True]


def test_small_sets_with_repeated_points_do_not_raise() -> None:
    """OpenCV's seven-point sampler fails an assertion at some of these sets, as they come."""
    sets = [scene(1, 12, seed=seed, noise=1.0, wrong=0.3) for seed in range(60)]
    points = [[x.view(1, 12, 2).clone() for x in views.matches[:2]] for views in sets]
    for pair in points:
        for x in pair:
            x[:, :5] = x[:, :1]
    x0, x1 = (torch.cat(side).flatten(0, 1) for side in zip(*points, strict=True))
    found = estimate_robust(x0, x1, pair_index(60, 12), batch_size=60, model="fundamental")
    assert bool(torch.isfinite(found.model_0to1).all())


def test_essential_matrix_is_that_of_the_pose() -> None:
    views = scene(3, 60, seed=9, noise=0.2, wrong=0.3)
    cameras = {"K0": views.K0, "K1": views.K1}
    found = estimate_robust(*views.matches, batch_size=3, model="essential", **cameras)
    pose = estimate_robust(*views.matches, batch_size=3, model="pose", **cameras)
    assert bool(found.valid.all())
    assert torch.equal(found.inliers, pose.inliers)
    values = torch.linalg.svdvals(found.model_0to1)
    assert torch.allclose(values, torch.tensor([0.5**0.5, 0.5**0.5, 0.0]).double().expand(3, 3), atol=1e-12)
    refined = essential_from_matches(
        *views.matches[:2], views.K0, views.K1, views.batch_indexes, weights=found.inliers.double()
    )
    assert float((refined.E_0to1 - found.model_0to1).abs().max()) < 0.05


@pytest.mark.parametrize("model", ["homography", "fundamental", "pose"])
def test_the_order_of_the_matches_does_not_matter(model: str) -> None:
    views = scene(2, 40, seed=10, noise=1.0, wrong=0.5)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    options = {"batch_size": 2, "model": model, "K0": views.K0, "K1": views.K1}
    plain = estimate_robust(*views.matches, **options)
    shuffled = estimate_robust(*(x[order] for x in views.matches), **options)
    assert torch.equal(shuffled.model_0to1, plain.model_0to1)
    assert torch.equal(shuffled.inliers, plain.inliers[order])
