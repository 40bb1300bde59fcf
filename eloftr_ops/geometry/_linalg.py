# SPDX-License-Identifier: Apache-2.0
"""Small batched linear algebra whose value and gradient stay finite."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Relative eigenvalue gap under which a null vector counts as not determined: singular values 1e-6 apart.
LEAST_GAP = 1e-12
# A direction whose singular value is within this many coordinate roundings is not determined by the data.
ROUNDINGS = 32.0
# Magnitudes that are computed with as they come.
ORDINARY = (2.0**-100, 2.0**100)
# Normalised coordinates and residuals beyond this count as this: far away, whatever the number.
FAR = 1e30


class Normalised(NamedTuple):
    """Points in Hartley's frame: weighted centroid 0, weighted mean distance to it sqrt(2)."""

    points: Tensor  # (B, N, 2)
    transform: Tensor  # (B, 3, 3), pixels to normalised
    inverse: Tensor  # (B, 3, 3), normalised to pixels
    scale: Tensor  # (B,), 1 where the points do not spread
    spread: Tensor  # (B,) bool, False where all weighted points coincide
    rounding: Tensor  # (B,), size in this frame of the rounding of the input dtype


def power_of_two(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return the power of two of the largest magnitude over `dim`, kept as sizes of one; no gradient.

    Dividing by a power of two is exact. Where all values are zero it is 1.
    """
    largest = values.detach().abs().amax(dim, keepdim=True)
    smallest = math.log2(torch.finfo(values.dtype).tiny)
    exponent = torch.log2(torch.where(largest > 0, largest, 1.0)).floor()
    return torch.exp2(exponent.clamp(smallest, 1.0 - smallest))


def unit_magnitude(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Divide by the power of two of the largest magnitude over `dim`: entries in (-2, 2), no overflow."""
    return values / power_of_two(values, dim)


def extreme_unit(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """`power_of_two` where the square of the largest magnitude could overflow or vanish, 1 elsewhere."""
    unit = power_of_two(values, dim)
    return torch.where((unit < ORDINARY[0]) | (unit > ORDINARY[1]), unit, 1.0)


def homography_in_units(H: Tensor, unit0: Tensor, unit1: Tensor) -> Tensor:
    """`diag(u1, u1, 1) H diag(1 / u0, 1 / u0, 1)`: homographies of coordinates counted in other units."""
    rows = torch.stack([unit1, unit1, torch.ones_like(unit1)], dim=1)
    columns = torch.stack([unit0, unit0, torch.ones_like(unit0)], dim=1)
    return rows[:, :, None] * H / columns[:, None]


def safe_norm(vectors: Tensor) -> Tensor:
    """Euclidean norm over the last dimension with gradient zero, not NaN, at the zero vector."""
    squared = vectors.square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def safe_normalise(vectors: Tensor) -> Tensor:
    """Unit vectors along the last dimension; the zero vector stays zero, with gradient zero."""
    norm = safe_norm(vectors)
    return vectors / torch.where(norm > 0, norm, 1.0)[..., None]


def homogeneous(points: Tensor) -> Tensor:
    """Append a coordinate 1: `(..., 2)` to `(..., 3)`."""
    return torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)


def adjugate(matrix: Tensor) -> Tensor:
    """Adjugate of `(..., 3, 3)`: `det(M) inv(M)` without a division, defined for singular M too."""
    r0, r1, r2 = matrix.unbind(-2)
    columns = [torch.linalg.cross(r1, r2), torch.linalg.cross(r2, r0), torch.linalg.cross(r0, r1)]
    return torch.stack(columns, dim=-1)


def skew(vector: Tensor) -> Tensor:
    """Cross-product matrix `(..., 3, 3)` of `(..., 3)`."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).reshape(*vector.shape, 3)


def cayley(vector: Tensor) -> Tensor:
    """Rotation `(..., 3, 3)` near `exp([vector]_x)`: rational, so smooth at zero and everywhere else."""
    half = 0.5 * vector
    a = skew(half)
    factor = 2.0 / (1.0 + half.square().sum(-1))
    return torch.eye(3, dtype=vector.dtype, device=vector.device) + factor[..., None, None] * (a + a @ a)


def plane_basis(normal: Tensor) -> Tensor:
    """Two unit columns `(..., 3, 2)` that complete the unit vector `(..., 3)` to a right-handed frame."""
    axis = torch.nn.functional.one_hot(normal.detach().abs().argmin(-1), 3).to(normal.dtype)
    first = safe_normalise(torch.linalg.cross(normal, axis))
    return torch.stack([first, torch.linalg.cross(normal, first)], dim=-1)


def rank_two_null(matrix: Tensor) -> Tensor:
    """Unit right null vector `(..., 3)` of matrices of rank two: the largest cross product of rows."""
    rows = matrix[..., [0, 1, 2], :]
    crosses = torch.linalg.cross(rows, matrix[..., [1, 2, 0], :])
    best = crosses.square().sum(-1).argmax(-1, keepdim=True)
    vector = crosses.gather(-2, best[..., None].expand(*best.shape, 3))[..., 0, :]
    return safe_normalise(vector)


def shares(weights: Tensor) -> Tensor:
    """Weights `(B, N)` divided by their sum; zero stays zero."""
    total = weights.sum(1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def normalise_points(points: Tensor, weights: Tensor, eps: float) -> Normalised:
    """Translate and scale weighted points into Hartley's frame (Hartley 1997, section 4).

    Args:
        points: `(B, N, 2)`.
        weights: `(B, N)`, non-negative; zero leaves a point out.
        eps: machine epsilon of the dtype that the coordinates came in.

    Returns:
        The normalised points and both transforms. Points that all coincide are only translated. The gradient
        flows to points and weights through centroid and scale.
    """
    share = shares(weights)
    centre = (share[..., None] * points).sum(1)
    centred = points - centre[:, None]
    distance = (share * safe_norm(centred)).sum(1)
    magnitude = (share.detach() * points.detach().square().sum(-1)).sum(1).sqrt()
    spread = distance.detach() > torch.clamp(64 * eps * magnitude, min=1.0 / FAR**4)
    scale = torch.where(spread, math.sqrt(2.0) / torch.where(spread, distance, 1.0), 1.0)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    shift = -scale[:, None] * centre
    transform = torch.stack([scale, zero, shift[:, 0], zero, scale, shift[:, 1], zero, zero, one], -1)
    back = 1.0 / scale
    inverse = torch.stack([back, zero, centre[:, 0], zero, back, centre[:, 1], zero, zero, one], -1)
    return Normalised(
        centred * scale[:, None, None],
        transform.view(-1, 3, 3),
        inverse.view(-1, 3, 3),
        scale,
        spread,
        eps * magnitude * scale.detach(),
    )


def smallest_eigenvector(matrix: Tensor, least_gap: Tensor | float = LEAST_GAP) -> tuple[Tensor, Tensor, Tensor]:
    """Unit eigenvector of the smallest eigenvalue of symmetric positive semi-definite matrices.

    The derivative is `dv = -(A - lambda I)^+ dA v` (Magnus 1985, theorem 1). It involves only the gap
    between the smallest eigenvalue and the second smallest: other eigenvalues may coincide, which is where
    the derivative of a full decomposition turns NaN. It is formed by solving the bordered system
    `[[A - lambda I, v], [v^T, 0]]`, which is regular exactly when that gap is open.

    Args:
        matrix: `(B, n, n)`, symmetric; non-finite ones are treated as ill-posed.
        least_gap: scalar or `(B,)`, the gap, relative to the largest eigenvalue, below which the vector
            counts as not determined.

    Returns:
        The vector `(B, n)` (its sign is arbitrary), the relative gap `(B,)`, and `determined` `(B,)` bool.
        Where not determined, the vector is some unit vector and its gradient is zero. Twice differentiable.
    """
    finite = torch.isfinite(matrix.detach()).flatten(1).all(1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    clean = torch.where(finite[:, None, None], matrix, eye)
    least = torch.as_tensor(least_gap, dtype=matrix.dtype, device=matrix.device)
    return _apply_smallest_eigenvector(clean, least)


class _SmallestEigenvector(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor, least_gap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        largest = values[:, -1]
        gap = (values[:, 1] - values[:, 0]) / torch.where(largest > 0, largest, 1.0)
        determined = gap > least_gap
        return vectors[:, :, 0].clone(), gap, determined

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        vector, gap, determined = output
        ctx.save_for_backward(inputs[0], vector, determined)
        ctx.mark_non_differentiable(gap, determined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        matrix, vector, determined = ctx.saved_tensors
        open_gap = determined[:, None, None]
        n = matrix.shape[-1]
        eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        safe = torch.where(open_gap, matrix, eye)
        value = torch.einsum("bi,bij,bj->b", vector, safe, vector)
        # The border takes the matrix's own scale so that the system is as well conditioned as the gap allows.
        border = vector * (safe.diagonal(dim1=-2, dim2=-1).sum(-1) / n)[:, None]
        top = torch.cat([safe - value[:, None, None] * eye, border[:, :, None]], dim=2)
        bottom = torch.cat([border, torch.zeros_like(border[:, :1])], dim=1)[:, None]
        system = torch.where(
            open_gap, torch.cat([top, bottom], dim=1), torch.eye(n + 1, dtype=eye.dtype, device=eye.device)
        )
        right = torch.cat([grads[0], torch.zeros_like(border[:, :1])], dim=1)
        moved = torch.where(determined[:, None], torch.linalg.solve_ex(system, right)[0][:, :n], 0.0)
        outer = moved[:, :, None] * vector[:, None, :]
        return -0.5 * (outer + outer.mT), None


_apply_smallest_eigenvector: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = _SmallestEigenvector.apply


def complement_basis(unit: Tensor) -> Tensor:
    """Orthonormal columns `(B, n, n - 1)` orthogonal to unit vectors `(B, n)`, by a reflection."""
    last = torch.zeros_like(unit)
    last[:, -1] = torch.where(unit[:, -1] < 0, -1.0, 1.0)
    mirror = unit + last
    factor = 2.0 / mirror.square().sum(-1)
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    reflection = eye - factor[:, None, None] * mirror[:, :, None] * mirror[:, None, :]
    return reflection[:, :, :-1]
