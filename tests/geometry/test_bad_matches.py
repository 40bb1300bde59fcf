# SPDX-License-Identifier: Apache-2.0
"""Bad input is an error that names the argument; what is merely ill-posed is a flag."""

import inspect

import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import (
    apply_homography,
    essential_from_matches,
    estimate_robust,
    fundamental_from_matches,
    fundamental_from_pose,
    homography_from_matches,
    relative_pose_from_matches,
)
from eloftr_ops.losses import (
    corner_error_loss,
    pose_loss,
    sampson_loss,
    symmetric_epipolar_loss,
    symmetric_transfer_loss,
)
from support.two_view import intrinsics, planar_scene, scene

K = intrinsics(500.0).expand(2, 3, 3)
MATRIX = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
TAKERS = {
    "homography": lambda x0, x1, i, w=None: homography_from_matches(x0, x1, i, batch_size=2, weights=w),
    "fundamental": lambda x0, x1, i, w=None: fundamental_from_matches(x0, x1, i, batch_size=2, weights=w),
    "essential": lambda x0, x1, i, w=None: essential_from_matches(x0, x1, K, K, i, weights=w),
    "pose": lambda x0, x1, i, w=None: relative_pose_from_matches(x0, x1, K, K, i, weights=w),
    "symmetric transfer": lambda x0, x1, i, w=None: symmetric_transfer_loss(x0, x1, i, MATRIX, w),
    "sampson": lambda x0, x1, i, w=None: sampson_loss(x0, x1, i, MATRIX, w),
    "symmetric epipolar": lambda x0, x1, i, w=None: symmetric_epipolar_loss(x0, x1, i, MATRIX, w),
}
everywhere = pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS.keys())


def _matches() -> tuple[Tensor, Tensor, Tensor]:
    return planar_scene(2, 9, seed=0, noise=1.0).matches


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_coordinates_that_are_not_finite(take, value: float) -> None:
    x0, x1, index = _matches()
    x1[7, 1] = value
    with pytest.raises(ValueError, match=r"keypoints1: expected finite coordinates.*at match 7"):
        take(x0, x1, index)


@everywhere
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_that_are_negative_or_not_finite(take, value: float) -> None:
    weights = torch.ones(18)
    weights[3] = value
    with pytest.raises(ValueError, match=r"weights: expected finite values >= 0.*at match 3"):
        take(*_matches(), weights)


@everywhere
@pytest.mark.parametrize("value", [-1, 2])
def test_batch_index_out_of_range(take, value: int) -> None:
    x0, x1, index = _matches()
    index[5] = value
    with pytest.raises(IndexError, match=rf"batch_indexes: expected values in \[0, 2\), got {value} at match 5"):
        take(x0, x1, index)


@everywhere
def test_shapes_and_dtypes_that_do_not_fit(take) -> None:
    x0, x1, index = _matches()
    with pytest.raises(ValueError, match="keypoints1: expected the shape of keypoints0"):
        take(x0, x1[:-1], index)
    with pytest.raises(ValueError, match=r"keypoints0: expected shape \(M, 2\)"):
        take(x0[None], x1[None], index)
    with pytest.raises(ValueError, match=r"batch_indexes: expected shape \(M,\)"):
        take(x0, x1, index[:-1])
    with pytest.raises(ValueError, match=r"weights: expected shape \(M,\)"):
        take(x0, x1, index, torch.ones(17))
    with pytest.raises(TypeError, match="keypoints0: expected a floating point dtype"):
        take(x0.long(), x1, index)
    with pytest.raises(TypeError, match="batch_indexes: expected an integer dtype"):
        take(x0, x1, index.double())
    with pytest.raises(TypeError, match="weights: expected a floating point dtype"):
        take(x0, x1, index, torch.ones(18, dtype=torch.long))


@pytest.mark.parametrize("which", [0, 1])
def test_intrinsics_that_are_not_invertible_name_the_pair(which: int) -> None:
    views = scene(2, 10, seed=1)
    cameras = [views.K0.clone(), views.K1.clone()]
    cameras[which][1, 0, 0] = 0.0
    message = rf"K{which}: expected invertible intrinsics.*batch element 1"
    with pytest.raises(ValueError, match=message):
        relative_pose_from_matches(*views.matches[:2], *cameras, views.batch_indexes)
    with pytest.raises(ValueError, match=message):
        essential_from_matches(*views.matches[:2], *cameras, views.batch_indexes)
    with pytest.raises(ValueError, match=message):
        fundamental_from_pose(views.T_0to1, *cameras)


