# SPDX-License-Identifier: Apache-2.0
"""Convolutions band by band: what a CPU computes soonest is what its caches hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eloftr_kernels.dispatch import works_in_pieces

BAND_BYTES = 24 << 20  # of the widest map within a band: below what the allocator keeps, few cuts


def by_bands(function: Callable[..., Tensor], *maps: Tensor, height: int, channels: int, halo: int) -> Tensor:
    """``function(*maps)``, in bands of rows where :func:`eloftr_kernels.dispatch.works_in_pieces`; else at once.

    A band is given with ``halo`` more rows on either side, which are dropped from its result: what a convolution pads
    there with zeros, where the map goes on, must not reach further. At the maps' own borders the padding is right.

    Args:
        function: of maps (B, C_i, H_i, W_i), local along the rows; the result has ``height`` of them.
        maps: of ``height`` rows, of a multiple, or, if ``height`` and ``halo`` are even, of half of it.
        height: rows of the result.
        channels: of the widest map at the size of the result.
        halo: rows of the result that a cut spoils on either side of it.

    Returns:
        (B, C, height, W), channels last in memory.
    """
    batch, _, rows_in, width_in = maps[-1].shape
    row_bytes = batch * channels * (width_in * height // rows_in) * maps[-1].element_size()
    count = min(-(-height * row_bytes // BAND_BYTES), height // (4 * halo))
    if not works_in_pieces(maps[0]) or count <= 1:
        return function(*maps)
    rows = -(-height // (2 * count)) * 2  # bands of one height
    result: Tensor | None = None
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        low, high = max(start - halo, 0), min(stop + halo, height)
        band = function(*(x[:, :, low * x.shape[2] // height : high * x.shape[2] // height] for x in maps))
        if result is None:
            shape = (batch, band.shape[1], height, band.shape[3])
            result = torch.empty(
                shape, dtype=band.dtype, device=band.device, memory_format=torch.channels_last
            )
        result[:, :, start:stop] = band[:, :, start - low : stop - low]
    assert result is not None  # height is positive
    return result
