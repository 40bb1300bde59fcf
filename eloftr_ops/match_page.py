# SPDX-License-Identifier: Apache-2.0
"""Matches as one HTML file to look at in a browser: a slider, matches under the pointer, zoom; no network."""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["MatchPage", "PagePicture", "match_page"]

_GAP = 0.012  # between the images, of their joint width
_JPEG_QUALITY = 95
_FRAME_HEIGHT = 560  # pixels, in a notebook
_Array = npt.NDArray[Any]


@dataclass(frozen=True, repr=False)
class MatchPage:
    """A page with two images and their matches: one HTML document that holds all it needs."""

    html: str

    def __repr__(self) -> str:
        return f"MatchPage({len(self.html):,} characters of HTML)"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.frame()

    def frame(self, height: int = _FRAME_HEIGHT, *, slider: bool = True) -> str:
        """The page inside an element that can stand in another page.

        Args:
            height: of the element, CSS pixels.
            slider: show the slider; False where the page around it has its own.
        """
        document = self.html if slider else self.html.replace("<body>", '<body class="without-slider">', 1)
        return (
            f'<iframe srcdoc="{html.escape(document)}" title="matches" sandbox="allow-scripts" '
            f'style="width: 100%; height: {height}px; border: 0"></iframe>'
        )


@dataclass(frozen=True)
class PagePicture:
    """One of the two images of a page."""

    pixels: _Array  # (H, W) or (H, W, 3) floating point in [0, 1]
    scale_xy: tuple[float, float] = (1.0, 1.0)  # pixels of the original image in one pixel of this one


def match_page(
    pictures: tuple[PagePicture, PagePicture],
    points0: _Array,
    points1: _Array,
    scores: _Array | None,
    good: _Array | None,
    *,
    limits: tuple[float, float],
    colors: list[str],
    outlier: str,
    max_matches: int | None,
) -> MatchPage:
    """The page of some matches; `eloftr_ops.visualization.draw_matches` checks its input and calls it.

    Args:
        pictures: image 0 and image 1.
        points0: (M, 2) x, y in pixels of image 0, the centre of pixel (x, y) at (x + 0.5, y + 0.5).
        points1: (M, 2).
        scores: (M,); None: all lines have the last colour.
        good: (M,) bool; None: nothing is known about outliers.
        limits: least and largest score of the colour scale and of the slider.
        colors: of the scale, CSS.
        outlier: the colour of outliers, CSS.
        max_matches: how many lines are drawn at first; None for all. The page holds all.
    """
    sizes = [(picture.pixels.shape[1], picture.pixels.shape[0]) for picture in pictures]
    width = sum(size[0] for size in sizes)
    joint = (width * (1 + _GAP), max(size[1] for size in sizes))
    lefts = (0.0, joint[0] - sizes[1][0])
    data = {
        "images": [
            {
                "source": _encoded(picture.pixels),
                "width": size[0],
                "height": size[1],
                "corner": [left, (joint[1] - size[1]) / 2],
                "scale": picture.scale_xy,
            }
            for picture, size, left in zip(pictures, sizes, lefts, strict=True)
        ],
        "size": joint,
        "points": [np.round(column, 3).tolist() for column in (*points0.T, *points1.T)],
        "confidence": None if scores is None else [_number(value) for value in scores],
        "inlier": None if good is None else good.astype(int).tolist(),
        "limits": limits,
        "colors": colors,
        "outlier": outlier,
        "lines": max_matches,
    }
    place = importlib.resources.files("eloftr_ops") / "assets" / "matches.html"
    # In a script element only "<" could end it.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return MatchPage(place.read_text(encoding="utf-8").replace("@DATA@", text))


def _number(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _encoded(pixels: _Array) -> str:
    """An image as a data URL."""
    file = io.BytesIO()
    image = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
    image.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
