# SPDX-License-Identifier: Apache-2.0
"""Labels of the models: a homography, or depth, intrinsics and pose; and the training loss at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eloftr_ops import EfficientLoFTR
from eloftr_ops.training.batches import DEPTH, HOMOGRAPHY, TrainingBatch
from eloftr_ops.training.config import LossConfig
from eloftr_ops.training.objective import batch_losses, term_weights

_DEPTH_LABELS = ("depth0", "depth1", "K0", "K1", "T_0to1")


class PairFeatures(NamedTuple):
    """Backbone features of both images, under the names that the matcher takes."""

    features0: dict[str, Tensor]
    features1: dict[str, Tensor]


class _BatchOfFeatures(TrainingBatch):
    """A batch whose backbone features are known already."""

    features: PairFeatures

    def matcher_input(self) -> dict[str, Any]:
        return self.features._asdict()


def matching_loss(
    matcher: EfficientLoFTR,
    images: tuple[Tensor, Tensor],
    features: PairFeatures,
    labels: Any,
    config: LossConfig,
) -> Tensor:
    """The supervised loss of the paper (section 3.5), weighted as in training; a scalar.

    Args:
        matcher: the operator.
        images: both sides, (B, 1, H, W).
        features: of these images.
        labels: a tensor (B, 3, 3), the homographies from image 0 to image 1, or a mapping with ``H_0to1``, or one
            with ``depth0``, ``depth1`` (B, H, W), ``K0``, ``K1`` (B, 3, 3) and ``T_0to1`` (B, 4, 4). All in pixels of
            the images as the model gets them; the centre of pixel (x, y) is (x + 0.5, y + 0.5).
        config: weights of the terms.

    Raises:
        TypeError: labels of another type.
        ValueError: other names or shapes.
    """
    batch = _batch(images, labels, matcher.training)
    batch.features = features
    losses = batch_losses(matcher, batch, config)
    weights = losses.coarse.new_tensor(term_weights(config))
    return (torch.stack(list(losses[: len(weights)])) * weights).sum()


def _batch(images: tuple[Tensor, Tensor], labels: Any, training: bool) -> _BatchOfFeatures:
    image0, image1 = images
    count, _, height, width = image0.shape
    device = image0.device
    known = _checked(labels, count, (height, width), device)
    kind = HOMOGRAPHY if "H_0to1" in known else DEPTH
    eye3, eye4 = (torch.eye(n, device=device).repeat(count, 1, 1) for n in (3, 4))
    nowhere = torch.zeros(count, height, width, device=device)
    default = {"H_0to1": eye3, "depth0": nowhere, "depth1": nowhere, "K0": eye3, "K1": eye3, "T_0to1": eye4}
    everywhere = torch.ones(count, height, width, dtype=torch.bool, device=device)
    seeds = torch.randint(2**31, (count,)) if training else torch.arange(count)
    return _BatchOfFeatures(
        image0,
        image1,
        None,
        None,
        everywhere,
        everywhere,
        torch.full((count,), kind, device=device),
        **{**default, **known},
        seeds=seeds,
        joined=count,
    )


def _checked(labels: Any, count: int, size_hw: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    if isinstance(labels, Tensor):
        labels = {"H_0to1": labels}
    if not isinstance(labels, Mapping):
        raise TypeError(
            "labels: expected a tensor (B, 3, 3) of homographies, or a mapping with H_0to1 or with "
            f"{', '.join(_DEPTH_LABELS)}, got {type(labels).__name__}."
        )
    if set(labels) not in ({"H_0to1"}, set(_DEPTH_LABELS)):
        raise ValueError(
            f"labels: expected H_0to1, or {', '.join(_DEPTH_LABELS)}, got {', '.join(sorted(map(str, labels)))}."
        )
    shapes = {"depth": (count, *size_hw), "T_": (count, 4, 4), "H_": (count, 3, 3), "K": (count, 3, 3)}
    checked = {}
    for name, value in labels.items():
        shape = next(shape for prefix, shape in shapes.items() if name.startswith(prefix))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"labels: {name}: expected a floating point tensor, got {value!r}.")
        if tuple(value.shape) != shape:
            raise ValueError(f"labels: {name}: expected shape {shape}, got {tuple(value.shape)}.")
        checked[name] = value.to(device, torch.float32)
    return checked
