# SPDX-License-Identifier: Apache-2.0
"""What the EXIF data of photographs say about their cameras."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from eloftr_ops.errors import FileError

__all__ = ["DEFAULT_FOCAL", "PhotoCamera", "read_camera"]

DEFAULT_FOCAL = 1.2  # in long sides, where nothing is known: COLMAP's guess
_DIAGONAL_35MM = math.hypot(36, 24)
_MM_PER_UNIT = {2: 25.4, 3: 10.0}  # inch, centimetre
_PLAUSIBLE = (0.2, 50.0)  # focal length in long sides


class PhotoCamera(NamedTuple):
    """A camera as a photograph describes it; photographs of equal ones share their intrinsics.

    Convention:
        The size is that of the upright image. The focal length is in its pixels.
    """

    size_wh: tuple[int, int]
    make: str
    model: str
    focal: float | None  # pixels; None: EXIF does not say

    @property
    def start_focal(self) -> float:
        """The focal length to start with."""
        return self.focal or DEFAULT_FOCAL * max(self.size_wh)


def read_camera(path: Path) -> PhotoCamera:
    """Read size and EXIF data of an image file.

    The focal length comes from its 35 mm equivalent, which by the standard keeps the diagonal, or from the focal length
    and the resolution of the sensor. Values that no lens has (below 0.2 or above 50 long sides) are ignored.

    Raises:
        FileError: the file is no image that can be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            exif = image.getexif()
            details = exif.get_ifd(ExifTags.IFD.Exif)
    except Exception as error:  # decoders of broken data raise whatever they stumble over
        raise FileError(f"{path}: cannot be read as an image: {error}.") from error
    if exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):
        width, height = height, width
    names = [str(exif.get(tag, "")).strip("\x00 ") for tag in (ExifTags.Base.Make, ExifTags.Base.Model)]
    return PhotoCamera((width, height), names[0], names[1], _focal(details, width, height))


def _focal(details: Any, width: int, height: int) -> float | None:
    equivalent = _number(details.get(ExifTags.Base.FocalLengthIn35mmFilm))
    long_side = max(width, height)
    if equivalent:
        return _checked(equivalent * math.hypot(width, height) / _DIAGONAL_35MM, long_side)
    focal = _number(details.get(ExifTags.Base.FocalLength))
    resolution = _number(details.get(ExifTags.Base.FocalPlaneXResolution))
    unit = _MM_PER_UNIT.get(details.get(ExifTags.Base.FocalPlaneResolutionUnit, 2))
    if not (focal and resolution and unit):
        return None
    # The resolution is that of the photograph as taken; a copy may have been reduced.
    taken = [_number(details.get(tag)) for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)]
    reduction = long_side / max(taken) if all(taken) else 1.0
    return _checked(focal * resolution / unit * reduction, long_side)


def _checked(focal: float, long_side: int) -> float | None:
    low, high = _PLAUSIBLE
    return focal if low * long_side <= focal <= high * long_side else None


def _number(value: Any) -> float:
    """A positive finite number, or 0: EXIF holds fractions with a denominator of 0, and text."""
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return 0.0
    return number if 0 < number < math.inf else 0.0
