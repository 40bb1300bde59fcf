# SPDX-License-Identifier: Apache-2.0
"""What a pair of images may look like, and what an image becomes before a backend resizes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

Source = Any  # a Pillow image, an array, a tensor, a path or a URL

_EXPECTED = "images: expected a pair [image0, image1] or a list of pairs [[image0, image1], ...], got"
_CHANNELS = (1, 3, 4)


def flat_pairs(images: Any) -> list[Source]:
    """A pair or a list of pairs as one list of 2 B images.

    Raises:
        ValueError: anything else; the message says what was found.
    """
    if isinstance(images, (Image.Image, np.ndarray, Tensor, str)):
        raise ValueError(f"{_EXPECTED} one {type(images).__name__}.")
    if not isinstance(images, Sequence):
        raise ValueError(f"{_EXPECTED} {type(images).__name__}.")
    if not images:
        raise ValueError(f"{_EXPECTED} an empty list.")
    nested = [not is_image(image) and isinstance(image, Sequence) for image in images]
    if any(nested):
        return [image for index, pair in enumerate(images) for image in _pair(index, pair)]
    for index, image in enumerate(images):
        _check(f"images[{index}]", image)
    if len(images) != 2:
        advice = " Put the two images of each pair into a list of their own." if len(images) > 2 else ""
        raise ValueError(f"{_EXPECTED} a list of {len(images)} image{'s'[: len(images) > 1]}.{advice}")
    return list(images)


def is_image(image: Any) -> bool:
    """A kind of image, whatever its shape."""
    return isinstance(image, (Image.Image, np.ndarray, Tensor, str))


def size_hw(image: Any) -> tuple[int, int]:
    """Height and width of a Pillow image or an array of any layout."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    shape = tuple(image.shape)
    if len(shape) == 2:
        return int(shape[0]), int(shape[1])
    height, width = shape[1:] if shape[0] in _CHANNELS else shape[:2]
    return int(height), int(width)


def plain_image(image: Image.Image) -> npt.NDArray[Any]:
    """A Pillow image as (H, W) or (H, W, 3) uint8; transparent pixels become white, 16 bits become 8.

    Raises:
        ValueError: an image of 32-bit integers or floats, whose range is not known.
    """
    if image.mode.startswith("I;16"):
        return np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"images: expected 8 or 16 bits per channel, got a Pillow image of mode {image.mode}, whose range is not "
            "known. Scale it to 0..255 and convert it: image.convert('L')."
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        image = Image.alpha_composite(white, layers).convert("RGB")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    pixels: npt.NDArray[Any] = np.array(image)  # a copy, which may be written to
    return pixels


def _pair(index: int, pair: Any) -> Sequence[Source]:
    if is_image(pair) or not isinstance(pair, Sequence) or len(pair) != 2:
        count = f"{len(pair)} images" if isinstance(pair, (list, tuple)) else type(pair).__name__
        raise ValueError(f"images[{index}]: expected a pair [image0, image1], got {count}.")
    for side, image in enumerate(pair):
        _check(f"images[{index}][{side}]", image)
    return pair


def _check(name: str, image: Any) -> None:
    if isinstance(image, (Image.Image, str)):
        return
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(f"{name}: expected a Pillow image, an array or a tensor, got {type(image).__name__}.")
    shape = tuple(image.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"{name}: expected an image of 2 or 3 dimensions, got shape {shape}.")
    if len(shape) == 3 and shape[0] not in _CHANNELS and shape[2] not in _CHANNELS:
        raise ValueError(f"{name}: expected 1, 3 or 4 channels, first or last, got shape {shape}.")
