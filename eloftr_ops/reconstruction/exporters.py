# SPDX-License-Identifier: Apache-2.0
"""Keypoints and matches in the files of other programs, each in its own frame.

| program | centre of the first pixel |
|---|---|
| COLMAP | (0.5, 0.5), as here |
| hloc | (0, 0): it adds 0.5 on the way to COLMAP |
| OpenSfM | (0, 0), then normalised: (x + 0.5 - width / 2) / max(width, height) |
| OpenMVG | (0, 0) |
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.reconstruction.cameras import PhotoCamera
from eloftr_ops.reconstruction.colmap import write_database
from eloftr_ops.reconstruction.match_file import require_h5py
from eloftr_ops.reconstruction.pairs import check_keys, pair_key
from eloftr_ops.reconstruction.tracks import Tracks
from eloftr_ops.storage import write_file

__all__ = ["Program", "export_tracks"]

Program = Literal["colmap", "hloc", "opensfm", "openmvg"]
_Exporter = Callable[[Path, Tracks, Mapping[str, PhotoCamera]], list[Path]]
_SIZE = 4.0  # pixels, what is said about the size of a keypoint
_SIFT_BYTES = 128  # of a descriptor in OpenMVG's files, all zero


def export_tracks(program: Program, folder: Path, tracks: Tracks, cameras: Mapping[str, PhotoCamera]) -> list[Path]:
    """Write keypoints and matches as a program reads them.

    Convention:
        ``tracks`` are in the project's frame; the files are in the program's, see the module.

    Args:
        program: "colmap", "hloc", "opensfm" or "openmvg".
        folder: to write into, made if need be. For OpenSfM the folder of its project.
        tracks: of `build_tracks` or `quantised_tracks`.
        cameras: of each image; COLMAP and OpenMVG get their focal lengths.

    Returns:
        The files that matter.

    Raises:
        ArgumentError: another program, or a package is missing.
        FileError: names that the program cannot tell apart, or a place that cannot be written.
    """
    if program not in get_args(Program):
        raise ArgumentError("to", f"expected one of {', '.join(get_args(Program))}, got {program!r}.")
    exporters: dict[str, _Exporter] = {
        "colmap": _colmap,
        "hloc": _hloc,
        "opensfm": _opensfm,
        "openmvg": _openmvg,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return exporters[program](folder, tracks, cameras)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written: {error.strerror or error}.") from error


def _colmap(folder: Path, tracks: Tracks, cameras: Mapping[str, PhotoCamera]) -> list[Path]:
    write_database(folder / "database.db", tracks, cameras)
    return [folder / "database.db"]


def _hloc(folder: Path, tracks: Tracks, cameras: Mapping[str, PhotoCamera]) -> list[Path]:
    """features.h5, matches.h5 and pairs.txt."""
    h5py = require_h5py()
    check_keys(tracks.names)
    with h5py.File(folder / "features.h5", "w") as file:
        for name, keypoints, scores in zip(tracks.names, tracks.keypoints, tracks.scores, strict=True):
            group = file.create_group(name)
            group.create_dataset("keypoints", data=_integer_centred(keypoints))
            group.create_dataset("scores", data=scores)
    count = {name: len(keypoints) for name, keypoints in zip(tracks.names, tracks.keypoints, strict=True)}
    with h5py.File(folder / "matches.h5", "w") as file:
        for pair, rows in tracks.pairs.items():
            matches = np.full(count[pair[0]], -1, np.int32)
            matches[rows[:, 0]] = rows[:, 1]
            group = file.create_group(pair_key(pair))
            group.create_dataset("matches0", data=matches)
            group.create_dataset("matching_scores0", data=(matches >= 0).astype(np.float16))
    lines = [f"{first} {second}\n" for first, second in tracks.pairs]
    write_file(folder / "pairs.txt", "".join(lines).encode())
    return [folder / name for name in ("features.h5", "matches.h5", "pairs.txt")]


def _opensfm(folder: Path, tracks: Tracks, cameras: Mapping[str, PhotoCamera]) -> list[Path]:
    """features/NAME.features.npz and matches/NAME_matches.pkl.gz."""
    by_first: dict[str, dict[str, npt.NDArray[np.int32]]] = {name: {} for name in tracks.names}
    for (first, second), rows in tracks.pairs.items():
        by_first[first][second] = rows.astype(np.int32)
    for name, (width, height), keypoints in zip(tracks.names, tracks.sizes_wh, tracks.keypoints, strict=True):
        long_side, count = max(width, height), len(keypoints)
        points = np.zeros((count, 4), np.float32)  # x, y, size, angle
        points[:, :2] = (_integer_centred(keypoints) + 0.5 - [width / 2, height / 2]) / long_side
        points[:, 2] = _SIZE / long_side
        content = io.BytesIO()
        descriptors, colors = np.zeros((count, 1), np.float32), np.zeros((count, 3), np.uint8)
        fields: dict[str, Any] = {"points": points, "descriptors": descriptors, "colors": colors}
        np.savez_compressed(content, OPENSFM_FEATURES_VERSION=np.array(1), **fields)
        write_file(folder / "features" / f"{name}.features.npz", content.getvalue())
        packed = gzip.compress(pickle.dumps(by_first[name]), mtime=0)
        write_file(folder / "matches" / f"{name}_matches.pkl.gz", packed)
    return [folder / "features", folder / "matches"]


def _openmvg(folder: Path, tracks: Tracks, cameras: Mapping[str, PhotoCamera]) -> list[Path]:
    """sfm_data.json, image_describer.json, NAME.feat, NAME.desc and matches.putative.txt."""
    stems = [Path(name).stem for name in tracks.names]
    twice = {stem for stem in stems if stems.count(stem) > 1}
    if twice:
        raise FileError(f"{min(twice)}: two images of this name. OpenMVG tells images by it alone; rename one.")
    for stem, keypoints in zip(stems, tracks.keypoints, strict=True):
        points = _integer_centred(keypoints)
        text = "".join(f"{x:.9g} {y:.9g} {_SIZE:g} 0\n" for x, y in points.tolist())
        write_file(folder / f"{stem}.feat", text.encode())
        descriptors = struct.pack("<Q", len(points)) + bytes(_SIFT_BYTES * len(points))
        write_file(folder / f"{stem}.desc", descriptors)
    number = {name: k for k, name in enumerate(tracks.names)}
    lines = []
    for (first, second), rows in tracks.pairs.items():
        i, j = number[first], number[second]
        columns = rows if i < j else rows[:, ::-1]
        lines.append(f"{min(i, j)} {max(i, j)}\n{len(rows)}\n")
        lines += [f"{a} {b}\n" for a, b in columns.tolist()]
    write_file(folder / "matches.putative.txt", "".join(lines).encode())
    write_file(folder / "sfm_data.json", json.dumps(_sfm_data(tracks, cameras), indent=1).encode())
    write_file(folder / "image_describer.json", json.dumps(_REGIONS, indent=1).encode())
    names = ("sfm_data.json", "image_describer.json", "matches.putative.txt")
    return [folder / name for name in names]


_REGIONS = {
    "regions_type": {
        "polymorphic_id": 2**31 + 1,
        "polymorphic_name": "SIFT_Regions",
        "ptr_wrapper": {"valid": 1, "data": {"value0": [], "value1": []}},
    }
}


def _sfm_data(tracks: Tracks, cameras: Mapping[str, PhotoCamera]) -> dict[str, Any]:
    """Views and intrinsics as OpenMVG's serialization (cereal) writes them; pointers are numbered from 2^31 + 1."""
    known: dict[PhotoCamera, int] = {}
    views = []
    for number, name in enumerate(tracks.names):
        camera = known.setdefault(cameras[name], len(known))
        width, height = cameras[name].size_wh
        path = Path(name)
        local = "" if path.parent == Path() else path.parent.as_posix()
        data = {"local_path": local, "filename": path.name, "width": width, "height": height}
        data |= {"id_view": number, "id_intrinsic": camera, "id_pose": number}
        pointer = {"id": 2**31 + 1 + number, "data": data}
        views.append({"key": number, "value": {"polymorphic_id": 2**30, "ptr_wrapper": pointer}})
    intrinsics = []
    for photo, number in known.items():
        width, height = photo.size_wh
        # Integer centres: the middle of the image is half a pixel less.
        data = {"width": width, "height": height, "focal_length": photo.start_focal}
        data |= {"principal_point": [width / 2 - 0.5, height / 2 - 0.5], "disto_k3": [0.0, 0.0, 0.0]}
        kind = {"polymorphic_id": 2**31 + 1, "polymorphic_name": "pinhole_radial_k3"}
        value = kind if number == 0 else {"polymorphic_id": 1}
        pointer = {"id": 2**31 + 1 + len(views) + number, "data": data}
        intrinsics.append({"key": number, "value": {**value, "ptr_wrapper": pointer}})
    empty: dict[str, Any] = {"extrinsics": [], "structure": [], "control_points": []}
    return {
        "sfm_data_version": "0.3",
        "root_path": "",
        "views": views,
        "intrinsics": intrinsics,
        **empty,
    }


def _integer_centred(keypoints: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Keypoints in the frame where the centre of the first pixel is (0, 0)."""
    moved: npt.NDArray[np.float32] = keypoints - np.float32(0.5)
    return moved
