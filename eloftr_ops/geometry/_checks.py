# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the geometry functions and losses, run once at the public layer."""

from typing import Any

import torch
from torch import Tensor

from eloftr_ops.geometry._linalg import unit_magnitude
from eloftr_ops.geometry._precision import to_work


def check_floats(name: str, value: Any) -> None:
    """Raise unless `value` is a tensor of a floating point dtype."""
    check_tensor(name, value)
    if not torch.is_floating_point(value):
        raise TypeError(f"{name}: expected a floating point dtype, got {value.dtype}; call .float() first")


def check_tensor(name: str, value: Any) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def batch_size_of(name: str, value: Any) -> int:
    """Return the number of pairs of a tensor `(B, ...)`, or raise."""
    check_tensor(name, value)
    if value.ndim == 0 or value.shape[0] < 1:
        raise ValueError(f"{name}: expected one entry per image pair, (B, ...), got {tuple(value.shape)}")
    return int(value.shape[0])


def check_matches(
    keypoints0: Tensor, keypoints1: Tensor, batch_indexes: Tensor, batch_size: int, weights: Tensor | None
) -> None:
    """Raise unless the arguments are M well-formed, finite matches of `batch_size` pairs."""
    _check_keypoints("keypoints0", keypoints0)
    _check_keypoints("keypoints1", keypoints1)
    if keypoints0.shape != keypoints1.shape:
        raise ValueError(
            "keypoints1: expected the shape of keypoints0 "
            f"{tuple(keypoints0.shape)}, got {tuple(keypoints1.shape)}; row m of both is one match"
        )
    _check_batch_indexes(batch_indexes, keypoints0.shape[0], batch_size)
    if weights is not None:
        check_weights(weights, keypoints0.shape[0])


def check_points(name: str, points: Tensor, count: int) -> None:
    """Raise unless `points` is `(count, 3)`, floating point and finite."""
    check_floats(name, points)
    if points.shape != (count, 3):
        raise ValueError(f"{name}: expected shape (M, 3) = ({count}, 3), got {tuple(points.shape)}")
    bad = ~torch.isfinite(points).all(1)
    if bool(bad.any()):
        raise ValueError(f"{name}: expected finite coordinates, got NaN or infinity at match {_first(bad)}")


def check_weights(weights: Tensor, count: int) -> None:
    """Raise unless `weights` is `(count,)`, floating point, finite and nowhere negative."""
    check_floats("weights", weights)
    if weights.shape != (count,):
        raise ValueError(f"weights: expected shape (M,) = ({count},), got {tuple(weights.shape)}")
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"weights: expected finite values >= 0, got {float(weights[row])} at match {row}; "
            "use 0 to leave a match out"
        )


def check_matrices(name: str, matrices: Tensor, batch_size: int, rows: int = 3) -> None:
    """Raise unless `matrices` is `(batch_size, rows, rows)`, floating point and finite."""
    check_floats(name, matrices)
    if matrices.shape != (batch_size, rows, rows):
        raise ValueError(
            f"{name}: expected shape (B, {rows}, {rows}) = ({batch_size}, {rows}, {rows}), got {tuple(matrices.shape)}"
        )
    bad = ~torch.isfinite(matrices).flatten(1).all(1)
    if bool(bad.any()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity in batch element {_first(bad)}")


def check_intrinsics(name: str, intrinsics: Tensor, batch_size: int) -> None:
    """Raise unless `intrinsics` is `(batch_size, 3, 3)`, finite and safely invertible."""
    check_matrices(name, intrinsics, batch_size)
    K = unit_magnitude(to_work(intrinsics.detach()), (1, 2))
    rows = torch.linalg.vector_norm(K, dim=-1).clamp_min(torch.finfo(K.dtype).tiny)
    # Hadamard's ratio: 1 for orthogonal rows, 0 for a singular matrix, whatever the focal length.
    singular = torch.linalg.det(K / rows[..., None]).abs() < 1e-9
    if bool(singular.any()):
        raise ValueError(
            f"{name}: expected invertible intrinsics [[fx, s, cx], [0, fy, cy], [0, 0, 1]], "
            f"got a singular matrix in batch element {_first(singular)}"
        )


def check_scale(name: str, value: float) -> None:
    """Raise unless `value` is a positive finite number."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, got {value}")


def check_cameras(needed: bool, K0: Tensor | None, K1: Tensor | None, batch_size: int) -> None:
    """Raise unless both intrinsics are there, where the model needs them, and invertible."""
    if not needed:
        return
    if K0 is None or K1 is None:
        raise ValueError("K0, K1: expected intrinsics (B, 3, 3) for an essential matrix or a pose, got None")
    check_intrinsics("K0", K0, batch_size)
    check_intrinsics("K1", K1, batch_size)


def check_sampling(confidence: float, max_iterations: int) -> None:
    """Raise unless the options of a sample consensus are in range."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations: expected at least 1, got {max_iterations}")


def check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_keypoints(name: str, keypoints: Tensor) -> None:
    check_floats(name, keypoints)
    if keypoints.ndim != 2 or keypoints.shape[1] != 2:
        raise ValueError(f"{name}: expected shape (M, 2), got {tuple(keypoints.shape)}")
    bad = ~torch.isfinite(keypoints).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"{name}: expected finite coordinates, got NaN or infinity at match {_first(bad)}; "
            "drop such matches before estimating"
        )


def _check_batch_indexes(batch_indexes: Tensor, count: int, batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size: expected an int, got {type(batch_size).__name__}")
    check_tensor("batch_indexes", batch_indexes)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if batch_indexes.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"batch_indexes: expected an integer dtype, got {batch_indexes.dtype}; call .long()")
    if batch_indexes.shape != (count,):
        raise ValueError(f"batch_indexes: expected shape (M,) = ({count},), got {tuple(batch_indexes.shape)}")
    outside = (batch_indexes < 0) | (batch_indexes >= batch_size)
    if bool(outside.any()):
        row = _first(outside)
        raise IndexError(
            f"batch_indexes: expected values in [0, {batch_size}), got {int(batch_indexes[row])} at "
            f"match {row}; pass the number of image pairs as batch_size"
        )


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0, 0])
