# SPDX-License-Identifier: Apache-2.0
"""Image files in (see `eloftr_ops.images`), match files out."""

from __future__ import annotations

import contextlib
import csv
import importlib.resources
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eloftr_ops._version import __version__
from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.images import LoadedImage, read_image
from eloftr_ops.storage import remove_leftovers, temporary_name

if TYPE_CHECKING:
    from eloftr_ops.geometry.verification import Verdict

__all__ = [
    "MATCH_SUFFIXES",
    "ArgumentError",
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


def check_output(path: str | os.PathLike[str], suffixes: Sequence[str]) -> Path:
    """Refuse, before any work is done, a file that could not be written at the end.

    Raises:
        FileError: a suffix that is not among ``suffixes``, a folder, or a parent folder that is missing or read-only.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise FileError(f"{path}: expected a name that ends in {', '.join(suffixes)}, got {path.suffix or 'none'}.")
    try:
        if path.is_dir():
            raise FileError(f"{path}: expected a file to write, got a folder.")
        if path.exists() and not path.is_file():
            raise FileError(f"{path}: expected a file to write, got a pipe or a device.")
        if not path.parent.is_dir():
            raise FileError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    except OSError as error:  # a folder that may not be searched, a name that is too long
        raise FileError(f"{path}: cannot be written: {error.strerror or error}.") from error
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
    temporary = temporary_name(path)
    remove_leftovers(path.parent)
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
    verdict: Verdict | None = None,
) -> None:
    """Write the matches of one pair, whole or not at all.

    ``.npz`` and ``.json`` hold ``format``, ``version``, ``frame``, ``size0_wh``, ``size1_wh``, ``keypoints0``,
    ``keypoints1``, ``confidence``, ``inliers`` if given, the matrices by name, and ``related`` and ``chance`` of the
    verdict. ``.csv`` holds one row per match,
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
        verdict: of `eloftr_ops.geometry.verification.related`.

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
    if verdict is not None:
        fields["related"] = np.array(verdict.related)
        fields["chance"] = np.array(verdict.chance, dtype=np.float64)
    with atomic_write(path) as file:
        _WRITERS[path.suffix.lower()](file, fields)


def _array(
    name: str, values: Tensor | npt.NDArray[Any], shape: tuple[int, ...], dtype: type[np.generic] = np.float32
) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
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
