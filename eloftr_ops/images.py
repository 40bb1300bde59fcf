# SPDX-License-Identifier: Apache-2.0
"""Images in: files, URLs, Pillow images, arrays and tensors become what the matcher takes.

Images are read with Pillow: it gives the EXIF orientation, palettes, alpha and samples of more than eight bits to
the caller instead of dropping them, and reads large JPEGs at a reduced scale.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from eloftr_ops.downloads import download, is_url
from eloftr_ops.errors import ArgumentError, FileError

__all__ = ["ImageSource", "LoadedImage", "load_image", "read_image"]

ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Tensor

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED_BACK = {**_UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_ON_ITS_SIDE = (5, 6, 7, 8)
_DEPTHS = (8, 10, 12, 14)  # bits that cameras store in words of 16
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_SLACK = 1e-3  # beyond [0, 1], of resampling and rounding
_Box = tuple[float, float, float, float]


class LoadedImage(NamedTuple):
    """An image ready for the matcher, and the way back to the pixels of its file.

    Convention:
        Both frames put the centre of pixel (x, y) at (x + 0.5, y + 0.5), so that they differ by a factor alone.
    """

    image: Tensor  # (1, 1, H, W) float32 in [0, 1]
    mask: Tensor | None  # (1, H, W) bool, False where the file has no image (see read_image); None: all of it
    original_size_wh: tuple[int, int]  # of the upright image before resizing
    color: npt.NDArray[np.uint8] | None = None  # (H, W, 3); None: a gray image, or colour was not asked for
    notes: tuple[str, ...] = ()  # what was assumed about the values of the file, in sentences

    @property
    def size_wh(self) -> tuple[int, int]:
        """(W, H) of ``image``."""
        return self.image.shape[-1], self.image.shape[-2]

    @property
    def scale_xy(self) -> tuple[float, float]:
        """(original width / W, original height / H)."""
        return self.original_size_wh[0] / self.size_wh[0], self.original_size_wh[1] / self.size_wh[1]

    def to_original(self, keypoints: Tensor) -> Tensor:
        """Keypoints (M, 2) of ``image`` in pixels of the original image; same dtype, differentiable."""
        return (keypoints.double() * keypoints.new_tensor(self.scale_xy, dtype=torch.float64)).to(keypoints.dtype)

    def from_original(self, keypoints: Tensor) -> Tensor:
        """Keypoints (M, 2) of the original image in pixels of ``image``; float64."""
        return keypoints.double() / keypoints.new_tensor(self.scale_xy, dtype=torch.float64)

    def reduced(self, resize: int) -> LoadedImage:
        """The same at a smaller size: long side ``resize``, filtered as :func:`read_image` does."""
        size_wh = _fitted(self.size_wh, resize)
        if size_wh == self.size_wh:
            return self
        box = (0, 0, *self.size_wh)
        pixels = np.clip(_resampled(Image.fromarray(self.image[0, 0].numpy()), size_wh, box, None), 0, 1)
        mask, color = None, self.color
        if self.mask is not None:
            seen = Image.fromarray(self.mask[0].numpy().astype(np.float32))
            mask = torch.from_numpy(_resampled(seen, size_wh, box, None) >= 0.5)[None]
        if color is not None:
            color = np.array(_resized(Image.fromarray(color), size_wh, box, None))
        return self._replace(image=torch.from_numpy(pixels)[None, None], mask=mask, color=color)


def read_image(
    path: str | os.PathLike[str], *, resize: int | None = None, color: bool = False, upright: bool = True
) -> LoadedImage:
    """Read an image file as the matcher takes it: gray, upright, in [0, 1].

    - Gray is ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B, as in kornia and OpenCV, not rounded to eight bits.
    - The EXIF orientation is applied: "original" below is the image as viewers show it.
    - Transparent images are composited over black; where they are wholly transparent the mask is False, and no match
      lies there.
    - 16-bit gray is divided by 65535. Where no value needs more than 8, 10, 12 or 14 bits, the largest value of so
      many bits is white, and ``notes`` says so. 32-bit integers are divided by 65535 if they lie in [0, 65535],
      floating point is taken as it is if it lies in [0, 1]; anything else has no known white and is stretched from
      its least value to its largest. NaN and infinity are masked. Colour of 16 bits keeps its upper eight.
    - Of an animation or a multi-page file the first image is read.

    Convention:
        The centre of pixel (x, y) is (x + 0.5, y + 0.5); resizing keeps the image's borders where they are, so that
        keypoints map to the original by multiplication alone: :meth:`LoadedImage.to_original`.

    Args:
        path: image file, or an http(s) URL (see `eloftr_ops.downloads.download`).
        resize: length in pixels that a longer long side is reduced to, aspect kept to the nearest pixel, with
            antialiasing (bicubic). Smaller images are left alone: enlarging adds no detail. None: never resize.
        color: keep the colours, too, for pictures.
        upright: apply the EXIF orientation. False keeps the rows and columns as they are stored, which is what
            intrinsics, depth maps and poses of data sets belong to.

    Raises:
        FileError: a file that is missing, a folder, a pipe, empty, not an image, broken, truncated, or larger than
            Pillow's limit against decompression bombs (179 megapixels); a URL that cannot be read.
        ValueError: ``resize`` is less than 1.
        TypeError: ``resize`` is not an int.
    """
    _check_resize(resize)
    with _reported(str(path)), contextlib.ExitStack() as stack:
        if isinstance(path, str) and is_url(path):
            file: IO[bytes] = io.BytesIO(download(path))
        else:
            _check_file(Path(path))
            # A file object, not a path: Pillow maps a path into memory, and then (13.0) skews uncompressed TIFFs
            # that lie on their side.
            file = stack.enter_context(Path(path).open("rb"))
        with warnings.catch_warnings():
            # Pillow warns at half of the size that it refuses: nothing that its user could act on.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = stack.enter_context(Image.open(file))
        return _decode(image, resize, color, upright=upright)


def load_image(name: str, source: ImageSource, *, resize: int | None = None, color: bool = True) -> LoadedImage:
    """An image of any kind as the matcher takes it; see :func:`read_image`.

    Convention:
        A file or URL is turned upright as its EXIF data say. Pillow images, arrays and tensors stay as they are.

    Args:
        name: what to call it in errors.
        source: a path, an http(s) URL, a ``PIL.Image.Image``, an array (H, W) or (H, W, C), or a tensor (H, W),
            (C, H, W) or (1, C, H, W), with one (gray), three (RGB) or four channels (RGBA); uint8, uint16, bool, or
            floating point in [0, 1].
        resize: as :func:`read_image`.
        color: as :func:`read_image`.

    Raises:
        FileError: as :func:`read_image`.
        ArgumentError: another type, shape or range.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_image(source, resize=resize, color=color)
    _check_resize(resize)
    if isinstance(source, Image.Image):
        with _reported(name):
            return _decode(source.copy(), resize, color, upright=False)
    return _from_array(name, _channels_last(name, source), resize, color)


