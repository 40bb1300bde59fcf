# SPDX-License-Identifier: Apache-2.0
"""What the loaders of labelled image pairs share: the pair, its files, and what happens to broken ones.

Convention:
    Image points are (x, y) with the centre of pixel (x, y) at (x + 0.5, y + 0.5). Intrinsics and homographies of a
    pair belong to that frame and to its images as they are given, resized or not. ``T_0to1`` maps coordinates of
    camera 0 to those of camera 1 (``X1 = R X0 + t``), depth is z, 0 where it is unknown.

    Labels belong to the pixels as they are stored, as in COLMAP: the EXIF orientation is not applied.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from eloftr_ops.data.labels import (
    checked_homography,
    checked_intrinsics,
    checked_pose,
    share_by_depth,
    share_by_homography,
)
from eloftr_ops.io import FileError, read_image

_ON_ITS_SIDE = 5  # EXIF orientations from here on exchange width and height


class ImagePair(NamedTuple):
    """Two images and what is known about them; with a leading batch dimension after `collate_pairs`.

    Convention:
        See the module. Padding is at the right and at the bottom, so that it changes no coordinate.
    """

    image0: Tensor  # (1, H0, W0) float32 in [0, 1]
    image1: Tensor  # (1, H1, W1)
    mask0: Tensor  # (H0, W0) bool, False on padding and where the file is transparent
    mask1: Tensor  # (H1, W1) bool
    scale0: Tensor  # (2,) float32, pixels of the file per pixel of image0, x and y
    scale1: Tensor  # (2,)
    name: str | list[str]  # of the two files; a list in a batch
    K0: Tensor | None = None  # (3, 3) float32
    K1: Tensor | None = None
    T_0to1: Tensor | None = None  # (4, 4) float32
    H_0to1: Tensor | None = None  # (3, 3) float32
    depth0: Tensor | None = None  # (H0, W0) float32
    depth1: Tensor | None = None  # (H1, W1)


@dataclass(frozen=True)
class PairOptions:
    """How pairs are read.

    Attributes:
        resize: length in pixels that a longer side is reduced to; None keeps the size. Images are never enlarged.
        shorter_side: ``resize`` is meant for the shorter side instead of the longer one.
        pad_to: (H, W) that images are filled up to, so that pairs can be batched; None for no padding.
        min_overlap: pairs are refused unless each image shows more than this share of the other, as far as depth or
            homography tell; None for no check.
        strict: raise an error at a pair that cannot be used, instead of passing it over.
    """

    resize: int | None = None
    shorter_side: bool = False
    pad_to: tuple[int, int] | None = None
    min_overlap: float | None = 0.0
    strict: bool = False

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize: expected at least 1 pixel, got {self.resize}. Pass None to keep the size.")
        if self.pad_to is not None and min(self.pad_to) < 1:
            raise ValueError(f"pad_to: expected a positive (height, width), got {self.pad_to}.")
        if self.min_overlap is not None and not 0 <= self.min_overlap < 1:
            raise ValueError(f"min_overlap: expected a share in [0, 1), got {self.min_overlap}.")


class View(NamedTuple):
    """One image of a pair as its loader knows it: the labels are for the file's own size."""

    path: Path
    K: npt.NDArray[np.float64] | None = None  # (3, 3), project frame
    depth: npt.NDArray[np.float32] | None = None  # (H, W) of the file
    labelled_size_wh: tuple[int, int] | None = None  # size that K is for; None: the file's


