# SPDX-License-Identifier: Apache-2.0
"""The batch of a training step: pairs from any source, with the labels that each pair has.

Convention:
    Image points are (x, y) with the centre of pixel (x, y) at (x + 0.5, y + 0.5); intrinsics and homographies belong
    to that frame and to the images as they are in the batch. ``X1 = R X0 + t`` with (R, t) of ``T_0to1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_ops.data import HomographyBatch, ImagePair, SceneBatch
from eloftr_ops.model.matcher import SIZE_MULTIPLE
from eloftr_ops.training.supervision import DepthLabels
from eloftr_ops.types import CELL

HOMOGRAPHY, DEPTH, POSE, UNKNOWN = 0, 1, 2, 3  # what is known about a pair


class TrainingBatch(NamedTuple):
    """B pairs. Missing labels are identities and zeros; ``kinds`` says which labels are valid."""

    image0: Tensor  # (B, 1, H, W) float32 in [0, 1]
    image1: Tensor  # (B, 1, H, W)
    mask0: Tensor | None  # (B, H, W) bool, pixels that exist; None: all of them
    mask1: Tensor | None
    valid0: Tensor  # (B, H, W) bool, pixels that may be labelled
    valid1: Tensor
    kinds: Tensor  # (B,) int64: HOMOGRAPHY, DEPTH, POSE or UNKNOWN
    H_0to1: Tensor  # (B, 3, 3)
    depth0: Tensor  # (B, H, W), 0 where unknown
    depth1: Tensor
    K0: Tensor  # (B, 3, 3)
    K1: Tensor
    T_0to1: Tensor  # (B, 4, 4)
    seeds: Tensor  # (B,) int64, of what is drawn for a pair after it was made
    joined: int  # pairs in the whole step, of which this batch is a part

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(h0, w0), (h1, w1) coarse cells of the completed images."""
        return _grid(self.image0), _grid(self.image1)

    def matcher_input(self) -> dict[str, Tensor]:
        """Images and masks under the names that the matcher takes."""
        data = {"image0": self.image0, "image1": self.image1}
        masks = {"mask0": self.mask0, "mask1": self.mask1}
        return data | {name: mask for name, mask in masks.items() if mask is not None}

    def depth_labels(self) -> DepthLabels:
        """Depth, intrinsics and pose."""
        return DepthLabels(self.depth0, self.depth1, self.K0, self.K1, self.T_0to1)


def batch_of_rendered(rendered: HomographyBatch | SceneBatch, seeds: Sequence[int] = ()) -> TrainingBatch:
    """A batch of rendered pairs; ``seeds``, one per pair, draw the windows of the fine losses; 0, 1, ... by default."""
    count, _, height, width = rendered.image0.shape
    like = rendered.image0
    eye3, eye4 = (torch.eye(n, device=like.device).repeat(count, 1, 1) for n in (3, 4))
    everywhere = torch.ones(count, height, width, dtype=torch.bool, device=like.device)
    nowhere = torch.zeros(count, height, width, device=like.device)
    drawn = torch.tensor(list(seeds) or list(range(count)), dtype=torch.int64)
    kinds = torch.full((count,), HOMOGRAPHY, device=like.device)
    if isinstance(rendered, HomographyBatch):
        valid0, valid1 = rendered.valid0[:, 0], rendered.valid1[:, 0]
        labels = (rendered.H_0to1, nowhere, nowhere, eye3, eye3, eye4)
    else:
        valid0 = valid1 = everywhere
        kinds = torch.full_like(kinds, DEPTH)
        labels = (eye3, rendered.depth0, rendered.depth1, rendered.K0, rendered.K1, rendered.T_0to1)
    return TrainingBatch(rendered.image0, rendered.image1, None, None, valid0, valid1, kinds, *labels, drawn, count)


