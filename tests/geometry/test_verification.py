# SPDX-License-Identifier: Apache-2.0
"""The verdict on matches: chance agreement is none, true agreement is, and planes determine no fundamental matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import apply_homography, estimate_robust
from eloftr_ops.geometry.verification import related, shows_parallax

SIZE = (480, 360)
H = torch.tensor([[0.9, 0.1, 20.0], [-0.1, 1.0, 10.0], [1e-4, 0.0, 1.0]], dtype=torch.float64)


def random_points(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor(SIZE)


def plane(count: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    points = random_points(count, 0)
    return points, apply_homography(H[None], points[None])[0] + noise * torch.randn(
        count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def scene(count: int) -> tuple[Tensor, Tensor]:
    """A camera that moves sideways over points of many depths."""
    points = random_points(count, 0)
    depth = random_points(count, 1)[:, :1] / SIZE[0]
    return points, points + depth * torch.tensor([60.0, 5.0])


@pytest.mark.parametrize("seed", range(5))
def test_matches_at_random_places_are_not_related(seed: int) -> None:
    verdict = related(random_points(200, seed), random_points(200, seed + 50), SIZE, SIZE)
    assert not verdict.related
    assert verdict.chance > 0.01


@pytest.mark.parametrize("make", [plane, scene])
def test_agreement_among_wrong_matches_is_found(make: object) -> None:
    points0, points1 = make(60)  # type: ignore[operator]
    points0 = torch.cat([points0, random_points(140, 7)])
    points1 = torch.cat([points1, random_points(140, 8)])
    verdict = related(points0, points1, SIZE, SIZE)
    assert verdict.related
    assert verdict.inliers > 30


def test_more_looks_make_chance_more_likely() -> None:
    points0, points1 = plane(14)
    points0, points1 = torch.cat([points0, random_points(60, 7)]), torch.cat([points1, random_points(60, 8)])
    chances = [related(points0, points1, SIZE, SIZE, looks=looks).chance for looks in (1, 10, 10**9)]
    assert chances[0] < chances[1] < chances[2] == 1
    with pytest.raises(ValueError, match="looks: expected at least 1"):
        related(points0, points1, SIZE, SIZE, looks=0)
    with pytest.raises(ValueError, match="effort"):
        related(points0, points1, SIZE, SIZE, effort="high")  # type: ignore[arg-type]


def test_one_match_many_times_is_one_match() -> None:
    points0, points1 = plane(6)
    verdict = related(points0.repeat(50, 1), points1.repeat(50, 1), SIZE, SIZE)
    assert not verdict.related
    assert verdict == related(points0, points1, SIZE, SIZE)


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_too_few_matches_are_no_evidence(count: int) -> None:
    assert related(*plane(count), SIZE, SIZE) == (False, 1.0, 0, "none")


@pytest.mark.parametrize(("make", "expected"), [(plane, False), (scene, True)])
def test_parallax_is_what_a_homography_does_not_explain(make: object, expected: bool) -> None:
    points0, points1 = make(200)  # type: ignore[operator]
    batch = torch.zeros(200, dtype=torch.int64)
    F, H_found = (
        estimate_robust(points0, points1, batch, batch_size=1, model=model, threshold=1.5).model_0to1[0]
        for model in ("fundamental", "homography")
    )
    assert shows_parallax(points0, points1, F, H_found) is expected