class LabelledPairs(Dataset[ImagePair], ABC):
    """Base of the loaders: a map-style data set whose unusable pairs are passed over and counted, or are errors.

    ``pairs.load(i)`` reads pair i and raises ``FileError``. ``pairs[i]`` does so too if ``options.strict``; otherwise
    it gives the next usable pair, so that batches keep their size. Iterating gives every usable pair once. What was
    passed over is in ``skipped`` (of this process) and announced by a ``UserWarning`` with the count, at 1, 10, 100
    ... pairs and at the end of an iteration.

    Args:
        options: how pairs are read.

    Attributes:
        options: as given.
        skipped: reason by index of each pair that was passed over.
    """

    def __init__(self, options: PairOptions | None = None) -> None:
        self.options = options or PairOptions()
        self.skipped: dict[int, str] = {}

    @abstractmethod
    def __len__(self) -> int:
        """Number of pairs, usable or not."""

    @abstractmethod
    def load(self, index: int) -> ImagePair:
        """Read pair ``index``.

        Raises:
            FileError: it cannot be used; the message names the file.
        """

    def __getitem__(self, index: int) -> ImagePair:
        """Pair ``index``, or the next usable one; see the class.

        Raises:
            IndexError: no such pair.
            FileError: the pair cannot be used and ``options.strict``, or no pair can be.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected less than {len(self)} in magnitude, got {index}.")
        for offset in range(len(self)):
            pair = self._usable((index + offset) % len(self))
            if pair is not None:
                return pair
        raise FileError(f"none of the {len(self)} pairs can be used; the first: {self.skipped[0]}")

    def __iter__(self) -> Iterator[ImagePair]:
        """Every usable pair, once."""
        missing = 0
        for index in range(len(self)):
            pair = self._usable(index, announce=False)
            if pair is None:
                missing += 1
            else:
                yield pair
        if missing:
            last = next(reversed(self.skipped.values()))
            warnings.warn(f"{missing} of {len(self)} pairs skipped; the last: {last}", stacklevel=2)

    def _usable(self, index: int, *, announce: bool = True) -> ImagePair | None:
        if index in self.skipped:
            return None
        try:
            return self.load(index)
        except FileError as error:
            if self.options.strict:
                raise
            self.skipped[index] = str(error)
        count = len(self.skipped)
        if announce and count == 10 ** (len(str(count)) - 1):
            warnings.warn(f"{count} of {len(self)} pairs skipped so far: {self.skipped[index]}", stacklevel=3)
        return None


def assemble(
    view0: View,
    view1: View,
    options: PairOptions,
    *,
    T_0to1: npt.NDArray[np.float64] | None = None,
    H_0to1: npt.NDArray[np.float64] | None = None,
) -> ImagePair:
    """Read both images and bring all labels to their sizes.

    Raises:
        FileError: a broken image, a size that does not fit, impossible labels, too little overlap.
    """
    name = f"{view0.path}, {view1.path}"
    image0, mask0, scale0, K0, depth0 = _read_view(view0, options)
    image1, mask1, scale1, K1, depth1 = _read_view(view1, options)
    pair = ImagePair(image0, image1, mask0, mask1, scale0.float(), scale1.float(), name, depth0=depth0, depth1=depth1)
    if T_0to1 is not None:
        pair = pair._replace(K0=_float32(K0), K1=_float32(K1), T_0to1=_float32(checked_pose(T_0to1, name)))
    if H_0to1 is not None:
        to0, to1 = (torch.diag(F.pad(scale, (0, 1), value=1.0)) for scale in (scale0, scale1))
        H = torch.linalg.inv(to1) @ torch.from_numpy(checked_homography(H_0to1, name)) @ to0
        H = (H / H[2, 2] if H[2, 2] != 0 else H).float()
        if not torch.isfinite(H).all():
            raise FileError(f"{name}: expected a homography of moderate numbers, got {H_0to1.tolist()}.")
        pair = pair._replace(H_0to1=H)
    if options.min_overlap is not None:
        shares = pair_overlap(pair)
        if shares is not None and min(shares) <= options.min_overlap:
            raise FileError(f"{name}: the images overlap by {min(shares):.3f}, not more than {options.min_overlap}.")
    return pair


def collate_pairs(pairs: Sequence[ImagePair]) -> ImagePair:
    """Batch pairs of equal sizes and labels, for a ``DataLoader``; every tensor gets a leading dimension.

    Raises:
        ValueError: no pair, other sizes, or a label that only some pairs have.
    """
    if not pairs:
        raise ValueError("pairs: expected at least one, got none.")
    columns: dict[str, Tensor | list[str] | None] = {}
    for field in ImagePair._fields:
        values = [getattr(pair, field) for pair in pairs]
        if field == "name":
            columns[field] = [str(value) for value in values]
        elif all(value is None for value in values):
            columns[field] = None
        elif any(value is None for value in values):
            raise ValueError(f"pairs: expected {field} in all pairs or in none. Do not mix data sets in a batch.")
        elif len({value.shape for value in values}) > 1:
            shapes = sorted({tuple(value.shape) for value in values})
            raise ValueError(f"pairs: expected {field} of one shape, got {shapes}. Set resize and pad_to.")
        else:
            columns[field] = torch.stack(values)
    return ImagePair(**columns)  # type: ignore[arg-type]


def pair_overlap(pair: ImagePair) -> tuple[float, float] | None:
    """Share of image 0 that image 1 shows, and the other way round; None where the labels do not tell.

    Counted on a grid of points; with depth, points of unknown depth are not counted at all, and occluded ones not as
    shown.
    """
    if pair.H_0to1 is not None:
        H = pair.H_0to1.double()
        return (
            share_by_homography(H, pair.mask0, pair.mask1),
            share_by_homography(torch.linalg.inv_ex(H).inverse, pair.mask1, pair.mask0),
        )
    if pair.T_0to1 is None or pair.depth0 is None or pair.depth1 is None or pair.K0 is None or pair.K1 is None:
        return None
    T = pair.T_0to1
    return (
        share_by_depth(pair.depth0, pair.depth1, pair.K0, pair.K1, T),
        share_by_depth(pair.depth1, pair.depth0, pair.K1, pair.K0, torch.linalg.inv(T)),
    )


def _read_view(
    view: View, options: PairOptions
) -> tuple[Tensor, Tensor, Tensor, npt.NDArray[np.float64] | None, Tensor | None]:
    """Image, mask, scale, intrinsics and depth at the size that is given out."""
    loaded = read_image(view.path, resize=_longer_side(view.path, options), upright=False)
    width, height = loaded.size_wh
    image = loaded.image[0]
    mask = torch.ones(height, width, dtype=torch.bool) if loaded.mask is None else loaded.mask[0]
    depth = None if view.depth is None else _resized_depth(view, loaded.original_size_wh, (height, width))
    K = None
    if view.K is not None:
        labelled = view.labelled_size_wh or loaded.original_size_wh
        K = np.diag([width / labelled[0], height / labelled[1], 1.0]) @ checked_intrinsics(view.K, str(view.path))
    scale = torch.tensor(loaded.scale_xy, dtype=torch.float64)
    if options.pad_to is None:
        return image, mask, scale, K, depth
    below, right = options.pad_to[0] - height, options.pad_to[1] - width
    if min(below, right) < 0:
        raise FileError(
            f"{view.path}: {width} x {height} pixels do not fit into pad_to = {options.pad_to} (height, width). "
            "Set resize."
        )
    padding = (0, right, 0, below)
    return (
        F.pad(image, padding),
        F.pad(mask, padding),
        scale,
        K,
        None if depth is None else F.pad(depth, padding),
    )


def stored_size_wh(path: Path) -> tuple[int, int]:
    """(width, height) of an image as its rows are stored, whatever its EXIF orientation.

    Raises:
        FileError: missing or broken.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= _ON_ITS_SIDE
            if image.format == "TIFF" and turned:  # whose size Pillow gives as it is seen
                width, height = height, width
    except Exception as error:  # decoders of broken data raise whatever they stumble over
        raise FileError(f"{path}: missing or broken image: {error}.") from error
    return width, height


