# SPDX-License-Identifier: Apache-2.0
"""How a CPU runs the stages of a matcher where no gradient is recorded: less at a time, the same numbers.

What is computed at a time should fit the caches, and memory that the allocator keeps: fresh memory costs page faults.
So pairs go through one by one, images one by one, and the widest maps in bands of rows. Importing this module
registers these implementations; nothing else in the library decides about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eloftr_kernels.dispatch import is_cpu_inference
from eloftr_ops.config import GradientMode
from eloftr_ops.inference.cpu.bands import run_in_bands
from eloftr_ops.model.backbone import RepVGG
from eloftr_ops.model.fine import FeaturePyramid
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.model.stages import definition_of, implements
from eloftr_ops.model.transformer import TransformerLayer
from eloftr_ops.types import Features, PairInput

PYRAMID_HALO = 4  # one row of the upsampling, one of each 3x3 convolution; even, for the coarser map


def _first_is_cpu_inference(_: torch.nn.Module, x: Tensor, *__: Any) -> bool:
    return is_cpu_inference(x)


def _is_batch(_: EfficientLoFTR, data: Any, **__: Any) -> bool:
    first = _first_tensor(data)
    return first is not None and first.ndim == 4 and len(first) > 1 and is_cpu_inference(first)


def _first_tensor(data: Any) -> Tensor | None:
    """The first image or its features; None for input that the matcher refuses."""
    if not isinstance(data, Mapping):
        return None
    value = data.get("image0")
    if value is None and isinstance(data.get("features0"), Mapping):
        value = data["features0"].get("coarse")
    return value if isinstance(value, Tensor) else None


@implements(EfficientLoFTR.forward, when=_is_batch)
def match_one_by_one(
    matcher: EfficientLoFTR,
    data: Mapping[str, Any],
    *,
    mode: GradientMode | None = None,
    covariance: bool = False,
) -> dict[str, Tensor]:
    """A batch, pair by pair."""
    count = len(matcher.check_input(data).side0[0])
    match = definition_of(EfficientLoFTR.forward)
    pairs = [match(matcher, _sample(data, index), mode=mode, covariance=covariance) for index in range(count)]
    for index, matches in enumerate(pairs):
        matches["batch_indexes"] = torch.full_like(matches["batch_indexes"], index)
    return {name: torch.cat([matches[name] for matches in pairs]) for name in pairs[0]}


@implements(EfficientLoFTR.extract_pair, when=lambda _, pair: is_cpu_inference(pair.side0[0]))
def extract_one_by_one(matcher: EfficientLoFTR, pair: PairInput) -> tuple[Features, Features]:
    """Features of image 0, then of image 1."""
    return matcher.extract(pair.side0), matcher.extract(pair.side1)


@implements(RepVGG.to_half, when=_first_is_cpu_inference)
def backbone_to_half_in_bands(backbone: RepVGG, image: Tensor) -> Tensor:
    """The first two stages of the backbone; each 3x3 convolution spoils a row at a cut."""
    first, second = backbone.stages[0], backbone.stages[1]
    return run_in_bands(
        lambda x: definition_of(RepVGG.to_half)(backbone, x),
        [image],
        (image.shape[2] // 2, image.shape[3] // 2),
        max(backbone.widths[:2]),
        len(first) + len(second),  # type: ignore[arg-type]
    )


@implements(TransformerLayer.attend_within, when=_first_is_cpu_inference)
def attend_one_by_one(
    layer: TransformerLayer,
    x0: Tensor,
    x1: Tensor,
    rotary0: Tensor,
    rotary1: Tensor,
    mask0: Tensor | None,
    mask1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Self-attention of image 0, then of image 1."""
    x0 = layer.self_attention(x0, x0, rotary0, mask0, mask0)
    return x0, layer.self_attention(x1, x1, rotary1, mask1, mask1)


@implements(FeaturePyramid.to_quarter, when=_first_is_cpu_inference)
def pyramid_to_quarter_in_bands(pyramid: FeaturePyramid, coarse: Tensor, quarter: Tensor) -> Tensor:
    """The pyramid's step to quarter resolution."""
    return run_in_bands(
        lambda *maps: definition_of(FeaturePyramid.to_quarter)(pyramid, *maps),
        [coarse, quarter],
        (quarter.shape[2], quarter.shape[3]),
        coarse.shape[1],
        PYRAMID_HALO,
    )


@implements(FeaturePyramid.to_half, when=_first_is_cpu_inference)
def pyramid_to_half_in_bands(pyramid: FeaturePyramid, quarter: Tensor, half: Tensor) -> Tensor:
    """The pyramid's step to half resolution."""
    return run_in_bands(
        lambda *maps: definition_of(FeaturePyramid.to_half)(pyramid, *maps),
        [quarter, half],
        (half.shape[2], half.shape[3]),
        quarter.shape[1],
        PYRAMID_HALO,
    )


def _sample(data: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One pair of a batch, as a batch of one."""
    return {
        name: _sample(value, index) if isinstance(value, Mapping) else value[index : index + 1]
        for name, value in data.items()
        if isinstance(value, (Mapping, Tensor))
    }
