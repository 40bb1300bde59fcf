# SPDX-License-Identifier: Apache-2.0
"""The message's upsampling and MLP on the coarse maps of 640x480 images, with a mask.

``mixed`` has a float32 map, and weights of the dtype.
"""

from __future__ import annotations

import torch

from eloftr_kernels import MlpWeights
from eloftr_kernels.upsample_mlp import launch as launches

SHAPES = {"full": 256, "small": 96, "mixed": 256}  # channels
HEIGHT, WIDTH = 60, 80


def launch(shape: str, dtype: torch.dtype) -> None:
    """Run the launchers on meta tensors."""
    channels = SHAPES[shape]

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x = empty(2, channels, HEIGHT, WIDTH).to(memory_format=torch.channels_last)
    x = x.float() if shape == "mixed" else x
    message = empty(2, channels, HEIGHT // 4, WIDTH // 4).to(memory_format=torch.channels_last)
    weights = MlpWeights(
        expand=empty(2 * channels, 2 * channels),
        contract=empty(channels, 2 * channels),
        norm=empty(channels),
        norm_bias=empty(channels),
    )
    mask = torch.empty(2, HEIGHT, WIDTH, dtype=torch.bool, device="meta")
    y = launches.forward(x, message, weights, mask)
    launches.backward(y, x, message, weights, mask)
