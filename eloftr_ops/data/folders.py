# SPDX-License-Identifier: Apache-2.0
"""Training on a folder of images without labels: their views under random homographies."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import torch
from torch import Tensor

from eloftr_ops.data.synthetic import HomographyPairs, SyntheticConfig
from eloftr_ops.io import FileError, read_image

__all__ = ["folder_pairs", "read_textures"]

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"})


def read_textures(
    folder: str | Path,
    *,
    min_side: int = 128,
    max_side: int = 1536,
    max_images: int | None = 2000,
    seed: int = 0,
    strict: bool = False,
) -> list[Tensor]:
    """Read the images of a folder and of its folders as textures for `HomographyPairs` or `ScenePairs`.

    Files that cannot be read and images that are too small are left out with one ``UserWarning`` that counts them.

    Args:
        folder: searched for jpg, png, webp, tiff, bmp, ppm and pgm files, in name order.
        min_side: least shorter side in pixels, after the reduction.
        max_side: a longer side that is larger is reduced to it.
        max_images: of more files, so many are chosen at random; None for all. All images are held in memory, about
            1.5 MB each at the default size.
        seed: of that choice.
        strict: raise an error at a file that cannot be used instead.

    Returns:
        Gray images, each (H, W) uint8 on the CPU.

    Raises:
        FileError: a file that cannot be used, if strict.
        ValueError: no such folder, no image that can be used, or sides that do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder: expected a folder of images, got {folder}.")
    if not 1 <= min_side <= max_side:
        raise ValueError(f"min_side, max_side: expected 1 <= min_side <= max_side, got {min_side} and {max_side}.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if max_images is not None and len(files) > max_images:
        files = sorted(random.Random(seed).sample(files, max_images))
    read = [_read_texture(path, min_side, max_side, strict) for path in files]
    textures = [texture for texture in read if isinstance(texture, Tensor)]
    problems = [problem for problem in read if isinstance(problem, str)]
    if problems:
        warnings.warn(f"{len(problems)} of {len(files)} images left out; the last: {problems[-1]}", stacklevel=2)
    if not textures:
        raise ValueError(f"folder: expected at least one image with sides >= {min_side}, got none in {folder}.")
    return textures


def folder_pairs(
    folder: str | Path,
    config: SyntheticConfig | None = None,
    *,
    min_side: int = 128,
    max_side: int = 1536,
    max_images: int | None = 2000,
    seed: int = 0,
    strict: bool = False,
    device: torch.device | str = "cpu",
) -> HomographyPairs:
    """Pairs of views of a folder's images under random homographies: all that training without labels needs.

    Convention:
        As `HomographyPairs`: ``H_0to1`` for (x, y) with pixel centres at (x + 0.5, y + 0.5).

    Args:
        folder: see `read_textures`, as for the arguments that follow ``config``.
        config: what to render; defaults to ``SyntheticConfig()``.
        min_side: least shorter side, pixels.
        max_side: largest longer side, pixels.
        max_images: most images held.
        seed: of their choice.
        strict: raise at a file that cannot be used.
        device: that the textures are kept and rendered on.

    Raises:
        FileError: a file that cannot be used, if strict.
        ValueError: as `read_textures`.
    """
    textures = read_textures(
        folder, min_side=min_side, max_side=max_side, max_images=max_images, seed=seed, strict=strict
    )
    return HomographyPairs([texture.to(device) for texture in textures], config)


def _read_texture(path: Path, min_side: int, max_side: int, strict: bool) -> Tensor | str:
    """The texture, or what is wrong with the file."""
    try:
        loaded = read_image(path, resize=max_side)
        if min(loaded.size_wh) < min_side:
            raise FileError(f"{path}: expected sides of at least {min_side} pixels, got {loaded.size_wh}.")
    except FileError as error:
        if strict:
            raise
        return str(error)
    return (loaded.image[0, 0] * 255).round().to(torch.uint8)
