# SPDX-License-Identifier: Apache-2.0
"""Small data sets on disk, from one rendered scene whose geometry is known."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from eloftr_ops.data.scenes import SceneBatch, SceneConfig, ScenePairs

SIZE_HW = (48, 64)


class Truth(NamedTuple):
    """A rendered pair, unbatched."""

    images: tuple[Tensor, Tensor]  # (H, W)
    depths: tuple[Tensor, Tensor]  # (H, W)
    K: tuple[Tensor, Tensor]  # project frame
    T_0to1: Tensor


def rendered(seed: int = 0, size_hw: tuple[int, int] = SIZE_HW) -> Truth:
    texture = torch.arange(128 * 128).view(128, 128).remainder(251).to(torch.uint8)
    config = SceneConfig(photometric=None, min_overlap=0.5, yaw=15.0)
    pair: SceneBatch = ScenePairs([texture], config)(1, size_hw, torch.Generator().manual_seed(seed))
    return Truth(
        (pair.image0[0, 0], pair.image1[0, 0]),
        (pair.depth0[0], pair.depth1[0]),
        (pair.K0[0], pair.K1[0]),
        pair.T_0to1[0],
    )


def save_image(path: Path, image: Tensor) -> None:
    """Eight bits; the format follows the suffix, without loss where it can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95} if path.suffix == ".jpg" else {}
    Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save(path, **options)


def objects(*values: object) -> npt.NDArray[np.object_]:
    """A one-dimensional object array."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def integer_centers(K: Tensor) -> npt.NDArray[np.float64]:
    """Intrinsics for pixel centres at integers."""
    K = K.double().clone()
    K[:2, 2] -= 0.5
    return K.numpy()
