# SPDX-License-Identifier: Apache-2.0
"""Tune the matcher by the corner error of the homographies that its matches give."""

import torch

from eloftr_ops import EfficientLoFTR
from eloftr_ops.data import HomographyPairs, procedural_textures
from eloftr_ops.training.end_to_end import EndToEndConfig, finite_step, homography_objective


def tune(steps: int, size: int = 160) -> list[float]:
    """The loss of each step, on one fixed batch of rendered pairs."""
    generator = torch.Generator().manual_seed(0)
    batch = HomographyPairs(procedural_textures(generator, 4, 256))(2, (size, size), generator)
    model = EfficientLoFTR.from_pretrained("small", threshold=0.05)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    config = EndToEndConfig(mode="straight_through", robust="cauchy")
    losses = []
    for _ in range(steps):
        objective = homography_objective(model, batch.image0, batch.image1, batch.H_0to1, config)
        finite_step(optimizer, objective.loss, parameters)  # clips, and leaves out what is not finite
        losses.append(objective.loss.item())
    return losses


if __name__ == "__main__":
    print("corner error in pixels:", [round(loss, 3) for loss in tune(steps=8)])
