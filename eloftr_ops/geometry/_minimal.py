# SPDX-License-Identifier: Apache-2.0
"""Minimal samples of matches and the models that fit them exactly: 4, 7 and 5 points."""

import torch
from torch import Tensor

from eloftr_ops.geometry._linalg import adjugate, homogeneous, unit_magnitude

SAMPLE_SIZE = {"homography": 4, "fundamental": 7, "essential": 5}
SOLUTIONS = {"homography": 1, "fundamental": 3, "essential": 10}


def draw_samples(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw samples of distinct matches, each match in proportion to its weight.

    The same uniform numbers serve every pair, so that a pair gets the same samples alone and in a batch.

    Args:
        weights: `(B, N)`, non-negative.
        uniform: `(S, m)` in [0, 1).

    Returns:
        Indexes `(B, S, m)` into the N matches. A pair with fewer than m matches of positive weight repeats some.
    """
    order = torch.argsort((weights <= 0).to(torch.uint8), dim=1, stable=True)
    ordered = weights.gather(1, order)
    present = (ordered > 0).sum(1)[:, None, None]
    total = ordered.sum(1, keepdim=True)
    cumulated = (ordered / torch.where(total > 0, total, 1.0)).cumsum(1)
    quantiles = uniform.to(weights).flatten()[None] * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, quantiles, right=True).view(-1, *uniform.shape)
    # Equal draws move to the next match: sorted, each is at least one above the one before.
    step = torch.arange(uniform.shape[1], device=weights.device)
    drawn = (drawn.sort(2).values - step).cummax(2).values + step
    drawn = torch.minimum(drawn, present - uniform.shape[1] + step).clamp_min(0)
    return order.gather(1, drawn.flatten(1)).view_as(drawn)


def minimal_models(model: str, points0: Tensor, points1: Tensor) -> Tensor:
    """All models through minimal samples.

    Homographies by the projective bases of four points (Hartley and Zisserman, section 4.1.3); fundamental
    matrices by seven points and essential ones by five (Nister 2004), both kornia's.

    Args:
        model: "homography", "fundamental" or "essential".
        points0: `(S, m, 2)` in coordinates of about unit size; camera coordinates for "essential".
        points1: `(S, m, 2)`.

    Returns:
        `(S, C, 3, 3)` with C = 1, 3 or 10, of magnitude 1; zero where there is no such solution.
    """
    # Not imported with the package, which stays light.
    if model == "homography":
        found = _homography_of_four(points0, points1)[:, None]
    elif model == "fundamental":
        from kornia.geometry.epipolar import find_fundamental

        found = find_fundamental(points0, points1, method="7POINT")
    else:
        from kornia.geometry.epipolar import find_essential

        found = find_essential(points0, points1)
    finite = torch.isfinite(found.detach()).flatten(2).all(2)[..., None, None]
    return unit_magnitude(torch.where(finite, found, 0.0), (2, 3))


def _homography_of_four(points0: Tensor, points1: Tensor) -> Tensor:
    return _basis(points1) @ adjugate(_basis(points0))


def _basis(points: Tensor) -> Tensor:
    """Matrices that map the canonical projective basis, the axes and (1, 1, 1), to four points `(S, 4, 2)`."""
    x = homogeneous(points).mT
    axes = x[..., :3]
    return axes * (adjugate(axes) @ x[..., 3:]).mT