def _longer_side(path: Path, options: PairOptions) -> int | None:
    if options.resize is None or not options.shorter_side:
        return options.resize
    try:
        width, height = stored_size_wh(path)
    except FileError:
        return None  # read_image says what is wrong
    aspect: float = max(width, height) / min(width, height)
    return max(1, round(options.resize * aspect))


def _resized_depth(view: View, original_wh: tuple[int, int], size_hw: tuple[int, int]) -> Tensor:
    """Depth at the image's size by the nearest value: means across an edge would be surfaces that do not exist."""
    depth = np.asarray(view.depth, dtype=np.float32)
    if depth.shape != original_wh[::-1]:
        raise FileError(
            f"{view.path}: the image has {original_wh[0]} x {original_wh[1]} pixels, its depth map has shape "
            f"{depth.shape} (height, width)."
        )
    rows, columns = (
        torch.arange(size).add(0.5).mul(full / size).long() for size, full in zip(size_hw, depth.shape, strict=True)
    )
    resized = torch.from_numpy(depth)[rows[:, None], columns]
    return torch.where(torch.isfinite(resized) & (resized > 0), resized, 0)


def _float32(matrix: npt.NDArray[np.float64] | None) -> Tensor | None:
    return None if matrix is None else torch.from_numpy(matrix).float()
