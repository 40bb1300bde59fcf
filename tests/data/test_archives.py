# SPDX-License-Identifier: Apache-2.0
"""Index files read without running what they hold, and depth maps in three formats."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from eloftr_ops.data.archives import npz_names, read_depth, read_npz
from eloftr_ops.io import FileError
from support.pair_files import objects


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_of_all_kinds_come_back(tmp_path: Path, compressed: bool) -> None:
    arrays = {
        "plain": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "objects": objects("a/b.jpg", None, np.eye(3), ((0, 1), 0.5, np.float32(2.0))),
    }
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", **arrays)
    assert npz_names(tmp_path / "a.npz") == list(arrays)
    read = read_npz(tmp_path / "a.npz", arrays)
    np.testing.assert_array_equal(read["plain"], arrays["plain"])
    np.testing.assert_array_equal(read["columns"], arrays["columns"])
    name, nothing, matrix, info = read["objects"]
    assert (name, nothing) == ("a/b.jpg", None)
    np.testing.assert_array_equal(matrix, np.eye(3))
    assert info == ((0, 1), 0.5, 2.0)


def test_code_in_an_archive_is_refused_and_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=objects(Bomb(tmp_path / "touched")))
    with pytest.raises(FileError, match=r"a\.npz.*no part of an array"):
        read_npz(tmp_path / "a.npz", ["x"])
    assert not (tmp_path / "touched").exists()


def test_broken_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK no archive")
    for read in (npz_names, lambda path: read_npz(path, ["x"])):
        with pytest.raises(FileError, match=r"a\.npz"):
            read(tmp_path / "a.npz")
        with pytest.raises(FileError, match=r"absent\.npz"):
            read(tmp_path / "absent.npz")


def test_depth_formats(tmp_path: Path) -> None:
    depth = np.array([[0.0, 1.5], [2.0, 3.25]], dtype=np.float32)
    np.save(tmp_path / "a.npy", depth.astype(np.float64))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["depth"] = depth
    Image.fromarray((depth * 1000).astype(np.uint16)).save(tmp_path / "a.png")
    for name in ("a.npy", "a.h5", "a.png"):
        read = read_depth(tmp_path / name)
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, depth, rtol=1e-6)
    np.testing.assert_allclose(read_depth(tmp_path / "a.png", unit=0.002), 2 * depth, rtol=1e-6)


def test_broken_depth_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.ones(4))
    with pytest.raises(FileError, match=r"flat\.npy.*\(4,\)"):
        read_depth(tmp_path / "flat.npy")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["distance"] = np.ones((2, 2))
    for name in ("other.h5", "absent.npy"):
        with pytest.raises(FileError, match=name):
            read_depth(tmp_path / name)
    for name in ("a.h5", "a.npy", "a.png"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(FileError, match=name):
            read_depth(tmp_path / name)


def test_without_h5py_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"eloftr-ops\[train\]"):
        read_depth(tmp_path / "a.h5")
