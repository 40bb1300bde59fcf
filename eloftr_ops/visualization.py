# SPDX-License-Identifier: Apache-2.0
"""Matches as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt
from torch import Tensor

from eloftr_ops.errors import ArgumentError
from eloftr_ops.io import atomic_write, check_output
from eloftr_ops.match_page import MatchPage, PagePicture, match_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure, SubFigure

__all__ = ["PAGE_SUFFIXES", "PICTURE_SUFFIXES", "MatchPage", "draw_matches", "is_page"]

PAGE_SUFFIXES = (".html", ".htm")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg", *PAGE_SUFFIXES)
_WIDTH = 12.0  # inches, of a figure made here
_DPI = 160
_GAP = 0.012  # between the images, of their joint width
_OUTLIER = "#ff3b30"
_COLORS = ("viridis", 0.3, 1.0)  # its dark end would vanish in dark parts of the images
_PAGE_COLORS = 64
_Array = npt.NDArray[Any]
Backend = Literal["matplotlib", "html"]


@overload
def draw_matches(
    image0: Tensor | _Array,
    image1: Tensor | _Array,
    keypoints0: Tensor | _Array,
    keypoints1: Tensor | _Array,
    confidence: Tensor | _Array | None = None,
    inliers: Tensor | _Array | None = None,
    *,
    backend: Literal["html"],
    max_matches: int | None = 200,
    path: str | os.PathLike[str] | None = None,
    ax: None = None,
    size0_wh: tuple[int, int] | None = None,
    size1_wh: tuple[int, int] | None = None,
) -> MatchPage: ...


@overload
def draw_matches(
    image0: Tensor | _Array,
    image1: Tensor | _Array,
    keypoints0: Tensor | _Array,
    keypoints1: Tensor | _Array,
    confidence: Tensor | _Array | None = None,
    inliers: Tensor | _Array | None = None,
    *,
    backend: Literal["matplotlib"] = "matplotlib",
    max_matches: int | None = 200,
    path: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
    size0_wh: tuple[int, int] | None = None,
    size1_wh: tuple[int, int] | None = None,
) -> Figure | SubFigure: ...


@overload
def draw_matches(
    image0: Tensor | _Array,
    image1: Tensor | _Array,
    keypoints0: Tensor | _Array,
    keypoints1: Tensor | _Array,
    confidence: Tensor | _Array | None = None,
    inliers: Tensor | _Array | None = None,
    *,
    backend: Backend,
    max_matches: int | None = 200,
    path: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
    size0_wh: tuple[int, int] | None = None,
    size1_wh: tuple[int, int] | None = None,
) -> Figure | SubFigure | MatchPage: ...


def draw_matches(
    image0: Tensor | _Array,
    image1: Tensor | _Array,
    keypoints0: Tensor | _Array,
    keypoints1: Tensor | _Array,
    confidence: Tensor | _Array | None = None,
    inliers: Tensor | _Array | None = None,
    *,
    backend: Backend = "matplotlib",
    max_matches: int | None = 200,
    path: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
    size0_wh: tuple[int, int] | None = None,
    size1_wh: tuple[int, int] | None = None,
) -> Figure | SubFigure | MatchPage:
    """Draw two images side by side and lines between their matches, coloured by confidence.

    With more matches than ``max_matches`` every k-th in order of confidence is drawn, so that the picture shows good
    and poor ones in their true proportion. Outliers, where ``inliers`` is given, are thin and red, below the others.
    The caption counts all matches. No global state of matplotlib is used or changed.

    ``backend="html"`` gives a page instead, one file with all it needs. It has a slider for the least confidence, shows
    the match under the pointer, zooms with the wheel and moves with a drag. It holds all matches; ``max_matches`` is
    how many lines it draws at first.

    Convention:
        Keypoints are (x, y) in pixels of the images passed here; the centre of pixel (x, y) is (x + 0.5, y + 0.5).
        Both images are drawn at the same scale. Zero matches give the two images alone.

    Args:
        image0: gray or RGB; a tensor (1, C, H, W), (C, H, W) or (H, W), or an array (H, W) or (H, W, C); floating
            point in [0, 1] or uint8; any device; gradients are dropped.
        image1: likewise, of any size.
        keypoints0: (M, 2).
        keypoints1: (M, 2).
        confidence: (M,); 0 to 1, or any scores, which then take the colour scale's whole range. None: one colour.
        inliers: (M,) bool.
        backend: "matplotlib" or "html".
        max_matches: the most lines drawn; None for all.
        path: file to write, .png .jpg .webp .pdf or .svg, for a page .html; whole or not at all.
        ax: axes to draw into; None makes a figure. Not for a page.
        size0_wh: for a page: (width, height) of the original image 0, in whose pixels the page gives coordinates. None:
            those of ``image0``.
        size1_wh: the same of image 1.

    Returns:
        The figure, or the page.

    Raises:
        ValueError: shapes or sizes that do not fit, ``max_matches`` is negative, an unknown backend, or axes for a
            page.
        FileError: ``path`` has another suffix or cannot be written (a ValueError too).
    """
    _check_backend(backend, ax, size0_wh, size1_wh)
    if path is not None:
        allowed = [suffix for suffix in PICTURE_SUFFIXES if (suffix in PAGE_SUFFIXES) == (backend == "html")]
        check_output(path, allowed)
    if max_matches is not None and max_matches < 0:
        raise ValueError(f"max_matches: expected 0 or more, or None, got {max_matches}.")
    picture0, picture1 = _picture("image0", image0), _picture("image1", image1)
    points0, points1, scores, good = _matches(keypoints0, keypoints1, confidence, inliers)
    if backend == "html":
        pictures = _page_picture(picture0, size0_wh), _page_picture(picture1, size1_wh)
        page = _page(pictures, points0, points1, scores, good, max_matches)
        if path is not None:
            with atomic_write(path) as file:
                file.write(page.html.encode())
        return page
    width = picture0.shape[1] + picture1.shape[1]
    size = (width * (1 + _GAP), max(picture0.shape[0], picture1.shape[0]))
    axes = ax if ax is not None else _new_axes(size)
    offset0, offset1 = _show(axes, picture0, picture1, size)
    drawn = _spread(scores, len(points0), max_matches)
    segments = np.stack([points0 + offset0, points1 + offset1], axis=1)
    _draw_lines(axes, segments, scores, good, drawn)
    axes.set_title(_caption(len(points0), good, len(drawn)), fontsize=9, color="#444444", loc="left", pad=5)
    if path is not None:
        _save(axes.figure, Path(path))
    return axes.figure


def is_page(path: str | os.PathLike[str] | None) -> bool:
    """Whether a file of this name is a page, not a picture."""
    return path is not None and Path(path).suffix.lower() in PAGE_SUFFIXES


def _check_backend(backend: str, ax: Axes | None, *sizes_wh: tuple[int, int] | None) -> None:
    if backend not in ("matplotlib", "html"):
        raise ArgumentError("backend", f"expected matplotlib or html, got {backend!r}.")
    if backend == "html" and ax is not None:
        raise ArgumentError(
            "ax", "expected None, because a page has no axes. Pass backend='matplotlib' to draw into axes."
        )
    for name, size in zip(("size0_wh", "size1_wh"), sizes_wh, strict=True):
        if size is not None and min(size) < 1:
            raise ArgumentError(name, f"expected a positive (width, height), got {size}.")


def _page_picture(pixels: _Array, size_wh: tuple[int, int] | None) -> PagePicture:
    height, width = pixels.shape[:2]
    return PagePicture(pixels, (1.0, 1.0) if size_wh is None else (size_wh[0] / width, size_wh[1] / height))


def _page(
    pictures: tuple[PagePicture, PagePicture],
    points0: _Array,
    points1: _Array,
    scores: _Array | None,
    good: _Array | None,
    max_matches: int | None,
) -> MatchPage:
    from matplotlib.colors import to_hex

    return match_page(
        pictures,
        points0,
        points1,
        scores,
        good,
        limits=_limits(scores),
        colors=[to_hex(color) for color in _scale(_PAGE_COLORS)],
        outlier=_OUTLIER,
        max_matches=max_matches,
    )


def _scale(count: int) -> _Array:
    """Colours from the least confidence to the largest, (count, 4)."""
    from matplotlib import colormaps

    name, low, high = _COLORS
    colors: _Array = colormaps[name](np.linspace(low, high, count))
    return colors


def _new_axes(size: tuple[float, float]) -> Axes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _WIDTH * size[1] / size[0] + 0.3), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _show(axes: Axes, picture0: _Array, picture1: _Array, size: tuple[float, float]) -> tuple[_Array, _Array]:
    """Put both images on the axes, centred in height; where their top left corners are."""
    offsets = []
    for picture, left in ((picture0, 0.0), (picture1, size[0] - picture1.shape[1])):
        height, width = picture.shape[:2]
        top = (size[1] - height) / 2
        # The extent makes the data's coordinates the keypoints' frame: the image's left border is 0, not -0.5.
        extent = (left, left + width, top + height, top)
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="antialiased")
        offsets.append(np.array([left, top]))
    axes.set_xlim(0, size[0])
    axes.set_ylim(size[1], 0)
    axes.set_axis_off()
    return offsets[0], offsets[1]


def _draw_lines(
    axes: Axes, segments: _Array, scores: _Array | None, good: _Array | None, drawn: npt.NDArray[np.intp]
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap, Normalize

    normalize = Normalize(*_limits(scores))
    mappable = ScalarMappable(normalize, ListedColormap(_scale(256)))
    segments = segments[drawn]
    scores = None if scores is None else scores[drawn]
    colors = mappable.to_rgba(np.full(len(segments), normalize.vmax) if scores is None else scores)
    kept = np.ones(len(segments), dtype=np.bool_) if good is None else good[drawn]
    # The most confident last, on top.
    order = np.flatnonzero(kept) if scores is None else np.flatnonzero(kept)[np.argsort(scores[kept], kind="stable")]
    bad = np.flatnonzero(~kept)
    axes.add_collection(LineCollection(list(segments[bad]), colors=_OUTLIER, linewidths=0.4, alpha=0.55))
    axes.add_collection(LineCollection(list(segments[order]), colors=list(colors[order]), linewidths=0.7, alpha=0.75))
    for side in (0, 1):
        x, y = segments[:, side].T
        axes.scatter(x[bad], y[bad], s=2.5, color=_OUTLIER, linewidths=0, alpha=0.8, zorder=3)
        axes.scatter(x[order], y[order], s=5, c=colors[order], linewidths=0, zorder=3)
    if scores is not None and len(segments):
        _draw_bar(axes, mappable)


def _draw_bar(axes: Axes, mappable: ScalarMappable) -> None:
    beside = axes.inset_axes((1.008, 0.0, 0.007, 1.0))
    bar = axes.figure.colorbar(mappable, cax=beside)
    bar.outline.set_visible(False)
    beside.tick_params(labelsize=7, length=2, color="#888888", labelcolor="#444444")
    bar.set_label("confidence", fontsize=8, color="#444444")


def _limits(scores: _Array | None) -> tuple[float, float]:
    """Of the colour scale: 0 to 1 for probabilities, so that pictures can be compared; else the data's own."""
    finite = np.zeros(0) if scores is None else scores[np.isfinite(scores)]
    if not finite.size or (finite.min() >= 0 and finite.max() <= 1):
        return 0.0, 1.0
    return float(finite.min()), float(finite.max())


