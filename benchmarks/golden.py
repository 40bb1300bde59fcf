# SPDX-License-Identifier: Apache-2.0
"""Outputs of the authors' implementation on seeded weights, and a model that carries these weights.

Tests hold the matcher to these numbers. Benchmarks time the model: its weights are the same on every machine, and
nothing has to be downloaded.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eloftr_ops import EfficientLoFTR, EfficientLoFTRConfig
from eloftr_ops.weights.names import to_layout

PATH = Path(__file__).with_name("golden.npz")


@cache
def reference() -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of the file by name: images, weights' statistics, and what the authors' code gave."""
    return dict(np.load(PATH))


def seeded_state_dict(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """The authors' state dict, drawn key by key; BatchNorm statistics are stored with the reference."""
    state: dict[str, torch.Tensor] = {}
    for key, shape in shapes.items():
        stored = reference().get(f"bn/{key}")
        if stored is not None:
            state[key] = torch.from_numpy(stored)
            continue
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        n = np.random.default_rng([zlib.crc32(key.encode()), seed]).standard_normal(shape).astype(np.float32)
        fan_in = int(np.prod(shape[1:]))
        if len(shape) == 1:
            value = 0.1 * n + (1 if key.endswith("weight") else 0)
        else:
            value = n * np.float32(np.sqrt((2 if len(shape) == 4 else 1) / fan_in))
        state[key] = torch.from_numpy(np.asarray(value, np.float32))
    return state


def golden_model(**changes: Any) -> EfficientLoFTR:
    """The ``full`` model with the reference's weights and threshold, in evaluation mode."""
    settings = {"threshold": float(reference()["threshold"]), **changes}
    model = EfficientLoFTR(EfficientLoFTRConfig().replace(**settings))
    ours = model.state_dict()
    names = {key: to_layout(key, "authors") for key in ours}
    drawn = seeded_state_dict({names[k]: tuple(v.shape) for k, v in ours.items()}, int(reference()["seed"]))
    model.load_state_dict({key: drawn[names[key]] for key in ours})
    return model.eval()


def image(name: str, index: int | None = None) -> torch.Tensor:
    """(1, 1, H, W) float32 in [0, 1]."""
    array = reference()[name] if index is None else reference()[name][index]
    return torch.from_numpy(array).float()[None, None] / 255
