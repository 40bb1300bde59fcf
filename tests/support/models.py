# SPDX-License-Identifier: Apache-2.0
"""Small models and images that tests share."""

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch

from eloftr_ops import EfficientLoFTR, EfficientLoFTRConfig, matchers
from eloftr_ops.model.coarse import match_cells, score_cells
from eloftr_ops.types import CoarseOutput, Features

TINY = EfficientLoFTRConfig(
    stage_channels=(8, 12, 16, 32),
    stage_blocks=(1, 1, 1, 2),
    num_layers=2,
    num_heads=2,
    subpixel_channels=4,
    threshold=0.0,
    centred_subpixel=True,
)


# For what `torch.compile` traces: its time grows with the number of layers, and all have the same code.
SHALLOW: dict[str, Any] = {"stage_blocks": (1, 1, 1, 1), "num_layers": 1}


def tiny_model(seed: int = 0, **changes: object) -> EfficientLoFTR:
    """All stages at toy widths, random weights and BatchNorm statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    model = EfficientLoFTR(TINY.replace(**changes))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_mean"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim > 1:
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)
    return model.eval()


def random_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(B, 1, H, W) smooth-ish noise in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((batch, 1, height // 4 + 1, width // 4 + 1), generator=generator)
    fine = torch.rand((batch, 1, height, width), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return 0.7 * smooth + 0.3 * fine


class StandIn(EfficientLoFTR):
    """Base of test doubles with a ``forward`` of their own, which an optimized copy would not have."""

    def optimize_for_inference(self, **_: object) -> "StandIn":  # type: ignore[override]
        return self


def put_for_pretrained(
    monkeypatch: pytest.MonkeyPatch, matcher: type[EfficientLoFTR], config: EfficientLoFTRConfig
) -> None:
    """``from_pretrained("small")`` gives this class with random weights; there are no others."""

    def load(name: str = "small", **_: object) -> EfficientLoFTR:
        if name != "small":
            raise FileNotFoundError(f"no weights called {name}")
        torch.manual_seed(0)
        return matcher(config).eval()

    monkeypatch.setattr(EfficientLoFTR, "from_pretrained", load)
    monkeypatch.setattr(matchers, "_MATCHERS", OrderedDict())  # none that was made from other weights


class CoarseStage(NamedTuple):
    """What a matcher knows before it selects a match."""

    features0: Features
    features1: Features
    coarse: CoarseOutput


def coarse_stage(model: EfficientLoFTR, data: dict[str, torch.Tensor], *, nearest: bool = True) -> CoarseStage:
    """Steps 1 to 3 of ``forward``."""
    features0, features1 = model.extract_pair(model.check_input(data))
    score = match_cells if nearest else score_cells
    masks = features0.coarse_mask, features1.coarse_mask
    coarse = score(*model.transform(features0, features1), *masks, model.config)
    return CoarseStage(features0, features1, coarse)
