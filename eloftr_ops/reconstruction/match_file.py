# SPDX-License-Identifier: Apache-2.0
"""The matches of many pairs in one HDF5 file, in the layout and the frame of hloc.

A pair is the group ``name0/name1``, with ``/`` in a name written as ``-``. It holds ``keypoints0`` and ``keypoints1``
(M, 2) and ``scores`` (M,), as the dense matchers of hloc write them, so that hloc goes on from there.

Convention:
    In the file the centre of the first pixel is (0, 0), because hloc adds 0.5 on the way to COLMAP. The functions here
    take and give the project's frame, where it is (0.5, 0.5). The attribute ``pixel_centers`` of the file says 0.0.

Source: Sarlin, Cadena, Siegwart, Dymczyk: "From Coarse to Fine: Robust Hierarchical Localization at Large Scale",
CVPR 2019, and the tool's documentation.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.pairs import Pair, pair_key
from eloftr_ops.storage import remove_leftovers, temporary_name

__all__ = ["MatchFile", "require_h5py", "write_match_file"]

_PIXEL_CENTERS = 0.0  # hloc's


def require_h5py() -> ModuleType:
    """The package h5py.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise ArgumentError(
            "output", "HDF5 files need the package h5py. Install it with pip install 'eloftr-ops[sfm]'."
        ) from error
    return h5py  # type: ignore[no-any-return]


class MatchFile:
    """A file of matches, open for reading.

    Args:
        path: a file of :func:`write_match_file`, or of hloc's dense matchers.

    Raises:
        FileError: it cannot be read, or holds no matches.
    """

    def __init__(self, path: Path) -> None:
        h5py = require_h5py()
        self.path = path
        if not path.is_file():
            raise FileError(f"{path}: no such file.")
        try:
            self._file = h5py.File(path, "r")
            self.settings: dict[str, Any] = json.loads(self._file.attrs.get("settings", "{}"))
            self._shift = np.float32(0.5 - self._file.attrs.get("pixel_centers", _PIXEL_CENTERS))
            self._groups = {_names(group): key for key, group in _groups(h5py, self._file)}
        except (OSError, ValueError, KeyError) as error:
            raise FileError(f"{path}: not a file of matches: {error}.") from error

    def __enter__(self) -> MatchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def failed_pairs(self) -> int:
        """How many of the pairs that were asked for are missing."""
        return int(self._file.attrs.get("failed_pairs", 0))

    def pairs(self) -> list[Pair]:
        """The pairs, sorted by name."""
        return sorted(self._groups)

    def forget(self, pair: Pair) -> None:
        """Do not give this pair any more; the file stays as it is."""
        self._groups.pop(pair, None)

    def states(self) -> dict[Pair, tuple[str, str]]:
        """Each pair with the state of its image files when it was matched."""
        return {
            pair: tuple(json.loads(self._file[key].attrs.get("files", '["", ""]')))
            for pair, key in self._groups.items()
        }

    def read(self, pair: Pair) -> PairMatches:
        """The matches of a pair, in the project's frame."""
        group = self._file[self._groups[pair]]
        sizes = json.loads(group.attrs.get("sizes", "[[0, 0], [0, 0]]"))
        files = tuple(json.loads(group.attrs.get("files", '["", ""]')))
        keypoints0, keypoints1 = (
            group[name][()].astype(np.float32) + self._shift for name in ("keypoints0", "keypoints1")
        )
        confidence = group["scores"][()].astype(np.float32)
        return PairMatches(pair, keypoints0, keypoints1, confidence, tuple(sizes[0]), tuple(sizes[1]), files)


def write_match_file(
    path: Path, matches: Iterable[PairMatches], settings: dict[str, Any], *, failed_pairs: int = 0
) -> None:
    """Write a file of matches, whole or not at all; the same matches in the same order give the same bytes.

    Convention:
        ``matches`` are in the project's frame, the file is in hloc's; see the module.

    Raises:
        FileError: it cannot be written.
        ArgumentError: h5py is not installed.
    """
    h5py = require_h5py()
    temporary = temporary_name(path)
    remove_leftovers(path.parent)
    try:
        with _Sink(temporary) as sink, h5py.File(sink, "w") as file:
            file.attrs["format"] = "hloc matches, written by eloftr-ops 1"
            file.attrs["pixel_centers"] = _PIXEL_CENTERS
            file.attrs["settings"] = json.dumps(settings, sort_keys=True)
            file.attrs["failed_pairs"] = failed_pairs
            for found in matches:
                _write_pair(file.create_group(pair_key(found.pair)), found)
                if sink.error is not None:
                    break
        if sink.error is not None:
            raise sink.error
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class _Sink(io.FileIO):
    """A new file that keeps the error of a write, on a full disk for instance.

    HDF5 ends the process with a segmentation fault if it is told of one while it closes a file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """All of the data, unless a write failed; HDF5 sees success."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """To ``size``, unless it or a write failed."""
        try:
            return super().truncate(size) if self.error is None else self.tell()
        except OSError as error:
            self.error = error
            return self.tell()

    def flush(self) -> None:
        """Nothing is held back: a file of this kind has no buffer."""


def _write_pair(group: Any, found: PairMatches) -> None:
    group.attrs["names"] = json.dumps(found.pair)
    group.attrs["sizes"] = json.dumps((found.size0_wh, found.size1_wh))
    group.attrs["files"] = json.dumps(found.files)
    group.create_dataset("keypoints0", data=found.keypoints0 - np.float32(0.5))
    group.create_dataset("keypoints1", data=found.keypoints1 - np.float32(0.5))
    group.create_dataset("scores", data=found.confidence)


def _groups(h5py: ModuleType, file: Any) -> Iterator[tuple[str, Any]]:
    for first in file:
        if isinstance(file[first], h5py.Group):
            for second in file[first]:
                yield f"{first}/{second}", file[first][second]


def _names(group: Any) -> Pair:
    """Of files that hloc wrote, only the names with ``-`` for ``/`` are known."""
    if "names" in group.attrs:
        first, second = json.loads(group.attrs["names"])
        return first, second
    first, second = group.name.strip("/").split("/")
    return first, second
