# SPDX-License-Identifier: Apache-2.0
"""The warp that makes two images look alike, from matches whose geometry is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eloftr_ops.guided.looks import Found, Look, Setting, support_of
from eloftr_ops.guided.straighten import differs, straightened
from eloftr_ops.guided.warps import Warp, scaling, tilted

SIZE = (320, 240)
SETTING = Setting((SIZE, SIZE), 320, 1.0, 1)
AS_THEY_ARE = Look(scaling(SIZE, SIZE), scaling(SIZE, SIZE), "as they are")
PLANE = torch.tensor([[0.7, 0.3, 20.0], [-0.2, 0.9, 40.0], [4e-4, -2e-4, 1.0]], dtype=torch.float64)


def bump(points: Tensor) -> Tensor:
    """(N, 2): what a smooth hill adds to a plane, up to 12 pixels."""
    middle = points.new_tensor([160.0, 120.0])
    height = torch.exp(-(points - middle).square().sum(1) / (2 * 60.0**2))
    return height[:, None] * points.new_tensor([12.0, 5.0])


def matches(wrong: float = 0.0, hill: bool = False, count: int = 600, seed: int = 0) -> Found:
    generator = torch.Generator().manual_seed(seed)
    points0 = torch.rand(count, 2, dtype=torch.float64, generator=generator) * torch.tensor(SIZE)
    points1 = Warp(PLANE, SIZE).to_image(points0) + (bump(points0) if hill else 0)
    points1 = points1 + 0.3 * torch.randn(count, 2, dtype=torch.float64, generator=generator)
    lost = int(wrong * count)
    points1[:lost] = torch.rand(lost, 2, dtype=torch.float64, generator=generator) * torch.tensor(SIZE)
    inside = ((points1 >= 0) & (points1 <= points1.new_tensor(SIZE))).all(1)
    return Found(points0, points1, torch.ones(count), points0, points1).rows(inside)


def shown_well(look: Look, truth: Tensor, points0: Tensor, pixels: float) -> bool:
    error = (look.assumed(points0) - truth).norm(dim=1)
    return bool(error.quantile(0.95) < pixels)


@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_a_plane_is_found_and_the_frame_holds_the_overlap(wrong: float) -> None:
    look = straightened(AS_THEY_ARE, matches(wrong), SETTING)
    assert look is not None
    points = matches().points0
    assert shown_well(look, Warp(PLANE, SIZE).to_image(points), points, 0.5)
    assert all(side % 32 == 0 for side in look.warp0.size_wh)
    overlap = look.warp0.from_image(points)
    assert ((overlap > -1) & (overlap < overlap.new_tensor(look.warp0.size_wh) + 1)).all()


def test_a_hill_needs_the_field() -> None:
    found = matches(wrong=0.2, hill=True)
    look = straightened(AS_THEY_ARE, found, SETTING)
    assert look is not None
    assert look.warp1.field is not None
    points = matches().points0
    truth = Warp(PLANE, SIZE).to_image(points) + bump(points)
    # A fit over 40 pixels flattens the top: by at most half of the Laplacian times 40^2, which is 5.8 pixels.
    assert shown_well(look, truth, points, 4.0)
    assert not shown_well(look._replace(warp1=look.warp1._replace(field=None)), truth, points, 8.0)


def test_matches_of_a_simulated_view_give_the_same_plane() -> None:
    look = Look(tilted(SIZE, 2.0, 45.0), scaling(SIZE, SIZE), "slanted")
    found = matches()
    found = found._replace(seen0=look.warp0.from_image(found.points0))
    new = straightened(look, found, SETTING)
    assert new is not None
    assert shown_well(new, Warp(PLANE, SIZE).to_image(found.points0), found.points0, 0.5)


@pytest.mark.parametrize("count", [0, 3, 9])
def test_too_few_matches_give_no_look(count: int) -> None:
    assert straightened(AS_THEY_ARE, matches(count=count), SETTING) is None


def test_matches_of_one_place_or_line_give_no_look() -> None:
    found = matches()
    same = found._replace(
        points0=found.points0[:1].expand_as(found.points0), seen0=found.seen0[:1].expand_as(found.seen0)
    )
    assert straightened(AS_THEY_ARE, same, SETTING) is None
    line = torch.linspace(10, 200, len(found.points0), dtype=torch.float64)[:, None].expand(-1, 2)
    assert straightened(AS_THEY_ARE, Found(line, line, found.confidence, line, line), SETTING) is None


def test_a_shift_changes_nothing_and_a_turn_does() -> None:
    shift = torch.eye(3, dtype=torch.float64)
    shift[:2, 2] = 30.0
    moved = Look(scaling(SIZE, SIZE), Warp(shift, SIZE), "shifted")
    turned = Look(scaling(SIZE, SIZE), tilted(SIZE, 1.0, 10.0), "turned")
    assert not differs(moved, AS_THEY_ARE)
    assert differs(turned, AS_THEY_ARE)


def test_agreement_says_more_than_chance() -> None:
    right, wrong = support_of(AS_THEY_ARE, matches()), support_of(AS_THEY_ARE, matches(wrong=1.0))
    assert right.evidence > 30
    assert wrong.evidence < 2
    assert right.beats(wrong)
    assert not wrong.beats(right)
