# SPDX-License-Identifier: Apache-2.0
"""A scene seen by several cameras that are known: rendered photographs, and matches with exact geometry."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_ops.data import procedural_textures
from eloftr_ops.data.scene_geometry import (
    Facets,
    Views,
    camera_pose,
    cast,
    look,
    reproject,
    scaled_coordinates,
    turn,
    view_rays,
)
from eloftr_ops.data.scenes import pixel_centres
from eloftr_ops.reconstruction.journal import PairMatches
from support.pair_files import save_image


class Photographs(NamedTuple):
    """N cameras before a wall with three panels."""

    size_wh: tuple[int, int]
    K: Tensor  # (3, 3) float64, of all cameras; the centre of the first pixel is (0.5, 0.5)
    T: Tensor  # (N, 4, 4) world to camera
    views: Views

    @property
    def names(self) -> list[str]:
        return [f"{number:02}.png" for number in range(len(self.T))]

    def save(self, folder: Path) -> None:
        """Render all photographs."""
        textures = procedural_textures(torch.Generator().manual_seed(3), 4, 256)
        width, height = self.size_wh
        rays = view_rays(self.views, pixel_centres((height, width), self.T.device).flatten(0, 1))
        hits = cast(self.views, rays)
        coordinates = scaled_coordinates(self.views.inverse, rays, hits.facet) / hits.inverse_depth[:, None]
        facet = self.views.ids.gather(1, hits.facet)
        for number, name in enumerate(self.names):
            grid = coordinates[number].T[None, None].float()
            shown = [
                F.grid_sample(texture[None, None].float() / 255, grid, align_corners=False)[0, 0, 0]
                for texture in textures
            ]
            pixels = torch.stack(shown).gather(0, facet[number][None])[0]
            save_image(folder / name, pixels.view(height, width))

    def partners(self, i: int, j: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """Where points (M, 2) of image i lie in image j, and whether they are seen there."""
        first, second = (
            self.views._replace(**{name: getattr(self.views, name)[k : k + 1] for name in ("ids", "inverse", "K", "T")})
            for k in (i, j)
        )
        inverse_depth = cast(first, view_rays(first, points)).inverse_depth
        T_0to1 = (self.T[j] @ torch.linalg.inv(self.T[i]))[None]
        depth = 1 / inverse_depth.clamp_min(1e-9)
        moved, z = reproject(points[None], depth, self.K[None], self.K[None], T_0to1)
        nearest = cast(second, view_rays(second, moved)).inverse_depth
        inside = ((moved > 1) & (moved < moved.new_tensor(self.size_wh) - 1)).all(-1)
        seen = inside & (z > 0) & ((nearest * z - 1).abs() < 1e-3)
        return moved[0], seen[0]

    def matches(self, noise: float = 0.0, wrong: float = 0.0, seed: int = 0) -> list[PairMatches]:
        """Matches as a semi-dense matcher gives them: in each pair another whole pixel of each cell of image 0.

        Args:
            noise: standard deviation of the points of image 1, pixels.
            wrong: share of matches that lead anywhere.
        """
        generator = torch.Generator().manual_seed(seed)
        width, height = self.size_wh
        cells = pixel_centres((height // 8, width // 8), self.T.device).flatten(0, 1).double() - 0.5
        found = []
        for i, j in itertools.combinations(range(len(self.T)), 2):
            place = torch.randint(8, cells.shape, generator=generator) + 0.5
            points0 = 8 * cells + place
            points1, seen = self.partners(i, j, points0)
            points1 = points1 + noise * torch.randn(points1.shape, generator=generator)
            lost = torch.rand(len(points1), generator=generator) < wrong
            anywhere = torch.rand(points1.shape, generator=generator) * points1.new_tensor(self.size_wh)
            points1 = torch.where(lost[:, None], anywhere, points1)
            confidence = torch.where(lost, 0.3, 0.9)[seen]
            found.append(
                PairMatches(
                    (self.names[i], self.names[j]),
                    _array(points0[seen]),
                    _array(points1[seen]),
                    _array(confidence),
                    self.size_wh,
                    self.size_wh,
                )
            )
        return found


def photographs(count: int = 5, size_wh: tuple[int, int] = (320, 240)) -> Photographs:
    """Cameras on an arc of 9 degrees each."""
    eye = torch.eye(3, dtype=torch.float64)

    def frame(axes: Tensor, half: tuple[float, float], centre: tuple[float, float, float]) -> Tensor:
        columns = axes[:, :2] * axes.new_tensor(half)
        return torch.cat([columns, axes.new_tensor(centre)[:, None]], 1)

    angle = torch.tensor(0.5, dtype=torch.float64)
    frames = torch.stack(
        [
            frame(eye, (5.0, 4.0), (0.0, 0.0, 1.5)),
            frame(turn(angle, 1), (0.8, 0.8), (-0.9, 0.1, 0.0)),
            frame(turn(-angle, 1), (0.8, 0.6), (0.9, 0.3, -0.3)),
            frame(turn(angle, 0), (0.9, 0.5), (0.1, -0.9, 0.3)),
        ]
    )
    facets = Facets(frames.repeat(count, 1, 1, 1), torch.ones(count, 4, dtype=torch.bool), 4)
    steps = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    target = torch.zeros(count, 3, dtype=torch.float64)
    T = camera_pose(steps * math.radians(9), 0.05 * steps.cos(), 0.02 * steps, 4 + 0.1 * steps, target)
    width, height = size_wh
    K = torch.tensor([[1.1 * width, 0, width / 2], [0, 1.1 * width, height / 2], [0, 0, 1]], dtype=torch.float64)
    return Photographs(size_wh, K, T, look(facets, K.repeat(count, 1, 1), T))


def _array(values: Tensor) -> npt.NDArray[np.float32]:
    return values.float().numpy()
