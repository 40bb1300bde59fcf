# SPDX-License-Identifier: Apache-2.0
"""Fine matching: a feature pyramid to half resolution, then positions in the windows of matched cells.

The arg-max pixel is the second place where gradients stop; ``keypoints_from_windows`` says what each mode does there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eloftr_kernels import WindowMatches, window_match
from eloftr_kernels.window_match.moments import WindowMoments, window_moments
from eloftr_ops.config import EfficientLoFTRConfig, GradientMode
from eloftr_ops.model.backbone import fold_batch_norm
from eloftr_ops.model.covariance import calibrated_covariances
from eloftr_ops.model.stages import stage
from eloftr_ops.types import CELL, CoarseMatches, CoarseOutput, Features, Matches, UncertainMatches


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

    def forward(self, coarse: Tensor, quarter: Tensor, half: Tensor) -> Tensor:
        """(B, C, h, w), (B, C2, 2h, 2w), (B, C1, 4h, 4w) -> (B, C1, 4h, 4w)."""
        return self.to_half(self.to_quarter(coarse, quarter), half)

    @stage
    def to_quarter(self, coarse: Tensor, quarter: Tensor) -> Tensor:
        """(B, C, h, w), (B, C2, 2h, 2w) -> (B, C2, 2h, 2w)."""
        coarse = (coarse * self.scale).to(quarter.dtype)
        x = _upsample(self.coarse_projection(coarse)).add_(self.quarter_projection(quarter))
        return self.quarter_fusion(x)  # type: ignore[no-any-return]

    @stage
    def to_half(self, quarter: Tensor, half: Tensor) -> Tensor:
        """(B, C2, 2h, 2w), (B, C1, 4h, 4w) -> (B, C1, 4h, 4w)."""
        return self.half_fusion(_upsample(quarter).add_(self.half_projection(half)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fuse_(self) -> None:
        """Fold the BatchNorms in place, for inference."""
        for fusion in (self.quarter_fusion, self.half_fusion):
            conv, bn = fusion[0], fusion[1]
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                weight, bias = fold_batch_norm(conv.weight, bn)
                conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
                fusion[1] = nn.Identity()


def match_windows(
    fine0: Tensor,
    fine1: Tensor,
    selected: CoarseMatches,
    coarse: CoarseOutput,
    mode: GradientMode,
    config: EfficientLoFTRConfig,
    covariance: bool = False,
) -> Matches | UncertainMatches:
    """Keypoints of selected cells, wherever they lie, and their covariances; fine maps (B, D, 4h, 4w)."""
    windows = matched_windows(fine0, fine1, selected, mode, config)
    keypoints0, keypoints1 = keypoints_from_windows(selected, windows, coarse, mode, config)
    matches = Matches(keypoints0, keypoints1, selected.confidence, selected.batch)
    if not covariance:
        return matches
    moments = measured_windows(fine0, fine1, selected, windows, config)
    return UncertainMatches(*matches, *calibrated_covariances(moments, config.covariance_calibration))


def matched_windows(
    fine0: Tensor, fine1: Tensor, selected: CoarseMatches, mode: GradientMode, config: EfficientLoFTRConfig
) -> WindowMatches:
    """The pixels of selected cells, with expectations unless the mode is ``hard``."""
    return window_match(
        fine0,
        fine1,
        selected.batch,
        selected.cells0,
        selected.cells1,
        subpixel_channels=config.subpixel_channels,
        subpixel_temperature=config.subpixel_temperature,
        centred_subpixel=config.centred_subpixel,
        soft_temperature=None if mode == "hard" else config.soft_temperature,
    )


def measured_windows(
    fine0: Tensor, fine1: Tensor, selected: CoarseMatches, windows: WindowMatches, config: EfficientLoFTRConfig
) -> WindowMoments:
    """How sure the windows are of those pixels."""
    return window_moments(
        fine0,
        fine1,
        selected.batch,
        selected.cells0,
        selected.cells1,
        windows.pixel0,
        windows.pixel1,
        subpixel_channels=config.subpixel_channels,
        subpixel_temperature=config.subpixel_temperature,
        centred_subpixel=config.centred_subpixel,
    )


def keypoints_from_windows(
    selected: CoarseMatches,
    windows: WindowMatches,
    coarse: CoarseOutput,
    mode: GradientMode,
    config: EfficientLoFTRConfig,
) -> tuple[Tensor, Tensor]:
    """Keypoints (M, 2), (x, y) pixels, centre of pixel (x, y) at (x + 0.5, y + 0.5).

    ``hard``: cell + arg-max pixel (+ sub-pixel offset in image 1). ``soft``: expectations (soft-argmax) over the
    window's joint probability and over the coarse neighbourhood take the place of both arg-maxes.
    ``straight_through``: the values of ``hard``, the gradient of ``soft``.

    Args:
        selected: M pairs of cells.
        windows: of ``eloftr_kernels.window_match`` for them.
        coarse: where the cells come from.
        mode: how keypoints depend on features.
        config: temperature, neighbourhood.

    Raises:
        ValueError: ``windows`` without expectations in a mode that needs them.
    """
    dtype = windows.subpixel1.dtype
    cell0 = cell_positions(selected.cells0, coarse.grid0, dtype)
    cell1 = cell_positions(selected.cells1, coarse.grid1, dtype)
    hard0, hard1 = cell0 + windows.pixel0, cell1 + windows.pixel1 + windows.subpixel1
    if mode == "hard":
        return hard0, hard1
    if windows.expected0 is None or windows.expected1 is None:
        raise ValueError(f"windows: expected the fields expected0 and expected1 for mode {mode!r}, got None.")
    offset0 = expected_cell_offset(selected, coarse, 0, config)
    offset1 = expected_cell_offset(selected, coarse, 1, config)
    soft0 = cell0 + offset0 + windows.expected0
    soft1 = cell1 + offset1 + windows.expected1 + windows.subpixel1
    if mode == "soft":
        return soft0, soft1
    return hard0.detach() + (soft0 - soft0.detach()), hard1.detach() + (soft1 - soft1.detach())


def on_image(matches: Matches | UncertainMatches, features0: Features, features1: Features) -> Tensor:
    """(M,) bool: both keypoints lie on their image and on no masked pixel."""
    inside = torch.ones_like(matches.batch_indexes, dtype=torch.bool)
    for keypoints, features in ((matches.keypoints0, features0), (matches.keypoints1, features1)):
        height, width = (CELL * cells for cells in features.coarse.shape[-2:])
        column, row = keypoints.detach().floor().long().unbind(-1)
        inside = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        if features.mask is not None:
            row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
            inside = inside & features.mask[matches.batch_indexes, row, column]
    return inside


def cell_positions(cells: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(M,) flat cells -> (M, 2) frame positions 8 * (column, row)."""
    return CELL * torch.stack([cells % grid[1], cells // grid[1]], -1).to(dtype)


def expected_cell_offset(
    selected: CoarseMatches, coarse: CoarseOutput, side: int, config: EfficientLoFTRConfig
) -> Tensor:
    """(M, 2) expected offset, in pixels, over the coarse cells around the match in image ``side``.

    The probability is the softmax of the coarse scores of the partner cell against the neighbourhood: the coarse
    counterpart of the window expectation. Through it a position moves coarse features.
    """
    radius = config.soft_neighbourhood // 2
    scores = coarse.scores
    if side == 0:
        anchors, features, cells, partners = (
            scores.features1,
            scores.features0,
            selected.cells0,
            selected.cells1,
        )
        mask, (height, width) = coarse.mask0, coarse.grid0
    else:
        anchors, features, cells, partners = (
            scores.features0,
            scores.features1,
            selected.cells1,
            selected.cells0,
        )
        mask, (height, width) = coarse.mask1, coarse.grid1
    line = torch.arange(-radius, radius + 1, device=cells.device)
    offsets = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)  # (K, 2)
    x = (cells % width)[:, None] + offsets[:, 0]
    y = (cells // width)[:, None] + offsets[:, 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    neighbours = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    batch = selected.batch[:, None]
    if mask is not None:
        inside = inside & mask.flatten(1)[batch, neighbours]
    dtype = torch.promote_types(features.dtype, torch.float32)
    query, keys = anchors[selected.batch, partners].to(dtype), features[batch, neighbours].to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        logits = (keys @ query[:, :, None])[..., 0] / config.temperature
        # The match itself is always inside, so no row is empty.
        probability = F.softmax(logits.masked_fill(~inside, -torch.inf), 1)
        return probability @ (CELL * offsets).to(dtype)


def _fusion(channels: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(inplace=True),
        nn.Conv2d(channels, channels_out, 3, padding=1, bias=False),
    )


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
