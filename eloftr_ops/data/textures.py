# SPDX-License-Identifier: Apache-2.0
"""Gray textures that synthetic views are rendered from: folders of photos and procedural drawings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


class PhotoTextures:
    """The photos of a folder as gray images in memory.

    Files ending in jpg, jpeg or png are read once, in name order, with their EXIF orientation applied. Files
    that cannot be decoded are left out with one ``UserWarning`` that counts and names them.

    Args:
        folder: directory searched (not recursively).
        min_side: photos whose shorter side in pixels, after the reduction, is smaller are left out.
        max_side: photos whose longer side, in pixels, is larger are reduced to it.

    Attributes:
        images: the textures, each (H, W) uint8 on the CPU.
        broken: files that could not be decoded.

    Raises:
        ValueError: the folder does not exist, holds no usable photo, or a side is not positive.
    """

    images: tuple[torch.Tensor, ...]
    broken: tuple[Path, ...]

    def __init__(self, folder: Path, min_side: int = 128, max_side: int = 1536) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"folder must be a directory of photos, got {folder}")
        if not 1 <= min_side <= max_side:
            raise ValueError(f"sides must satisfy 1 <= min_side <= max_side, got {min_side} and {max_side}")
        images: list[torch.Tensor] = []
        broken: list[Path] = []
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES):
            try:
                image = _read_gray(path, max_side)
            except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError):
                broken.append(path)
                continue
            if min(image.shape) >= min_side:
                images.append(image)
        if broken:
            names = ", ".join(p.name for p in broken[:5]) + (", ..." if len(broken) > 5 else "")
            warnings.warn(f"{len(broken)} photo(s) could not be read and are left out: {names}", stacklevel=2)
        if not images:
            raise ValueError(f"folder must hold a readable photo with sides >= {min_side}, got none in {folder}")
        self.images = tuple(images)
        self.broken = tuple(broken)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.images)


def procedural_textures(generator: torch.Generator, count: int, size: int) -> torch.Tensor:
    """Gray textures drawn by chance: multi-octave noise with polygons, blobs, lines, checkers and strokes.

    Args:
        generator: CPU source of randomness; the textures depend on it alone.
        count: number of textures N.
        size: side in pixels, at least 16.

    Returns:
        (N, size, size) uint8 textures on the CPU.

    Raises:
        ValueError: count is negative or size is below 16.
    """
    if count < 0 or size < 16:
        raise ValueError(f"count must be >= 0 and size >= 16, got count={count} and size={size}")
    if count == 0:
        return torch.empty(0, size, size, dtype=torch.uint8)
    background = _octave_noise(generator, count, size)
    contrast = torch.rand(count, 1, 1, generator=generator) * 0.8 + 0.2
    background = ((background - 0.5) * contrast + 0.5) * 255
    drawn = torch.stack([_draw(item.to(torch.uint8), generator) for item in background]).float()
    # Noise over the shapes as well: perfectly flat areas are rarer in photos than in drawings.
    grain = _octave_noise(generator, count, size) - 0.5
    strength = torch.rand(count, 1, 1, generator=generator) * 60
    return (drawn + grain * strength).clamp_(0, 255).to(torch.uint8)


def _read_gray(path: Path, max_side: int) -> torch.Tensor:
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("L")
    if max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, dtype=np.uint8))


def _octave_noise(generator: torch.Generator, count: int, size: int) -> torch.Tensor:
    """Noise (count, size, size) in [0, 1] whose spectrum falls off differently in every texture."""
    decay = torch.rand(count, 1, 1, 1, generator=generator) * 0.6 + 0.35
    noise = torch.zeros(count, 1, size, size)
    for octave in range(2, int(math.log2(size)) + 1):
        coarse = torch.randn(count, 1, 2**octave, 2**octave, generator=generator)
        noise += decay ** (octave - 2) * F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    noise = noise[:, 0]
    spread = noise.std(dim=(1, 2), keepdim=True).clamp_min(1e-6)
    return (0.5 + 0.2 * (noise - noise.mean(dim=(1, 2), keepdim=True)) / spread).clamp_(0, 1)


def _draw(background: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a random mix of shapes on a (S, S) uint8 background, at twice the size for smooth edges."""
    side = background.shape[0] * 2
    canvas = Image.fromarray(background.numpy()).resize((side, side), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    painters = (_paint_polygons, _paint_blobs, _paint_lines, _paint_checker, _paint_strokes)
    chosen = (torch.rand(len(painters), generator=generator) < 0.6).tolist()
    order = torch.randperm(len(painters), generator=generator).tolist()
    for index in order:
        if chosen[index]:
            painters[index](pen, side, generator)
    return torch.from_numpy(np.array(canvas.reduce(2), dtype=np.uint8))


def _uniform(generator: torch.Generator, rows: int, columns: int) -> list[list[float]]:
    values: list[list[float]] = torch.rand(rows, columns, generator=generator).tolist()
    return values


def _paint_polygons(pen: ImageDraw.ImageDraw, side: int, generator: torch.Generator) -> None:
    count = int(torch.randint(5, 40, (), generator=generator))
    for x, y, size, turn, gray, corners, *radii in _uniform(generator, count, 12):
        radius = side * 0.2 * size**2 + side * 0.01
        n = 3 + int(corners * 4)
        angles = [2 * math.pi * (turn + k / n) for k in range(n)]
        reach = [radius * (0.4 + 0.6 * r) for r in radii[:n]]
        points = [(x * side + r * math.cos(a), y * side + r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]
        pen.polygon(points, fill=int(gray * 255))


def _paint_blobs(pen: ImageDraw.ImageDraw, side: int, generator: torch.Generator) -> None:
    count = int(torch.randint(10, 120, (), generator=generator))
    for x, y, size, stretch, gray in _uniform(generator, count, 5):
        rx = side * (0.004 + 0.06 * size**3)
        ry = rx * (0.5 + stretch)
        pen.ellipse((x * side - rx, y * side - ry, x * side + rx, y * side + ry), fill=int(gray * 255))


def _paint_lines(pen: ImageDraw.ImageDraw, side: int, generator: torch.Generator) -> None:
    count = int(torch.randint(5, 40, (), generator=generator))
    for x0, y0, x1, y1, width, gray in _uniform(generator, count, 6):
        ends = (x0 * side, y0 * side, x1 * side, y1 * side)
        pen.line(ends, fill=int(gray * 255), width=2 + int(width**2 * side * 0.015))


def _paint_checker(pen: ImageDraw.ImageDraw, side: int, generator: torch.Generator) -> None:
    """A few slanted chequered patches; grays vary from cell to cell, so that cells can be told apart."""
    for x, y, cell, turn, dark, light in _uniform(generator, 3, 6):
        step = side * (0.01 + 0.04 * cell)
        cos, sin = step * math.cos(turn * 6.2832), step * math.sin(turn * 6.2832)
        for k, (jitter,) in enumerate(_uniform(generator, 49, 1)):
            i, j = k % 7, k // 7
            cx, cy = x * side + i * cos - j * sin, y * side + i * sin + j * cos
            gray = (dark if (i + j) % 2 else light) * 200 + jitter * 55
            pen.polygon(
                [(cx, cy), (cx + cos, cy + sin), (cx + cos - sin, cy + sin + cos), (cx - sin, cy + cos)],
                fill=int(gray),
            )


def _paint_strokes(pen: ImageDraw.ImageDraw, side: int, generator: torch.Generator) -> None:
    """Rows of small random polylines that look like writing."""
    for x, y, height, turn, gray in _uniform(generator, 6, 5):
        glyph = side * (0.01 + 0.025 * height)
        cos, sin = math.cos((turn - 0.5) * 1.5), math.sin((turn - 0.5) * 1.5)
        for k, shape in enumerate(_uniform(generator, 24, 8)):
            origin = k * glyph * 1.1
            local = [(origin + shape[i] * glyph, shape[i + 1] * glyph) for i in (0, 2, 4, 6)]
            points = [(x * side + u * cos - v * sin, y * side + u * sin + v * cos) for u, v in local]
            pen.line(points, fill=int(gray * 255), width=max(2, int(glyph * 0.12)))
