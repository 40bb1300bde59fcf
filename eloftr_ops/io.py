# SPDX-License-Identifier: Apache-2.0
"""Image files in, match files out.

Images are read with Pillow: it gives the EXIF orientation, palettes, alpha and samples of more than eight bits to
the caller instead of dropping them, and reads large JPEGs at a reduced scale.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.resources
import io
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from eloftr_ops._version import __version__

__all__ = [
    "MATCH_SUFFIXES",
    "DemoPair",
    "FileError",
    "LoadedImage",
    "atomic_write",
    "check_output",
    "demo_pair",
    "read_image",
    "write_matches",
]

MATCH_SUFFIXES = (".npz", ".json", ".csv")
FRAME = "(x, y) in pixels of the upright original image; the centre of pixel (x, y) is (x + 0.5, y + 0.5)"

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
_Box = tuple[float, float, float, float]


class FileError(ValueError):
    """A file that cannot be read or written; the message names it and says what to do."""


class LoadedImage(NamedTuple):
    """An image ready for the matcher, and the way back to the pixels of its file.

    Convention:
        Both frames put the centre of pixel (x, y) at (x + 0.5, y + 0.5), so that they differ by a factor alone.
    """

    image: Tensor  # (1, 1, H, W) float32 in [0, 1]
    mask: Tensor | None  # (1, H, W) bool, False where the file has no image (see read_image); None: all of it
    original_size_wh: tuple[int, int]  # of the upright image before resizing

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
        return (keypoints.double() * keypoints.new_tensor(self.scale_xy, dtype=torch.float64)).to(
            keypoints.dtype
        )


def read_image(path: str | os.PathLike[str], *, resize: int | None = None) -> LoadedImage:
    """Read an image file as the matcher takes it: gray, upright, in [0, 1].

    - Gray is ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B, as in kornia and OpenCV, not rounded to eight bits.
    - The EXIF orientation is applied: "original" below is the image as viewers show it.
    - Transparent images are composited over black; where they are wholly transparent the mask is False, and no match
      lies there.
    - 16-bit gray is divided by 65535. 32-bit integers are too if they lie in [0, 65535], floating point is taken as
      it is if it lies in [0, 1]; anything else has no known white and is stretched from its least value to its
      largest. NaN and infinity are masked. Colour of 16 bits keeps its upper eight.
    - Of an animation or a multi-page file the first image is read.

    Convention:
        The centre of pixel (x, y) is (x + 0.5, y + 0.5); resizing keeps the image's borders where they are, so that
        keypoints map to the original by multiplication alone: :meth:`LoadedImage.to_original`.

    Args:
        path: image file.
        resize: length in pixels that a longer long side is reduced to, aspect kept to the nearest pixel, with
            antialiasing (bicubic). Smaller images are left alone: enlarging adds no detail. None: never resize.

    Raises:
        FileError: a file that is missing, a folder, empty, not an image, broken, truncated, or larger than Pillow's
            limit against decompression bombs (179 megapixels).
        ValueError: ``resize`` is less than 1.
        TypeError: ``resize`` is not an int.
    """
    if resize is not None and (isinstance(resize, bool) or not isinstance(resize, int)):
        raise TypeError(f"resize: expected an int or None, got {resize!r}.")
    if resize is not None and resize < 1:
        raise ValueError(f"resize: expected at least 1 pixel, got {resize}. Pass None to keep the size.")
    path = Path(path)
    _check_file(path)
    try:
        return _decode(path, resize)
    except UnidentifiedImageError:
        raise FileError(f"{path}: not an image of a known format. Convert it to PNG or JPEG.") from None
    except Image.DecompressionBombError as error:
        raise FileError(f"{path}: too large. {error} Reduce the image first.") from error
    except PermissionError as error:
        raise FileError(f"{path}: no permission to read it.") from error
    except MemoryError as error:
        raise FileError(f"{path}: too large for this machine's memory. Reduce the image first.") from error
    except Exception as error:  # decoders of broken data raise whatever they stumble over
        raise FileError(f"{path}: broken or unsupported image: {error}.") from error


class DemoPair(NamedTuple):
    """The bundled pair: a photograph and its warp with another exposure."""

    image0: Tensor  # (1, 1, 480, 640) float32 in [0, 1]
    image1: Tensor  # (1, 1, 480, 640)
    H_0to1: Tensor  # (3, 3) float64, exact; centre of pixel (x, y) at (x + 0.5, y + 0.5)


def demo_pair() -> DemoPair:
    """Read the bundled pair; no network."""
    assets = importlib.resources.files("eloftr_ops") / "assets"
    images = []
    for name in ("demo_0.jpg", "demo_1.jpg"):
        with importlib.resources.as_file(assets / name) as path:
            images.append(read_image(path).image)
    truth = json.loads((assets / "demo.json").read_text(encoding="utf-8"))["H_0to1"]
    return DemoPair(images[0], images[1], torch.tensor(truth, dtype=torch.float64))


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise FileError(f"{path}: expected an image file, got a folder.")
    if not path.exists():
        raise FileError(f"{path}: no such file.")
    if path.is_file() and path.stat().st_size == 0:
        raise FileError(f"{path}: the file is empty.")


def _decode(path: Path, resize: int | None) -> LoadedImage:
    with contextlib.ExitStack() as stack:
        # A file object, not a path: Pillow maps a path into memory, and then (13.0) skews uncompressed TIFFs that lie
        # on their side.
        file = stack.enter_context(path.open("rb"))
        with warnings.catch_warnings():
            # Pillow warns at half of the size that it refuses: nothing that its user could act on.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = stack.enter_context(Image.open(file))
        stored_wh = image.size
        box: _Box | None = None
        if resize is not None and max(stored_wh) > resize:
            # Has an effect on JPEGs only. Twice the wanted size, so that the final, better filter still has something
            # to average. The box is the original's extent: the last column and row may be only partly covered.
            twice = _fitted(stored_wh, resize)
            drafted = image.draft(None, (2 * twice[0], 2 * twice[1]))
            box = drafted[1] if drafted is not None else None
        image.load()
        if box is None:
            stored_wh = image.size  # a TIFF turns itself upright while loading
            box = (0, 0, *stored_wh)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        gray, visible, white = _gray(image)
    target = stored_wh if resize is None else _fitted(stored_wh, resize)
    upright = _UPRIGHT.get(orientation)
    pixels = np.clip(_resampled(gray, target, box, upright) / np.float32(white), 0, 1)
    mask = None if visible is None else _resampled(visible, target, box, upright) >= 0.5
    return LoadedImage(
        torch.from_numpy(pixels)[None, None],
        None if mask is None or mask.all() else torch.from_numpy(mask)[None],
        (stored_wh[1], stored_wh[0]) if orientation in _ON_ITS_SIDE else stored_wh,
    )


def _fitted(size_wh: tuple[int, int], resize: int) -> tuple[int, int]:
    """The size whose long side is ``resize``; the given one if that is not smaller."""
    factor = min(1.0, resize / max(size_wh))
    return max(1, round(size_wh[0] * factor)), max(1, round(size_wh[1] * factor))


def _resampled(
    image: Image.Image, size_wh: tuple[int, int], box: _Box, upright: Image.Transpose | None
) -> npt.NDArray[np.float32]:
    """A part of a mode F image at another size, turned upright, (H, W)."""
    if image.size != size_wh or box != (0, 0, *size_wh):
        image = image.resize(size_wh, Image.Resampling.BICUBIC, box)
    if upright is not None:
        image = image.transpose(upright)
    return np.array(image, dtype=np.float32)


def _gray(image: Image.Image) -> tuple[Image.Image, Image.Image | None, float]:
    """Gray and visibility (1 or 0), in mode F, and the gray value of white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_gray(image)
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if not transparent:
        # To F directly, an L image would skip the palette and an RGB one would be rounded to eight bits.
        return (image if image.mode in ("L", "RGB") else image.convert("RGB")).convert("F"), None, 255.0
    image = image.convert("RGBA")
    alpha = np.asarray(image.getchannel("A"))
    over_black = np.asarray(image.convert("RGB").convert("F")) * (alpha / np.float32(255))
    return Image.fromarray(over_black), Image.fromarray((alpha > 0).astype(np.float32)), 255.0


