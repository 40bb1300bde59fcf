# SPDX-License-Identifier: Apache-2.0
"""Image pairs with exactly known homographies, rendered from textures.

Convention:
    Coordinates are (x, y) with the centre of pixel (x, y) at (x + 0.5, y + 0.5), in every function here.
    Warp points with ``kornia.geometry.transform_points(H_0to1, points)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kornia.geometry import transform_points

from eloftr_ops.data.homographies import (
    HomographyConfig,
    horizon_is_far,
    image_corners,
    sample_homographies,
)
from eloftr_ops.data.photometric import PhotometricConfig, photometric_change
from eloftr_ops.geometry._precision import check_has_float64

_PLACES = 6  # positions drawn for a pair of views
_CELLS = 16  # side of a texture's map of activity


_MILD = HomographyConfig(
    rotation_sigma=8.0, rotation_max=25.0, scale=(1.0, 1.0), anisotropy=1.1, translation=0.0, perspective=0.06
)


@dataclass(frozen=True)
class SyntheticConfig:
    """What ``HomographyPairs`` renders.

    Attributes:
        homography: distribution of ``H_0to1``.
        view: distribution of the homography from image 0 to the texture, before zoom and placement.
        zoom: texture pixels per pixel of image 0 are log-uniform in this interval, less where the texture
            is small.
        border_probability: share of pairs placed by image 0 alone, so that image 1 may look past the texture.
        mirror_probability: share of pairs whose texture continues mirrored instead of black past its borders.
        min_activity: places whose mean texture gradient, in 1/255 of the gray range per pixel, is lower are
            passed over when a better one is drawn within a few tries.
        photometric: change of look, drawn for each image on its own; ``None`` for none.
    """

    homography: HomographyConfig = field(default_factory=HomographyConfig)
    view: HomographyConfig = _MILD
    zoom: tuple[float, float] = (0.5, 1.5)
    border_probability: float = 0.2
    mirror_probability: float = 0.5
    min_activity: float = 6.0
    photometric: PhotometricConfig | None = field(default_factory=PhotometricConfig)

    def __post_init__(self) -> None:
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"zoom must be (low, high) with 0 < low <= high, got {self.zoom}")
        for name in ("border_probability", "mirror_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


class HomographyBatch(NamedTuple):
    """Rendered pairs.

    Convention:
        ``H_0to1`` maps (x, y) of image 0 to image 1, pixel centres at (x + 0.5, y + 0.5).
    """

    image0: torch.Tensor  # (B, 1, H, W) float32 in [0, 1]
    image1: torch.Tensor  # (B, 1, H, W) float32 in [0, 1]
    H_0to1: torch.Tensor  # (B, 3, 3) float32, last entry 1
    valid0: torch.Tensor  # (B, 1, H, W) bool: image 0 shows the texture or its mirrored continuation
    valid1: torch.Tensor  # (B, 1, H, W) bool: the same of image 1


class HomographyPairs:
    """Renders pairs of views of flat textures.

    Each image is sampled bilinearly from the level of the texture's image pyramid (halved by area averaging)
    that has about one pixel per pixel of the view, so that reduced views do not alias.

    Args:
        textures: gray images, each (H, W) uint8, all on one device; a pyramid of each is kept.
        config: what to render; defaults to ``SyntheticConfig()``.
        weights: relative frequency of each texture; equal if left out.

    Raises:
        ValueError: no texture, a texture with another shape, weights of another length, or a device without float64.
        TypeError: a texture that is not uint8.
    """

    def __init__(
        self,
        textures: Iterable[torch.Tensor],
        config: SyntheticConfig | None = None,
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.config = config or SyntheticConfig()
        self._pyramids = [texture_pyramid(texture) for texture in textures]
        if not self._pyramids:
            raise ValueError("textures must hold at least one image, got none")
        weights = [1.0] * len(self._pyramids) if weights is None else weights
        if len(weights) != len(self._pyramids):
            raise ValueError(f"weights must have one value per texture, got {len(weights)}")
        device = self._pyramids[0][0].device
        check_has_float64("textures", device)
        sizes = [(levels[0].shape[1], levels[0].shape[0]) for levels in self._pyramids]
        self._weights = torch.tensor(weights, dtype=torch.float64, device=device)
        self._sizes_wh = torch.tensor(sizes, dtype=torch.float64, device=device)
        self._activity = torch.stack([texture_activity(levels[0]) for levels in self._pyramids])

    def __call__(self, batch: int, size_hw: tuple[int, int], generator: torch.Generator) -> HomographyBatch:
        """The same as `sample`."""
        return self.sample(batch, size_hw, generator)

    def sample(self, batch: int, size_hw: tuple[int, int], generator: torch.Generator) -> HomographyBatch:
        """Render a batch of pairs; everything random comes from the generator.

        Convention:
            ``H_0to1`` maps (x, y) of image 0 to image 1, pixel centres at (x + 0.5, y + 0.5).

        Args:
            batch: number of pairs B.
            size_hw: height H and width W of every image, pixels.
            generator: source of randomness, on the textures' device.

        Returns:
            The pairs. ``H_0to1`` is exact up to float32 rounding.

        Raises:
            ValueError: batch or a size is not positive.
        """
        config = self.config
        H_0to1 = sample_homographies(batch, size_hw, generator, config=config.homography, dtype=torch.float64)
        index = torch.multinomial(self._weights, batch, replacement=True, generator=generator)
        H_0totexture = self._place(H_0to1, index, size_hw, generator)
        H_1totexture = H_0totexture @ torch.linalg.inv(H_0to1)
        mirrored = torch.rand(batch, generator=generator, device=index.device) < config.mirror_probability
        H_totexture = torch.cat([H_0totexture, H_1totexture])
        images, valid = self._render(H_totexture, index.repeat(2), mirrored.repeat(2), size_hw)
        if config.photometric is not None:
            images = photometric_change(images, generator, config.photometric)
        return HomographyBatch(images[:batch], images[batch:], H_0to1.float(), valid[:batch], valid[batch:])

    def _place(
        self,
        H_0to1: torch.Tensor,
        index: torch.Tensor,
        size_hw: tuple[int, int],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """H_0totexture (B, 3, 3): mild tilt, zoom and position; both views lie on the texture if they fit."""
        batch, config, sizes_wh = len(H_0to1), self.config, self._sizes_wh[index]
        H = sample_homographies(batch, size_hw, generator, config=config.view, dtype=torch.float64)
        H_1to0 = torch.linalg.inv(H_0to1)
        flat = ~horizon_is_far(H @ H_1to0, size_hw)
        affine = H.clone()
        affine[:, 2, :2] = 0
        H = torch.where(flat[:, None, None], affine, H)
        u = torch.rand(batch, 2, generator=generator, device=H.device, dtype=H.dtype)

        corners = image_corners(size_hw, H).expand(batch, -1, -1)
        quad0 = transform_points(H, corners)
        both = torch.cat([quad0, transform_points(H @ H_1to0, corners)], dim=1)
        span = both.amax(dim=1) - both.amin(dim=1)
        low, high = math.log(config.zoom[0]), math.log(config.zoom[1])
        zoom = torch.exp(low + (high - low) * u[:, 0])
        inside = u[:, 1] >= config.border_probability
        fitting = (sizes_wh / span).amin(dim=-1).clamp_min(config.zoom[0])
        fitting0 = (sizes_wh / (quad0.amax(dim=1) - quad0.amin(dim=1))).amin(dim=-1).clamp_min(config.zoom[0])
        zoom = torch.minimum(zoom, torch.where(inside, fitting, fitting0))[:, None]
        inside = inside & (span * zoom <= sizes_wh * (1 + 1e-9)).all(dim=-1)
        region = torch.where(inside[:, None, None], both, quad0.repeat(1, 2, 1)) * zoom[:, None]
        start, end = -region.amin(dim=1), sizes_wh - region.amax(dim=1)
        places = torch.rand(batch, _PLACES, 2, generator=generator, device=H.device, dtype=H.dtype)
        offsets = start[:, None] + places * (end - start)[:, None]
        offset = self._first_with_content(index, quad0 * zoom[:, None], offsets)

        placement = torch.diag_embed(F.pad(zoom.expand(-1, 2), (0, 1), value=1.0))
        placement[:, :2, 2] = offset
        return placement @ H

    def _first_with_content(self, index: torch.Tensor, quads: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Of offsets (B, K, 2) of quads (B, 4, 2), the first that shows detail, else the most detailed."""
        steps = (torch.arange(4, device=quads.device, dtype=quads.dtype) + 0.5) / 4
        across, down = torch.cartesian_prod(steps, steps)[..., None].unbind(1)  # (16, 1) each
        top = quads[:, None, 0] * (1 - across) + quads[:, None, 1] * across
        bottom = quads[:, None, 3] * (1 - across) + quads[:, None, 2] * across
        points = (top * (1 - down) + bottom * down)[:, None] + offsets[:, :, None]  # (B, K, 16, 2)
        cells = (points / self._sizes_wh[index][:, None, None] * _CELLS).long().clamp(0, _CELLS - 1)
        activity = self._activity[index[:, None, None], cells[..., 1], cells[..., 0]].mean(dim=-1)
        chosen = torch.where(activity >= self.config.min_activity, torch.inf, activity).argmax(dim=1)
        return offsets[torch.arange(len(offsets), device=offsets.device), chosen]

    def _render(
        self, H_totexture: torch.Tensor, index: torch.Tensor, mirrored: torch.Tensor, size_hw: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 1, H, W) in [0, 1] and where they show the texture, (N, 1, H, W) bool."""
        quads = transform_points(H_totexture, image_corners(size_hw, H_totexture).expand(len(index), -1, -1))
        rolled = quads.roll(-1, dims=1)
        area = (quads[..., 0] * rolled[..., 1] - quads[..., 1] * rolled[..., 0]).sum(dim=1).abs() / 2
        level = torch.log2(area / (size_hw[0] * size_hw[1])).div(2).round().clamp_min(0).int().tolist()
        boxes = torch.cat([quads.amin(dim=1), quads.amax(dim=1)], dim=1).tolist()
        items = zip(index.tolist(), level, boxes, mirrored.tolist(), strict=True)
        grid = _texture_coordinates(H_totexture, size_hw)
        images = torch.empty(len(index), 1, *size_hw, device=grid.device)
        valid = torch.ones(len(index), 1, *size_hw, device=grid.device, dtype=torch.bool)
        for n, (texture, wanted, box, mirror) in enumerate(items):
            levels = self._pyramids[texture]
            height, width = levels[0].shape
            if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
                _leave_texture(grid[n], valid[n, 0], (width, height), mirror)
            _sample_crop(levels, min(wanted, len(levels) - 1), box, grid[n], images[n])
        return images.mul_(valid).mul_(1 / 255), valid


def texture_pyramid(texture: torch.Tensor) -> list[torch.Tensor]:
    """Levels of an (H, W) uint8 texture, each half the one before by area averaging."""
    if texture.ndim != 2 or min(texture.shape) < 2:
        raise ValueError(f"each texture must have shape (H, W) of at least 2 x 2, got {tuple(texture.shape)}")
    if texture.dtype != torch.uint8:
        raise TypeError(f"each texture must be uint8, got {texture.dtype}; scale to [0, 255] and convert")
    levels = [texture]
    while min(levels[-1].shape) >= 64:
        halved = F.avg_pool2d(levels[-1][None].float(), 2)[0]
        levels.append(halved.round_().to(torch.uint8))
    return levels


def texture_activity(texture: torch.Tensor) -> torch.Tensor:
    """Mean gradient, in gray levels per pixel and clipped at strong edges, in 16 x 16 cells of a texture."""
    gray = texture.float()
    along_x = F.pad(gray.diff(dim=1).abs(), (0, 1))
    along_y = F.pad(gray.diff(dim=0).abs(), (0, 0, 0, 1))
    return F.adaptive_avg_pool2d((along_x + along_y).clamp(max=30)[None], _CELLS)[0]


def _texture_coordinates(H_totexture: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Texture coordinates (N, H, W, 2), float32, of every pixel centre of the views."""
    height, width = size_hw
    # The frame moves to the view's centre in float64, so that float32 loses nothing that matters afterwards.
    x = torch.arange(width, device=H_totexture.device, dtype=torch.float32) + (0.5 - width / 2)
    y = torch.arange(height, device=H_totexture.device, dtype=torch.float32)[:, None] + (0.5 - height / 2)
    centred = H_totexture.clone()
    centred[:, :, 2] += H_totexture[:, :, 0] * (width / 2) + H_totexture[:, :, 1] * (height / 2)
    entries = (centred / centred[:, 2:, 2:]).float()[..., None, None]
    scale = (entries[:, 2, 0] * x + (entries[:, 2, 1] * y + entries[:, 2, 2])).reciprocal_()
    grid = torch.empty(len(centred), height, width, 2, device=centred.device)
    for axis in (0, 1):
        rows = entries[:, axis, 1] * y + entries[:, axis, 2]
        torch.mul(torch.addcmul(rows, entries[:, axis, 0], x), scale, out=grid[..., axis])
    return grid


