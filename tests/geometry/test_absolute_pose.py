# SPDX-License-Identifier: Apache-2.0
"""Camera poses from points in space: accuracy, gradient, flags, errors; points from depth; the loss."""

from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import absolute_pose_from_matches, points_from_depth
from eloftr_ops.geometry._three_points import poses_of_three
from eloftr_ops.losses import absolute_pose_loss
from support.gradients import check_gradients, finite_gradients
from support.two_view import SIZE, angle_between, intrinsics, pair_index, project, rotation


class Views(NamedTuple):
    """Points in space and where cameras see them."""

    keypoints: Tensor  # (B * N, 2) float64
    points: Tensor  # (B * N, 3)
    K: Tensor  # (B, 3, 3)
    batch_indexes: Tensor
    T: Tensor  # (B, 4, 4)


def views(pairs: int, count: int, *, seed: int, noise: float = 0.0, wrong: float = 0.0, flat: bool = False) -> Views:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    X = 4.0 * (uniform(pairs, count, 3) - 0.5)
    if flat:
        X[..., 2] = 0.2 * X[..., 0]
    T = torch.eye(4, dtype=torch.float64).repeat(pairs, 1, 1)
    T[:, :3, :3] = rotation(torch.randn(pairs, 3, generator=generator, dtype=torch.float64))
    T[:, :3, 3] = torch.tensor([0.0, 0.0, 7.0]) + uniform(pairs, 3) - 0.5
    K = intrinsics(500.0).repeat(pairs, 1, 1)
    K[:, 1, 1] = 460.0
    x = project(K, X @ T[:, :3, :3].mT + T[:, None, :3, 3])
    x = x + noise * torch.randn(pairs, count, 2, generator=generator, dtype=torch.float64)
    bad = round(wrong * count)
    x[:, :bad] = uniform(pairs, bad, 2) * torch.tensor(SIZE, dtype=torch.float64)
    return Views(x.flatten(0, 1), X.flatten(0, 1), K, pair_index(pairs, count), T)


def pose(seen: Views, **options: Any) -> Any:
    return absolute_pose_from_matches(*seen[:4], **options)


@pytest.mark.parametrize("flat", [False, True], ids=["space", "plane"])
@pytest.mark.parametrize("count", [4, 5, 20])
def test_exact_points_give_the_exact_pose(count: int, flat: bool) -> None:
    seen = views(6, count, seed=1, flat=flat)
    found = pose(seen)
    assert bool(found.valid.all() & found.converged.all())
    assert torch.allclose(found.T_0to1, seen.T, atol=1e-6)
    moved = seen._replace(points=1e8 * seen.points)
    assert torch.allclose(pose(moved).T_0to1[:, :3, 3], 1e8 * seen.T[:, :3, 3], rtol=1e-6)


def test_half_of_the_matches_wrong() -> None:
    seen = views(12, 60, seed=2, noise=1.0, wrong=0.5)
    found = pose(seen, robust="geman_mcclure")
    assert bool(found.converged.all())
    assert angle_between(found.T_0to1[:, :3, :3], seen.T[:, :3, :3]).max() < 1.0
    assert (found.T_0to1 - seen.T)[:, :3, 3].norm(dim=1).max() < 0.15
    weights = found.inlier_weights.view(12, 60)
    assert weights[:, 30:].median() > 0.5
    assert weights[:, :30].median() < 0.01


def test_reprojection_errors_are_not_above_opencvs() -> None:
    seen = views(8, 15, seed=3, noise=2.0)
    found = pose(seen)

    def error(T: Tensor, k: int) -> float:
        rows = slice(15 * k, 15 * (k + 1))
        mapped = project(seen.K[k : k + 1], seen.points[None, rows] @ T[:3, :3].mT + T[:3, 3])[0]
        return float((mapped - seen.keypoints[rows]).square().sum())

    for k in range(8):
        rows = slice(15 * k, 15 * (k + 1))
        arrays = [x.numpy() for x in (seen.points[rows], seen.keypoints[rows], seen.K[k])]
        _, turn, slide = cv2.solvePnP(arrays[0], arrays[1], arrays[2], None, flags=cv2.SOLVEPNP_SQPNP)
        turn, slide = cv2.solvePnPRefineLM(arrays[0], arrays[1], arrays[2], np.zeros(4), turn, slide)
        T = torch.eye(4, dtype=torch.float64)
        T[:3, :3], T[:3, 3] = torch.from_numpy(cv2.Rodrigues(turn)[0]), torch.from_numpy(slide[:, 0])
        assert error(found.T_0to1[k], k) <= error(T, k) * (1 + 1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"robust": "cauchy"}, {"covariance": True}], ids=["plain", "robust", "covariance"]
)
def test_gradients(options: dict[str, Any]) -> None:
    seen = views(1, 9, seed=4, noise=1.0)
    given = (
        [torch.eye(2, dtype=torch.float64) + torch.rand(9, 1, 1).double()] if options.pop("covariance", None) else []
    )

    def of(x: Tensor, X: Tensor, K: Tensor, w: Tensor, *S: Tensor) -> Tensor:
        fixed = torch.cat([torch.cat([K[:, :, :2], seen.K[:, :, 2:]], 2)[:, :2], seen.K[:, 2:]], 1)
        covariance = S[0] if S else None
        return absolute_pose_from_matches(
            x, X, fixed, seen.batch_indexes, weights=w, covariance1=covariance, **options
        ).T_0to1[:, :3]

    weights = 0.5 + torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check_gradients(of, [*seen[:3], weights, *given], eps=1e-6, atol=1e-6, rtol=1e-3, fast=True)


