# SPDX-License-Identifier: Apache-2.0
"""Residuals of matches under a 3x3 matrix, with their derivatives; finite everywhere."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eloftr_ops.geometry._linalg import FAR, adjugate, homogeneous

# A homogeneous coordinate this much smaller than the terms it is the sum of counts as infinity.
HORIZON = 1e-6
# A squared gradient this much smaller than the terms it is the sum of means a match at both epipoles.
EPIPOLE = 1e-14


class Residual(Protocol):
    """Residuals `(B, N, k)` of matches under matrices `(B, 3, 3)`, and their derivative in the matrix."""

    def value(self, matrix: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
        """Residuals `(B, N, k)`."""
        ...

    def jacobian(self, matrix: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
        """Derivative `(B, N, k, 9)` with respect to the row-major matrix."""
        ...


def guarded_depth(line: Tensor, points: Tensor) -> Tensor:
    """Homogeneous coordinate `line . points`, kept away from zero with its sign (zero counts as positive).

    Args:
        line: `(..., 3)`, last row of a homography.
        points: `(..., 3)`, homogeneous points.

    Returns:
        `(...)`: the product, or `+-HORIZON` times the sum of its terms' magnitudes where it is smaller than
        that. The guard depends on neither the scale of the homography nor that of the points.
    """
    depth = (line * points).sum(-1)
    floor = HORIZON * (line * points).detach().abs().sum(-1)
    floor = torch.where(floor > 0, floor, 1.0)
    return torch.where(depth.abs() > floor, depth, torch.where(depth < 0, -floor, floor))


class TransferResidual:
    """`pi(H x0) - x1`: the transfer error in image 1, two components."""

    @staticmethod
    def value(matrix: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
        """Residuals `(B, N, 2)`."""
        x = homogeneous(points0)
        depth = guarded_depth(matrix[:, None, 2], x)
        return (x @ matrix[:, :2].mT) / depth[..., None] - points1

    @staticmethod
    def jacobian(matrix: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
        """Derivative `(B, N, 2, 9)`."""
        x = homogeneous(points0)
        row = x / guarded_depth(matrix[:, None, 2], x)[..., None]
        mapped = row @ matrix[:, :2].mT
        zero = torch.zeros_like(row)
        along_x = torch.cat([row, zero, -mapped[..., :1] * row], dim=-1)
        along_y = torch.cat([zero, row, -mapped[..., 1:] * row], dim=-1)
        return torch.stack([along_x, along_y], dim=2)


class SampsonResidual:
    """Signed Sampson distance `x1^T F x0 / |grad|`, one component; zero for a match at both epipoles."""

    @staticmethod
    def value(matrix: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
        """Residuals `(B, N, 1)`."""
        error, squared, regular = _sampson_parts(matrix, homogeneous(points0), homogeneous(points1))[:3]
        return torch.where(regular, error * squared.rsqrt(), 0.0)[..., None]

    @staticmethod
    def jacobian(matrix: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
        """Derivative `(B, N, 1, 9)`."""
        x0, x1 = homogeneous(points0), homogeneous(points1)
        error, squared, regular, line1, line0 = _sampson_parts(matrix, x0, x1)
        outer = x1[..., :, None] * x0[..., None, :]
        change = _flat(line1)[..., :, None] * x0[..., None, :] + x1[..., :, None] * _flat(line0)[..., None, :]
        inverse = squared.rsqrt()
        slope = inverse[..., None, None] * outer - (error * inverse.pow(3))[..., None, None] * change
        return torch.where(regular[..., None, None], slope, 0.0).flatten(2)[:, :, None]


def sampson_of_many(matrices: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
    """Squared Sampson distances `(B, S, N)` of matches `(B, N, 2)` under S matrices `(B, S, 3, 3)` each.

    By matrix products alone, for scoring samples in float32; zero for a match at both epipoles.
    """
    x0, x1 = homogeneous(points0), homogeneous(points1)
    pairs, count = matrices.shape[:2]
    products = (x1[..., :, None] * x0[..., None, :]).flatten(2)
    error = matrices.flatten(2) @ products.mT
    normal1 = (matrices[:, :, :2].flatten(1, 2) @ x0.mT).view(pairs, count, 2, -1)
    normal0 = (matrices.mT[:, :, :2].flatten(1, 2) @ x1.mT).view(pairs, count, 2, -1)
    squared = normal1.square().sum(2) + normal0.square().sum(2)
    return error.square() / squared.clamp_min(torch.finfo(squared.dtype).tiny)


def symmetric_transfer_of_many(matrices: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
    """Mean `(B, S, N)` of the squared transfer errors in both images under S homographies `(B, S, 3, 3)` each."""
    total = torch.zeros((), dtype=matrices.dtype, device=matrices.device)
    for H, source, target in ((matrices, points0, points1), (adjugate(matrices), points1, points0)):
        mapped = (H.flatten(1, 2) @ homogeneous(source).mT).view(*H.shape[:2], 3, -1)
        depth = mapped[:, :, 2:]
        depth = torch.where(depth.abs() > HORIZON, depth, HORIZON)
        total = total + 0.5 * (mapped[:, :, :2] / depth - target.mT[:, None]).square().sum(2)
    return total


def symmetric_transfer(matrix: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
    """Mean `(B, N)` of the squared transfer errors in both images, so that no map onto a point or line is good."""
    forward = TransferResidual.value(matrix, points0, points1).clamp(-FAR, FAR).square().sum(-1)
    backward = TransferResidual.value(adjugate(matrix), points1, points0).clamp(-FAR, FAR).square().sum(-1)
    return 0.5 * (forward + backward)


def line_distances(matrix: Tensor, points0: Tensor, points1: Tensor) -> Tensor:
    """Signed distances `(B, N, 2)` of points to their epipolar lines in image 0 and in image 1.

    Zero on the side where a point sits at the epipole, so that its line has no direction.
    """
    x0, x1 = homogeneous(points0), homogeneous(points1)
    lines = _Lines.of(matrix, x0, x1)
    sides = []
    for line, floor in ((lines.line0, lines.floor0), (lines.line1, lines.floor1)):
        squared = line[..., :2].square().sum(-1)
        regular = squared > floor
        distance = lines.error * torch.where(regular, squared, 1.0).rsqrt()
        sides.append(torch.where(regular, distance, 0.0))
    return torch.stack(sides, dim=-1)


class _Lines(NamedTuple):
    error: Tensor  # (B, N), x1^T F x0
    line0: Tensor  # (B, N, 3), F^T x1
    line1: Tensor  # (B, N, 3), F x0
    floor0: Tensor  # (B, N), squared normal of line0 that is only rounding
    floor1: Tensor  # (B, N)

    @classmethod
    def of(cls, matrix: Tensor, x0: Tensor, x1: Tensor) -> "_Lines":
        line1, line0 = x0 @ matrix.mT, x1 @ matrix
        size = matrix.detach().abs()
        terms1, terms0 = x0.detach().abs() @ size.mT, x1.detach().abs() @ size
        floors = [EPIPOLE * terms[..., :2].square().sum(-1) for terms in (terms0, terms1)]
        return cls((x1 * line1).sum(-1), line0, line1, floors[0], floors[1])


def _sampson_parts(matrix: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Algebraic error, squared gradient norm (safe), where it is regular, and both epipolar lines."""
    lines = _Lines.of(matrix, x0, x1)
    squared = lines.line1[..., :2].square().sum(-1) + lines.line0[..., :2].square().sum(-1)
    regular = squared > lines.floor0 + lines.floor1
    return lines.error, torch.where(regular, squared, 1.0), regular, lines.line1, lines.line0


def _flat(line: Tensor) -> Tensor:
    """Drop the offset of lines `(..., 3)`: only the normal enters the distance."""
    return torch.cat([line[..., :2], torch.zeros_like(line[..., 2:])], dim=-1)