def _check_resize(resize: int | None) -> None:
    if resize is not None and (isinstance(resize, bool) or not isinstance(resize, int)):
        raise TypeError(f"resize: expected an int or None, got {resize!r}.")
    if resize is not None and resize < 1:
        raise ValueError(f"resize: expected at least 1 pixel, got {resize}. Pass None to keep the size.")


@contextlib.contextmanager
def _reported(name: str) -> Any:
    """Turn what decoders raise into one sentence that names the image."""
    try:
        yield
    except FileError:
        raise
    except UnidentifiedImageError:
        raise FileError(f"{name}: not an image of a known format. Convert it to PNG or JPEG.") from None
    except Image.DecompressionBombError as error:
        raise FileError(f"{name}: too large. {error} Reduce the image first.") from error
    except PermissionError as error:
        raise FileError(f"{name}: no permission to read it.") from error
    except MemoryError as error:
        raise FileError(f"{name}: too large for this machine's memory. Reduce the image first.") from error
    except Exception as error:  # decoders of broken data raise whatever they stumble over
        raise FileError(f"{name}: broken or unsupported image: {error}.") from error


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise FileError(f"{path}: expected an image file, got a folder.")
        if not path.exists():
            raise FileError(f"{path}: no such file.")
        if not path.is_file():  # opening a pipe would wait for a writer
            raise FileError(f"{path}: expected an image file, got a pipe or a device.")
        if path.stat().st_size == 0:
            raise FileError(f"{path}: the file is empty.")
    except OSError as error:  # a folder that may not be searched, a name that is too long
        raise FileError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _decode(image: Image.Image, resize: int | None, color: bool, *, upright: bool) -> LoadedImage:
    stored_wh = image.size
    box: _Box | None = None
    if resize is not None and max(stored_wh) > resize:
        # Has an effect on JPEGs only. Twice the wanted size, so that the final, better filter still has something
        # to average. The box is the original's extent: the last column and row may be only partly covered.
        twice = _fitted(stored_wh, resize)
        drafted = image.draft(None, (2 * twice[0], 2 * twice[1]))
        box = drafted[1] if drafted is not None else None
    before = image.getexif().get(ExifTags.Base.Orientation, 1)
    image.load()
    if not upright and before != image.getexif().get(ExifTags.Base.Orientation, 1):
        image = image.transpose(_TURNED_BACK[before])  # a TIFF turns itself upright while loading
    if box is None:
        stored_wh = image.size
        box = (0, 0, *stored_wh)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if upright else 1
    gray, visible, white, notes = _gray(image)
    target = stored_wh if resize is None else _fitted(stored_wh, resize)
    turn = _UPRIGHT.get(orientation)
    pixels = np.clip(_resampled(gray, target, box, turn) / np.float32(white), 0, 1)
    mask = None if visible is None else _resampled(visible, target, box, turn) >= 0.5
    picture = _colors(image) if color else None
    if picture is not None:
        picture = _resized(picture, target, box, turn)
    return LoadedImage(
        torch.from_numpy(pixels)[None, None],
        None if mask is None or mask.all() else torch.from_numpy(mask)[None],
        (stored_wh[1], stored_wh[0]) if orientation in _ON_ITS_SIDE else stored_wh,
        None if picture is None else np.array(picture),
        notes,
    )