def _deep_gray(image: Image.Image) -> tuple[Image.Image, Image.Image | None, float]:
    values = np.asarray(image)
    if values.dtype.itemsize == 2:
        return Image.fromarray(values.astype(np.float32)), None, 65535.0
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("it holds no finite value")
    low, high = float(values[finite].min()), float(values[finite].max())
    known_white = 1.0 if values.dtype.kind == "f" else 65535.0
    if low < 0 or high > known_white:
        # In float64: neighbouring 32-bit integers are one float32.
        values, known_white = (values.astype(np.float64) - low) / (high - low or 1.0), 1.0
    gray = Image.fromarray(np.where(finite, values, 0).astype(np.float32))
    return gray, None if finite.all() else Image.fromarray(finite.astype(np.float32)), known_white


def check_output(path: str | os.PathLike[str], suffixes: Sequence[str]) -> Path:
    """Refuse, before any work is done, a file that could not be written at the end.

    Raises:
        FileError: a suffix that is not among ``suffixes``, a folder, or a parent folder that is missing or read-only.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise FileError(
            f"{path}: expected a name that ends in {', '.join(suffixes)}, got {path.suffix or 'none'}."
        )
    if path.is_dir():
        raise FileError(f"{path}: expected a file to write, got a folder.")
    if not path.parent.is_dir():
        raise FileError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise FileError(f"{path}: no permission to write into {path.parent}.")
    return path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when the block ends well, and leaves no trace when it does not.

    Raises:
        FileError: the file system refuses: no folder, no permission, no space.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_matches(
    path: str | os.PathLike[str],
    keypoints0: Tensor | npt.NDArray[Any],
    keypoints1: Tensor | npt.NDArray[Any],
    confidence: Tensor | npt.NDArray[Any],
    *,
    size0_wh: tuple[int, int],
    size1_wh: tuple[int, int],
    inliers: Tensor | npt.NDArray[Any] | None = None,
    matrices: Mapping[str, Tensor | npt.NDArray[Any]] | None = None,
) -> None:
    """Write the matches of one pair, whole or not at all.

    ``.npz`` and ``.json`` hold ``format``, ``version``, ``frame``, ``size0_wh``, ``size1_wh``, ``keypoints0``,
    ``keypoints1``, ``confidence``, ``inliers`` if given, and the matrices by name. ``.csv`` holds one row per match,
    ``x0,y0,x1,y1,confidence`` and ``inlier`` if given. Text keeps every digit of float32.

    Convention:
        Keypoints are (x, y) in pixels; the centre of pixel (x, y) is (x + 0.5, y + 0.5). Sizes are (width, height).

    Args:
        path: file to write; its suffix chooses the format.
        keypoints0: (M, 2); M may be 0.
        keypoints1: (M, 2).
        confidence: (M,).
        size0_wh: size of image 0 that ``keypoints0`` refer to.
        size1_wh: the same of image 1.
        inliers: (M,) bool.
        matrices: (3, 3) each, for instance ``{"H_0to1": ...}``.

    Raises:
        FileError: an unknown suffix, or a place that cannot be written.
        ValueError: shapes that do not fit.
    """
    path = check_output(path, MATCH_SUFFIXES)
    count = len(confidence)
    fields: dict[str, Any] = {
        "format": "eloftr-ops matches 1",
        "version": __version__,
        "frame": FRAME,
        "size0_wh": np.array(size0_wh, dtype=np.int64),
        "size1_wh": np.array(size1_wh, dtype=np.int64),
        "keypoints0": _array("keypoints0", keypoints0, (count, 2)),
        "keypoints1": _array("keypoints1", keypoints1, (count, 2)),
        "confidence": _array("confidence", confidence, (count,)),
    }
    if inliers is not None:
        fields["inliers"] = _array("inliers", inliers, (count,), np.bool_)
    for name, matrix in (matrices or {}).items():
        fields[name] = _array(name, matrix, (3, 3), np.float64)
    with atomic_write(path) as file:
        _WRITERS[path.suffix.lower()](file, fields)


def _array(
    name: str, values: Tensor | npt.NDArray[Any], shape: tuple[int, ...], dtype: type[np.generic] = np.float32
) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = (
        values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    )
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}. Every match has one row.")
    return array.astype(dtype)


def _write_npz(file: IO[bytes], fields: dict[str, Any]) -> None:
    np.savez_compressed(file, **fields)


def _write_json(file: IO[bytes], fields: dict[str, Any]) -> None:
    plain = {key: _plain(value) if isinstance(value, np.ndarray) else value for key, value in fields.items()}
    file.write((json.dumps(plain, indent=1) + "\n").encode())


def _write_csv(file: IO[bytes], fields: dict[str, Any]) -> None:
    names = ["x0", "y0", "x1", "y1", "confidence"]
    columns = [*fields["keypoints0"].T, *fields["keypoints1"].T, fields["confidence"]]
    if "inliers" in fields:
        names.append("inlier")
        columns.append(fields["inliers"].astype(np.int64))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*(_plain(column) for column in columns), strict=True))
    file.write(text.getvalue().encode())


def _plain(array: npt.NDArray[Any]) -> list[Any]:
    """Nested lists; float32 by the shortest decimals that give it back."""
    if array.dtype != np.float32:
        return array.tolist()  # type: ignore[no-any-return]
    return np.array([float(str(value)) for value in array.ravel()]).reshape(array.shape).tolist()  # type: ignore[no-any-return]


_WRITERS = {".npz": _write_npz, ".json": _write_json, ".csv": _write_csv}
