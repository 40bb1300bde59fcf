# SPDX-License-Identifier: Apache-2.0
"""Local coordinates on the manifolds that are refined: homographies, fundamental matrices, poses, planar maps.

Each chart is centred at a point of its manifold: `at(0)` is that point, `at(delta)` is smooth in delta,
`tangent` is its derivative at zero and `moved(delta)` the chart centred at `at(delta)`. None has a singular
or redundant direction, so the normal equations are regular whenever the data determine the answer.
"""

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from eloftr_ops.geometry._linalg import (
    cayley,
    complement_basis,
    plane_basis,
    rank_two_null,
    safe_normalise,
    skew,
)

ChartT = TypeVar("ChartT", bound="Chart")


class Chart(Protocol):
    """A point of a manifold of 3x3 matrices, batched, with local coordinates around it."""

    @property
    def tangent(self) -> Tensor:
        """Derivative `(B, 9, p)` of the row-major matrix with respect to the coordinates, at zero."""
        ...

    def at(self, delta: Tensor) -> Tensor:
        """Matrices `(B, 3, 3)` at coordinates `(B, p)`."""
        ...

    def moved(self: ChartT, delta: Tensor) -> ChartT:
        """Return the chart centred at `at(delta)`."""
        ...

    def where(self: ChartT, mask: Tensor, other: ChartT) -> ChartT:
        """Return this chart where `mask` `(B,)` holds and `other` elsewhere."""
        ...


def _select(mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *([1] * (first.ndim - 1))), first, second)


class HomographyChart(NamedTuple):
    """Homographies up to scale: eight directions orthogonal to a unit-norm matrix."""

    matrix: Tensor  # (B, 3, 3), unit Frobenius norm
    tangent: Tensor  # (B, 9, 8)

    @classmethod
    def centred(cls, matrix: Tensor) -> "HomographyChart":
        """Return the chart around any multiple of `matrix` `(B, 3, 3)`, which must not be zero."""
        unit = safe_normalise(matrix.flatten(1))
        return cls(unit.view(-1, 3, 3), complement_basis(unit))

    def at(self, delta: Tensor) -> Tensor:
        """Matrices `(B, 3, 3)` at coordinates `(B, 8)`."""
        return self.matrix + (self.tangent @ delta[:, :, None]).view(-1, 3, 3)

    def moved(self, delta: Tensor) -> "HomographyChart":
        """Return the chart centred at `at(delta)`."""
        return HomographyChart.centred(self.at(delta))

    def where(self, mask: Tensor, other: "HomographyChart") -> "HomographyChart":
        """Return this chart where `mask` holds and `other` elsewhere."""
        return HomographyChart(_select(mask, self.matrix, other.matrix), _select(mask, self.tangent, other.tangent))


class FundamentalChart(NamedTuple):
    """Rank-two matrices up to scale: `left [[G, p], [q, q G^-1 p]] right^T` has rank two for every G, p, q.

    Unlike the parametrisation by two rotations and a ratio of singular values, it stays regular where the
    singular values coincide, as they do for every essential matrix.
    """

    left: Tensor  # (B, 3, 3), rotation; the last column is the left null vector
    block: Tensor  # (B, 2, 2), G at the centre, unit Frobenius norm
    right: Tensor  # (B, 3, 3), rotation; the last column is the right null vector
    spread: Tensor  # (B, 4, 3), directions of G other than its own scale

    @classmethod
    def centred(cls, matrix: Tensor) -> "FundamentalChart":
        """Return the chart around any multiple of `matrix` `(B, 3, 3)`, of rank two."""
        right_null, left_null = rank_two_null(matrix), rank_two_null(matrix.mT)
        right = torch.cat([plane_basis(right_null), right_null[:, :, None]], dim=2)
        left = torch.cat([plane_basis(left_null), left_null[:, :, None]], dim=2)
        block = (left.mT @ matrix @ right)[:, :2, :2]
        unit = safe_normalise(block.flatten(1))
        return cls(left, unit.view(-1, 2, 2), right, complement_basis(unit))

    @property
    def tangent(self) -> Tensor:
        """Derivative `(B, 9, 7)` at zero."""
        directions = self.block.new_zeros(self.block.shape[0], 7, 3, 3)
        directions[:, :3, :2, :2] = self.spread.mT.reshape(-1, 3, 2, 2)
        for k, (row, column) in enumerate([(0, 2), (1, 2), (2, 0), (2, 1)]):
            directions[:, 3 + k, row, column] = 1.0
        return (self.left[:, None] @ directions @ self.right.mT[:, None]).flatten(2).mT

    def at(self, delta: Tensor) -> Tensor:
        """Matrices `(B, 3, 3)` of rank two at coordinates `(B, 7)`."""
        block = self.block + (self.spread @ delta[:, :3, None]).view(-1, 2, 2)
        p, q = delta[:, 3:5, None], delta[:, None, 5:7]
        a, b, c, d = block.flatten(1).unbind(1)
        cofactor = torch.stack([d, -b, -c, a], dim=1).view(-1, 2, 2)
        det = a * d - b * c
        corner = q @ cofactor @ p / torch.where(det == 0, 1.0, det)[:, None, None]
        inner = torch.cat([torch.cat([block, p], dim=2), torch.cat([q, corner], dim=2)], dim=1)
        return self.left @ inner @ self.right.mT

    def moved(self, delta: Tensor) -> "FundamentalChart":
        """Return the chart centred at `at(delta)`."""
        return FundamentalChart.centred(self.at(delta))

    def where(self, mask: Tensor, other: "FundamentalChart") -> "FundamentalChart":
        """Return this chart where `mask` holds and `other` elsewhere."""
        return FundamentalChart(*(_select(mask, a, b) for a, b in zip(self, other, strict=True)))


