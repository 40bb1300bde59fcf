# SPDX-License-Identifier: Apache-2.0
"""Large images, matched tile by tile at full resolution; a coarse pass says which parts correspond."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_ops.checks import MIN_SIZE
from eloftr_ops.images import LoadedImage

__all__ = ["TileMatches", "match_tiles"]

CELL = 8  # pixels of the matcher's grid, which the tiles keep
_NEIGHBOURS = 64  # coarse matches that a tile's place in image 1 is fitted to
_LEAST = 6  # coarse matches around a tile; with fewer it shows nothing of the other image
_ROUNDS = 10  # of the robust fit
_LARGEST = 1.5  # of a window in image 1, in tiles
_SAME_SCALE = 0.7  # a smaller ratio of scales than this is evened out
_Array = npt.NDArray[np.float64]
_Match = Callable[[LoadedImage, LoadedImage], tuple[Tensor, Tensor, Tensor]]


class TileMatches(NamedTuple):
    """Matches in pixels of the images at full size."""

    keypoints0: Tensor  # (M, 2) float32
    keypoints1: Tensor  # (M, 2) float32
    confidence: Tensor  # (M,) float32


class _Box(NamedTuple):
    """Half-open, in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> int:
        return max(self.right - self.left, self.bottom - self.top)

    def within(self, width: int, height: int) -> _Box:
        """The part inside an image."""
        return _Box(max(self.left, 0), max(self.top, 0), min(self.right, width), min(self.bottom, height))


def match_tiles(
    match: _Match,
    image0: LoadedImage,
    image1: LoadedImage,
    coarse0: _Array,
    coarse1: _Array,
    *,
    tile: int,
) -> TileMatches:
    """Match two images at full size, tile by tile.

    Image 0 is cut into cores that touch without overlap. A tile is a core and a halo around it. An affine map, fitted
    robustly to the coarse matches next to the tile, gives the window of image 1 that shows the same. Where the scales
    of both differ, the finer one is reduced. A match belongs to the tile whose core holds its keypoint in image 0, so
    that none counts twice; where two tiles claim one cell of image 1, the more confident claim wins.

    Memory is that of the two images and of one pair of tiles.

    Args:
        match: the matcher: two images in, ``keypoints0`` (M, 2), ``keypoints1`` (M, 2), ``confidence`` (M,) out, in
            pixels of those images.
        image0: at full size.
        image1: at full size.
        coarse0: (N, 2), keypoints of the coarse pass in pixels of ``image0``.
        coarse1: (N, 2), their partners in ``image1``.
        tile: long side of a tile in pixels; rounded down to a multiple of 32.
    """
    tile = tile // 32 * 32
    halo = tile // 8 // CELL * CELL
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    owners: list[Tensor] = []
    for number, (core, box0) in enumerate(_tiles(image0.size_wh, tile - 2 * halo, halo)):
        placed = _window(core, box0, coarse0, coarse1, image1.size_wh, halo)
        if placed is None:
            continue
        box1, scale = placed
        tile0 = _cut(image0, box0, min(1.0, scale) if scale < _SAME_SCALE else 1.0)
        reduced = 1 / scale if scale > 1 / _SAME_SCALE else 1.0
        tile1 = _cut(image1, box1, min(reduced, _LARGEST * tile / box1.size))
        if min(*tile0.size_wh, *tile1.size_wh) < MIN_SIZE:
            continue
        keypoints0, keypoints1, confidence = match(tile0, tile1)
        keypoints0 = tile0.to_original(keypoints0) + keypoints0.new_tensor(box0[:2])
        keypoints1 = tile1.to_original(keypoints1) + keypoints1.new_tensor(box1[:2])
        low, high = keypoints0.new_tensor(core[:2]), keypoints0.new_tensor(core[2:])
        own = ((keypoints0 >= low) & (keypoints0 < high)).all(1)
        parts.append((keypoints0[own], keypoints1[own], confidence[own]))
        owners.append(torch.full((int(own.sum()),), number))
    if not parts:
        return TileMatches(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))
    keypoints0, keypoints1, confidence = (torch.cat(field) for field in zip(*parts, strict=True))
    kept = _undisputed(keypoints1, confidence, torch.cat(owners))
    return TileMatches(keypoints0[kept], keypoints1[kept], confidence[kept])


