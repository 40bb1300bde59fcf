# SPDX-License-Identifier: Apache-2.0
"""Label and depth files: ``.npz`` with object arrays read without running foreign code, depth in three formats."""

from __future__ import annotations

import importlib
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from eloftr_ops.io import FileError

_LARGEST = 2**31  # bytes of the unpacked contents of a file: a depth map of 179 megapixels takes 0.7e9
_ARRAY_PARTS = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode"})
_ARRAY_MODULES = frozenset(
    {
        "numpy",
        "numpy.core.multiarray",
        "numpy._core.multiarray",
        "numpy.core.numeric",
        "numpy._core.numeric",
        "_codecs",
    }
)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays, numbers, texts, tuples and lists, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _ARRAY_MODULES and name in _ARRAY_PARTS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an array")


def read_npz(path: Path, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Read arrays of an ``.npz`` file, object arrays too.

    NumPy reads object arrays by unpickling, which runs whatever code the file holds; here the unpickler knows arrays
    and plain values only.

    Args:
        path: the file.
        names: of the arrays wanted.

    Raises:
        FileError: the file is missing or broken, lacks an array, or holds something else than arrays.
    """
    arrays = {}
    try:
        if not path.is_file():
            raise FileError(f"{path}: no such file.")
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(member.file_size for member in archive.infolist()))
            for name in names:
                if f"{name}.npy" not in archive.namelist():
                    stored = ", ".join(sorted(member.removesuffix(".npy") for member in archive.namelist()))
                    raise FileError(f"{path}: expected an array {name!r}, got {stored}.")
                with archive.open(f"{name}.npy") as member:
                    arrays[name] = _read_array(member)
    except FileError:
        raise
    except Exception as error:  # readers of broken data raise whatever they stumble over
        raise FileError(f"{path}: broken, or not an .npz file of arrays: {error}.") from error
    return arrays


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an ``.npz`` file.

    Raises:
        FileError: the file is missing or broken.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [member.removesuffix(".npy") for member in archive.namelist()]
    except Exception as error:  # readers of broken data raise whatever they stumble over
        raise FileError(f"{path}: missing, broken, or not an .npz file: {error}.") from error


def read_depth(path: Path, *, unit: float = 0.001) -> npt.NDArray[np.float32]:
    """Read a depth map (H, W), float32, 0 where depth is unknown.

    Args:
        path: ``.h5`` with a data set "depth", ``.npy``, or an image with one channel: 16 or 32 bits, or floating point.
        unit: depth per 1 of stored whole numbers, in any kind of file; millimetres in metres by default. Floating point
            is depth itself, in the unit of the poses: a file's type says nothing about another one.

    Raises:
        FileError: missing, broken, of another format or of eight bits, too large, or not two-dimensional.
        ImportError: h5py is not installed.
    """
    try:
        if not path.is_file():
            raise FileError(f"{path}: no such depth map.")
        if path.suffix in (".h5", ".hdf5"):
            depth = _read_h5(path)
        elif path.suffix == ".npy":
            depth = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with Image.open(path) as image:
                depth = np.asarray(image)
        if depth.ndim != 2:
            raise FileError(f"{path}: expected a depth map (height, width), got shape {depth.shape}.")
        if depth.dtype.itemsize == 1 or depth.dtype.kind not in "iuf":
            raise FileError(
                f"{path}: expected depth in 16 bits or more, got {depth.dtype}: a picture of depth, not depth."
            )
        factor = 1.0 if depth.dtype.kind == "f" else unit
        scaled: npt.NDArray[np.float32] = np.asarray(depth, dtype=np.float32) * np.float32(factor)
        return scaled
    except (FileError, ImportError):
        raise
    except Exception as error:  # readers of broken data raise whatever they stumble over
        raise FileError(f"{path}: broken, or not a depth map: {error}.") from error


def _read_h5(path: Path) -> npt.NDArray[Any]:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError(
            f"{path}: reading .h5 files needs h5py. Install it with: pip install 'eloftr-ops[train]'"
        ) from error
    with h5py.File(path, "r") as file:
        stored = file["depth"]
        _check_size(path, stored.size * stored.dtype.itemsize)
        return np.asarray(stored)


def _check_size(path: Path, size: int) -> None:
    """A small file may unpack to any size."""
    if size > _LARGEST:
        raise FileError(f"{path}: expected at most {_LARGEST} bytes when unpacked, got {size}.")


def _read_array(member: IO[bytes]) -> npt.NDArray[Any]:
    version = np.lib.format.read_magic(member)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read_header(member)
    if dtype.hasobject:
        array = np.asarray(_ArrayUnpickler(member).load(), dtype=object)
        return array.reshape(shape)
    flat = np.frombuffer(member.read(), dtype=dtype)
    return flat.reshape(shape, order="F" if by_columns else "C")