def batch_of_labelled(pair: ImagePair, size_hw: tuple[int, int], seed: int) -> TrainingBatch:
    """A batch of one pair, reduced where it is larger than ``size_hw`` and filled up to it.

    A pair without homography and without pose is UNKNOWN: only a reward that needs no label can use it.
    """
    pair = _padded(_reduced(pair, size_hw), size_hw)
    known = pair.T_0to1 is not None and pair.K0 is not None and pair.K1 is not None
    deep = pair.depth0 is not None and pair.depth1 is not None
    kind = HOMOGRAPHY if pair.H_0to1 is not None else DEPTH if deep and known else POSE if known else UNKNOWN
    zeros = torch.zeros(size_hw)

    def one(value: Tensor | None, otherwise: Tensor) -> Tensor:
        return (otherwise if value is None else value)[None]

    return TrainingBatch(
        pair.image0[None],
        pair.image1[None],
        None if pair.mask0.all() else pair.mask0[None],
        None if pair.mask1.all() else pair.mask1[None],
        pair.mask0[None],
        pair.mask1[None],
        torch.tensor([kind]),
        one(pair.H_0to1, torch.eye(3)),
        one(pair.depth0, zeros),
        one(pair.depth1, zeros),
        one(pair.K0, torch.eye(3)),
        one(pair.K1, torch.eye(3)),
        one(pair.T_0to1, torch.eye(4)),
        torch.tensor([seed], dtype=torch.int64),
        1,
    )


def join_batches(parts: Sequence[TrainingBatch]) -> TrainingBatch | None:
    """Join several pairs of a step to one batch; None for no pair."""
    if not parts:
        return None
    columns: dict[str, Tensor | None] = {}
    for name in TrainingBatch._fields[:-1]:
        values = [getattr(part, name) for part in parts]
        if name.startswith("mask"):
            valid = [getattr(part, name.replace("mask", "valid")) for part in parts]
            full = [torch.ones_like(v) if m is None else m for m, v in zip(values, valid, strict=True)]
            columns[name] = None if all(value is None for value in values) else torch.cat(full)
        else:
            columns[name] = torch.cat(values)
    return TrainingBatch(**columns, joined=parts[0].joined)  # type: ignore[arg-type]


def _grid(image: Tensor) -> tuple[int, int]:
    height, width = (math.ceil(side / SIZE_MULTIPLE) * SIZE_MULTIPLE // CELL for side in image.shape[-2:])
    return height, width


def _reduced(pair: ImagePair, size_hw: tuple[int, int]) -> ImagePair:
    """Reduce both images to at most ``size_hw`` with the same aspect; labels are adapted."""
    changes: dict[str, Tensor] = {}
    scales = []
    for side in "01":
        image, mask, depth = (getattr(pair, f"{name}{side}") for name in ("image", "mask", "depth"))
        height, width = image.shape[-2:]
        factor = min(1.0, size_hw[0] / height, size_hw[1] / width)
        new = (max(1, round(height * factor)), max(1, round(width * factor)))
        scale = torch.tensor([new[1] / width, new[0] / height, 1.0])
        scales.append(scale)
        if new == (height, width):
            continue
        changes[f"image{side}"] = F.interpolate(image[None], new, mode="bilinear", align_corners=False, antialias=True)[
            0
        ].clamp(0, 1)
        rows, columns = (
            torch.arange(n).add(0.5).mul(full / n).long() for n, full in zip(new, (height, width), strict=True)
        )
        changes[f"mask{side}"] = mask[rows[:, None], columns]
        if depth is not None:
            changes[f"depth{side}"] = depth[rows[:, None], columns]
        if getattr(pair, f"K{side}") is not None:
            changes[f"K{side}"] = scale[:, None] * getattr(pair, f"K{side}")
    if pair.H_0to1 is not None:
        changes["H_0to1"] = scales[1][:, None] * pair.H_0to1 / scales[0]
    return pair._replace(**changes)  # type: ignore[arg-type]


def _padded(pair: ImagePair, size_hw: tuple[int, int]) -> ImagePair:
    changes = {}
    for side in "01":
        height, width = getattr(pair, f"image{side}").shape[-2:]
        padding = (0, size_hw[1] - width, 0, size_hw[0] - height)
        for name in ("image", "mask", "depth"):
            value = getattr(pair, f"{name}{side}")
            if value is not None:
                changes[f"{name}{side}"] = F.pad(value, padding)
    return pair._replace(**changes)  # type: ignore[arg-type]
