# SPDX-License-Identifier: Apache-2.0
"""Damaged files, labels of the wrong type, turned images and depth in other units: an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from eloftr_ops.data import archives
from eloftr_ops.data.archives import npz_names, read_depth, read_npz
from eloftr_ops.data.labelled import PairOptions
from eloftr_ops.data.pairs import JsonPairs
from eloftr_ops.io import FileError, read_image
from support.pair_files import objects

DEPTH = np.linspace(1, 9, 48, dtype=np.float32).reshape(6, 8)


def write_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("depth", data=DEPTH, compression="gzip")


def write_npz(path: Path) -> None:
    np.savez_compressed(path, plain=DEPTH, objects=objects("a.jpg", np.eye(3), ((0, 1), 0.5)))


FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "a.npz": (write_npz, lambda path: (npz_names(path), read_npz(path, ["plain", "objects"]))),
    "a.npy": (lambda path: np.save(path, DEPTH), read_depth),
    "a.png": (lambda path: Image.fromarray((DEPTH * 1000).astype(np.uint16)).save(path), read_depth),
    "a.tiff": (lambda path: Image.fromarray(DEPTH).save(path), read_depth),
    "a.h5": (write_h5, read_depth),
    "a.jpg": (lambda path: Image.fromarray(DEPTH.astype(np.uint8)).save(path), read_image),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_named(tmp_path: Path, name: str) -> None:
    """Bytes changed, and ends cut off: every reader gives a result or a FileError, and no exception of its own."""
    write, read = FILES[name]
    write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    generator = np.random.default_rng(0)
    messages = []
    for trial in range(120):
        content = bytearray(whole)
        if trial % 4 == 0:
            content = content[: generator.integers(len(whole))]
        for _ in range(min(len(content), 1 + trial % 3)):
            content[generator.integers(len(content))] = generator.integers(256)
        (tmp_path / name).write_bytes(content)
        try:
            read(tmp_path / name)
        except FileError as error:
            messages.append(str(error))
    assert len(messages) >= 20
    assert all(name in message for message in messages)


def test_a_path_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    long = tmp_path / ("n" * 300)
    for read in (read_depth, npz_names, lambda path: read_npz(path, ["x"])):
        with pytest.raises(FileError, match="nnn"):
            read(long)


def test_files_that_unpack_to_more_than_any_depth_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_LARGEST", 100_000)
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(10**5))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("depth", shape=(1000, 1000), dtype="f4", compression="gzip")
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    for name, read in (("a.npz", lambda path: read_npz(path, ["x"])), ("a.h5", read_depth)):
        with pytest.raises(FileError, match=f"{name}: expected at most 100000 bytes when unpacked"):
            read(tmp_path / name)


def write_depth(path: Path, values: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["depth"] = values
    else:
        Image.fromarray(values).save(path)


@pytest.mark.parametrize("name", ["a.npy", "a.h5", "a.tiff"])
def test_floating_point_is_depth_itself_and_whole_numbers_have_a_unit(tmp_path: Path, name: str) -> None:
    write_depth(tmp_path / name, DEPTH)
    np.testing.assert_array_equal(read_depth(tmp_path / name), DEPTH)
    np.testing.assert_array_equal(read_depth(tmp_path / name, unit=0.5), DEPTH)
    millimetres = (DEPTH * 1000).astype(np.uint16)
    write_depth(tmp_path / name, millimetres)
    np.testing.assert_allclose(read_depth(tmp_path / name), millimetres / 1000, rtol=1e-6)
    np.testing.assert_allclose(read_depth(tmp_path / name, unit=1.0), millimetres, rtol=1e-6)


@pytest.mark.parametrize("name", ["a.npy", "a.png"])
def test_a_picture_of_depth_is_no_depth(tmp_path: Path, name: str) -> None:
    write_depth(tmp_path / name, DEPTH.astype(np.uint8))
    with pytest.raises(FileError, match="expected depth in 16 bits or more, got uint8"):
        read_depth(tmp_path / name)


def json_set(root: Path, orientation: int = 1, suffix: str = ".jpg", **fields: Any) -> Path:
    """One pair with pose; image 0 carries an EXIF orientation, its labels are for the stored pixels."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    ramp = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
    for side, options in ((0, {"exif": exif}), (1, {})):
        Image.fromarray(ramp).save(root / f"{side}{suffix}", **options)
        np.save(root / f"{side}.npy", np.full((48, 64), 2.0 + side, dtype=np.float32))
    K = [[50.0, 0, 30], [0, 50, 20], [0, 0, 1]]
    pair = {
        "image0": f"0{suffix}", "image1": f"1{suffix}", "depth0": "0.npy", "depth1": "1.npy",
        "K0": K, "K1": K, "T_0to1": np.eye(4).tolist(), "size0": [64, 48],
    }  # fmt: skip
    entries = {name: value for name, value in fields.items() if name in pair or name.startswith("size")}
    whole = {"pixel_centers": 0.5, "pairs": [{**pair, **entries}]}
    whole |= {name: value for name, value in fields.items() if name not in entries}
    (root / "pairs.json").write_text(json.dumps(whole))
    return root / "pairs.json"


@pytest.mark.parametrize("suffix", [".jpg", ".tiff", ".png"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 8])
def test_labels_belong_to_the_pixels_as_stored(tmp_path: Path, orientation: int, suffix: str) -> None:
    options = PairOptions(min_overlap=None, strict=True, resize=32)
    expected = JsonPairs(json_set(tmp_path, 1, suffix), options=options)[0]
    pair = JsonPairs(json_set(tmp_path, orientation, suffix), options=options)[0]
    assert pair.image0.shape == (1, 24, 32)
    torch.testing.assert_close(pair.image0, expected.image0)
    torch.testing.assert_close(pair.K0, expected.K0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size0": 128}, r"pairs\[0\]: size0: expected \[width, height\], got 128"),
        ({"size0": {"w": 64}}, r"size0: expected \[width, height\]"),
        ({"size1": [64]}, r"size1: expected \[width, height\], got \[64\]"),
        ({"depth_unit": "mm"}, r'"depth_unit": expected a positive number, such as 0.001, got \'mm\''),
        ({"depth_unit": -1}, '"depth_unit": expected a positive number'),
        ({"pixel_centers": False}, '"pixel_centers": 0 or 0.5, got False'),
        ({"T_0to1": [[0.0] * 4] * 4}, "expected a rotation"),
        ({"T_0to1": "pose"}, "T_0to1: expected numbers"),
        ({"K0": [[10**400, 0, 0], [0, 1, 0], [0, 0, 1]]}, "K0: expected numbers"),
        ({"K0": [[1e300, 0, 0], [0, 1e300, 0], [0, 0, 1]]}, "expected 3 x 3 intrinsics"),
        ({"image0": 7}, "7: missing or broken image: .*No such file"),
    ],
)
def test_labels_of_the_wrong_type_name_the_file_and_the_field(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(FileError, match=message):
        _ = JsonPairs(json_set(tmp_path, **fields), options=PairOptions(strict=True, min_overlap=None))[0]
