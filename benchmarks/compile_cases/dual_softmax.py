# SPDX-License-Identifier: Apache-2.0
"""Streaming dual softmax on the coarse maps of 640x480 images, with masks; maps are channel-first.

``mixed`` has float32 maps whose products are of the dtype: their common part is taken out before.
"""

from __future__ import annotations

import torch

from eloftr_kernels.dual_softmax import launch as launches

SHAPES = {"full": 256, "small": 96, "mixed": 256}  # channels
CELLS = 60 * 80


def launch(shape: str, dtype: torch.dtype) -> None:
    """Run the launchers on meta tensors."""
    of_maps = torch.float32 if shape == "mixed" else dtype
    features0, features1 = (torch.empty(2, SHAPES[shape], CELLS, dtype=of_maps, device="meta").mT for _ in range(2))
    masks = [torch.empty(2, CELLS, dtype=torch.bool, device="meta") for _ in range(2)]
    lse = launches.dual_softmax_lse_forward(features0, features1, 0.1, *masks, dtype)
    launches.dual_softmax_lse_backward(*lse, features0, features1, *lse, 0.1, *masks, dtype)
    launches.dual_softmax_best_forward(features0, features1, 0.1, 0.2, *masks, dtype)
    launches.mutual_best_forward(features0, features1, 0.1, *lse, *masks, dtype)
