# SPDX-License-Identifier: Apache-2.0
"""ScanNet's 1500 test pairs (Dai et al. 2017; chosen by SuperGlue) in the layout that LoFTR published.

Convention:
    The intrinsics are for pixel centres at (x, y) and images of 640 x 480 pixels; they are moved to pixel centres at
    (x + 0.5, y + 0.5). Pose files map camera to world coordinates, ``rel_pose`` maps camera 0 to camera 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eloftr_ops.data.archives import npz_names, read_depth, read_npz
from eloftr_ops.data.labelled import ImagePair, LabelledPairs, PairOptions, View, assemble, stored_size_wh
from eloftr_ops.data.labels import checked_pose, intrinsics_from_integer_centers
from eloftr_ops.io import FileError

__all__ = ["ScanNetPairs"]

_SAME_ASPECT = 0.01  # ScanNet's colour images have 1296 x 968 pixels, 0.4 % off the 4 : 3 of the intrinsics


class ScanNetPairs(LabelledPairs):
    """Pairs with intrinsics and pose, and depth where asked for.

    Args:
        root: folder of the scenes: ``scene0707_00/color/15.jpg``, ``.../pose/15.txt``, ``.../depth/15.png``.
        index: ``test.npz`` with ``name`` (N, 4), scene, sub-scene and both frame numbers, and ``rel_pose`` (N, 12) or
            (N, 16); without ``rel_pose`` the pose files are read. ``None`` for ``root / "test.npz"``.
        intrinsics: ``intrinsics.npz`` with a (3, 3) array per scene; ``None`` for the file beside the index.
        intrinsics_size_wh: image size that the intrinsics are for. Images of the same aspect are taken at their own
            size, others cannot be used.
        depth: read depth maps, 16-bit images of millimetres, which must have the images' size.
        options: how pairs are read.

    Raises:
        FileError: an index that is missing, broken, or lacks an array.
    """

    def __init__(
        self,
        root: str | Path,
        index: str | Path | None = None,
        intrinsics: str | Path | None = None,
        *,
        intrinsics_size_wh: tuple[int, int] = (640, 480),
        depth: bool = False,
        options: PairOptions | None = None,
    ) -> None:
        super().__init__(options)
        self._root, self._depth, self._size_wh = Path(root), depth, intrinsics_size_wh
        self._index = Path(index) if index is not None else self._root / "test.npz"
        self._poses: npt.NDArray[Any] | None = None
        arrays = read_npz(self._index, ["name", *({"rel_pose"} & set(_names_in(self._index)))])
        self._names = np.asarray(arrays["name"])
        if self._names.ndim != 2 or self._names.shape[1] != 4:
            raise FileError(f"{self._index}: expected name of shape (N, 4), got {self._names.shape}.")
        if "rel_pose" in arrays:
            self._poses = self._matrices(arrays["rel_pose"])
        path = Path(intrinsics) if intrinsics is not None else self._index.parent / "intrinsics.npz"
        self._intrinsics = read_npz(path, npz_names(path))
        self._intrinsics_path = path

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> ImagePair:
        """Read pair ``index``; see `LabelledPairs.load`.

        Raises:
            FileError: it cannot be used; the message names the file.
        """
        try:
            scene, sub, first, second = (int(value) for value in self._names[index])
        except (TypeError, ValueError, OverflowError) as error:
            raise FileError(
                f"{self._index}: name[{index}]: expected four numbers, got {self._names[index]}."
            ) from error
        folder = self._root / f"scene{scene:04d}_{sub:02d}"
        if folder.name not in self._intrinsics:
            raise FileError(f"{self._intrinsics_path}: no intrinsics of {folder.name}.")
        try:
            K = np.asarray(self._intrinsics[folder.name], dtype=np.float64).reshape(3, 3)
        except (TypeError, ValueError) as error:
            raise FileError(f"{self._intrinsics_path}: expected (3, 3) numbers for {folder.name}.") from error
        K = intrinsics_from_integer_centers(K)
        views = [self._view(folder, frame, K) for frame in (first, second)]
        if self._poses is not None:
            T_0to1 = np.vstack([self._poses[index][:3], (0.0, 0.0, 0.0, 1.0)])
        else:
            to_world0, to_world1 = (_read_pose(folder / "pose" / f"{frame}.txt") for frame in (first, second))
            T_0to1 = np.linalg.inv(to_world1) @ to_world0
        return assemble(views[0], views[1], self.options, T_0to1=T_0to1)

    def _matrices(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        try:
            return np.asarray(stored, dtype=np.float64).reshape(len(self._names), -1, 4)
        except (TypeError, ValueError) as error:
            raise FileError(
                f"{self._index}: expected rel_pose of shape ({len(self._names)}, 12 or 16), got {stored.shape}."
            ) from error

    def _view(self, folder: Path, frame: int, K: npt.NDArray[np.float64]) -> View:
        path = folder / "color" / f"{frame}.jpg"
        width, height = stored_size_wh(path)
        expected = self._size_wh[0] / self._size_wh[1]
        if abs(width / height / expected - 1) > _SAME_ASPECT:
            raise FileError(
                f"{path}: expected the aspect of {self._size_wh[0]} x {self._size_wh[1]}, which the intrinsics are "
                f"for, got {width} x {height} pixels."
            )
        depth = read_depth(folder / "depth" / f"{frame}.png") if self._depth else None
        return View(path, K, depth, self._size_wh)


def _names_in(path: Path) -> list[str]:
    """None if the file is missing, which reading it reports."""
    return npz_names(path) if path.is_file() else []


def _read_pose(path: Path) -> npt.NDArray[np.float64]:
    try:
        T = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: missing, or not a 4 x 4 matrix: {error}.") from error
    return checked_pose(T, str(path))  # ScanNet writes -inf where tracking was lost
