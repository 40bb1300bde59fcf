# SPDX-License-Identifier: Apache-2.0
"""A long pair does not make the short pairs of its batch long, and results do not depend on the company."""

from typing import Any

import pytest
import torch

from eloftr_ops.geometry import (
    _ragged,
    fundamental_from_matches,
    homography_from_matches,
    relative_pose_from_matches,
)
from support.two_view import planar_scene, scene


def _ragged_batch(views: Any, keep: list[int]) -> tuple[torch.Tensor, ...]:
    """The first `keep[p]` matches of each pair, in a shuffled order."""
    pairs = len(keep)
    count = views.batch_indexes.shape[0] // pairs
    rows = torch.cat([p * count + torch.arange(k) for p, k in enumerate(keep)])
    rows = rows[torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(0))]
    return views.keypoints0[rows], views.keypoints1[rows], views.batch_indexes[rows]


@pytest.mark.parametrize("robust", [None, "cauchy"])
def test_pieces_change_neither_values_nor_gradients(robust: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = [600, 12, 0, 150, 3, 9]
    planar, views = planar_scene(6, 600, seed=1, noise=0.3), scene(6, 600, seed=1, noise=0.3)
    results = []
    for together in (False, True):
        if together:
            monkeypatch.setattr(_ragged, "SMALL_PAIR", 10_000)
        fields = []
        for estimate, data in (
            (homography_from_matches, planar),
            (fundamental_from_matches, views),
            (relative_pose_from_matches, views),
        ):
            x0, x1, index = _ragged_batch(data, keep)
            x0.requires_grad_()
            weights = torch.linspace(0.5, 1.0, x0.shape[0], dtype=torch.float64).requires_grad_()
            if estimate is relative_pose_from_matches:
                found = estimate(x0, x1, views.K0, views.K1, index, weights=weights, robust=robust)
            else:
                found = estimate(x0, x1, index, batch_size=6, weights=weights, robust=robust)
            assert found.valid.tolist() == [True, True, False, True, False, True]
            right = found.valid[index]
            gradients = torch.autograd.grad(found[0].sum() + (found.inlier_weights * right).sin().sum(), (x0, weights))
            assert all(bool(g.any()) for g in gradients)
            fields += [*found[:4], found.inlier_weights[right], *gradients]
        results.append(fields)
    for apart, joined in zip(*results, strict=True):
        assert torch.allclose(apart.double(), joined.double(), rtol=1e-5, atol=1e-7)


def test_one_long_pair_is_solved_apart_from_many_short_ones() -> None:
    counts = torch.tensor([20_000, *[4] * 63])
    pieces = _ragged._pieces(counts)
    padded = sum(len(pairs) * int(counts[pairs].max()) for pairs in pieces)
    assert padded <= 2 * int(counts.sum()) + _ragged.SMALL_PAIR * len(counts)
    assert sorted(torch.cat(pieces).tolist()) == list(range(64))


@pytest.mark.parametrize("seed", range(5))
def test_padding_is_bounded_for_any_lengths(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.exp(9.0 * torch.rand(50, generator=generator)).long()
    pieces = _ragged._pieces(counts)
    padded = sum(len(pairs) * int(counts[pairs].max()) for pairs in pieces)
    assert padded <= 2 * int(counts.sum()) + _ragged.SMALL_PAIR * len(counts)
    assert len(pieces) <= 10