def ill_posed() -> dict[str, tuple[Tensor, Tensor]]:
    seen = views(1, 12, seed=5)
    x, X, T = seen.keypoints, seen.points, seen.T[0]
    line = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.5, -0.3])

    def image(points: Tensor) -> Tensor:
        return project(seen.K, (points @ T[:3, :3].mT + T[:3, 3])[None])[0]

    return {
        "none": (x[:0], X[:0]),
        "one": (x[:1], X[:1]),
        "three": (x[:3], X[:3]),
        "three, repeated": (x[:3].repeat(4, 1), X[:3].repeat(4, 1)),
        "one point": (x[:1].repeat(12, 1), X[:1].repeat(12, 1)),
        "one place in the image": (x[:1].repeat(12, 1), X),
        "one point in space": (x, X[:1].repeat(12, 1)),
        "a line": (image(line), line),
        "zeros": (torch.zeros_like(x), torch.zeros_like(X)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("robust", [None, "geman_mcclure"])
@pytest.mark.parametrize("case", ill_posed())
def test_ill_posed_matches_are_flagged(case: str, robust: str | None, dtype: torch.dtype) -> None:
    x, X = ill_posed()[case]
    good = views(1, 20, seed=6, noise=0.5)
    index = torch.cat([torch.zeros(len(x), dtype=torch.long), torch.ones(20, dtype=torch.long)])
    leaves = [torch.cat(parts).to(dtype).requires_grad_() for parts in ((x, good.keypoints), (X, good.points))]
    found = absolute_pose_from_matches(*leaves, good.K.to(dtype).repeat(2, 1, 1), index, robust=robust)
    assert found.valid.tolist() == [False, True]
    assert torch.equal(found.T_0to1[0], torch.eye(4, dtype=dtype))
    for gradient in finite_gradients(found.T_0to1, leaves):
        assert not bool(gradient[: len(x)].any())
    alone = absolute_pose_from_matches(*(y[len(x) :] for y in leaves), good.K.to(dtype), index[:20] * 0, robust=robust)
    assert torch.allclose(found.T_0to1[1], alone.T_0to1[0], atol=1e-5)


def test_a_point_behind_the_camera() -> None:
    seen = views(1, 12, seed=7)
    # Mirrored through the camera: the same pixel, from behind.
    R, t = seen.T[0, :3, :3], seen.T[0, :3, 3]
    behind = (-(seen.points[:1] @ R.mT + t) - t) @ R
    points = torch.cat([behind, seen.points[1:]])
    kept = pose(seen._replace(points=points), robust="geman_mcclure")
    assert bool(kept.valid)
    assert torch.allclose(kept.T_0to1, seen.T, atol=1e-5)
    weights = torch.ones(12, dtype=torch.float64)
    weights[0] = 0.0
    assert torch.allclose(pose(seen._replace(points=points), weights=weights).T_0to1, seen.T, atol=1e-6)
    all_behind = (-(seen.points @ R.mT + t) - t) @ R
    assert not bool(pose(seen._replace(points=all_behind), initial_0to1=seen.T).valid)


def test_random_matches_are_no_pose() -> None:
    seen = views(8, 30, seed=8, wrong=1.0)
    assert not bool(pose(seen, robust="geman_mcclure").valid.any())


def test_a_start_of_ones_own() -> None:
    seen = views(3, 20, seed=9, noise=1.0)
    start = seen.T.clone()
    start[:, :3, 3] += 0.2
    assert torch.allclose(pose(seen, initial_0to1=start).T_0to1, pose(seen).T_0to1, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": torch.zeros(5, 2)}, ValueError, r"points0: expected shape \(M, 3\) = \(10, 3\)"),
        ({"points": torch.full((10, 3), float("nan"))}, ValueError, "points0: expected finite coordinates"),
        ({"points": torch.ones(10, 3, dtype=torch.long)}, TypeError, "points0: expected a floating point dtype"),
        ({"K": torch.zeros(1, 3, 3)}, ValueError, "K1: expected invertible intrinsics"),
        ({"keypoints": torch.full((10, 2), float("inf"))}, ValueError, "keypoints0?1?: expected finite"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pose(views(1, 10, seed=1)._replace(**change))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"refine_steps": 0}, "refine_steps: expected >= 1"),
        ({"robust": "huber"}, "robust: expected one of"),
        ({"initial_0to1": torch.eye(3)[None]}, "initial_0to1: expected shape"),
        ({"covariance1": torch.zeros(10, 2, 2)}, "covariance1: expected positive definite"),
    ],
)
def test_bad_options_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pose(views(1, 10, seed=1), **option)


