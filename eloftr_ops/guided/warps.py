# SPDX-License-Identifier: Apache-2.0
"""Maps from the frame of a look to an image, and what is seen through them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Source", "Warp", "scaling", "seen_through", "tilted"]

_NOWHERE = -1e6  # where points behind the camera of a homography go: outside every image
_LEAST_DEPTH = 1e-6
_MOST_SAMPLES = 8  # per pixel and axis
_PROBES = 9  # points per axis at which a warp's scale is taken


class Warp(NamedTuple):
    """A map from the pixels of a frame to the pixels of an image: a homography, and a smooth field added to it.

    Convention:
        The centre of pixel (x, y) is (x + 0.5, y + 0.5) in both. A warp is a constant: it carries no gradient of its
        own, but `to_image` passes on the gradient of the points.
    """

    matrix: Tensor  # (3, 3) float64
    size_wh: tuple[int, int]  # of the frame
    field: Tensor | None = None  # (2, h, w) float64, pixels of the image, on a grid from border to border of the frame
    lasting: bool = False  # whether the frame comes again: its features are worth keeping

    def to_image(self, points: Tensor) -> Tensor:
        """Points (N, 2) of the frame in pixels of the image, float64; differentiable.

        Points on or behind the horizon of the homography come out far outside the image.
        """
        x = points.double()
        matrix = self.matrix.to(x.device)
        homogeneous = x @ matrix[:, :2].T + matrix[:, 2]
        depth = homogeneous[:, 2:]
        ahead = depth > _LEAST_DEPTH
        y = torch.where(ahead, homogeneous[:, :2] / torch.where(ahead, depth, 1.0), _NOWHERE)
        if self.field is None:
            return y
        extent = x.new_tensor(self.size_wh)
        grid = (2 * x / extent - 1)[None, None]
        shift = F.grid_sample(
            self.field.to(x.device)[None], grid, mode="bilinear", padding_mode="border", align_corners=True
        )
        return y + shift[0, :, 0].T

    def from_image(self, points: Tensor) -> Tensor:
        """Points (N, 2) of the image in pixels of the frame, float64, for a warp without a field."""
        return Warp(torch.linalg.inv(self.matrix), self.size_wh).to_image(points)

    def grid(self, count: int) -> Tensor:
        """``count`` x ``count`` points (N, 2) spread over the frame, float64."""
        xs, ys = (torch.linspace(0.5, side - 0.5, count, dtype=torch.float64) for side in self.size_wh)
        return torch.cartesian_prod(xs, ys)


class Source(NamedTuple):
    """An image, with its reductions by powers of two, and the size that it counts as: its working size."""

    levels: tuple[Tensor, ...]  # (1, 1, H / 2^n, W / 2^n)
    mask: Tensor | None  # (1, 1, H, W), zero where there is no image
    size_wh: tuple[int, int]  # working size: the pixels that warps map to

    def covers(self, points: Tensor) -> Tensor:
        """(N,) bool: which points (N, 2) lie on the image, and not on a masked pixel."""
        inside = ((points >= 0) & (points <= points.new_tensor(self.size_wh))).all(1)
        if self.mask is None:
            return inside
        height, width = self.mask.shape[-2:]
        pixels = (points.detach() * points.new_tensor([width, height]) / points.new_tensor(self.size_wh)).long()
        mask = self.mask[0, 0].to(points.device)
        return inside & (mask[pixels[:, 1].clamp(0, height - 1), pixels[:, 0].clamp(0, width - 1)] > 0)

    def detached(self) -> Source:
        """The same without gradient."""
        return self._replace(levels=tuple(level.detach() for level in self.levels))

    @staticmethod
    def of(image: Tensor, mask: Tensor | None, size_wh: tuple[int, int]) -> Source:
        """An image (1, 1, H, W), and its mask (1, H, W); half precision becomes float32, which places are told in.

        Masked pixels become zero: what lies there does not matter, and must not reach its neighbours.
        """
        image = image if image.dtype is torch.float64 else image.float()
        if mask is not None:
            image = image.masked_fill(mask[:, None] == 0, 0)
        levels = [image]
        while min(levels[-1].shape[-2:]) >= 64 and len(levels) < 6:
            levels.append(F.avg_pool2d(levels[-1], 2))
        return Source(tuple(levels), None if mask is None else (mask != 0)[:, None].to(image.dtype), size_wh)


def scaling(size_wh: tuple[int, int], frame_wh: tuple[int, int]) -> Warp:
    """A frame that shows all of an image of the size ``size_wh``."""
    matrix = torch.diag(torch.tensor([size_wh[0] / frame_wh[0], size_wh[1] / frame_wh[1], 1.0], dtype=torch.float64))
    return Warp(matrix, frame_wh)


def tilted(size_wh: tuple[int, int], tilt: float, degrees: float, zoom: float = 1.0) -> Warp:
    """All of an image, turned by ``degrees``, then seen at a slant: ``tilt`` times narrower; ``zoom`` times smaller.

    A camera at the latitude arccos(1 / tilt) sees a plane so (Yu and Morel, "ASIFT", 2011).
    """
    width, height = size_wh
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64) @ turn.T
    low, high = corners.amin(0), corners.amax(0)
    shrink = torch.diag(torch.tensor([1 / (tilt * zoom), 1 / zoom], dtype=torch.float64))
    view = torch.eye(3, dtype=torch.float64)
    view[:2, :2] = shrink @ turn
    view[:2, 2] = -shrink @ low
    extent = shrink @ (high - low)
    frame_wh = (max(32, math.ceil(float(extent[0]) - 1e-6)), max(32, math.ceil(float(extent[1]) - 1e-6)))
    return Warp(torch.linalg.inv(view), frame_wh)


def scales_at(warp: Warp, points: Tensor) -> Tensor:
    """(N, 2): how many pixels of the image a step of one pixel of the frame covers, along x and along y."""
    steps = points.new_tensor([[0.5, 0.0], [0.0, 0.5]])
    along = [(warp.to_image(points + step) - warp.to_image(points - step)).norm(dim=1) for step in steps]
    return torch.stack(along, 1)


def seen_through(source: Source, warp: Warp) -> tuple[Tensor, Tensor | None]:
    """What a frame shows of an image: (1, 1, h, w) pixels, and (1, h, w) bool, True where there is image.

    A pixel of the frame is the mean of samples over its area, so that a reduction does not alias; in one direction
    more than in the other if the warp asks for it. Gradient flows to the image.

    Returns:
        The pixels; the mask, or None where the whole frame shows the image.
    """
    width, height = warp.size_wh
    image = source.levels[0]
    device, dtype = image.device, image.dtype
    ratio = image.shape[-1] / source.size_wh[0]  # pixels that there are for a pixel that counts
    if ratio == 1 and _shows_all(warp, source):
        return image, None if source.mask is None else source.mask[:, 0] > 0.5
    level, samples_x, samples_y = _sampling(warp, ratio, len(source.levels), source.size_wh)
    pixels = source.levels[level]
    ys = (torch.arange(height * samples_y, dtype=torch.float64) + 0.5) / samples_y
    xs = (torch.arange(width * samples_x, dtype=torch.float64) + 0.5) / samples_x
    points = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)
    mapped = warp.to_image(points.view(-1, 2)).view(*points.shape)
    extent = mapped.new_tensor(source.size_wh)
    inside = ((mapped >= 0) & (mapped <= extent)).all(-1).to(dtype)[None, None].to(device)
    grid = (2 * mapped / extent - 1).clamp(-2, 2).to(device=device, dtype=dtype)[None]
    # Torch's bicubic kernel would shift a linear ramp by up to an eighth of a pixel.
    values = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if source.mask is not None:
        seen = F.grid_sample(source.mask, grid, mode="nearest", padding_mode="border", align_corners=False)
        inside = inside * seen
    if samples_x * samples_y > 1:
        window = (samples_y, samples_x)
        values, inside = F.avg_pool2d(values, window), F.avg_pool2d(inside, window)
    visible = inside[:, 0] > 0.5
    return values, None if bool(visible.all()) else visible


def _shows_all(warp: Warp, source: Source) -> bool:
    """Whether the frame is the image itself."""
    eye = torch.eye(3, dtype=torch.float64)
    return warp.field is None and warp.size_wh == source.size_wh and bool((warp.matrix == eye).all())


def _sampling(warp: Warp, ratio: float, levels: int, size_wh: tuple[int, int]) -> tuple[int, int, int]:
    """The level to sample, and samples per pixel along x and y."""
    probes = warp.grid(_PROBES)
    mapped = warp.to_image(probes)
    inside = ((mapped >= 0) & (mapped <= mapped.new_tensor(size_wh))).all(1)
    scales = scales_at(warp, probes[inside]) * ratio if inside.any() else torch.ones(1, 2).double()
    scale_x, scale_y = torch.quantile(scales, 0.9, dim=0).tolist()
    level = min(levels - 1, max(0, math.floor(math.log2(max(min(scale_x, scale_y), 1e-6)))))
    samples = [min(_MOST_SAMPLES, max(1, round(scale / 2**level))) for scale in (scale_x, scale_y)]
    return level, samples[0], samples[1]
