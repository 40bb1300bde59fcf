# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for matching toolboxes: as much of their documented interfaces as an adapter touches.

Each tests the adapter as the toolbox would use it. Where the toolbox is installed, the test takes the toolbox itself.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module that can be imported by name, inside its parents."""
    made = ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)
    parent, _, last = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            module(monkeypatch, parent, __path__=[])
        monkeypatch.setattr(sys.modules[parent], last, made, raising=False)
    return made


class HlocModel(nn.Module):
    """hloc's BaseModel: a configuration over the defaults, required inputs, ``_init`` and ``_forward``."""

    default_conf: dict[str, Any] = {}  # noqa: RUF012
    required_inputs: list[str] = []  # noqa: RUF012

    def __init__(self, conf: dict[str, Any]) -> None:
        super().__init__()
        self.conf = {**self.default_conf, **conf}
        self._init(self.conf)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        assert set(self.required_inputs) <= set(data)
        return self._forward(data)


def hloc(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``load(conf)`` gives a model by its name as hloc does; ``confs`` are those of its dense matchers."""
    module(monkeypatch, "hloc.utils.base_model", BaseModel=HlocModel)
    module(monkeypatch, "hloc.matchers", __path__=[])
    dense = module(monkeypatch, "hloc.match_dense", confs={"loftr": {}})

    def load(conf: dict[str, Any]) -> nn.Module:
        name = f"hloc.matchers.{conf['name']}"
        found = [
            kind
            for _, kind in inspect.getmembers(importlib.import_module(name), inspect.isclass)
            if kind.__module__ == name and issubclass(kind, HlocModel)
        ]
        assert len(found) == 1
        model: nn.Module = found[0](conf)
        return model.eval()

    return SimpleNamespace(load=load, confs=dense.confs)


def hloc_keypoints(pred: dict[str, Tensor], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """What hloc writes for images that were larger by this factor, then adds on the way to COLMAP."""
    kept = [(pred[name] + 0.5) * scale - 0.5 for name in ("keypoints0", "keypoints1")]
    return (kept[0] + 0.5).numpy(), (kept[1] + 0.5).numpy()


class VismatchMatcher(nn.Module):
    """vismatch's BaseMatcher: two images (3, H, W), seven outputs of ``_forward``, and a dictionary."""

    outputs = 7

    def __init__(self, device: str = "cpu", **options: Any) -> None:
        super().__init__()
        self.device = device
        self.options = options

    @torch.inference_mode()
    def forward(self, img0: Tensor, img1: Tensor) -> dict[str, Any]:
        found = self._forward(img0.to(self.device), img1.to(self.device))
        assert len(found) == self.outputs
        points = [np.empty((0, 2)) if value is None else value.cpu().numpy() for value in found[:2]]
        confidence = found[6].cpu().numpy() if self.outputs == 7 else None
        for side, image in enumerate((img0, img1)):
            assert (points[side] >= 0).all()
            assert (points[side] < [image.shape[-1], image.shape[-2]]).all()
        return {"matched_kpts0": points[0], "matched_kpts1": points[1], "matched_confidences": confidence}


class GlueFactoryModel(nn.Module):
    """glue-factory's BaseModel: a configuration with attributes, required keys, ``_init`` and ``_forward``."""

    default_conf: dict[str, Any] = {}  # noqa: RUF012
    required_data_keys: list[str] = []  # noqa: RUF012

    def __init__(self, conf: dict[str, Any]) -> None:
        super().__init__()
        self.conf = SimpleNamespace(**{**self.default_conf, **conf})
        self._init(self.conf)

    def forward(self, data: dict[str, Any]) -> dict[str, Tensor]:
        assert set(self.required_data_keys) <= set(data)
        return self._forward(data)
