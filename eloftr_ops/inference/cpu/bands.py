# SPDX-License-Identifier: Apache-2.0
"""Convolutions in bands of rows: a band fits the caches, and memory that the allocator keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BAND_BYTES = 12 << 20  # of the widest map within a band; twice as much takes the same time and 80 MB more


def band_rows(height: int, row_bytes: int, halo: int) -> int:
    """Rows of a band, an even number: as many as fit ``BAND_BYTES``, and at least four halos.

    Args:
        height: rows of the whole result.
        row_bytes: bytes of one row of the widest map.
        halo: rows that a cut spoils on either side of it.
    """
    bands = max(1, min(-(-height * row_bytes // BAND_BYTES), height // (4 * halo)))
    return -(-height // (2 * bands)) * 2


def run_in_bands(
    function: Callable[..., Tensor], maps: Sequence[Tensor], size: tuple[int, int], channels: int, halo: int
) -> Tensor:
    """``function(*maps)``, computed in bands of rows.

    Each band is computed with ``halo`` more rows on both sides and cropped, so that the zero padding at a cut never
    reaches a value that is kept. At the borders of the maps the padding is right.

    Args:
        function: of maps (B, C_i, H_i, W_i); every row of the result depends on ``halo`` rows around it at most.
        maps: each has the height of the result, a multiple, or half of it (then ``halo`` is even).
        size: (H, W) of the result.
        channels: of the widest map at the size of the result.
        halo: rows of the result that a cut spoils on either side of it.

    Returns:
        (B, C, H, W), channels last in memory where there is more than one band.
    """
    height, width = size
    row_bytes = max(1, len(maps[0])) * channels * width * maps[0].element_size()
    rows = band_rows(height, row_bytes, halo)
    if rows >= height:
        return function(*maps)
    result = torch.empty(0)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(0, top - halo), min(bottom + halo, height)
        band = function(*(x[:, :, first * x.shape[2] // height : last * x.shape[2] // height] for x in maps))
        if top == 0:
            result = band.new_empty((*band.shape[:2], *size)).to(memory_format=torch.channels_last)
        result[:, :, top:bottom] = band[:, :, top - first : bottom - first]
    return result