def test_three_points_have_their_pose_among_the_solutions() -> None:
    seen = views(400, 3, seed=10)
    rays = torch.cat([seen.keypoints, torch.ones_like(seen.keypoints[:, :1])], 1).view(400, 3, 3)
    rays = torch.nn.functional.normalize(rays @ torch.linalg.inv(seen.K).mT, dim=2)
    found = poses_of_three(seen.points.view(400, 3, 3), rays)
    nearest = (found - seen.T[:, None, :3]).abs().amax((2, 3)).amin(1)
    # The rest have two roots closer together than the search for changes of sign.
    assert float((nearest < 1e-5).double().mean()) > 0.8
    X = seen.points.view(400, 1, 3, 3)
    mapped = X @ found[..., :3].mT + found[..., None, :, 3]
    off = (torch.nn.functional.normalize(mapped, dim=3) - rays[:, None]).abs().amax((2, 3))
    real = found.flatten(2).any(2)
    assert float((off[real] < 1e-5).double().mean()) > 0.95


def test_points_from_depth() -> None:
    K = intrinsics(50.0)[None].clone()
    K[0, :2, 2] = torch.tensor([8.0, 6.0])
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(16), indexing="ij")
    depth = (3.0 + 0.1 * (columns + 0.5) + 0.2 * (rows + 0.5)).double()[None]  # bilinear: interpolated exactly
    x = torch.tensor([[3.2, 4.7], [8.0, 6.0], [12.9, 9.1]], dtype=torch.float64)
    index = torch.zeros(3, dtype=torch.long)
    points, valid = points_from_depth(x, depth, K, index)
    assert bool(valid.all())
    assert torch.allclose(project(K, points[None])[0], x)
    assert torch.allclose(points[:, 2], 3.0 + x @ torch.tensor([0.1, 0.2], dtype=torch.float64))
    check_gradients(lambda a, d, k: points_from_depth(a, d, k + 0 * K, index)[0], [x, depth, K])
    holes = depth.clone()
    holes[0, 4, 3], holes[0, 9, 13] = 0.0, float("nan")
    outside = torch.cat([x, torch.tensor([[-1.0, 2.0], [17.0, 3.0], [0.2, 0.2]], dtype=torch.float64)])
    holes.requires_grad_()
    points, valid = points_from_depth(outside, holes, K, index.new_zeros(6))
    assert valid.tolist() == [False, True, False, False, False, True]
    assert not bool(points[~valid].any())
    assert bool(torch.isfinite(torch.autograd.grad(points.sum(), holes)[0]).all())
    with pytest.raises(ValueError, match=r"depth: expected shape \(B, H, W\) with B = 1"):
        points_from_depth(x, depth[0], K, index)


def test_the_loss_of_a_pose() -> None:
    truth = views(3, 4, seed=11).T
    leaf = truth.clone().requires_grad_()
    value = absolute_pose_loss(leaf, truth)
    assert float(value.detach()) == 0.0
    assert not bool(torch.autograd.grad(value, leaf)[0].any())
    moved = truth.clone()
    moved[:, :3, 3] += (truth[:, :3, :3] @ torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)[:, None])[..., 0]
    assert torch.allclose(absolute_pose_loss(moved, truth, smoothing=1e-9), torch.tensor(5.0).double())
    turned = truth.clone()
    turned[:, :3] = rotation(torch.tensor([[0.0, 0.3, 0.0]], dtype=torch.float64)) @ truth[:, :3]
    assert torch.allclose(
        absolute_pose_loss(turned, truth, smoothing=1e-9, reduction="none"), torch.full((3,), 0.3).double(), atol=1e-6
    )
    check_gradients(lambda a, b: absolute_pose_loss(a, b, reduction="none"), [moved, turned], fast=True)
    flags = torch.tensor([True, False, True])
    moved[1] = float("nan")
    assert torch.allclose(absolute_pose_loss(moved, truth, valid=flags, smoothing=1e-9), torch.tensor(5.0).double())
    with pytest.raises(ValueError, match="rotation_weight, position_weight"):
        absolute_pose_loss(truth, truth, position_weight=-1.0)