def _tiles(size_wh: tuple[int, int], core: int, halo: int) -> Iterator[tuple[_Box, _Box]]:
    """Cores that cover the image, and their tiles."""
    width, height = size_wh
    for top in range(0, height, core):
        for left in range(0, width, core):
            inner = _Box(left, top, left + core, top + core).within(width, height)
            outer = _Box(left - halo, top - halo, left + core + halo, top + core + halo)
            yield inner, outer.within(width, height)


def _window(
    core: _Box, tile: _Box, coarse0: _Array, coarse1: _Array, size_wh: tuple[int, int], halo: int
) -> tuple[_Box, float] | None:
    """The part of image 1 that shows a tile, and its scale, pixels of image 1 by pixels of image 0."""
    centre = np.array([core.left + core.right, core.top + core.bottom]) / 2
    distance = np.abs(coarse0 - centre).max(1)
    near = np.argsort(distance, kind="stable")[:_NEIGHBOURS]
    near = near[distance[near] <= tile.size]
    if len(near) < _LEAST:
        return None
    points0, points1 = coarse0[near] - centre, coarse1[near]
    affine, errors = _robust_affine(points0, points1)
    scale = float(np.sqrt(abs(np.linalg.det(affine[:2]))))
    if not np.isfinite(affine).all() or not 1e-2 < scale < 1e2:
        return None
    corners = np.array([[x, y] for x in (tile.left, tile.right) for y in (tile.top, tile.bottom)]) - centre
    shown = np.c_[corners, np.ones(4)] @ affine
    # Depth moves points off the map: they are let in, as far as most of them go.
    reach = float(np.clip(3 * np.median(errors), halo * scale / 2, tile.size * scale / 2))
    left, top = np.floor((shown.min(0) - reach) / CELL) * CELL
    right, bottom = np.ceil((shown.max(0) + reach) / CELL) * CELL
    box = _Box(int(left), int(top), int(right), int(bottom)).within(*size_wh)
    return (box, scale) if min(box.right - box.left, box.bottom - box.top) > 0 else None


def _robust_affine(points0: _Array, points1: _Array) -> tuple[_Array, _Array]:
    """(3, 2) map of rows (x, y, 1), and the errors of the points: least squares, reweighted by Cauchy's kernel."""
    rows = np.c_[points0, np.ones(len(points0))]
    weights = np.ones(len(rows))
    # A start that no wrong match can draw away: a shift by the median.
    affine = np.r_[np.eye(2), np.median(points1 - points0, axis=0)[None]]
    for _ in range(_ROUNDS):
        errors = np.linalg.norm(rows @ affine - points1, axis=1)
        spread = max(float(np.median(errors)), 1.0)
        weights = 1 / (1 + (errors / spread) ** 2)
        root = np.sqrt(weights)[:, None]
        affine = np.linalg.lstsq(root * rows, root * points1, rcond=None)[0]
    return affine, np.linalg.norm(rows @ affine - points1, axis=1)


def _cut(image: LoadedImage, box: _Box, factor: float) -> LoadedImage:
    """A part of an image, reduced by a factor of at most 1."""
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    pixels = image.image[..., rows, columns]
    mask = None if image.mask is None else image.mask[:, rows, columns]
    size_wh = (box.right - box.left, box.bottom - box.top)
    if factor < 1:
        size = [max(1, round(side * factor)) for side in size_wh[::-1]]
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        if mask is not None:
            mask = F.interpolate(mask[None].float(), size, mode="area")[0] >= 0.5
    return LoadedImage(pixels.contiguous(), mask, size_wh)


def _undisputed(keypoints1: Tensor, confidence: Tensor, owners: Tensor) -> Tensor:
    """Indexes of matches whose cell of image 1 belongs to their tile: the tile of its most confident match."""
    cells = (keypoints1 / CELL).floor().long()
    _, cell = torch.unique(cells, dim=0, return_inverse=True)
    count = int(cell.max()) + 1 if len(cell) else 0
    best = torch.zeros(count, dtype=confidence.dtype).scatter_reduce(0, cell, confidence, "amax")
    first = confidence == best[cell]
    owner = torch.full((count,), len(owners)).scatter_reduce(0, cell[first], owners[first], "amin")
    return (owner[cell] == owners).nonzero()[:, 0]
