# SPDX-License-Identifier: Apache-2.0
"""MegaDepth (Li and Snavely 2018) in the layout that LoFTR published: training scenes and the 1500 test pairs.

Convention:
    The index holds COLMAP's intrinsics, for pixel centres at (x + 0.5, y + 0.5): they are taken as they are. Poses map
    world to camera coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eloftr_ops.data.archives import read_depth, read_npz
from eloftr_ops.data.labelled import ImagePair, LabelledPairs, PairOptions, View, assemble
from eloftr_ops.data.labels import checked_pose
from eloftr_ops.io import FileError

__all__ = ["MegaDepthPairs"]

_ARRAYS = ("image_paths", "depth_paths", "intrinsics", "poses", "pair_infos")


class MegaDepthPairs(LabelledPairs):
    """Pairs with depth, intrinsics and pose.

    Args:
        root: folder that the paths in the index start from (it has ``phoenix`` or ``Undistorted_SfM`` in it).
        scene_info: index file, folder of index files (all ``*.npz``, in name order), or a list of files. Each holds
            ``image_paths``, ``depth_paths``, ``intrinsics``, ``poses`` per image and ``pair_infos``, a list of
            ((i, j), overlap score, ...).
        min_score: pairs whose overlap score in the index is not larger are left out; 0.4 is usual in training.
        max_score: pairs whose score is larger are left out, as too easy.
        depth: read depth maps (``.h5``, data set "depth"); evaluation of poses does not need them.
        options: how pairs are read.

    Raises:
        FileError: an index file that is missing, broken, or lacks an array.
        ValueError: no index file, or no pair left.
    """

    def __init__(
        self,
        root: str | Path,
        scene_info: str | Path | Sequence[str | Path],
        *,
        min_score: float = 0.0,
        max_score: float = float("inf"),
        depth: bool = True,
        options: PairOptions | None = None,
    ) -> None:
        super().__init__(options)
        self._root, self._depth = Path(root), depth
        self._scenes: list[dict[str, npt.NDArray[Any]]] = []
        self._pairs: list[tuple[int, int, int]] = []
        self._files = _index_files(scene_info)
        for path in self._files:
            self._add(path, min_score, max_score)
        if not self._pairs:
            raise ValueError(
                f"scene_info: no pair has an overlap score in ({min_score}, {max_score}]. Lower min_score."
            )

    def _add(self, path: Path, min_score: float, max_score: float) -> None:
        arrays = read_npz(path, _ARRAYS)
        infos = arrays.pop("pair_infos")
        count = len(arrays["image_paths"])
        if any(len(array) != count for array in arrays.values()):
            lengths = {name: len(array) for name, array in arrays.items()}
            raise FileError(f"{path}: expected arrays with one entry per image, got lengths {lengths}.")
        try:
            chosen = [(int(info[0][0]), int(info[0][1])) for info in infos if min_score < float(info[1]) <= max_score]
        except (TypeError, ValueError, IndexError) as error:
            raise FileError(f"{path}: expected pair_infos of ((i, j), score, ...), got {infos[:1]}.") from error
        if chosen and not 0 <= np.min(chosen) <= np.max(chosen) < count:
            raise FileError(f"{path}: pair_infos names an image that is not among the {count} images.")
        self._pairs += [(len(self._scenes), i, j) for i, j in chosen]
        self._scenes.append(arrays)

    def __len__(self) -> int:
        return len(self._pairs)

    def load(self, index: int) -> ImagePair:
        """Read pair ``index``; see `LabelledPairs.load`.

        Raises:
            FileError: it cannot be used; the message names the file.
        """
        scene, first, second = self._pairs[index]
        world_to_0, world_to_1 = (self._entry(scene, "poses", image, (4, 4)) for image in (first, second))
        views = (self._view(scene, first), self._view(scene, second))
        for image, pose in ((first, world_to_0), (second, world_to_1)):
            checked_pose(pose, f"{self._files[scene]}: poses[{image}]")
        return assemble(*views, self.options, T_0to1=world_to_1 @ np.linalg.inv(world_to_0))

    def _view(self, scene: int, image: int) -> View:
        path = self._path(scene, "image_paths", image)
        depth = read_depth(self._path(scene, "depth_paths", image)) if self._depth else None
        return View(path, self._entry(scene, "intrinsics", image, (3, 3)), depth)

    def _path(self, scene: int, name: str, image: int) -> Path:
        path = self._scenes[scene][name][image]
        if not isinstance(path, str) or not path:
            raise FileError(f"{self._files[scene]}: {name}[{image}] is {path!r}, not a path.")
        return self._root / path

    def _entry(self, scene: int, name: str, image: int, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
        try:
            return np.asarray(self._scenes[scene][name][image], dtype=np.float64).reshape(shape)
        except (TypeError, ValueError) as error:
            raise FileError(f"{self._files[scene]}: {name}[{image}] is no matrix of shape {shape}.") from error


def _index_files(scene_info: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(scene_info, str | Path):
        path = Path(scene_info)
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    else:
        files = [Path(path) for path in scene_info]
    if not files:
        raise ValueError(f"scene_info: expected an .npz file or a folder of them, got {scene_info}.")
    return files
