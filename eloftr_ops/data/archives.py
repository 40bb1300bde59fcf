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
    if not path.is_file():
        raise FileError(f"{path}: no such file.")
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                if f"{name}.npy" not in archive.namelist():
                    stored = ", ".join(sorted(member.removesuffix(".npy") for member in archive.namelist()))
                    raise FileError(f"{path}: expected an array {name!r}, got {stored}.")
                with archive.open(f"{name}.npy") as member:
                    arrays[name] = _read_array(member)
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        AttributeError,
    ) as error:
        if isinstance(error, FileError):
            raise
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
    except (OSError, zipfile.BadZipFile) as error:
        raise FileError(f"{path}: missing, broken, or not an .npz file: {error}.") from error


def read_depth(path: Path, *, unit: float = 0.001) -> npt.NDArray[np.float32]:
    """Read a depth map (H, W), float32, 0 where depth is unknown.

    Args:
        path: ``.h5`` with a data set "depth", ``.npy``, or a 16-bit image.
        unit: depth per gray level of an image; millimetres in metres by default. The others hold depth itself.

    Raises:
        FileError: missing, broken, of another format, or not two-dimensional.
        ImportError: h5py is not installed.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such depth map.")
    try:
        if path.suffix in (".h5", ".hdf5"):
            depth = _read_h5(path)
        elif path.suffix == ".npy":
            depth = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                depth = np.asarray(image, dtype=np.float32) * unit
    except (OSError, ValueError, KeyError, SyntaxError, EOFError) as error:
        raise FileError(f"{path}: broken, or not a depth map: {error}.") from error
    if depth.ndim != 2:
        raise FileError(f"{path}: expected a depth map (height, width), got shape {depth.shape}.")
    return depth.astype(np.float32)


def _read_h5(path: Path) -> npt.NDArray[Any]:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError(
            f"{path}: reading .h5 files needs h5py. Install it with: pip install 'eloftr-ops[train]'"
        ) from error
    with h5py.File(path, "r") as file:
        return np.asarray(file["depth"])


def _read_array(member: IO[bytes]) -> npt.NDArray[Any]:
    version = np.lib.format.read_magic(member)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, by_columns, dtype = read_header(member)
    if dtype.hasobject:
        array = np.asarray(_ArrayUnpickler(member).load(), dtype=object)
        return array.reshape(shape)
    flat = np.frombuffer(member.read(), dtype=dtype)
    return flat.reshape(shape, order="F" if by_columns else "C")