def _spread(scores: _Array | None, count: int, limit: int | None) -> npt.NDArray[np.intp]:
    """Indices of at most ``limit`` matches, evenly spaced in order of confidence."""
    order = np.arange(count) if scores is None else np.argsort(-scores, kind="stable")
    if limit is None or count <= limit:
        return order
    return order[np.linspace(0, count - 1, limit).round().astype(np.intp)] if limit else order[:0]


def _caption(count: int, good: _Array | None, drawn: int) -> str:
    parts = ["no match" if not count else f"{count:,} match" + ("es" if count > 1 else "")]
    if good is not None and count:
        parts.append(f"{int(good.sum()):,} inliers")
    if drawn < count:
        parts.append(f"{drawn:,} drawn")
    return "   ·   ".join(parts)


def _save(figure: Any, path: Path) -> None:
    suffix = path.suffix[1:].lower()
    # A third of the time for a tenth more bytes.
    encoder = {"pil_kwargs": {"compress_level": 1}} if suffix == "png" else {}
    with atomic_write(path) as file:
        figure.savefig(file, format=suffix, bbox_inches="tight", pad_inches=0.05, **encoder)


def _array(values: Tensor | _Array) -> _Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _picture(name: str, image: Tensor | _Array) -> _Array:
    """(H, W) or (H, W, 3) floating point in [0, 1]."""
    array = _array(image)
    if isinstance(image, Tensor):
        if array.ndim == 4 and array.shape[0] == 1:
            array = array[0]
        if array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise ValueError(
            f"{name}: expected one gray or RGB image, a tensor (1, C, H, W), (C, H, W) or (H, W) or an array (H, W) or "
            f"(H, W, C), got {tuple(image.shape)}."
        )
    scaled: _Array = np.clip(array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1), 0, 1)
    return scaled


def _matches(
    keypoints0: Tensor | _Array,
    keypoints1: Tensor | _Array,
    confidence: Tensor | _Array | None,
    inliers: Tensor | _Array | None,
) -> tuple[_Array, _Array, _Array | None, _Array | None]:
    points0 = _points("keypoints0", keypoints0, None)
    count = len(points0)
    points1 = _points("keypoints1", keypoints1, count)
    scores = None if confidence is None else _values("confidence", confidence, count).astype(np.float64)
    good = None if inliers is None else _values("inliers", inliers, count).astype(np.bool_)
    return points0, points1, scores, good


def _points(name: str, keypoints: Tensor | _Array, count: int | None) -> _Array:
    array = _array(keypoints)
    if array.ndim != 2 or array.shape[1] != 2 or (count is not None and len(array) != count):
        expected = "(M, 2)" if count is None else f"(M, 2) = ({count}, 2)"
        raise ValueError(f"{name}: expected shape {expected}, got {array.shape}.")
    return array.astype(np.float64)


def _values(name: str, values: Tensor | _Array, count: int) -> _Array:
    array = _array(values)
    if array.shape != (count,):
        raise ValueError(f"{name}: expected one value per match, (M,) = ({count},), got {array.shape}.")
    return array
