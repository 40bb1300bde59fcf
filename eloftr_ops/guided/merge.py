# SPDX-License-Identifier: Apache-2.0
"""One set of matches from several looks, without repetition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eloftr_ops.geometry.verification import epipolar_errors, shows_parallax, transfer_errors
from eloftr_ops.guided.looks import Found, model_between

__all__ = ["merged"]

_PLACE = 8  # working pixels: matches of two looks in one cell of either image are the same match
_THRESHOLD = 1.5  # working pixels, of the model
_AGREES = 4.0  # working pixels: largest error of a match of an earlier look


def merged(found: Sequence[Found]) -> Found:
    """Matches of the last look, and what earlier looks add.

    Later looks are more precise. An earlier look adds a match only where later ones have none in either image: there
    they saw nothing, or something else. So such a match must also agree with the fundamental matrix of all matches
    together, or, where the matches lie on a plane and determine none, with the homography.

    Gradient: that of the matches kept.
    """
    kept = found[-1]
    for earlier in reversed(found[:-1]):
        sides = ((kept.points0, earlier.points0), (kept.points1, earlier.points1))
        taken = torch.stack([_shared(*side) for side in sides]).any(0)
        fresh = earlier.rows(~taken)
        fresh = fresh.rows(_agreeing(fresh, kept))
        kept = Found(*(torch.cat(fields) for fields in zip(kept, fresh, strict=True)))
    return kept


def _shared(points: Tensor, others: Tensor) -> Tensor:
    """(N,) bool: which of ``others`` (N, 2) lie in a cell that one of ``points`` (M, 2) lies in."""
    cells = (torch.cat([points, others]).detach() / _PLACE).floor().long()
    _, cell = torch.unique(cells, dim=0, return_inverse=True)
    return torch.isin(cell[len(points) :], cell[: len(points)])


def _agreeing(fresh: Found, kept: Found) -> Tensor:
    """(N,) bool: which fresh matches agree with what all matches show; all of them if that is nothing."""
    points0 = torch.cat([kept.points0, fresh.points0]).detach()
    points1 = torch.cat([kept.points1, fresh.points1]).detach()
    others = fresh.points0.detach().numpy(), fresh.points1.detach().numpy()
    fundamental = model_between("fundamental", points0, points1, _THRESHOLD)
    homography = model_between("homography", points0, points1, _THRESHOLD)
    if homography is not None and (
        fundamental is None or not shows_parallax(points0, points1, fundamental[0], homography[0])
    ):
        return torch.from_numpy(transfer_errors(homography[0].numpy(), *others) < _AGREES)
    if fundamental is not None:
        return torch.from_numpy(epipolar_errors(fundamental[0].numpy(), *others) < _AGREES)
    return torch.ones(len(fresh.confidence), dtype=torch.bool)
