# SPDX-License-Identifier: Apache-2.0
"""Two-view scenes with a known answer, batched and seeded."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = (640.0, 480.0)


class PlanarScene(NamedTuple):
    """Matches under a known homography."""

    keypoints0: Tensor  # (B * N, 2) float64
    keypoints1: Tensor  # (B * N, 2)
    batch_indexes: Tensor  # (B * N,)
    H_0to1: Tensor  # (B, 3, 3), last entry 1

    @property
    def matches(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keypoints0, self.keypoints1, self.batch_indexes


class Scene(NamedTuple):
    """Matches of points in space seen by two cameras."""

    keypoints0: Tensor  # (B * N, 2) float64
    keypoints1: Tensor  # (B * N, 2)
    batch_indexes: Tensor  # (B * N,)
    K0: Tensor  # (B, 3, 3)
    K1: Tensor  # (B, 3, 3), another focal length than K0's
    T_0to1: Tensor  # (B, 4, 4), unit translation

    @property
    def matches(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keypoints0, self.keypoints1, self.batch_indexes


def planar_scene(pairs: int, points: int, *, seed: int, noise: float = 0.0, wrong: float = 0.0) -> PlanarScene:
    """Draw homographies that move image corners by up to 100 pixels, and matches under them.

    Args:
        pairs: B.
        points: N, matches per pair.
        seed: of everything drawn.
        noise: standard deviation in pixels of both coordinates in image 1.
        wrong: share of the matches, the first ones of each pair, that are drawn anywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    width, height = SIZE
    corners = torch.tensor([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]], dtype=torch.float64)
    moved = corners + 200.0 * (_uniform(generator, pairs, 4, 2) - 0.5)
    H = four_point_homography(corners.expand(pairs, 4, 2), moved)
    x0 = _uniform(generator, pairs, points, 2) * torch.tensor(SIZE, dtype=torch.float64)
    x1 = project(H, x0) + noise * torch.randn(pairs, points, 2, generator=generator, dtype=torch.float64)
    count = round(wrong * points)
    x1[:, :count] = _uniform(generator, pairs, count, 2) * torch.tensor(SIZE, dtype=torch.float64)
    return PlanarScene(x0.flatten(0, 1), x1.flatten(0, 1), pair_index(pairs, points), H)


def scene(
    pairs: int,
    points: int,
    *,
    seed: int,
    noise: float = 0.0,
    wrong: float = 0.0,
    baseline: float = 1.0,
    flat: bool = False,
) -> Scene:
    """Draw points four to eight units away and a second camera one unit off, turned by about ten degrees.

    Args:
        pairs: B.
        points: N, matches per pair.
        seed: of everything drawn.
        noise: standard deviation in pixels of the coordinates in both images.
        wrong: share of the matches, the first ones of each pair, that are drawn anywhere.
        baseline: length of the translation; 0 is a pure rotation.
        flat: put all points on one plane.
    """
    generator = torch.Generator().manual_seed(seed)
    sideways = 6.0 * (_uniform(generator, pairs, points, 2) - 0.5)
    depth = 4.0 + 4.0 * _uniform(generator, pairs, points, 1)
    if flat:
        depth = 6.0 + 0.3 * sideways[..., :1] - 0.2 * sideways[..., 1:]
    X = torch.cat([sideways, depth], dim=-1)
    R = rotation(0.15 * torch.randn(pairs, 3, generator=generator, dtype=torch.float64))
    t = torch.nn.functional.normalize(torch.randn(pairs, 3, generator=generator, dtype=torch.float64), dim=-1)
    K0, K1 = intrinsics(500.0).expand(pairs, 3, 3), intrinsics(450.0).expand(pairs, 3, 3)
    x0, x1 = project(K0, X), project(K1, X @ R.mT + baseline * t[:, None])
    x0 = x0 + noise * torch.randn(pairs, points, 2, generator=generator, dtype=torch.float64)
    x1 = x1 + noise * torch.randn(pairs, points, 2, generator=generator, dtype=torch.float64)
    count = round(wrong * points)
    x1[:, :count] = _uniform(generator, pairs, count, 2) * torch.tensor(SIZE, dtype=torch.float64)
    T = torch.eye(4, dtype=torch.float64).repeat(pairs, 1, 1)
    T[:, :3, :3], T[:, :3, 3] = R, t
    return Scene(x0.flatten(0, 1), x1.flatten(0, 1), pair_index(pairs, points), K0.clone(), K1.clone(), T)


def intrinsics(focal: float) -> Tensor:
    """Intrinsics `(3, 3)` of a camera that looks at the middle of the image."""
    return torch.tensor([[focal, 0.0, SIZE[0] / 2], [0.0, focal, SIZE[1] / 2], [0.0, 0.0, 1.0]], dtype=torch.float64)


def rotation(vector: Tensor) -> Tensor:
    """Rotation matrices `(B, 3, 3)` by the exponential of rotation vectors `(B, 3)`."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    generator = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
    return torch.linalg.matrix_exp(generator)


def project(matrix: Tensor, points: Tensor) -> Tensor:
    """Apply `(B, 3, 3)` to `(B, N, 2)` or `(B, N, 3)` and divide by the last coordinate, without any guard."""
    if points.shape[-1] == 2:
        points = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    mapped = points @ matrix.mT
    return mapped[..., :2] / mapped[..., 2:]


def four_point_homography(x0: Tensor, x1: Tensor) -> Tensor:
    """Homographies `(B, 3, 3)` with last entry 1 through four matches `(B, 4, 2)`: eight linear equations."""
    one, zero = torch.ones_like(x0[..., :1]), torch.zeros_like(x0)
    u, v = x1[..., :1], x1[..., 1:]
    first = torch.cat([x0, one, zero, 0 * one, -u * x0], dim=-1)
    second = torch.cat([zero, 0 * one, x0, one, -v * x0], dim=-1)
    solution = torch.linalg.solve(torch.cat([first, second], dim=1), torch.cat([u, v], dim=1))
    return torch.cat([solution[..., 0], torch.ones_like(solution[:, :1, 0])], dim=1).view(-1, 3, 3)


def pair_index(pairs: int, points: int) -> Tensor:
    """Batch indexes of `points` matches for each of `pairs` pairs."""
    return torch.arange(pairs).repeat_interleave(points)


def angle_between(R_a: Tensor, R_b: Tensor) -> Tensor:
    """Rotation angles in degrees, by the chord `|R_a - R_b| = 2 sqrt(2) sin(angle / 2)`."""
    chord = torch.linalg.matrix_norm(R_a - R_b) / (2.0 * math.sqrt(2.0))
    return torch.rad2deg(2.0 * torch.asin(chord.clamp(max=1.0)))


def direction_between(t_a: Tensor, t_b: Tensor) -> Tensor:
    """Angles in degrees between unit vectors, by the chord."""
    chord = torch.linalg.vector_norm(t_a - t_b, dim=-1) / 2.0
    return torch.rad2deg(2.0 * torch.asin(chord.clamp(max=1.0)))


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)
