# SPDX-License-Identifier: Apache-2.0
"""Window matches between 640x480 images with the expectations of the soft mode; maps channels last."""

from __future__ import annotations

import torch

from eloftr_kernels.window_match import launch as launches

SHAPES = {"full": (64, 8), "small": (24, 8)}  # channels, those of the sub-pixel stage
MATCHES = 2000


def launch(shape: str, dtype: torch.dtype) -> None:
    """Run the launchers on meta tensors."""
    channels, subpixel_channels = SHAPES[shape]
    map0, map1 = (
        torch.empty(2, channels, 240, 320, dtype=dtype, device="meta", memory_format=torch.channels_last)
        for _ in range(2)
    )
    matches = [torch.empty(MATCHES, dtype=torch.int64, device="meta") for _ in range(3)]
    options = (subpixel_channels, 10.0, False, 1.0)
    *outputs, best = launches.window_match_forward(map0, map1, *matches, *options)
    launches.window_match_backward(*outputs[2:], best, map0, map1, *matches, *options)