def _leave_texture(grid: torch.Tensor, valid: torch.Tensor, size_wh: tuple[int, int], mirror: bool) -> None:
    """Fold (H, W, 2) coordinates back into the texture, or mark in the (H, W) mask those that leave it."""
    extent = torch.tensor(size_wh, device=grid.device, dtype=grid.dtype)
    if mirror:
        grid.remainder_(2 * extent)
        torch.minimum(grid, 2 * extent - grid, out=grid)
    else:
        torch.all((grid >= 0) & (grid <= extent), dim=-1, out=valid)


def _sample_crop(
    levels: list[torch.Tensor], level: int, box: list[float], grid: torch.Tensor, out: torch.Tensor
) -> None:
    """Sample a pyramid level into (1, H, W), at (H, W, 2) coordinates of the full texture; overwrites them.

    Only the part of the level that the view's bounding box (x0, y0, x1, y1) or its mirror images touch is
    converted to float.
    """
    source = levels[level]
    spans = []
    for low, high, side in ((box[0], box[2], source.shape[1]), (box[1], box[3], source.shape[0])):
        low, high = low / 2**level, high / 2**level
        first = max(0, math.floor(min(low, 2 * side - high)) - 2)
        last = min(side, math.ceil(max(high, -low)) + 2)
        spans.append((min(first, side - 1), max(last, 1)))
    (x0, x1), (y0, y1) = spans
    crop = source[y0:y1, x0:x1].float()
    factor = grid.new_tensor([2.0 / (x1 - x0), 2.0 / (y1 - y0)])
    shift = grid.new_tensor([-x0, -y0]) * factor - 1
    grid.mul_(factor / 2**level).add_(shift)
    sampled = F.grid_sample(crop[None, None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)
    out.copy_(sampled[0])
