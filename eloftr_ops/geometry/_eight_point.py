# SPDX-License-Identifier: Apache-2.0
"""The weighted eight-point algorithm and projections onto fundamental and essential matrices."""

from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._linalg import (
    LEAST_GAP,
    ROUNDINGS,
    Normalised,
    homogeneous,
    normalise_points,
    plane_basis,
    shares,
    smallest_eigenvector,
    unit_magnitude,
)
from eloftr_ops.geometry._ragged import PaddedMatches

LEAST_MATCHES = 8


class EightPoint(NamedTuple):
    """The linear solution, before any constraint is imposed."""

    matrix: Tensor  # (B, 3, 3) between normalised frames, unit norm
    frame0: Normalised
    frame1: Normalised
    determined: Tensor  # (B,) bool
    gap: Tensor  # (B,), relative gap that determines the solution
    least_gap: Tensor  # (B,), the gap below which it is not determined


class NullVectors(NamedTuple):
    """Directions that a matrix of rank two maps to zero; the epipoles."""

    right: Tensor  # (B, 3), unit
    left: Tensor  # (B, 3), unit
    determined: Tensor  # (B,) bool: the other two singular values are away from the smallest


def eight_point(matches: PaddedMatches, weights: Tensor) -> EightPoint:
    """Solve `x1^T F x0 = 0` in weighted least squares (Hartley and Zisserman, section 11.1).

    Args:
        matches: padded matches, in pixels or camera coordinates.
        weights: `(B, N)`, non-negative.

    Returns:
        The solution in normalised frames. Symmetric in the two images: swapping them transposes it.
    """
    frame0 = normalise_points(matches.points0, weights, matches.eps)
    frame1 = normalise_points(matches.points1, weights, matches.eps)
    x0, x1 = homogeneous(frame0.points), homogeneous(frame1.points)
    rows = (x1[..., :, None] * x0[..., None, :]).flatten(2)
    moment = (rows * shares(weights)[..., None]).mT @ rows
    rounding = torch.maximum(frame0.rounding, frame1.rounding)
    least_gap = (ROUNDINGS * rounding).square().clamp_min(LEAST_GAP)
    vector, gap, open_gap = smallest_eigenvector(moment, least_gap)
    enough = (weights > 0).sum(1) >= LEAST_MATCHES
    determined = enough & frame0.spread & frame1.spread & open_gap
    return EightPoint(vector.view(-1, 3, 3), frame0, frame1, determined, gap, least_gap)


def null_vectors(matrix: Tensor) -> NullVectors:
    """Singular vectors of the smallest singular value, without the gradient of a full decomposition."""
    right, _, right_open = smallest_eigenvector(matrix.mT @ matrix)
    left, _, left_open = smallest_eigenvector(matrix @ matrix.mT)
    return NullVectors(right, left, right_open & left_open)


def nearest_rank_two(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest matrix of rank two in Frobenius norm, `F (I - v v^T)`.

    Args:
        matrix: `(B, 3, 3)`.

    Returns:
        The matrix `(B, 3, 3)` and `determined` `(B,)`: False where the two smallest singular values
        coincide, so that the nearest matrix is not unique. The gradient is zero there; where the two largest
        coincide, as for an essential matrix, it is exact.
    """
    right, _, determined = smallest_eigenvector(matrix.mT @ matrix)
    return matrix - (matrix @ right[:, :, None]) @ right[:, None, :], determined


def nearest_essential(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest matrix with singular values (1, 1, 0) and its left null vector.

    The two-by-two block between the planes orthogonal to the null vectors is replaced by its orthogonal polar
    factor, which has a closed form whose only denominator is the sum of the two singular values. They may
    coincide, as they do at every solution, where the derivative of a decomposition into singular vectors is
    NaN.

    Args:
        matrix: `(B, 3, 3)`.

    Returns:
        Essential matrices `(B, 3, 3)`, unit left null vectors `(B, 3)` (the translation up to sign), and
        `determined` `(B,)`: False where the second singular value is not away from the smallest.
    """
    null = null_vectors(matrix)
    left, right = plane_basis(null.left), plane_basis(null.right)
    a, b, c, d = (left.mT @ matrix @ right).flatten(1).unbind(1)
    turns = (a * d - b * c).detach() >= 0
    cosine, sine = torch.where(turns, a + d, a - d), torch.where(turns, c - b, c + b)
    size = cosine.square() + sine.square()
    inverse = torch.where(size > 0, torch.where(size > 0, size, 1.0).rsqrt(), 0.0)
    cosine, sine = cosine * inverse, sine * inverse
    flip = torch.where(turns, 1.0, -1.0).to(cosine.dtype)
    polar = torch.stack([cosine, -flip * sine, sine, flip * cosine], dim=1).view(-1, 2, 2)
    return left @ polar @ right.mT, null.left, null.determined & (size.detach() > 0)


def to_pixels(matrix: Tensor, frame0: Normalised, frame1: Normalised) -> Tensor:
    """Undo the normalisation, up to scale: `T1^T F T0`."""
    outer, inner = (unit_magnitude(frame.transform, (1, 2)) for frame in (frame1, frame0))
    return outer.mT @ matrix @ inner


def with_fixed_sign(matrix: Tensor) -> Tensor:
    """Unit Frobenius norm; the entry of largest magnitude is positive."""
    flat = unit_magnitude(matrix, (1, 2)).flatten(1)
    norm = flat.square().sum(1)
    inverse = torch.where(norm > 0, torch.where(norm > 0, norm, 1.0).rsqrt(), 1.0)
    largest = flat.detach().abs().argmax(1, keepdim=True)
    sign = torch.where(flat.detach().gather(1, largest) < 0, -1.0, 1.0).to(flat.dtype)
    return (flat * inverse[:, None] * sign).view_as(matrix)
