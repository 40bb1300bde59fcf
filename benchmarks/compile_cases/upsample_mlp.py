# SPDX-License-Identifier: Apache-2.0
"""The message's upsampling and MLP on the coarse maps of 640x480 images, with a mask."""

from __future__ import annotations

import torch

from eloftr_kernels.upsample_mlp import kernel

SHAPES = {"full": 256, "small": 96}  # channels
HEIGHT, WIDTH = 60, 80


def launch(shape: str, dtype: torch.dtype) -> None:
    """Run the launchers on meta tensors."""
    channels = SHAPES[shape]

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x = empty(2, channels, HEIGHT, WIDTH).to(memory_format=torch.channels_last)
    message = empty(2, channels, HEIGHT // 4, WIDTH // 4).to(memory_format=torch.channels_last)
    weights = [
        empty(2 * channels, 2 * channels),
        empty(channels, 2 * channels),
        empty(channels),
        empty(channels),
    ]
    mask = torch.empty(2, HEIGHT, WIDTH, dtype=torch.bool, device="meta")
    y = kernel.forward(x, message, *weights, mask)
    kernel.backward(y, x, message, *weights, mask)
