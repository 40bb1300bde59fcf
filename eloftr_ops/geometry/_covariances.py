# SPDX-License-Identifier: Apache-2.0
"""Covariances of matched points: checked, made relative to those of their pair, and what residuals do with them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._checks import check_floats
from eloftr_ops.geometry._precision import to_work

# Added to relative variances: a point that is a thousandth as uncertain as another is exact beside it.
LEAST_VARIANCE = 1e-9
# Share of the trace by which two entries may differ: rounding, also of a lower precision. Their mean is taken.
ASYMMETRY = 1e-3
# Logarithm of a variance, relative to that of the pair, beyond which it counts as this.
WIDEST_LOG = 46.0


class Covariances(NamedTuple):
    """Covariances of padded matches; None where the points of an image are exact."""

    points0: Tensor | None  # (B, N, 2, 2)
    points1: Tensor | None  # (B, N, 2, 2)

    @property
    def given(self) -> list[Tensor]:
        """Those that are there."""
        return [x for x in self if x is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Covariances":
        """Apply a function to those that are there."""
        return Covariances(*(None if x is None else function(x) for x in self))


def check_covariances(covariance0: Tensor | None, covariance1: Tensor | None, count: int) -> None:
    """Raise unless each that is given is `(count, 2, 2)`, floating point, finite, symmetric and positive definite."""
    for name, covariance in (("covariance0", covariance0), ("covariance1", covariance1)):
        if covariance is not None:
            _check_covariance(name, covariance, count)


def _check_covariance(name: str, covariance: Tensor, count: int) -> None:
    check_floats(name, covariance)
    if covariance.shape != (count, 2, 2):
        raise ValueError(
            f"{name}: expected shape (M, 2, 2) = ({count}, 2, 2), got {tuple(covariance.shape)}; "
            "row m belongs to match m"
        )
    S = to_work(covariance.detach())
    a, b, c, d = S.flatten(1).unbind(1)
    size = (a.abs() + d.abs()).clamp_min(torch.finfo(S.dtype).tiny)
    symmetric = (b - c).abs() <= ASYMMETRY * size
    definite = (a > 0) & (d > 0) & ((a / size) * (d / size) > (b / size) * (c / size))
    for fine, wanted, remedy in (
        (torch.isfinite(S).flatten(1).all(1), "finite values", "leave such matches out"),
        (symmetric, "symmetric matrices", "use 0.5 * (S + S.mT)"),
        (definite, "positive definite matrices", "add a floor to the diagonal, for instance 0.01 pixels squared"),
    ):
        if not bool(fine.all()):
            row = int((~fine).nonzero()[0, 0])
            raise ValueError(f"{name}: expected {wanted}, got {covariance[row].tolist()} at match {row}; {remedy}")


def symmetrised(covariance: Tensor) -> Tensor:
    """The symmetric part of covariances, in float64."""
    covariance = to_work(covariance)
    return 0.5 * (covariance + covariance.mT)


def relative_covariances(
    covariances: Covariances | None, weights: Tensor, *, summed: bool
) -> tuple[Covariances | None, Tensor]:
    """Covariances as multiples of a typical one of their pair, and weights `(B, N)` divided by relative variances.

    The typical variance is the geometric mean over the matches of positive weight. Residuals that are whitened by the
    relative covariances keep the unit of the points, and covariances that are all the same multiple of the identity
    change nothing.

    Args:
        covariances: of padded matches, or None, which returns None and the weights.
        weights: `(B, N)`.
        summed: the residual is a difference of points, whose variances add up; otherwise a distance from a line,
            which is counted per point.
    """
    if covariances is None or not covariances.given:
        return None, weights
    traces = torch.stack([x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in covariances.given]).sum(0)
    axes = 2.0 if summed else 2.0 * len(covariances.given)
    variance = traces / axes
    log, present = variance.log(), (weights > 0).to(traces.dtype)
    typical = (log * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp_min(1.0)
    relative = (log - typical).clamp(-WIDEST_LOG, WIDEST_LOG).exp()
    # Divided first: the other way around, gradients of very small variances overflow.
    scaled = covariances.map(lambda x: x / variance[..., None, None] * relative[..., None, None])
    return scaled, weights / relative


def moved_covariances(covariance: Tensor, slope: Tensor) -> Tensor:
    """`J S J^T` of covariances `(..., 2, 2)` under maps with derivative `(..., 2, 2)`."""
    return slope @ covariance @ slope.mT


def projective_slope(matrix: Tensor, mapped: Tensor, depth: Tensor) -> Tensor:
    """Derivative `(B, N, 2, 2)` of points under matrices `(B, 3, 3)` that map them to `(B, N, 2)` at `(B, N)`."""
    rows = matrix[:, None, :2, :2] - mapped[..., :, None] * matrix[:, None, None, 2, :2]
    return rows / depth[..., None, None]


class Whitening(NamedTuple):
    """Inverse `[[p, 0], [q, s]]` of the Cholesky factors of covariances `(..., 2, 2)`."""

    p: Tensor
    q: Tensor
    s: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> "Whitening":
        """Return the factors for symmetric positive definite matrices."""
        a, b, d = covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1]
        p = a.rsqrt()
        # The Schur complement cancels for elongated ellipses; the floor keeps its root.
        s = (d - b * (b / a)).clamp_min(LEAST_VARIANCE).rsqrt()
        return cls(p, -s * b / a, s)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Whitened vectors `(..., 2, k)`."""
        p, q, s = (x[..., None] for x in self)
        first, second = vectors[..., 0, :], vectors[..., 1, :]
        return torch.stack([p * first, q * first + s * second], dim=-2)
