# SPDX-License-Identifier: Apache-2.0
"""Matches of several looks are joined without repetition."""

from __future__ import annotations

import torch
from torch import Tensor

from eloftr_ops.guided.looks import Found
from eloftr_ops.guided.merge import merged


def found(points0: Tensor, points1: Tensor) -> Found:
    return Found(points0, points1, torch.full((len(points0),), 0.5), points0, points1)


def scattered(count: int, seed: int) -> Tensor:
    return torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 640


def test_a_later_look_wins_where_both_see_a_match() -> None:
    points = scattered(100, 0)
    earlier, later = found(points, points + 5.0), found(points + 0.1, points + 5.2)
    joined = merged([earlier, later])
    assert torch.equal(joined.points1, later.points1)


def test_an_earlier_look_adds_what_agrees_with_the_epipolar_lines() -> None:
    """Depth moves a match along its line, by 20 pixels or by 60; what moves across it is left out."""
    left0 = scattered(200, 1) * torch.tensor([0.5, 1.0])
    depth = torch.where(left0[:, 1:] > 320, 20.0, 60.0) * torch.tensor([1.0, 0.0])
    later = found(left0, left0 + depth)
    right0 = torch.tensor([[500.0, 100.0], [600.0, 300.0], [400.0, 500.0]], dtype=torch.float64)
    agreeing = found(right0, right0 + torch.tensor([40.0, 0.0]))
    astray = found(right0 + 30, right0 + torch.tensor([70.0, 90.0]))
    assert len(merged([agreeing, later]).confidence) == 203
    assert len(merged([astray, later]).confidence) == 200


def test_an_earlier_look_adds_what_lies_on_the_plane() -> None:
    left0 = scattered(200, 1) * torch.tensor([0.5, 1.0])
    later = found(left0, left0 + 20.0)
    right0 = torch.tensor([[500.0, 100.0], [600.0, 300.0], [400.0, 500.0]], dtype=torch.float64)
    assert len(merged([found(right0, right0 + 21.0), later]).confidence) == 203
    assert len(merged([found(right0, right0 + 60.0), later]).confidence) == 200


def test_one_look_and_empty_looks() -> None:
    points = scattered(10, 2)
    some, none = found(points, points), found(points[:0], points[:0])
    assert torch.equal(merged([some]).points0, points)
    assert len(merged([none, some]).confidence) == 10
    assert len(merged([some, none]).confidence) == 10
    assert len(merged([none, none]).confidence) == 0


def test_matches_keep_their_gradient() -> None:
    points = scattered(50, 3).requires_grad_()
    later = found(points.detach(), points.detach())
    moved = found(points + 16.0, points + 16.0)
    merged([moved, later]).points1.sum().backward()
    assert points.grad is not None
    assert points.grad.any()