def test_short_and_long_focal_lengths_are_invertible() -> None:
    views = scene(1, 10, seed=2)
    for focal in (1.0, 1e6):
        camera = intrinsics(focal)[None]
        assert bool(torch.isfinite(fundamental_from_pose(views.T_0to1, camera, camera)).all())


def test_intrinsics_of_another_batch_size_or_not_finite() -> None:
    views = scene(2, 10, seed=3)
    with pytest.raises(ValueError, match=r"K1: expected shape \(B, 3, 3\) = \(2, 3, 3\)"):
        relative_pose_from_matches(*views.matches[:2], views.K0, views.K1[:1], views.batch_indexes)
    with pytest.raises(ValueError, match="K0: expected finite values"):
        relative_pose_from_matches(*views.matches[:2], views.K0 * torch.nan, views.K1, views.batch_indexes)


def test_options_out_of_range_are_named() -> None:
    matches = _matches()
    with pytest.raises(ValueError, match="robust: expected one of None, 'cauchy', 'geman_mcclure'"):
        homography_from_matches(*matches, batch_size=2, robust="huber")
    with pytest.raises(ValueError, match="robust_scale: expected a positive finite number"):
        homography_from_matches(*matches, batch_size=2, robust="cauchy", robust_scale=0.0)
    with pytest.raises(ValueError, match="refine_steps: expected >= 0"):
        homography_from_matches(*matches, batch_size=2, refine_steps=-1)
    with pytest.raises(ValueError, match="refine_steps: expected >= 1 with robust='cauchy'"):
        homography_from_matches(*matches, batch_size=2, robust="cauchy", refine_steps=0)
    with pytest.raises(ValueError, match="refine_steps: expected >= 1 with an initial estimate"):
        homography_from_matches(*matches, batch_size=2, refine_steps=0, initial_0to1=MATRIX)
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        homography_from_matches(*matches, batch_size=0)


def test_initial_pose_without_translation_is_refused() -> None:
    views = scene(2, 10, seed=4)
    start = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    with pytest.raises(ValueError, match="initial_0to1: expected a translation, got zero in batch element 0"):
        relative_pose_from_matches(*views.matches[:2], views.K0, views.K1, views.batch_indexes, initial_0to1=start)


@pytest.mark.parametrize(
    "take",
    [homography_from_matches, fundamental_from_matches, essential_from_matches, relative_pose_from_matches],
)
def test_estimators_share_one_order_of_arguments(take) -> None:
    """keypoints0, keypoints1, the intrinsics where there are any, batch_indexes; the rest by name."""
    parameters = list(inspect.signature(take).parameters.values())
    positional = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    cameras = ["K0", "K1"] if "K0" in positional else []
    assert positional == ["keypoints0", "keypoints1", *cameras, "batch_indexes"]


def test_what_is_no_tensor_is_named() -> None:
    x0, x1, index = _matches()
    with pytest.raises(TypeError, match=r"K0: expected a torch.Tensor, got int"):
        relative_pose_from_matches(x0, x1, 2, K, index)
    with pytest.raises(TypeError, match=r"K1: expected a torch.Tensor, got list"):
        essential_from_matches(x0, x1, K, [1.0], index)
    with pytest.raises(TypeError, match=r"K0: expected a torch.Tensor, got str"):
        estimate_robust(x0, x1, index, batch_size=2, model="essential", K0="K", K1=K)
    with pytest.raises(TypeError, match=r"keypoints0: expected a torch.Tensor, got list"):
        homography_from_matches([[0.0, 1.0]], x1, index, batch_size=2)
    with pytest.raises(TypeError, match=r"batch_indexes: expected a torch.Tensor, got int"):
        fundamental_from_matches(x0, x1, 2, batch_size=2)
    with pytest.raises(TypeError, match=r"batch_size: expected an int, got Tensor"):
        fundamental_from_matches(x0, x1, index, batch_size=index)
    with pytest.raises(TypeError, match=r"weights: expected a torch.Tensor, got float"):
        homography_from_matches(x0, x1, index, batch_size=2, weights=1.0)
    with pytest.raises(TypeError, match=r"H_0to1: expected a torch.Tensor, got list"):
        apply_homography([[1.0]], x0[None])
    with pytest.raises(TypeError, match=r"T_0to1: expected a torch.Tensor, got float"):
        fundamental_from_pose(1.0, K, K)
    with pytest.raises(TypeError, match=r"T_0to1: expected a torch.Tensor, got float"):
        pose_loss(1.0, K)
    with pytest.raises(TypeError, match=r"H_0to1: expected a torch.Tensor, got NoneType"):
        corner_error_loss(None, MATRIX, (4, 4))
    with pytest.raises(TypeError, match=r"F_0to1: expected a torch.Tensor, got int"):
        sampson_loss(x0, x1, index, 2)
