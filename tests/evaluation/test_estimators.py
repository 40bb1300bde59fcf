# SPDX-License-Identifier: Apache-2.0
"""The robust estimators: a known answer behind wrong matches, frames, and inputs that determine nothing."""

from __future__ import annotations

import pytest
import torch

from eloftr_ops.evaluation import ESTIMATORS, corner_error, estimate_homography, estimate_pose, pose_errors
from support.two_view import SIZE, planar_scene, scene

SIZE_WH = (int(SIZE[0]), int(SIZE[1]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pose_behind_wrong_matches(estimator: str) -> None:
    view = scene(1, 300, seed=3, noise=0.1, wrong=0.4)
    T = estimate_pose(view.keypoints0, view.keypoints1, view.K0[0], view.K1[0], estimator=estimator, threshold=0.5)
    # 0.1 px is 0.01 degrees at these focal lengths; points span the image, and RANSAC stops at a minimal sample.
    errors = pose_errors(T, view.T_0to1[0])
    assert errors.largest < (1.0 if estimator == "ransac" else 0.3)
    assert T.dtype == torch.float64
    assert T[:3, 3].norm() == pytest.approx(1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_homography_behind_wrong_matches(estimator: str) -> None:
    view = planar_scene(1, 300, seed=4, noise=0.3, wrong=0.4)
    H = estimate_homography(view.keypoints0, view.keypoints1, estimator=estimator)
    assert corner_error(H, view.H_0to1[0], SIZE_WH) < 0.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_frame_that_points_and_intrinsics_share(estimator: str) -> None:
    view = scene(1, 200, seed=5)
    shift = torch.tensor([[1.0, 0, -0.5], [0, 1, -0.5], [0, 0, 1]], dtype=torch.float64)
    moved = (view.keypoints0 - 0.5, view.keypoints1 - 0.5, shift @ view.K0[0], shift @ view.K1[0])
    T = estimate_pose(*moved, estimator=estimator)
    assert pose_errors(T, view.T_0to1[0]).largest < 0.01  # half a pixel in one of both would be 0.05


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_same_matches_give_the_same_model(estimator: str) -> None:
    view = scene(1, 100, seed=6, noise=0.5, wrong=0.3)
    poses = [
        estimate_pose(view.keypoints0, view.keypoints1, view.K0[0], view.K1[0], estimator=estimator) for _ in range(2)
    ]
    assert torch.equal(*poses)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_too_few_or_repeated_matches_give_nothing_or_something_finite(estimator: str) -> None:
    view = scene(1, 30, seed=7)
    x0, x1, K0, K1 = view.keypoints0, view.keypoints1, view.K0[0], view.K1[0]
    for count in (0, 1, 4):
        assert estimate_pose(x0[:count], x1[:count], K0, K1, estimator=estimator) is None
    for count in (0, 1, 3):
        assert estimate_homography(x0[:count], x1[:count], estimator=estimator) is None
    same0, same1 = x0[:1].expand(20, 2), x1[:1].expand(20, 2)
    for model in (
        estimate_pose(same0, same1, K0, K1, estimator=estimator),
        estimate_homography(same0, same1, estimator=estimator),
    ):
        assert model is None or model.isfinite().all()


def test_unknown_estimators_are_refused() -> None:
    none = torch.zeros(0, 2)
    with pytest.raises(ValueError, match="estimator: expected one of magsac"):
        estimate_homography(none, none, estimator="lmeds")
    with pytest.raises(ValueError, match="estimator"):
        estimate_pose(none, none, torch.eye(3), torch.eye(3), estimator="lmeds")
