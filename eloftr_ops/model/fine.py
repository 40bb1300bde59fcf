# SPDX-License-Identifier: Apache-2.0
"""Fine matching: a feature pyramid to half resolution, then positions in the windows of matched cells.

The arg-max pixel is the second place where gradients stop by nature; ``positions`` says how each mode carries on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eloftr_kernels import WindowMatches
from eloftr_kernels.window_match import WINDOW
from eloftr_ops.config import EfficientLoFTRConfig, GradientMode
from eloftr_ops.inference.cpu.tiling import by_pieces, plan, read_by
from eloftr_ops.model.backbone import fold_batch_norm
from eloftr_ops.types import CoarseMatches, CoarseScores

_HALO = 4  # positions that a cut spoils: one of the upsampling, one of each 3x3 convolution; even, for the coarser map
CELL = WINDOW  # pixels per side of a coarse cell


class FeaturePyramid(nn.Module):
    """Fuse the transformer output with the backbone maps, up to half resolution (section 3.4).

    The last upsampling, to the resolution of the image, is left to the windows: only matched cells pay for it.
    """

    def __init__(self, config: EfficientLoFTRConfig) -> None:
        super().__init__()
        _, half, quarter, coarse = config.stage_channels
        self.scale = 1 / math.sqrt(coarse)
        self.coarse_projection = nn.Conv2d(coarse, coarse, 1, bias=False)
        self.quarter_projection = nn.Conv2d(quarter, coarse, 1, bias=False)
        self.quarter_fusion = _fusion(coarse, quarter)
        self.half_projection = nn.Conv2d(half, quarter, 1, bias=False)
        self.half_fusion = _fusion(quarter, half)

    def forward(self, coarse: Tensor, quarter: Tensor, half: Tensor, wanted: Tensor | None = None) -> Tensor:
        """(B, C, h, w), (B, C2, 2h, 2w), (B, C1, 4h, 4w) -> (B, C1, 4h, 4w).

        With ``wanted``, (B, h, w) bool, only the windows of those cells are sure to be there.
        """
        at_half, at_quarter = _size(half), _size(quarter)
        if wanted is not None:
            wanted = _with_neighbours(wanted.any(0))  # windows reach a position beyond their cell
        pieces = plan(half, at_half, quarter.shape[1], _HALO, wanted)
        if wanted is not None:
            wanted = read_by(pieces, _HALO, at_half, wanted)
        first = plan(quarter, at_quarter, coarse.shape[1], _HALO, wanted)
        x = by_pieces(self._at_quarter, coarse, quarter, pieces=first, size=at_quarter, halo=_HALO)
        return by_pieces(self._at_half, x, half, pieces=pieces, size=at_half, halo=_HALO)

    def _at_quarter(self, coarse: Tensor, quarter: Tensor) -> Tensor:
        x = _upsample(self.coarse_projection(coarse * self.scale)).add_(self.quarter_projection(quarter))
        return self.quarter_fusion(x)  # type: ignore[no-any-return]

    def _at_half(self, x: Tensor, half: Tensor) -> Tensor:
        return self.half_fusion(_upsample(x).add_(self.half_projection(half)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the BatchNorms in place, for inference."""
        for fusion in (self.quarter_fusion, self.half_fusion):
            conv, bn = fusion[0], fusion[1]
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                weight, bias = fold_batch_norm(conv.weight, bn)
                conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
                fusion[1] = nn.Identity()


def positions(
    coarse: CoarseMatches,
    fine: WindowMatches,
    scores: CoarseScores,
    grid0: tuple[int, int],
    grid1: tuple[int, int],
    mask0: Tensor | None,
    mask1: Tensor | None,
    mode: GradientMode,
    config: EfficientLoFTRConfig,
) -> tuple[Tensor, Tensor]:
    """Keypoints (M, 2), (x, y) pixels, centre of pixel (x, y) at (x + 0.5, y + 0.5).

    ``hard``: cell + arg-max pixel (+ sub-pixel offset in image 1). ``soft``: expectations over the window's joint
    probability and over the coarse neighbourhood take the place of both arg-maxes. ``straight_through``: the values
    of ``hard``, the gradient of ``soft``.
    """
    dtype = fine.subpixel1.dtype
    cell0, cell1 = cell_positions(coarse.cells0, grid0, dtype), cell_positions(coarse.cells1, grid1, dtype)
    hard0, hard1 = cell0 + fine.pixel0, cell1 + fine.pixel1 + fine.subpixel1
    if mode == "hard":
        return hard0, hard1
    if fine.expected0 is None or fine.expected1 is None:
        raise ValueError(f"fine: expected window expectations for mode {mode!r}, got none.")
    drift0 = _neighbourhood_drift(scores, coarse, 0, grid0, mask0, config)
    drift1 = _neighbourhood_drift(scores, coarse, 1, grid1, mask1, config)
    soft0 = cell0 + drift0 + fine.expected0
    soft1 = cell1 + drift1 + fine.expected1 + fine.subpixel1
    if mode == "soft":
        return soft0, soft1
    return hard0.detach() + (soft0 - soft0.detach()), hard1.detach() + (soft1 - soft1.detach())


def cell_positions(cells: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(M,) flat cells -> (M, 2) frame positions 8 * (column, row)."""
    return CELL * torch.stack([cells % grid[1], cells // grid[1]], -1).to(dtype)


def _neighbourhood_drift(
    scores: CoarseScores,
    coarse: CoarseMatches,
    side: int,
    grid: tuple[int, int],
    mask: Tensor | None,
    config: EfficientLoFTRConfig,
) -> Tensor:
    """(M, 2) expected offset, in pixels, over the coarse cells around the match in image ``side``.

    The probability is the softmax of the coarse scores of the partner cell against the neighbourhood, the coarse
    counterpart of the window expectation: it is what lets a position move coarse features.
    """
    radius = config.soft_neighbourhood // 2
    if side == 0:
        anchors, features, cells, partners = scores.features1, scores.features0, coarse.cells0, coarse.cells1
    else:
        anchors, features, cells, partners = scores.features0, scores.features1, coarse.cells1, coarse.cells0
    height, width = grid
    line = torch.arange(-radius, radius + 1, device=cells.device)
    offsets = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)  # (K, 2)
    x = (cells % width)[:, None] + offsets[:, 0]
    y = (cells // width)[:, None] + offsets[:, 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    neighbours = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    batch = coarse.batch[:, None]
    if mask is not None:
        inside = inside & mask.flatten(1)[batch, neighbours]
    dtype = torch.promote_types(features.dtype, torch.float32)
    query, keys = anchors[coarse.batch, partners].to(dtype), features[batch, neighbours].to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        logits = (keys @ query[:, :, None])[..., 0] / config.temperature
        probability = F.softmax(
            logits.masked_fill(~inside, -torch.inf), 1
        )  # the match itself is always inside
        return probability @ (CELL * offsets).to(dtype)


def _fusion(channels: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(inplace=True),
        nn.Conv2d(channels, channels_out, 3, padding=1, bias=False),
    )


def _with_neighbours(cells: Tensor) -> Tensor:
    """(h, w) bool, and the eight cells around each that is set."""
    return F.max_pool2d(cells[None].float(), 3, stride=1, padding=1)[0] > 0


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
