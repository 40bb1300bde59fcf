# SPDX-License-Identifier: Apache-2.0
"""Image pairs of random scenes in space, with exact depth, pose and intrinsics.

A scene has a far wall, sometimes a floor and a side wall, and textured panels and boxes in front of them. Surfaces may
intersect. Two cameras look at the scene. Everything is batched tensor code on the textures' device.

Convention:
    Image points are (x, y) with the centre of pixel (x, y) at (x + 0.5, y + 0.5); ``K`` belongs to that frame. Camera
    coordinates are x right, y down, z forward; ``T_0to1`` maps those of camera 0 to those of camera 1; depth is z.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_ops.data.photometric import PhotometricConfig, photometric_change
from eloftr_ops.data.scene_geometry import (
    DISTANCE,
    Facets,
    Hits,
    Views,
    camera_pose,
    cast,
    draw_facets,
    look,
    scaled_coordinates,
    view_rays,
    visible_share,
)
from eloftr_ops.data.synthetic import texture_activity, texture_pyramid
from eloftr_ops.geometry._precision import check_has_float64

_PLACES = 4  # drawn on the texture for a facet
_SHRINKS = (0.5, 0.25, 0.05)  # what a camera motion that never fits is multiplied by


@dataclass(frozen=True)
class SceneConfig:
    """What ``ScenePairs`` renders.

    Attributes:
        panels: most flat panels in a scene; each is left out by chance.
        boxes: most boxes in a scene; each is left out by chance.
        yaw: largest angle between the cameras about the vertical axis, degrees.
        pitch: largest angle between them about the horizontal axis, degrees.
        roll: largest angle between them about the viewing direction, degrees.
        distance_ratio: largest ratio of their distances from the scene, >= 1.
        shift: largest difference of the points that they look at, per axis, in distances from the scene.
        focal: focal length in units of the longer image side is log-uniform in this interval.
        focal_ratio: largest ratio of their focal lengths, >= 1.
        min_overlap: least visible overlap of both images, about, as a share of their area; at most 0.8.
        tries: camera motions drawn before the last one is reduced.
        zoom: texture pixels per image pixel of a facet seen frontally are log-uniform in this interval, less where
            the texture is small.
        min_activity: parts of a texture whose mean gradient, in 1/255 of the gray range per pixel, is lower are
            passed over when a better one is drawn within a few tries.
        shading: largest share of light that a facet loses, in [0, 1).
        photometric: change of look, drawn for each image on its own; ``None`` for none.
    """

    panels: int = 3
    boxes: int = 3
    yaw: float = 40.0
    pitch: float = 15.0
    roll: float = 30.0
    distance_ratio: float = 1.5
    shift: float = 0.08
    focal: tuple[float, float] = (0.7, 1.5)
    focal_ratio: float = 1.3
    min_overlap: float = 0.3
    tries: int = 6
    zoom: tuple[float, float] = (0.5, 1.5)
    min_activity: float = 6.0
    shading: float = 0.4
    photometric: PhotometricConfig | None = field(default_factory=PhotometricConfig)

    def __post_init__(self) -> None:
        for name in ("panels", "boxes", "yaw", "pitch", "roll", "shift"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}; 0 switches it off")
        for name in ("distance_ratio", "focal_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}; 1 switches it off")
        for name in ("focal", "zoom"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high, got {(low, high)}")
        if not 0 <= self.min_overlap <= 0.8:
            raise ValueError(f"min_overlap must be in [0, 0.8], got {self.min_overlap}")
        if self.tries < 1:
            raise ValueError(f"tries must be >= 1, got {self.tries}")
        if not 0 <= self.shading < 1:
            raise ValueError(f"shading must be in [0, 1), got {self.shading}")


class SceneBatch(NamedTuple):
    """Rendered pairs.

    Convention:
        ``X1 = T_0to1 X0``; K for (x, y) with the centre of pixel (x, y) at (x + 0.5, y + 0.5); depth is z at the pixel
        centre, 0 where the image shows no surface.
    """

    image0: Tensor  # (B, 1, H, W) float32 in [0, 1]
    image1: Tensor  # (B, 1, H, W) float32 in [0, 1]
    depth0: Tensor  # (B, H, W) float32
    depth1: Tensor  # (B, H, W) float32
    K0: Tensor  # (B, 3, 3) float32
    K1: Tensor  # (B, 3, 3) float32
    T_0to1: Tensor  # (B, 4, 4) float32, camera 0 to camera 1


class _Coats(NamedTuple):
    """How textures lie on the P facets of B scenes."""

    texture: Tensor  # (B, P) int64
    centre: Tensor  # (B, P, 2) texture pixel at the facet's centre
    reach: Tensor  # (B, P, 2) texture pixels per unit of a and b
    gain: Tensor  # (B, P)


class ScenePairs:
    """Renders pairs of views of scenes in space.

    Each pixel is sampled bilinearly from the level of its texture's image pyramid that has about one pixel per image
    pixel there. Large facets show their texture mirrored past its borders.

    Args:
        textures: gray images, each (H, W) uint8, all on one device; a pyramid of each is kept.
        config: what to render; defaults to ``SceneConfig()``.
        weights: relative frequency of each texture; equal if left out.

    Raises:
        ValueError: no texture, a texture with another shape, weights of another length, or a device without float64.
        TypeError: a texture that is not uint8.
    """

    def __init__(
        self,
        textures: Iterable[Tensor],
        config: SceneConfig | None = None,
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.config = config or SceneConfig()
        pyramids = [texture_pyramid(texture) for texture in textures]
        if not pyramids:
            raise ValueError("textures must hold at least one image, got none")
        weights = [1.0] * len(pyramids) if weights is None else weights
        if len(weights) != len(pyramids):
            raise ValueError(f"weights must have one value per texture, got {len(weights)}")
        device = pyramids[0][0].device
        check_has_float64("textures", device)
        self._weights = torch.tensor(weights, dtype=torch.float64, device=device)
        # All levels of all textures in one row of bytes, so that one gather serves every facet of every scene.
        self._texels = torch.cat([level.flatten() for levels in pyramids for level in levels])
        self._activity = torch.stack([texture_activity(levels[0]) for levels in pyramids])
        self._deepest = max(len(levels) for levels in pyramids)
        table, start = [], 0
        for levels in pyramids:
            rows = []
            for depth, level in enumerate(levels):
                rows.append((start, *level.shape[::-1], 2**depth, *levels[0].shape[::-1]))
                start += level.numel()
            table += rows + [rows[-1]] * (self._deepest - len(rows))
        starts, *sides = zip(*table, strict=True)
        self._starts = torch.tensor(starts, device=device)
        # Of each level: width, height, reduction; then width and height of the whole texture.
        self._sides = torch.tensor(sides, device=device, dtype=torch.float32)

    def __call__(self, batch: int, size_hw: tuple[int, int], generator: torch.Generator) -> SceneBatch:
        """The same as `sample`."""
        return self.sample(batch, size_hw, generator)

    def sample(self, batch: int, size_hw: tuple[int, int], generator: torch.Generator) -> SceneBatch:
        """Render a batch of pairs, at full precision under autocast too; everything random comes from the generator.

        Convention:
            As `SceneBatch`.

        Args:
            batch: number of pairs B.
            size_hw: height H and width W of every image, pixels.
            generator: source of randomness, on the textures' device.

        Returns:
            The pairs. Depth, intrinsics and pose are exact up to float32 rounding.

        Raises:
            ValueError: batch or a size is not positive.
        """
        height, width = size_hw
        if batch < 1 or height < 1 or width < 1:
            raise ValueError(f"batch and size_hw must be positive, got {batch} and {size_hw}")
        with torch.no_grad(), torch.autocast(self._texels.device.type, enabled=False):
            return self._sample_pairs(batch, size_hw, generator)

    def _sample_pairs(self, batch: int, size_hw: tuple[int, int], generator: torch.Generator) -> SceneBatch:
        facets = draw_facets(batch, self.config.panels, self.config.boxes, generator)
        K, T = _draw_cameras(facets, size_hw, generator, self.config)
        coats = self._draw_coats(facets, K[:batch, 0, 0], generator)
        sky = torch.rand(batch, 1, generator=generator, device=generator.device)
        both = Facets(facets.frames.repeat(2, 1, 1, 1), facets.present.repeat(2, 1), facets.single)
        views = look(both, K, T)
        views = views._replace(inverse=views.inverse.float())
        points = pixel_centres(size_hw, generator.device).flatten(0, 1)
        rays = view_rays(views, points)
        hits = cast(views, rays)
        seen = hits.inverse_depth > 0
        depth = (seen / torch.where(seen, hits.inverse_depth, 1)).unflatten(1, size_hw)
        gray = self._shade(
            views, view_rays(views, points), hits, _Coats(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in coats))
        )
        images = torch.where(seen, gray, sky.repeat(2, 1)).view(2 * batch, 1, *size_hw)
        if self.config.photometric is not None:
            images = photometric_change(images, generator, self.config.photometric)
        T_0to1 = T[batch:] @ torch.linalg.inv(T[:batch])
        image0, image1 = images.split(batch)
        depth0, depth1 = depth.split(batch)
        K0, K1 = K.float().split(batch)
        return SceneBatch(image0, image1, depth0, depth1, K0, K1, T_0to1.float())

    def _draw_coats(self, facets: Facets, focal: Tensor, generator: torch.Generator) -> _Coats:
        """Textures at a random place; facets that can, show a part that lies wholly inside."""
        batch, count = facets.present.shape
        u = torch.rand(2, batch, count, generator=generator, device=focal.device, dtype=torch.float64)
        texture = torch.multinomial(self._weights, batch * count, replacement=True, generator=generator)
        texture = texture.view(batch, count)
        sizes = self._sides[3:, texture * self._deepest].movedim(0, -1).double()
        low, high = map(math.log, self.config.zoom)
        zoom = torch.exp(low + (high - low) * u[0])[..., None]
        half = torch.linalg.vector_norm(facets.frames[..., :2], dim=-2)
        away = (DISTANCE + facets.frames[..., 2, 2]).clamp_min(1.0)
        frontal = half * (focal[:, None] / away)[..., None]  # half sides in image pixels
        fitting = (sizes / (2 * frontal)).amin(-1, keepdim=True).clamp_min(self.config.zoom[0])
        reach = frontal * torch.minimum(zoom, fitting)
        margin = torch.where((2 * reach <= sizes).all(-1, keepdim=True), reach, 0)
        places = torch.rand(_PLACES, batch, count, 2, generator=generator, device=focal.device, dtype=torch.float64)
        centre = self._first_with_content(texture, margin + (sizes - 2 * margin) * places, reach, sizes)
        return _Coats(texture, centre.float(), reach.float(), (1 - self.config.shading * u[1]).float())

    def _first_with_content(self, texture: Tensor, centres: Tensor, reach: Tensor, sizes: Tensor) -> Tensor:
        """Of centres (K, B, P, 2), the first whose surroundings show detail, else the most detailed; (B, P, 2)."""
        steps = torch.linspace(-0.75, 0.75, 4, device=reach.device, dtype=reach.dtype)
        offsets = torch.cartesian_prod(steps, steps) * reach[..., None, :]
        around = centres[..., None, :] + offsets  # (K, B, P, 16, 2)
        side = self._activity.shape[-1]
        cells = (around / sizes[..., None, :] * side).long().clamp(0, side - 1)
        activity = self._activity[texture[..., None], cells[..., 1], cells[..., 0]].mean(-1)
        chosen = torch.where(activity >= self.config.min_activity, torch.inf, activity).argmax(0)
        return centres.gather(0, chosen[None, ..., None].expand(1, -1, -1, 2))[0]

    def _shade(self, views: Views, rays: Tensor, hits: Hits, coats: _Coats) -> Tensor:
        """Gray values (N, M) of the hits, in [0, 1]."""
        rows = torch.arange(len(views.ids), device=views.ids.device)[:, None]
        texture, centre, reach, gain = (coat[rows, views.ids] for coat in coats)  # of the views' facets
        layout = torch.diag_embed(F.pad(reach, (0, 1), value=1.0))
        layout[..., :2, 2] = centre
        to_texture = layout @ views.inverse  # ray to texture pixel times inverse depth
        # The Jacobian of a homography (a, b, 1) w = G (x, y, 1) has the determinant det G / w^3.
        area = torch.linalg.det(to_texture.double()).abs() / views.K[:, :1, 0].square()
        level_at_unit_depth = 0.5 * torch.log2(area.clamp_min(1e-30)).float()
        depth = 1 / hits.inverse_depth.clamp_min(1e-6)
        level = level_at_unit_depth.gather(1, hits.facet) + 1.5 * torch.log2(depth)
        level = level.round_().clamp_(0, self._deepest - 1).long()
        x, y = (scaled_coordinates(to_texture, rays, hits.facet) * depth[:, None]).unbind(1)
        light = gain.gather(1, hits.facet)
        row = texture.gather(1, hits.facet) * self._deepest + level
        return self._sample(row.flatten(), x.flatten(), y.flatten()).view_as(x) * light

    def _sample(self, row: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Bilinear gray in [0, 1] of table rows (M,) at coordinates (M,) of the full textures, mirrored."""
        width, height, reduction, full_width, full_height = (side.index_select(0, row) for side in self._sides)
        left, right, across = _neighbours(x, full_width, width, reduction)
        top, bottom, down = _neighbours(y, full_height, height, reduction)
        start, width = self._starts.index_select(0, row), width.long()
        top, bottom = top.mul_(width).add_(start), bottom.mul_(width).add_(start)
        places = (top + left, top + right, bottom + left, bottom + right)
        corners = [self._texels.index_select(0, place).float() for place in places]
        upper = torch.lerp(corners[0], corners[1], across)
        return torch.lerp(upper, torch.lerp(corners[2], corners[3], across), down).div_(255)


