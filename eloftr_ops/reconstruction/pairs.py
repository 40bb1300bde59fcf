# SPDX-License-Identifier: Apache-2.0
"""Which images of a folder are matched with which: all pairs, neighbours in a sequence, or a list in a file.

Images go by name: the path relative to their folder, with forward slashes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from eloftr_ops.errors import ArgumentError, FileError

__all__ = [
    "Pair",
    "PairList",
    "RefusedPair",
    "exhaustive_pairs",
    "list_images",
    "pair_key",
    "read_pair_file",
    "reading_order",
    "sequential_pairs",
    "unique_pairs",
]

Pair = tuple[str, str]


class RefusedPair(NamedTuple):
    """A pair that cannot be matched, and why."""

    pair: Pair
    reason: str


class PairList(NamedTuple):
    """Pairs to match, and those that a file asked for but that cannot be."""

    pairs: list[Pair]
    refused: list[RefusedPair]


def list_images(folder: Path) -> list[str]:
    """Names of the image files in a folder and its subfolders, in natural order: ``2.jpg`` before ``10.jpg``.

    A file counts by its suffix; hidden files and folders do not. Links to folders are not followed.

    Raises:
        FileError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileError(f"{folder}: expected a folder of images, or a text file of pairs; there is none.")
    Image.init()
    suffixes = {suffix for suffix, format_ in Image.registered_extensions().items() if format_ in Image.OPEN}
    names = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and path.is_file()
    ]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        raise FileError(f"{folder}: no image in this folder. Expected files such as .jpg, .png or .tif.")
    return sorted(names, key=_natural)


def exhaustive_pairs(names: Sequence[str]) -> list[Pair]:
    """Every image with every other one: N (N - 1) / 2 pairs.

    Raises:
        FileError: fewer than two images.
    """
    _check_count(names)
    return list(itertools.combinations(names, 2))


def sequential_pairs(names: Sequence[str], window: int) -> list[Pair]:
    """Every image with the ``window`` images behind it.

    Raises:
        FileError: fewer than two images.
        ArgumentError: a window below 1.
    """
    _check_count(names)
    if window < 1:
        raise ArgumentError("window", f"expected at least 1 image, got {window}.")
    return [(name, other) for k, name in enumerate(names) for other in names[k + 1 : k + 1 + window]]


def read_pair_file(path: Path) -> PairList:
    """Pairs of a text file: two names per line, separated by a tab or, where no name has any, by blanks.

    Blank lines and lines that begin with ``#`` are passed over. A line that is no pair, and a pair of an image with
    itself, is refused and listed. A pair that was named before, in either order, is passed over.

    Raises:
        FileError: the file cannot be read, or holds no pair.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read as a text file of pairs: {error}.") from error
    pairs, refused = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = [part.strip() for part in (line.split("\t") if "\t" in line else line.split())]
        if len(parts) != 2 or not all(parts):
            reason = f"line {number} of {path.name}: expected two names, got {line.strip()!r}"
            refused.append(RefusedPair((line.strip(), ""), reason))
        elif parts[0] == parts[1]:
            reason = f"line {number} of {path.name}: an image with itself"
            refused.append(RefusedPair((parts[0], parts[1]), reason))
        else:
            pairs.append((parts[0], parts[1]))
    if not pairs:
        raise FileError(f"{path}: no pair in this file. Expected two image names per line.")
    return PairList(unique_pairs(pairs), refused)


def unique_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs without those that came before, in either order."""
    seen: set[Pair] = set()
    kept = []
    for pair in pairs:
        if pair not in seen:
            seen |= {pair, (pair[1], pair[0])}
            kept.append(pair)
    return kept


def pair_key(pair: Pair) -> str:
    """The name of a pair's group in hloc's files: both names with ``/`` written as ``-``, and a ``/`` between."""
    return "/".join(name.replace("/", "-") for name in pair)


def check_keys(names: Iterable[str]) -> None:
    """Two images whose names become one in hloc's files cannot be told apart there.

    Raises:
        FileError: such names, as ``a/b.jpg`` and ``a-b.jpg`` are.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.replace("/", "-"), name)
        if other != name:
            raise FileError(
                f"{other} and {name}: the same name, once / is written as -, as hloc's files do. Rename one of them."
            )


def reading_order(pairs: Sequence[Pair], images: int, parts: int = 1) -> list[list[Pair]]:
    """The pairs in an order in which few images have to be at hand at a time.

    Images are numbered by their first use. The pairs fall into square tiles of the table of all pairs; a tile needs at
    most ``images`` images. Rows of tiles are walked to and fro, so that the next tile shares a side with the last.

    Args:
        pairs: what to order.
        images: how many images fit into memory, at least 2.
        parts: so many tiles at least, if there are pairs enough: one worker takes a tile.
    """
    numbers: dict[str, int] = {}
    for name in itertools.chain.from_iterable(pairs):
        numbers.setdefault(name, len(numbers))
    side = max(1, images // 2)
    if parts > 1:
        side = min(side, max(1, -(-len(numbers) // (2 * parts))))
    tiles: dict[tuple[int, int], list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: (numbers[pair[0]], numbers[pair[1]])):
        row, column = numbers[pair[0]] // side, numbers[pair[1]] // side
        tiles.setdefault((row, column if row % 2 == 0 else -column), []).append(pair)
    return [tiles[place] for place in sorted(tiles)]


def _natural(name: str) -> tuple[list[str | int], str]:
    parts: list[str | int] = list(re.split(r"(\d+)", name.lower()))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, name


def _check_count(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise FileError(f"Expected at least two images to match, got {len(names)}: {', '.join(names)}.")
