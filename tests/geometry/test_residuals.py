# SPDX-License-Identifier: Apache-2.0
"""Residuals per match: against their formulas, with gradient, finite at singular points."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import (
    epipolar_residuals,
    fundamental_from_pose,
    sampson_residuals,
    symmetric_transfer_residuals,
    transfer_residuals,
)
from support.gradients import check_gradients, finite_gradients
from support.two_view import planar_scene, project, scene


def test_transfer_residuals_are_differences_of_points() -> None:
    planar = planar_scene(2, 5, seed=1, noise=2.0)
    x0, x1 = (x.view(2, 5, 2) for x in planar.matches[:2])
    both = symmetric_transfer_residuals(*planar.matches, 3.0 * planar.H_0to1).view(2, 5, 4)
    assert torch.allclose(both[..., :2], project(planar.H_0to1, x0) - x1)
    assert torch.allclose(both[..., 2:], project(torch.linalg.inv(planar.H_0to1), x1) - x0)
    assert transfer_residuals(*planar.matches, planar.H_0to1).shape == (10, 2)


def test_epipolar_residuals_are_distances_to_lines() -> None:
    views = scene(2, 6, seed=2, noise=2.0)
    F = fundamental_from_pose(views.T_0to1, views.K0, views.K1)
    h0, h1 = (torch.cat([x, torch.ones_like(x[:, :1])], dim=1) for x in views.matches[:2])
    of_match = F[views.batch_indexes]
    line1, line0 = (of_match @ h0[:, :, None])[..., 0], (of_match.mT @ h1[:, :, None])[..., 0]
    error = (h1 * line1).sum(1)
    expected = torch.stack([error / line0[:, :2].norm(dim=1), error / line1[:, :2].norm(dim=1)], dim=1)
    assert torch.allclose(epipolar_residuals(*views.matches, F), expected)
    norm = (line0[:, :2].square().sum(1) + line1[:, :2].square().sum(1)).sqrt()
    assert torch.allclose(sampson_residuals(*views.matches, -2.0 * F), -error / norm)


@pytest.mark.parametrize(
    "function", [transfer_residuals, symmetric_transfer_residuals, sampson_residuals, epipolar_residuals]
)
def test_gradients(function: Callable[..., Tensor]) -> None:
    views, planar = scene(2, 4, seed=3, noise=1.0), planar_scene(2, 4, seed=3, noise=1.0)
    if "transfer" in function.__name__:
        data, matrix = planar, planar.H_0to1
    else:
        data, matrix = views, fundamental_from_pose(views.T_0to1, views.K0, views.K1)
        matrix = matrix / matrix.flatten(1).norm(dim=1)[:, None, None]
    index = data.batch_indexes
    # Pixels and entries of the matrix differ by orders of magnitude: one direction through all of them.
    inputs = [*data.matches[:2], matrix]
    check_gradients(lambda a, b, m: function(a, b, index, m), inputs, eps=1e-7, atol=1e-3, fast=True)
    zero = torch.zeros(1, 3, 3, dtype=torch.float64).requires_grad_()
    point = torch.zeros(1, 2, dtype=torch.float64).requires_grad_()
    finite_gradients(function(point, point, index[:1], zero), [point, zero])


def test_bad_input_is_named() -> None:
    planar = planar_scene(1, 4, seed=4)
    with pytest.raises(ValueError, match="H_0to1: expected finite"):
        transfer_residuals(*planar.matches, planar.H_0to1 * float("nan"))
    with pytest.raises(IndexError, match="batch_indexes"):
        sampson_residuals(*planar.matches[:2], planar.batch_indexes + 1, planar.H_0to1)