def pixel_centres(size_hw: tuple[int, int], device: torch.device) -> Tensor:
    """(H, W, 2) float32 (x, y) = (column + 0.5, row + 0.5)."""
    height, width = size_hw
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([x, y], dim=-1) + 0.5


def _neighbours(position: Tensor, full: Tensor, side: Tensor, reduction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of a reduced level on both sides of a coordinate of the full texture, and the weight of the second."""
    folded = position.remainder(2 * full)
    inner = torch.minimum(folded, 2 * full - folded).div_(reduction).sub_(0.5)
    inner = torch.minimum(inner, side - 1).clamp_min_(0)
    first = inner.long()
    second = torch.minimum(inner + 1, side - 1).long()
    return first, second, inner.frac_()


def _draw_cameras(
    facets: Facets, size_hw: tuple[int, int], generator: torch.Generator, config: SceneConfig
) -> tuple[Tensor, Tensor]:
    """K (2B, 3, 3) and world-to-camera T (2B, 4, 4), first all cameras 0, then all cameras 1; float64.

    Of several motions the first counts that keeps the overlap; if there is none, the last one much reduced.
    """
    batch = len(facets.frames)
    base = torch.rand(1, batch, 8, generator=generator, device=generator.device, dtype=torch.float64)
    draws = torch.rand(config.tries, batch, 8, generator=generator, device=generator.device, dtype=torch.float64)
    motion = draws * 2 - 1
    motion = torch.cat([motion, torch.stack([motion[-1] * factor for factor in _SHRINKS])])
    count = len(motion)
    candidates = [
        _camera(base.expand_as(motion).flatten(0, 1), half * motion.flatten(0, 1), size_hw, config)
        for half in (-0.5, 0.5)
    ]
    repeated = Facets(facets.frames.repeat(count, 1, 1, 1), facets.present.repeat(count, 1), facets.single)
    views0, views1 = (look(repeated, K, T) for K, T in candidates)
    share = torch.minimum(visible_share(views0, views1, size_hw), visible_share(views1, views0, size_hw))
    passes = (share >= config.min_overlap).view(count, batch)
    passes[-1] = True
    chosen = passes.to(torch.int8).argmax(0) * batch + torch.arange(batch, device=base.device)
    K, T = (torch.cat([first[chosen], second[chosen]]) for first, second in zip(*candidates, strict=True))
    return K, T


def _camera(base: Tensor, motion: Tensor, size_hw: tuple[int, int], config: SceneConfig) -> tuple[Tensor, Tensor]:
    """Intrinsics and pose (N, ...) of cameras from draws (N, 8): the pair's in [0, 1], its own in [-0.5, 0.5]."""
    height, width = size_hw
    yaw = math.radians(config.yaw) * motion[:, 0] + 0.5 * (base[:, 0] - 0.5)
    pitch = math.radians(config.pitch) * motion[:, 1] + 0.3 * base[:, 1]  # from a little above
    roll = math.radians(config.roll) * motion[:, 2] + 0.2 * (base[:, 2] - 0.5)
    distance = DISTANCE * torch.exp(math.log(config.distance_ratio) * motion[:, 3])
    target = DISTANCE * config.shift * motion[:, 4:7] + 0.4 * (base[:, 3:6] - 0.5)
    low, high = map(math.log, config.focal)
    focal = max(height, width) * torch.exp(
        low + (high - low) * base[:, 6] + math.log(config.focal_ratio) * motion[:, 7]
    )
    K = torch.diag_embed(torch.stack([focal, focal, torch.ones_like(focal)], -1))
    K[:, 0, 2] = width * (0.5 + 0.1 * motion[:, 1])
    K[:, 1, 2] = height * (0.5 + 0.1 * motion[:, 0])
    return K, camera_pose(yaw, pitch, roll, distance, target)
