# SPDX-License-Identifier: Apache-2.0
"""Pairs of one's own: a JSON file that names images and what is known about them.

Convention:
    The file says where its pixel centres are: ``"pixel_centers": 0.5`` for (x + 0.5, y + 0.5) (COLMAP, this project), 0
    for (x, y) (OpenCV). Everything is given out for (x + 0.5, y + 0.5).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eloftr_ops.data.archives import read_depth
from eloftr_ops.data.labelled import ImagePair, LabelledPairs, PairOptions, View, assemble, stored_size_wh
from eloftr_ops.data.labels import homography_from_integer_centers, intrinsics_from_integer_centers
from eloftr_ops.io import FileError

__all__ = ["JsonPairs"]

_FIELDS = frozenset(
    f"{kind}{side}" for kind in ("image", "size", "K", "depth") for side in "01"
) | {"T_0to1", "H_0to1"}  # fmt: skip


class JsonPairs(LabelledPairs):
    """Pairs from a file of one's own.

    It looks like this::

        {"pixel_centers": 0.5, "depth_unit": 0.001, "pairs": [
          {"image0": "a.jpg", "image1": "b.jpg", "K0": [[...], [...], [...]], "K1": [...], "T_0to1": [4 rows],
           "depth0": "a.npy", "depth1": "b.npy", "size0": [640, 480]},
          {"image0": "c.jpg", "image1": "d.jpg", "H_0to1": [3 rows]}]}

    A pair has a homography, or intrinsics and a pose (depth is then optional, but for both images). Sizes, [width,
    height], are optional; an image of another size cannot be used. Depth is ``.npy``, ``.h5`` ("depth") or a 16-bit
    image. ``depth_unit`` is the depth per 1 of stored whole numbers; floating point is depth itself, in the unit of the
    poses. Other fields are ignored. The labels belong to the images as they are stored: their EXIF orientation is not
    applied.

    Args:
        path: the JSON file.
        root: folder that the paths in it start from; None for the file's own.
        pixel_centers: 0 or 0.5, over what the file says.
        labels: every pair must have a label; False: what a pair lacks is not asked for.
        options: how pairs are read.

    Raises:
        FileError: the file is missing, not JSON, or not of this form.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        *,
        pixel_centers: float | None = None,
        labels: bool = True,
        options: PairOptions | None = None,
    ) -> None:
        super().__init__(options)
        self._path, self._labels = Path(path), labels
        self._root = Path(root) if root is not None else self._path.parent
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise FileError(f"{path}: missing, or not JSON: {error}.") from error
        if not isinstance(content, dict) or not isinstance(content.get("pairs"), list):
            raise FileError(f'{path}: expected an object with a list "pairs".')
        centers = content.get("pixel_centers") if pixel_centers is None else pixel_centers
        if isinstance(centers, bool) or centers not in (0, 0.5):
            raise FileError(
                f'{path}: expected "pixel_centers": 0 or 0.5, got {centers}. Say whether the centre of the first pixel '
                "is (0, 0), as in OpenCV, or (0.5, 0.5), as in COLMAP."
            )
        self._integer_centers = centers == 0
        self._depth_unit = _depth_unit(content.get("depth_unit", 0.001), str(path))
        self._pairs: list[Any] = content["pairs"]

    def __len__(self) -> int:
        return len(self._pairs)

    def load(self, index: int) -> ImagePair:
        """Read pair ``index``; see `LabelledPairs.load`.

        Raises:
            FileError: it cannot be used; the message names the file.
        """
        entry, place = self._pairs[index], f"{self._path}: pairs[{index}]"
        if not isinstance(entry, dict) or not {"image0", "image1"} <= entry.keys():
            raise FileError(f'{place}: expected an object with "image0" and "image1".')
        posed = {"K0", "K1", "T_0to1"} & entry.keys()
        bare = not self._labels and not posed and "H_0to1" not in entry
        if len(posed) not in (0, 3) or (bool(posed) == ("H_0to1" in entry) and not bare):
            labels = sorted(_FIELDS & entry.keys())
            raise FileError(f"{place}: expected either H_0to1 or all of K0, K1, T_0to1, got {labels}.")
        if ("depth0" in entry) != ("depth1" in entry):
            raise FileError(f"{place}: expected depth of both images or of none.")
        views = (self._view(entry, "0", place), self._view(entry, "1", place))
        if bare:
            return assemble(*views, self.options)
        if posed:
            return assemble(*views, self.options, T_0to1=_matrix(entry["T_0to1"], (4, 4), f"{place}: T_0to1"))
        H = _matrix(entry["H_0to1"], (3, 3), f"{place}: H_0to1")
        return assemble(*views, self.options, H_0to1=homography_from_integer_centers(H) if self._integer_centers else H)

    def _view(self, entry: dict[str, Any], side: str, place: str) -> View:
        path = self._root / str(entry[f"image{side}"])
        size = entry.get(f"size{side}")
        if size is not None:
            _check_size(path, size, f"{place}: size{side}")
        K = None
        if f"K{side}" in entry:
            K = _matrix(entry[f"K{side}"], (3, 3), f"{place}: K{side}")
            K = intrinsics_from_integer_centers(K) if self._integer_centers else K
        depth = entry.get(f"depth{side}")
        values = None if depth is None else read_depth(self._root / str(depth), unit=self._depth_unit)
        return View(path, K, values)


def _matrix(value: Any, shape: tuple[int, int], place: str) -> npt.NDArray[np.float64]:
    try:
        matrix = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise FileError(f"{place}: expected numbers, got {value!r}.") from error
    if matrix.shape != shape:
        raise FileError(f"{place}: expected shape {shape}, got {matrix.shape}.")
    return matrix


def _depth_unit(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise FileError(f'{place}: "depth_unit": expected a positive number, such as 0.001, got {value!r}.')
    return float(value)


def _check_size(path: Path, size: Any, place: str) -> None:
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise FileError(f"{place}: expected [width, height], got {size!r}.")
    actual = stored_size_wh(path)
    if tuple(size) != actual:
        raise FileError(f"{path}: expected {size[0]} x {size[1]} pixels, got {actual[0]} x {actual[1]}.")
