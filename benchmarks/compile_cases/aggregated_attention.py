# SPDX-License-Identifier: Apache-2.0
"""Aggregated attention on the coarse maps of 640x480 images, with masks and rotary encoding.

``mixed`` has float32 maps, and weights of the dtype.
"""

from __future__ import annotations

import torch

from eloftr_kernels import AttentionWeights
from eloftr_kernels.aggregated_attention import launch as launches

SHAPES = {"full": (256, 8), "small": (96, 6), "mixed": (256, 8)}  # channels, heads
HEIGHT, WIDTH = 60, 80


def launch(shape: str, dtype: torch.dtype) -> None:
    """Run the launchers on meta tensors."""
    channels, heads = SHAPES[shape]

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x = empty(2, channels, HEIGHT, WIDTH).to(memory_format=torch.channels_last)
    x = x.float() if shape == "mixed" else x
    source = x.clone()
    square = {name: empty(channels, channels) for name in ("q", "k", "v", "merge")}
    weights = AttentionWeights(
        aggregate=empty(channels, 1, 4, 4), norm=empty(channels), norm_bias=empty(channels), **square
    )
    rotary = empty(2, launches.token_count(x), channels // 2)
    mask = torch.empty(2, HEIGHT, WIDTH, dtype=torch.bool, device="meta")
    message, *saved = launches.forward(x, source, weights, heads, rotary, mask, mask)
    launches.backward(message, launches.Saved(*saved), x, source, weights, heads, rotary, mask, mask)