def _channels_last(name: str, source: Any) -> npt.NDArray[Any]:
    """(H, W) or (H, W, C) of an array or a tensor, gradients dropped."""
    if isinstance(source, Tensor):
        array: npt.NDArray[Any] = (
            (source.detach().float() if source.is_floating_point() else source.detach()).cpu().numpy()
        )
        if array.ndim == 4 and array.shape[0] == 1:
            array = array[0]
        if array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
    elif isinstance(source, np.ndarray):
        array = source
    else:
        raise ArgumentError(
            name,
            f"expected a path, a URL, a PIL image, an array or a tensor, got {type(source).__name__}.",
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise ArgumentError(
            name,
            "expected one gray, RGB or RGBA image, an array (H, W) or (H, W, C) or a tensor (H, W), (C, H, W) or "
            f"(1, C, H, W), got shape {tuple(source.shape)}.",
        )
    return array


def _from_array(name: str, array: npt.NDArray[Any], resize: int | None, color: bool) -> LoadedImage:
    if array.dtype == np.bool_:
        array = array.astype(np.float32)
    if array.dtype == np.uint16 and array.ndim == 2:
        return _decode(Image.fromarray(array), resize, color, upright=False)
    if array.dtype == np.uint8:
        return _decode(Image.fromarray(np.ascontiguousarray(array)), resize, color, upright=False)
    if array.dtype == np.uint16:
        array = array / np.float32(65535)
    if array.dtype.kind != "f":
        raise ArgumentError(
            name,
            f"expected uint8, uint16, bool or floating point in [0, 1], got {array.dtype}. Convert it first.",
        )
    values = array.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        hint = " Divide it by 255." if 1 < high <= 255 else ""
        raise ArgumentError(name, f"expected finite values in [0, 1], got [{low:g}, {high:g}].{hint}")
    values = np.clip(values, 0, 1)
    if values.ndim == 2:
        return _decode(Image.fromarray(values), resize, color, upright=False)
    return _from_colors(values, resize, color)


def _from_colors(values: npt.NDArray[np.float32], resize: int | None, color: bool) -> LoadedImage:
    """RGB or RGBA in floating point, which Pillow has no mode for."""
    rgb = values[..., :3] * (values[..., 3:] if values.shape[2] == 4 else np.float32(1))
    loaded = _decode(
        Image.fromarray(rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)), resize, False, upright=False
    )
    if values.shape[2] == 4 and not values[..., 3].all():
        visible = Image.fromarray((values[..., 3] > 0).astype(np.float32))
        seen = _resampled(visible, loaded.size_wh, (0, 0, *visible.size), None) >= 0.5
        loaded = loaded._replace(mask=None if seen.all() else torch.from_numpy(seen)[None])
    if color:
        picture = Image.fromarray((rgb * 255 + 0.5).astype(np.uint8))
        picture = _resized(picture, loaded.size_wh, (0, 0, *picture.size), None)
        loaded = loaded._replace(color=np.array(picture))
    return loaded


