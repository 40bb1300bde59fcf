# SPDX-License-Identifier: Apache-2.0
"""A file that grows by whole records, and loses at most the one that was being written when the process was killed.

The file begins with a line of JSON: what the run was asked for. Then come records: length and CRC-32 of what follows,
a header in JSON, and the arrays of a pair. A record that is cut short, or whose sum is wrong, and all behind it, are
cut off when the file is opened again.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eloftr_ops.errors import FileError
from eloftr_ops.reconstruction.pairs import Pair

__all__ = ["Journal", "PairMatches", "SettingsError"]

_FRAME = struct.Struct("<II")  # length and checksum of the record
_LENGTH = struct.Struct("<I")


class SettingsError(FileError):
    """What was matched before was matched with other settings."""


class PairMatches(NamedTuple):
    """The matches of one pair.

    Convention:
        Keypoints are (x, y) in pixels of the upright original images; the centre of pixel (x, y) is
        (x + 0.5, y + 0.5).
    """

    pair: Pair
    keypoints0: npt.NDArray[np.float32]  # (M, 2)
    keypoints1: npt.NDArray[np.float32]  # (M, 2)
    confidence: npt.NDArray[np.float32]  # (M,)
    size0_wh: tuple[int, int]
    size1_wh: tuple[int, int]
    files: tuple[str, str] = ("", "")  # which state of the image files it was, see `file_state`


class Journal:
    """Matches on disk, pair by pair.

    Args:
        path: the file; it is made, or taken up where it ends.
        settings: what must be the same for the matches to be worth keeping.

    Raises:
        SettingsError: the file was begun with other settings.
        FileError: it cannot be read or written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._places: dict[Pair, tuple[int, tuple[str, str]]] = {}
        self._end = 0  # of the last whole record
        header = (json.dumps({"eloftr-ops journal": 1, **settings}, sort_keys=True) + "\n").encode()
        try:
            self._file: IO[bytes] = path.open("r+b" if path.exists() else "w+b", buffering=0)
            self._take_up(header)
        except OSError as error:
            raise FileError(f"{path}: cannot be written: {error.strerror or error}.") from error

    def __contains__(self, pair: Pair) -> bool:
        return pair in self._places

    def pairs(self) -> dict[Pair, tuple[str, str]]:
        """The pairs that are there, each with the state of its image files when it was matched."""
        return {pair: files for pair, (_, files) in self._places.items()}

    def forget(self, pair: Pair) -> None:
        """Do not give this pair's matches out any more; the next ones take their place."""
        self._places.pop(pair, None)

    def append(self, matches: PairMatches) -> None:
        """Add a pair; it is safe from a kill of this process when this returns, and from a power cut after `sync`.

        Raises:
            FileError: the disk is full, for instance. What was there before stays whole.
        """
        record = _packed(matches)
        place = self._end
        try:
            self._file.seek(place)
            left = memoryview(_FRAME.pack(len(record), zlib.crc32(record)) + record)
            while left:  # without a buffer, a write may take a part only
                left = left[self._file.write(left) :]
        except OSError as error:
            raise FileError(f"{self.path}: cannot be written: {error.strerror or error}.") from error
        self._end = place + _FRAME.size + len(record)
        self._places[matches.pair] = place, matches.files

    def read(self, pair: Pair) -> PairMatches:
        """The matches of a pair that is there."""
        self._file.seek(self._places[pair][0])
        length, _ = _FRAME.unpack(self._file.read(_FRAME.size))
        return _unpacked(self._file.read(length))

    def sync(self) -> None:
        """Wait until the disk has everything."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Give the file back; no more calls."""
        self._file.close()

    def _take_up(self, header: bytes) -> None:
        """Read the records that are whole, and cut off what is not."""
        first = self._file.readline()
        if first != header:
            if first.endswith(b"\n"):
                raise SettingsError(_difference(self.path, first, header))
            self._file.seek(0)  # killed while it wrote the first line
            self._file.truncate()
            self._file.write(header)
        self._end = len(header)
        while (record := self._whole_record()) is not None:
            meta = _header(record)[0]
            self._places[tuple(meta["pair"])] = self._end, tuple(meta["files"])
            self._end += _FRAME.size + len(record)
        self._file.truncate(self._end)

    def _whole_record(self) -> bytes | None:
        self._file.seek(self._end)
        frame = self._file.read(_FRAME.size)
        if len(frame) < _FRAME.size:
            return None
        length, checksum = _FRAME.unpack(frame)
        record = self._file.read(length)
        return record if len(record) == length and zlib.crc32(record) == checksum else None


def _packed(matches: PairMatches) -> bytes:
    meta = {
        "pair": matches.pair,
        "files": matches.files,
        "sizes": (matches.size0_wh, matches.size1_wh),
        "count": len(matches.confidence),
    }
    header = json.dumps(meta).encode()
    arrays = (matches.keypoints0, matches.keypoints1, matches.confidence)
    return b"".join([_LENGTH.pack(len(header)), header, *(a.astype("<f4").tobytes() for a in arrays)])


def _header(record: bytes) -> tuple[dict[str, Any], int]:
    """The header of a record, and where its arrays begin."""
    (length,) = _LENGTH.unpack_from(record)
    end = _LENGTH.size + length
    return json.loads(record[_LENGTH.size : end]), end


def _unpacked(record: bytes) -> PairMatches:
    meta, start = _header(record)
    count = meta["count"]
    values = np.frombuffer(record, "<f4", offset=start).astype(np.float32)
    keypoints0, keypoints1, confidence = np.split(values, [2 * count, 4 * count])
    size0_wh, size1_wh = (tuple(size) for size in meta["sizes"])
    return PairMatches(
        tuple(meta["pair"]),
        keypoints0.reshape(-1, 2),
        keypoints1.reshape(-1, 2),
        confidence,
        size0_wh,
        size1_wh,
        tuple(meta["files"]),
    )


def _difference(path: Path, found: bytes, expected: bytes) -> str:
    try:
        before, now = json.loads(found), json.loads(expected)
        changed = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]
    except (ValueError, AttributeError):
        changed = ["it is another kind of file"]
    return (
        f"{path}: an unfinished run with other settings: {'; '.join(changed)}. "
        "Pass the settings of that run to go on, another output, or --overwrite to begin anew."
    )