class PoseChart(NamedTuple):
    """Essential matrices `[t]_x R`: three coordinates turn R, two move t on the unit sphere."""

    R: Tensor  # (B, 3, 3)
    t: Tensor  # (B, 3), unit
    plane: Tensor  # (B, 3, 2), tangent plane of the sphere at t

    @classmethod
    def centred(cls, R: Tensor, t: Tensor) -> "PoseChart":
        """Return the chart around rotation `(B, 3, 3)` and unit direction `(B, 3)`."""
        return cls(R, t, plane_basis(t))

    @property
    def tangent(self) -> Tensor:
        """Derivative `(B, 9, 5)` at zero."""
        generators = skew(torch.eye(3, dtype=self.R.dtype, device=self.R.device))
        turns = skew(self.t)[:, None] @ generators @ self.R[:, None]
        slides = skew(self.plane.mT) @ self.R[:, None]
        return torch.cat([turns, slides], dim=1).flatten(2).mT

    def motion(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation `(B, 3, 3)` and unit direction `(B, 3)` at coordinates `(B, 5)`."""
        R = cayley(delta[:, :3]) @ self.R
        return R, safe_normalise(self.t + (self.plane @ delta[:, 3:, None])[:, :, 0])

    def at(self, delta: Tensor) -> Tensor:
        """Essential matrices `(B, 3, 3)` at coordinates `(B, 5)`."""
        R, t = self.motion(delta)
        return skew(t) @ R

    def moved(self, delta: Tensor) -> "PoseChart":
        """Return the chart centred at `motion(delta)`."""
        return PoseChart.centred(*self.motion(delta))

    def where(self, mask: Tensor, other: "PoseChart") -> "PoseChart":
        """Return this chart where `mask` holds and `other` elsewhere."""
        return PoseChart(*(_select(mask, a, b) for a, b in zip(self, other, strict=True)))


class CameraChart(NamedTuple):
    """Camera matrices `[R | t]`: three coordinates turn R, three move t."""

    R: Tensor  # (B, 3, 3)
    t: Tensor  # (B, 3)

    @property
    def tangent(self) -> Tensor:
        """Derivative `(B, 12, 6)` at zero."""
        eye = torch.eye(3, dtype=self.R.dtype, device=self.R.device).expand_as(self.R)
        zero = torch.zeros_like(self.R)
        turns = torch.cat([skew(eye) @ self.R[:, None], zero[..., None]], dim=3)
        slides = torch.cat([zero[:, :, None].expand(-1, -1, 3, -1), eye[..., None]], dim=3)
        return torch.cat([turns, slides], dim=1).flatten(2).mT

    def motion(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation `(B, 3, 3)` and translation `(B, 3)` at coordinates `(B, 6)`."""
        return cayley(delta[:, :3]) @ self.R, self.t + delta[:, 3:]

    def at(self, delta: Tensor) -> Tensor:
        """Matrices `(B, 3, 4)` at coordinates `(B, 6)`."""
        R, t = self.motion(delta)
        return torch.cat([R, t[:, :, None]], dim=2)

    def moved(self, delta: Tensor) -> "CameraChart":
        """Return the chart centred at `motion(delta)`."""
        return CameraChart(*self.motion(delta))

    def where(self, mask: Tensor, other: "CameraChart") -> "CameraChart":
        """Return this chart where `mask` holds and `other` elsewhere."""
        return CameraChart(*(_select(mask, a, b) for a, b in zip(self, other, strict=True)))


class LinearChart(NamedTuple):
    """Matrices that depend linearly on the coordinates: affine maps and similarities."""

    matrix: Tensor  # (B, 3, 3)
    tangent: Tensor  # (B, 9, p)

    def at(self, delta: Tensor) -> Tensor:
        """Matrices `(B, 3, 3)` at coordinates `(B, p)`."""
        return self.matrix + (self.tangent @ delta[:, :, None]).view(-1, 3, 3)

    def moved(self, delta: Tensor) -> "LinearChart":
        """Return the chart centred at `at(delta)`."""
        return LinearChart(self.at(delta), self.tangent)

    def where(self, mask: Tensor, other: "LinearChart") -> "LinearChart":
        """Return this chart where `mask` holds and `other` elsewhere."""
        return LinearChart(_select(mask, self.matrix, other.matrix), self.tangent)
