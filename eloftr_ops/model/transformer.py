# SPDX-License-Identifier: Apache-2.0
"""Aggregated self- and cross-attention on the coarse maps (EfficientLoFTR, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eloftr_kernels import AttentionWeights, MlpWeights, aggregated_attention, upsample_mlp
from eloftr_kernels.aggregated_attention.naive import AGGREGATION as AGGREGATION
from eloftr_kernels.arithmetic import upcast_for_accumulation
from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.model.stages import stage


class AggregatedAttention(nn.Module):
    """One attention layer: message between 4x4-aggregated tokens, upsampled and merged into the full coarse map."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.aggregate = nn.Conv2d(channels, channels, AGGREGATION, stride=AGGREGATION, groups=channels, bias=False)
        self.token_norm = nn.LayerNorm(channels)
        self.q_proj = nn.Linear(channels, channels, bias=False)
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels, bias=False)
        self.merge = nn.Linear(channels, channels, bias=False)
        self.expand = nn.Linear(2 * channels, 2 * channels, bias=False)
        self.contract = nn.Linear(2 * channels, channels, bias=False)
        self.update_norm = nn.LayerNorm(channels)

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        rotary: Tensor | None = None,
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, C, h, w) and the map it attends to, (B, C, h', w'), -> (B, C, h, w). Masks (B, h, w) bool."""
        message = aggregated_attention(
            x,
            source,
            AttentionWeights(
                aggregate=self.aggregate.weight,
                norm=self.token_norm.weight,
                norm_bias=self.token_norm.bias,
                q=self.q_proj.weight,
                k=self.k_proj.weight,
                v=self.v_proj.weight,
                merge=self.merge.weight,
            ),
            num_heads=self.num_heads,
            rotary=rotary,
            mask=mask,
            source_mask=source_mask,
        )
        weights = MlpWeights(
            expand=self.expand.weight,
            contract=self.contract.weight,
            norm=self.update_norm.weight,
            norm_bias=self.update_norm.bias,
        )
        return upsample_mlp(x, message, weights, mask=mask)


class TransformerLayer(nn.Module):
    """Self-attention within each image, then cross-attention between the two.

    Image 1 attends to image 0 as its own cross-attention has already updated it: that is how the released weights
    were trained, and why exchanging the images changes the result slightly.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.self_attention = AggregatedAttention(channels, num_heads)
        self.cross_attention = AggregatedAttention(channels, num_heads)

    def forward(
        self,
        x0: Tensor,
        x1: Tensor,
        rotary0: Tensor,
        rotary1: Tensor,
        mask0: Tensor | None,
        mask1: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(B, C, h0, w0), (B, C, h1, w1) -> the same shapes."""
        x0, x1 = self.attend_within(x0, x1, rotary0, rotary1, mask0, mask1)
        x0 = self.cross_attention(x0, x1, None, mask0, mask1)
        x1 = self.cross_attention(x1, x0, None, mask1, mask0)
        return x0, x1

    @stage
    def attend_within(
        self,
        x0: Tensor,
        x1: Tensor,
        rotary0: Tensor,
        rotary1: Tensor,
        mask0: Tensor | None,
        mask1: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Self-attention of both images: in one batch where their sizes agree and nothing is masked."""
        if x0.shape == x1.shape and mask0 is None and mask1 is None:
            both = torch.cat([x0, x1])
            both = self.self_attention(both, both, rotary0)
            return both[: x0.shape[0]], both[x0.shape[0] :]
        return (
            self.self_attention(x0, x0, rotary0, mask0, mask0),
            self.self_attention(x1, x1, rotary1, mask1, mask1),
        )


class CoarseTransformer(nn.Module):
    """``num_layers`` (self, cross) pairs; 2-D rotary positions in self-attention."""

    def __init__(self, config: EfficientLoFTRConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            TransformerLayer(config.coarse_channels, config.num_heads) for _ in range(config.num_layers)
        )

    def forward(
        self, x0: Tensor, x1: Tensor, mask0: Tensor | None = None, mask1: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, C, h0, w0), (B, C, h1, w1) -> the same shapes; masked cells are zero.

        The maps that the layers add to are float32 even where their products run in half precision: what all cells
        have in common takes most of the few bits of such a number.
        """
        x0, x1 = upcast_for_accumulation(x0), upcast_for_accumulation(x1)
        rotary0, rotary1 = self._rotary(x0), self._rotary(x1)
        for layer in self.layers:
            x0, x1 = layer(x0, x1, rotary0, rotary1, mask0, mask1)
        return x0, x1

    def _rotary(self, x: Tensor) -> Tensor:
        rows, columns = (-(-size // AGGREGATION) for size in x.shape[-2:])
        return rotary_table(rows, columns, self.config, x.device).to(x.dtype)


def rotary_table(rows: int, columns: int, config: EfficientLoFTRConfig, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary angles: (2, rows * columns, C / 2) float32.

    C / 4 frequencies, base 10000; even entries turn with the row, odd ones with the column, positions from 1, times
    ``config.position_scale``. Rounded to float16 when ``config.round_rotary``, as the released weights saw them.
    """
    frequencies = config.coarse_channels // 4
    frequency = 10000.0 ** (-torch.arange(frequencies, dtype=torch.float32, device=device) / frequencies)
    scale_rows, scale_columns = config.position_scale
    row = (torch.arange(rows, dtype=torch.float32, device=device) + 1) * scale_rows
    column = (torch.arange(columns, dtype=torch.float32, device=device) + 1) * scale_columns
    angles = torch.stack(
        torch.broadcast_tensors(row[:, None, None] * frequency, column[None, :, None] * frequency), -1
    ).reshape(rows * columns, 2 * frequencies)
    table = torch.stack([angles.cos(), angles.sin()])
    return table.half().float() if config.round_rotary else table
