# SPDX-License-Identifier: Apache-2.0
"""Moves the keypoints of all tracks together, so that they agree with all matches between them.

A match says: where the keypoint of image 0 moves by d from the matched point, that of image 1 moves by J d. With the
keypoints x as unknowns this is a linear least-squares problem, weighted by the confidences, of one small block per
track. It is solved by conjugate gradients over all blocks at once, and again with the weights of matches reduced that
do not fit (Cauchy). A weak pull towards the mean of the matched points decides what the matches leave open: a point may
slide along the surface as long as it does so in all images.

Related: Lindenberger, Sarlin, Larsson, Pollefeys: "Pixel-Perfect Structure-from-Motion with Featuremetric Refinement",
ICCV 2021, adjusts keypoints of tracks by their features; here the matches alone decide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Constraints", "adjust_keypoints", "constraint_errors"]

Array = npt.NDArray[np.float64]
Indexes = npt.NDArray[np.int64]

_ROUNDS = 4  # of new weights
_STEPS = 25  # of conjugate gradients each, at most
_ENOUGH = 1e-8  # of the squared residual at the start
_SCALE = 0.7  # pixels, of Cauchy's weights
_PULL = 0.02  # weight of the mean position, in units of a match of confidence 1


class Constraints(NamedTuple):
    """C matches between keypoints; positions are in pixels as matched."""

    keypoint0: Indexes  # (C,)
    keypoint1: Indexes  # (C,)
    point0: Array  # (C, 2) a place in the image of keypoint 0
    point1: Array  # (C, 2) where it lies in the image of keypoint 1
    jacobian: Array  # (C, 2, 2) of the map there
    weight: Array  # (C,)

    def select(self, rows: npt.NDArray[np.bool_]) -> Constraints:
        """Some of them."""
        return Constraints(
            self.keypoint0[rows],
            self.keypoint1[rows],
            self.point0[rows],
            self.point1[rows],
            self.jacobian[rows],
            self.weight[rows],
        )


def constraint_errors(constraints: Constraints, keypoints: Array) -> Array:
    """(C, 2) where the keypoint of image 1 is, minus where the match puts it for the keypoint of image 0."""
    moved = keypoints[constraints.keypoint0] - constraints.point0
    expected = constraints.point1 + _times(constraints.jacobian, moved)
    errors: Array = keypoints[constraints.keypoint1] - expected
    return errors


def adjust_keypoints(constraints: Constraints, keypoints: Array) -> Array:
    """The keypoints (K, 2) that agree best with the matches.

    Args:
        constraints: the matches.
        keypoints: (K, 2) where they are pulled to, and start.
    """
    start, weight = keypoints, constraints.weight
    for _ in range(_ROUNDS):
        errors = np.linalg.norm(constraint_errors(constraints, keypoints), axis=1)
        weight = constraints.weight / (1 + (errors / _SCALE) ** 2)
        keypoints = _solved(constraints._replace(weight=weight), keypoints, start)
    return keypoints


def _solved(constraints: Constraints, keypoints: Array, start: Array) -> Array:
    """Conjugate gradients on the normal equations, preconditioned by their 2 x 2 blocks."""
    blocks = _blocks(constraints, len(keypoints))

    def product(x: Array) -> Array:
        error = x[constraints.keypoint1] - _times(constraints.jacobian, x[constraints.keypoint0])
        return _gathered(constraints, error, len(keypoints)) + _PULL * x

    gradient = _gathered(constraints, constraint_errors(constraints, keypoints), len(keypoints))
    residual = -(gradient + _PULL * (keypoints - start))
    step = _times(blocks, residual)
    direction = step
    product_before = float((residual * step).sum())
    enough = _ENOUGH * product_before
    for _ in range(_STEPS):
        if product_before <= enough:
            break
        image = product(direction)
        length = float(product_before / (direction * image).sum())
        keypoints = keypoints + length * direction
        residual = residual - length * image
        step = _times(blocks, residual)
        product_now = float((residual * step).sum())
        direction, product_before = step + product_now / product_before * direction, product_now
    return keypoints


def _blocks(constraints: Constraints, count: int) -> Array:
    """(K, 2, 2) inverses of the diagonal blocks of the normal equations."""
    blocks: Array = np.tile(_PULL * np.eye(2), (count, 1, 1))
    weight = constraints.weight[:, None, None]
    np.add.at(blocks, constraints.keypoint1, weight * np.eye(2))
    squared = np.swapaxes(constraints.jacobian, 1, 2) @ constraints.jacobian
    np.add.at(blocks, constraints.keypoint0, weight * squared)
    inverse: npt.NDArray[Any] = np.linalg.inv(blocks)
    return inverse


def _gathered(constraints: Constraints, errors: Array, count: int) -> Array:
    """(K, 2) the derivative of half the weighted sum of squares at these errors (C, 2)."""
    weighted = errors * constraints.weight[:, None]
    back = _times(np.swapaxes(constraints.jacobian, 1, 2), weighted)
    columns = [
        np.bincount(constraints.keypoint1, weighted[:, k], count)
        - np.bincount(constraints.keypoint0, back[:, k], count)
        for k in (0, 1)
    ]
    return np.stack(columns, 1)


def _times(matrices: Array, vectors: Array) -> Array:
    """Products of (N, 2, 2) and (N, 2); written out, since NumPy is slow on many small matrices."""
    x, y = vectors[:, 0], vectors[:, 1]
    rows = [matrices[:, k, 0] * x + matrices[:, k, 1] * y for k in (0, 1)]
    return np.stack(rows, 1)
