# SPDX-License-Identifier: Apache-2.0
"""What the losses share: smooth distances, weighted means over matches, and explicit reduction over pairs."""

from typing import Any

import torch
from torch import Tensor

from eloftr_ops.geometry._checks import (
    batch_size_of,
    check_choice,
    check_matches,
    check_matrices,
    check_scale,
    check_tensor,
)
from eloftr_ops.geometry._linalg import extreme_unit, power_of_two
from eloftr_ops.geometry._precision import to_work

REDUCTIONS = ("none", "mean", "sum")


def smooth_length(vectors: Tensor, smoothing: float) -> Tensor:
    """`smooth_distance` of the lengths over the last dimension, without overflow of their squares."""
    unit = extreme_unit(vectors, (-1,))
    squared = (vectors / unit).square().sum(-1)
    unit = unit[..., 0]
    return unit * squared / ((squared + (smoothing / unit).square()).sqrt() + smoothing / unit)


def smooth_distance(squared: Tensor, smoothing: float) -> Tensor:
    """`sqrt(d^2 + s^2) - s` without cancellation: zero, with zero gradient, at distance zero.

    Args:
        squared: squared distances, any shape.
        smoothing: s > 0; the loss is quadratic below it and `d - s` well above.

    Returns:
        Distances, same shape.
    """
    return squared / ((squared + smoothing**2).sqrt() + smoothing)


def saturated(values: Tensor, saturation: float | None) -> Tensor:
    """`c v / (c + v)`: v for small values, never more than c; None leaves the values alone."""
    if saturation is None:
        return values
    return values * (saturation / (saturation + values))


def check_options(smoothing: float, saturation: float | None, reduction: str) -> None:
    """Raise unless the options that every loss takes are in range."""
    check_scale("smoothing", smoothing)
    if saturation is not None:
        check_scale("saturation", saturation)
    check_choice("reduction", reduction, REDUCTIONS)


def mean_over_matches(values: Tensor, batch_indexes: Tensor, weights: Tensor | None, batch_size: int) -> Tensor:
    """Weighted mean `(B,)` of the values `(M,)` of each pair; zero for a pair without weight."""
    weights = torch.ones_like(values) if weights is None else weights.to(values.device).to(values.dtype)
    index = batch_indexes.to(values.device).long()
    empty = values.new_zeros(batch_size)
    largest = empty.scatter_reduce(0, index, weights.detach(), "amax")
    weights = weights / power_of_two(largest[:, None], (1,))[index, 0]
    total = empty.index_add(0, index, weights)
    summed = empty.index_add(0, index, weights * values)
    present = total > 0
    return torch.where(present, summed / torch.where(present, total, 1.0), 0.0)


def check_valid(valid: Tensor, batch_size: int) -> None:
    """Raise unless `valid` is `(batch_size,)` and bool."""
    check_tensor("valid", valid)
    if valid.dtype != torch.bool:
        raise TypeError(f"valid: expected dtype torch.bool, got {valid.dtype}")
    if valid.shape != (batch_size,):
        raise ValueError(f"valid: expected shape (B,) = ({batch_size},), got {tuple(valid.shape)}")


def without_invalid(matrices: Any, valid: Tensor | None, batch_size: int) -> Any:
    """Matrices `(B, n, n)` with the identity, and no gradient, where a pair is not valid, whatever stands there."""
    check_tensor("matrices", matrices)
    if valid is None or matrices.ndim != 3 or matrices.shape[0] != batch_size:
        return matrices
    check_valid(valid, batch_size)
    eye = torch.eye(matrices.shape[1], matrices.shape[2], dtype=matrices.dtype, device=matrices.device)
    return torch.where(valid.to(matrices.device)[:, None, None], matrices, eye)


def counted(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    matrices: Tensor,
    weights: Tensor | None,
    valid: Tensor | None,
    name: str,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Check, and return float64 matches and matrices `(B, 3, 3)`, with no value of a pair that is not valid."""
    batch_size = batch_size_of(name, matrices)
    matrices = without_invalid(matrices, valid, batch_size)
    check_matrices(name, matrices, batch_size)
    if valid is not None:
        # Shapes and dtypes first: the rows of pairs that are not valid are found by their indexes.
        check_tensor("keypoints0", keypoints0)
        check_tensor("keypoints1", keypoints1)
        check_matches(torch.zeros_like(keypoints0), torch.zeros_like(keypoints1), batch_indexes, batch_size, None)
        rows = valid.to(keypoints0.device)[batch_indexes.to(keypoints0.device).long()]
        keypoints0 = torch.where(rows[:, None], keypoints0, 0.0)
        keypoints1 = torch.where(rows.to(keypoints1.device)[:, None], keypoints1, 0.0)
    check_matches(keypoints0, keypoints1, batch_indexes, batch_size, weights)
    return (to_work(keypoints0), to_work(keypoints1), batch_indexes), to_work(matrices)


def constant(covariance: Tensor | None) -> Tensor | None:
    """A covariance without its gradient: a loss would fall by larger ones."""
    return None if covariance is None else covariance.detach()


def reduce_pairs(values: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """Reduce per-pair values over the valid pairs.

    Args:
        values: `(B,)`, finite.
        valid: `(B,)` bool or None for all; the others count for nothing and get zero gradient.
        reduction: "none" (zero where not valid), "mean" over the valid pairs (zero without any), or "sum".

    Returns:
        `(B,)` or a scalar.

    Raises:
        ValueError: `valid` is not `(B,)`.
        TypeError: `valid` is not bool.
    """
    if valid is not None:
        check_valid(valid, values.shape[0])
        valid = valid.to(values.device)
        values = torch.where(valid, values, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    count = values.shape[0] if valid is None else valid.sum().clamp_min(1)
    return values.sum() / count
