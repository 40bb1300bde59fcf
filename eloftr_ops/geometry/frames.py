# SPDX-License-Identifier: Apache-2.0
"""The two pixel frames in use, and the way between them."""

from torch import Tensor

from eloftr_ops.geometry._checks import check_floats

__all__ = ["from_integer_centers", "to_integer_centers"]


def to_integer_centers(keypoints: Tensor) -> Tensor:
    """Move keypoints from this project's frame into OpenCV's and kornia's.

    Convention:
        - In: the centre of pixel (x, y) is (x + 0.5, y + 0.5); the image spans [0, W] x [0, H].
        - Out: the centre of pixel (x, y) is (x, y); the image spans [-0.5, W - 0.5] x [-0.5, H - 0.5].
        - Axis order (x, y) in both; pixels in both.
        - Intrinsics are bound to a frame too: an estimator needs keypoints and K in the same one.

    Args:
        keypoints: `(..., 2)`, floating point, pixels.

    Returns:
        `(..., 2)`, same dtype: `keypoints - 0.5`. The gradient is the identity.

    Raises:
        ValueError: the last dimension is not 2.
        TypeError: the dtype is not floating point.
    """
    return _shifted(keypoints, -0.5)


def from_integer_centers(keypoints: Tensor) -> Tensor:
    """Move keypoints from OpenCV's and kornia's frame into this project's; undoes `to_integer_centers`.

    Convention:
        - In: the centre of pixel (x, y) is (x, y). Out: it is (x + 0.5, y + 0.5). Axis order (x, y), pixels.

    Args:
        keypoints: `(..., 2)`, floating point, pixels.

    Returns:
        `(..., 2)`, same dtype: `keypoints + 0.5`. The gradient is the identity.

    Raises:
        ValueError: the last dimension is not 2.
        TypeError: the dtype is not floating point.
    """
    return _shifted(keypoints, 0.5)


def _shifted(keypoints: Tensor, offset: float) -> Tensor:
    check_floats("keypoints", keypoints)
    if keypoints.ndim == 0 or keypoints.shape[-1] != 2:
        raise ValueError(f"keypoints: expected shape (..., 2), got {tuple(keypoints.shape)}")
    return keypoints + offset
