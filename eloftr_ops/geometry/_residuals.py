# SPDX-License-Identifier: Apache-2.0
"""Residuals of matches under a 3x3 matrix, with their derivatives; finite everywhere."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eloftr_ops.geometry._covariances import (
    LEAST_VARIANCE,
    Covariances,
    Whitening,
    moved_covariances,
    projective_slope,
)
from eloftr_ops.geometry._linalg import FAR, adjugate, homogeneous

# A homogeneous coordinate this much smaller than the terms it is the sum of counts as infinity.
HORIZON = 1e-6
# A squared gradient this much smaller than the terms it is the sum of means a match at both epipoles.
EPIPOLE = 1e-14


class Residual(Protocol):
    """Residuals `(B, N, k)` of matches under matrices `(B, 3, n)`, and their derivative in the matrix.

    With covariances of the points, residuals are whitened by the covariance that they have to first order.
    """

    def value(self, matrix: Tensor, points0: Tensor, points1: Tensor, covariances: Covariances | None = None) -> Tensor:
        """Residuals `(B, N, k)`."""
        ...

    def jacobian(
        self, matrix: Tensor, points0: Tensor, points1: Tensor, covariances: Covariances | None = None
    ) -> Tensor:
        """Derivative `(B, N, k, 3 n)` with respect to the row-major matrix."""
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
    def value(matrix: Tensor, points0: Tensor, points1: Tensor, covariances: Covariances | None = None) -> Tensor:
        """Residuals `(B, N, 2)`."""
        x = homogeneous(points0)
        depth = guarded_depth(matrix[:, None, 2], x)
        mapped = (x @ matrix[:, :2].mT) / depth[..., None]
        residual = mapped - points1
        if covariances is None:
            return residual
        covariance = _transfer_covariance(covariances, projective_slope(matrix, mapped, depth))
        return Whitening.of(covariance)(residual[..., None])[..., 0]

    @staticmethod
    def jacobian(matrix: Tensor, points0: Tensor, points1: Tensor, covariances: Covariances | None = None) -> Tensor:
        """Derivative `(B, N, 2, 9)`."""
        x = homogeneous(points0)
        depth = guarded_depth(matrix[:, None, 2], x)
        row = x / depth[..., None]
        mapped = row @ matrix[:, :2].mT
        zero = torch.zeros_like(row)
        along_x = torch.cat([row, zero, -mapped[..., :1] * row], dim=-1)
        along_y = torch.cat([zero, row, -mapped[..., 1:] * row], dim=-1)
        change = torch.stack([along_x, along_y], dim=2)
        if covariances is None:
            return change
        slope = projective_slope(matrix, mapped, depth)
        whitening = Whitening.of(_transfer_covariance(covariances, slope))
        whitened = whitening(change)
        if covariances.points0 is None:
            return whitened
        bend = _change_of_slope(matrix, mapped, row, depth, slope, change)
        # Of `W S W^T = 1` the lower triangle: `dW W^-1 = -(W dS W^T)`, its diagonal halved.
        outer = covariances.points0 @ slope.mT
        half = torch.einsum("bnijk,bnjl->bnilk", bend, outer)
        turned = _both_sides(whitening, half + half.transpose(2, 3))
        first, second = whitening((mapped - points1)[..., None])[..., 0].unbind(-1)
        lost = torch.stack(
            [
                0.5 * turned[..., 0, 0, :] * first[..., None],
                turned[..., 1, 0, :] * first[..., None] + 0.5 * turned[..., 1, 1, :] * second[..., None],
            ],
            dim=2,
        )
        return whitened - lost


def _transfer_covariance(covariances: Covariances, slope: Tensor) -> Tensor:
    """Covariance `(B, N, 2, 2)` of the transfer error, to first order."""
    floor = LEAST_VARIANCE * torch.eye(2, dtype=slope.dtype, device=slope.device)
    total = floor.expand_as(slope)
    if covariances.points0 is not None:
        total = total + moved_covariances(covariances.points0, slope)
    return total if covariances.points1 is None else total + covariances.points1


def _change_of_slope(
    matrix: Tensor, mapped: Tensor, row: Tensor, depth: Tensor, slope: Tensor, change: Tensor
) -> Tensor:
    """Derivative `(B, N, 2, 2, 9)` of `projective_slope` in the matrix; `change` is that of the mapped points."""
    units = torch.eye(9, dtype=matrix.dtype, device=matrix.device).view(3, 3, 9)
    direct = units[:2, :2] - mapped[..., :, None, None] * units[2, :2]
    through_points = change[:, :, :, None] * matrix[:, None, None, 2, :2, None]
    last = torch.cat([torch.zeros_like(row), torch.zeros_like(row), row], dim=-1)
    return (direct - through_points) / depth[..., None, None, None] - slope[..., None] * last[:, :, None, None]


def _both_sides(whitening: Whitening, matrices: Tensor) -> Tensor:
    """`W M W^T` of matrices `(B, N, 2, 2, k)`."""
    shape = matrices.shape
    left = whitening(matrices.flatten(3)).view(shape).transpose(2, 3)
    return whitening(left.flatten(3)).view(shape).transpose(2, 3)


class ProjectionResidual:
    """`pi(R X + t) - x`: the reprojection error of points in space, two components; large behind the camera."""

    @staticmethod
    def value(matrix: Tensor, points0: Tensor, points1: Tensor, covariances: Covariances | None = None) -> Tensor:
        """Residuals `(B, N, 2)` of points `(B, N, 3)` under `(B, 3, 4)`; of covariances, only those of points1."""
        x = homogeneous(points0)
        residual = (x @ matrix[:, :2].mT) / _depth_in_front(matrix, x)[..., None] - points1
        return residual if covariances is None else _of_image(covariances)(residual[..., None])[..., 0]

    @staticmethod
    def jacobian(matrix: Tensor, points0: Tensor, points1: Tensor, covariances: Covariances | None = None) -> Tensor:
        """Derivative `(B, N, 2, 12)`."""
        x = homogeneous(points0)
        row = x / _depth_in_front(matrix, x)[..., None]
        mapped = row @ matrix[:, :2].mT
        # Behind the camera the depth that is divided by is constant.
        last = torch.where(((x @ matrix[:, 2, :, None]) > _least_depth(matrix, x)[..., None]), row, 0.0)
        zero = torch.zeros_like(row)
        along_x = torch.cat([row, zero, -mapped[..., :1] * last], dim=-1)
        along_y = torch.cat([zero, row, -mapped[..., 1:] * last], dim=-1)
        change = torch.stack([along_x, along_y], dim=2)
        return change if covariances is None else _of_image(covariances)(change)


def _of_image(covariances: Covariances) -> Whitening:
    if covariances.points1 is None:
        raise ValueError("covariances: expected those of the image, got None")
    return Whitening.of(covariances.points1)


def _least_depth(matrix: Tensor, points: Tensor) -> Tensor:
    floor = HORIZON * (points.detach().abs() @ matrix.detach()[:, 2, :, None].abs())[..., 0]
    return torch.where(floor > 0, floor, 1.0)


def _depth_in_front(matrix: Tensor, points: Tensor) -> Tensor:
    """Depth `(B, N)`, at least a millionth of the terms it is the sum of."""
    depth, floor = (points @ matrix[:, 2, :, None])[..., 0], _least_depth(matrix, points)
    return torch.where(depth > floor, depth, floor)


class SampsonResidual:
    """Signed Sampson distance `x1^T F x0 / |grad|`, one component; zero for a match at both epipoles."""

    @staticmethod
    def value(matrix: Tensor, points0: Tensor, points1: Tensor, covariances: Covariances | None = None) -> Tensor:
        """Residuals `(B, N, 1)`."""
        parts = _SampsonParts.of(matrix, points0, points1, covariances)
        return torch.where(parts.regular, parts.error * parts.squared.rsqrt(), 0.0)[..., None]

    @staticmethod
    def jacobian(matrix: Tensor, points0: Tensor, points1: Tensor, covariances: Covariances | None = None) -> Tensor:
        """Derivative `(B, N, 1, 9)`."""
        x0, x1 = homogeneous(points0), homogeneous(points1)
        error, squared, regular, normal0, normal1 = _SampsonParts.of(matrix, points0, points1, covariances)
        outer = x1[..., :, None] * x0[..., None, :]
        change = _flat(normal1)[..., :, None] * x0[..., None, :] + x1[..., :, None] * _flat(normal0)[..., None, :]
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


class _SampsonParts(NamedTuple):
    error: Tensor  # (B, N), x1^T F x0
    squared: Tensor  # (B, N), its variance to first order, made safe: that of unit covariances without others
    regular: Tensor  # (B, N) bool: no match at both epipoles
    normal0: Tensor  # (B, N, 2), half of the derivative of that variance in the normal of the line in image 0
    normal1: Tensor  # (B, N, 2)

    @classmethod
    def of(cls, matrix: Tensor, points0: Tensor, points1: Tensor, covariances: Covariances | None) -> "_SampsonParts":
        lines = _Lines.of(matrix, homogeneous(points0), homogeneous(points1))
        plain0, plain1 = lines.line0[..., :2], lines.line1[..., :2]
        normal0, normal1 = plain0, plain1
        if covariances is not None:
            normal0 = _times_covariance(covariances.points0, plain0)
            normal1 = _times_covariance(covariances.points1, plain1)
        squared = (plain0 * normal0).sum(-1) + (plain1 * normal1).sum(-1)
        gradient = plain0.square().sum(-1) + plain1.square().sum(-1)
        regular = gradient > lines.floor0 + lines.floor1
        return cls(lines.error, torch.where(regular, squared, 1.0), regular, normal0, normal1)


def _times_covariance(covariance: Tensor | None, normals: Tensor) -> Tensor:
    least = LEAST_VARIANCE * normals
    return least if covariance is None else least + (covariance @ normals[..., None])[..., 0]


def _flat(normal: Tensor) -> Tensor:
    """Lines `(..., 3)` without offset: only the normal `(..., 2)` enters the distance."""
    return torch.cat([normal, torch.zeros_like(normal[..., :1])], dim=-1)
