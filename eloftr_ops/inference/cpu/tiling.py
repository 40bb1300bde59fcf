# SPDX-License-Identifier: Apache-2.0
"""Convolutions piece by piece: what a CPU computes soonest is what its caches hold, and what nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.dispatch import is_cpu_inference

BAND_BYTES = 24 << 20  # of the widest map within a band: below what the allocator keeps, few cuts
TILES = (32, 16)  # positions per side of a tile: few calls, or little that nobody wants
_CALL = 1024  # positions that could be computed in the time that a piece takes beside its arithmetic


class Piece(NamedTuple):
    """A rectangle of positions of a map, its ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def grown(self, by: int, size: tuple[int, int]) -> Piece:
        """With ``by`` more positions on every side, as far as the map goes."""
        top, left = max(0, self.top - by), max(0, self.left - by)
        return Piece(top, min(self.bottom + by, size[0]), left, min(self.right + by, size[1]))

    def of(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """This part of (B, C, H', W'), which covers what a map of ``size`` covers."""
        rows = slice(self.top * x.shape[2] // size[0], self.bottom * x.shape[2] // size[0])
        columns = slice(self.left * x.shape[3] // size[1], self.right * x.shape[3] // size[1])
        return x[:, :, rows, columns]


def plan(
    like: Tensor, size: tuple[int, int], channels: int, halo: int, wanted: Tensor | None = None
) -> list[Piece]:
    """Which pieces to compute a map in: bands of rows, or tiles where something is wanted if these are less work.

    All of it at once where :func:`eloftr_kernels.dispatch.is_cpu_inference` says no.

    Args:
        like: a map (B, C, H', W') that goes in.
        size: (H, W) of the result.
        channels: of the widest map at the size of the result.
        halo: positions of the result that a cut spoils on either side of it.
        wanted: (h, w) bool, cells of which something will be read; H and W are multiples of h and w.
    """
    height, width = size
    if not is_cpu_inference(like):
        return [Piece(0, height, 0, width)]
    row_bytes = max(1, len(like)) * channels * width * like.element_size()
    count = max(1, min(-(-height * row_bytes // BAND_BYTES), height // (4 * halo)))
    rows = -(-height // (2 * count)) * 2  # bands of one height
    bands = [Piece(top, min(top + rows, height), 0, width) for top in range(0, height, rows)]
    if wanted is None:
        return bands
    tilings = [list(_tiles(wanted, size, side)) for side in TILES]
    return min(bands, *tilings, key=lambda pieces: _cost(pieces, halo, size))


def by_pieces(
    function: Callable[..., Tensor], *maps: Tensor, pieces: Sequence[Piece], size: tuple[int, int], halo: int
) -> Tensor:
    """``function(*maps)``, computed in ``pieces``; between them the result holds anything.

    A piece is given with ``halo`` more positions on every side, which are dropped from its result: what a convolution
    pads there with zeros, where the map goes on, must not reach further. At the maps' own borders the padding is right.

    Args:
        function: of maps (B, C_i, H_i, W_i), local; the result is of ``size``.
        maps: of ``size``, of a multiple, or, if ``size``, ``halo`` and ``pieces`` are even, of half of it.
        pieces: from :func:`plan`, at least one.
        size: (H, W) of the result.
        halo: as for :func:`plan`.

    Returns:
        (B, C, H, W), channels last in memory.
    """
    if list(pieces) == [Piece(0, size[0], 0, size[1])]:
        return function(*maps)
    result: Tensor | None = None
    for piece in pieces:
        grown = piece.grown(halo, size)
        part = function(*(grown.of(x, size) for x in maps))
        if result is None:
            result = part.new_empty((*part.shape[:2], *size)).to(memory_format=torch.channels_last)
        top, left = piece.top - grown.top, piece.left - grown.left
        kept = part[:, :, top : top + piece.bottom - piece.top, left : left + piece.right - piece.left]
        piece.of(result, size).copy_(kept)
    assert result is not None  # there is a piece
    return result


def read_by(pieces: Sequence[Piece], halo: int, size: tuple[int, int], wanted: Tensor) -> Tensor:
    """The cells, as ``wanted``, that the ``pieces`` of a map of ``size`` are computed from."""
    cells = torch.zeros_like(wanted)
    step = size[0] // len(wanted)
    for piece in pieces:
        top, bottom, left, right = piece.grown(halo, size)
        cells[top // step : -(-bottom // step), left // step : -(-right // step)] = True
    return cells


def _tiles(wanted: Tensor, size: tuple[int, int], side: int) -> Iterator[Piece]:
    """Rows of tiles, cut where no tile is wanted for a while; the first tile if none is, to have a result."""
    tiles = F.max_pool2d(wanted[None].float(), side * len(wanted) // size[0], ceil_mode=True)[0] > 0
    tiles[0, 0] |= not tiles.any()
    for row, line in enumerate(tiles):
        for first, last in _runs(line.nonzero()[:, 0].tolist(), gap=1 + _CALL // side**2):
            bottom, right = min(side * (row + 1), size[0]), min(side * (last + 1), size[1])
            yield Piece(side * row, bottom, side * first, right)


def _runs(numbers: Sequence[int], gap: int) -> list[tuple[int, int]]:
    """First and last of ascending numbers that follow each other by ``gap`` at most."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        follows = bool(runs) and number - runs[-1][1] <= gap
        first = runs.pop()[0] if follows else number
        runs.append((first, number))
    return runs


def _cost(pieces: Sequence[Piece], halo: int, size: tuple[int, int]) -> int:
    """Positions that are computed, and those that could be in the meantime."""
    grown = [piece.grown(halo, size) for piece in pieces]
    return sum(_CALL + (p.bottom - p.top) * (p.right - p.left) for p in grown)