def _fitted(size_wh: tuple[int, int], resize: int) -> tuple[int, int]:
    """The size whose long side is ``resize``; the given one if that is not smaller."""
    factor = min(1.0, resize / max(size_wh))
    return max(1, round(size_wh[0] * factor)), max(1, round(size_wh[1] * factor))


def _resampled(
    image: Image.Image, size_wh: tuple[int, int], box: _Box, turn: Image.Transpose | None
) -> npt.NDArray[np.float32]:
    """A part of a mode F image at another size, turned upright, (H, W)."""
    return np.array(_resized(image, size_wh, box, turn), dtype=np.float32)


def _resized(image: Image.Image, size_wh: tuple[int, int], box: _Box, turn: Image.Transpose | None) -> Image.Image:
    if image.size != size_wh or box != (0, 0, *size_wh):
        image = image.resize(size_wh, Image.Resampling.BICUBIC, box)
    return image if turn is None else image.transpose(turn)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _TRANSPARENT or "transparency" in image.info


def _colors(image: Image.Image) -> Image.Image | None:
    """RGB, transparency over black; None for gray."""
    if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16"):
        return None
    if not _has_alpha(image):
        return image.convert("RGB")
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert("RGB")


def _gray(image: Image.Image) -> tuple[Image.Image, Image.Image | None, float, tuple[str, ...]]:
    """Gray and visibility (1 or 0), in mode F, the gray value of white, and what was assumed."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_gray(image)
    if not _has_alpha(image):
        # To F directly, an L image would skip the palette and an RGB one would be rounded to eight bits.
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        return image.convert("F"), None, 255.0, ()
    image = image.convert("RGBA")
    alpha = np.asarray(image.getchannel("A"))
    over_black = np.asarray(image.convert("RGB").convert("F")) * (alpha / np.float32(255))
    return Image.fromarray(over_black), Image.fromarray((alpha > 0).astype(np.float32)), 255.0, ()


def _deep_gray(image: Image.Image) -> tuple[Image.Image, Image.Image | None, float, tuple[str, ...]]:
    values = np.asarray(image)
    seen = np.isfinite(values)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # the one value of a 16-bit PNG that means "no image here"
        seen &= values != transparent
    if not seen.any():
        raise ValueError("it holds no finite value" if transparent is None else "it is wholly transparent")
    low, high = float(values[seen].min()), float(values[seen].max())
    notes: tuple[str, ...] = ()
    known_white = 1.0 if values.dtype.kind == "f" else 65535.0
    if low < 0 or high > known_white:
        # In float64: neighbouring 32-bit integers are one float32.
        values, known_white = (values.astype(np.float64) - low) / (high - low or 1.0), 1.0
    elif values.dtype.kind != "f" and high > 0:
        bits = next((depth for depth in _DEPTHS if high < 2**depth), 16)
        if bits < 16:
            known_white = 2.0**bits - 1
            notes = (f"16-bit values that use {bits} bits: {known_white:.0f} is taken for white",)
    gray = Image.fromarray(np.where(seen, values, 0).astype(np.float32))
    return gray, None if seen.all() else Image.fromarray(seen.astype(np.float32)), known_white, notes
