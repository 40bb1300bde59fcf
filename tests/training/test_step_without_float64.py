# SPDX-License-Identifier: Apache-2.0
"""A training step and a validation on a device without float64: labels, losses, gradients and weights stay there."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from eloftr_ops import EfficientLoFTR
from eloftr_ops.data import HomographyPairs, ScenePairs, sample_homographies
from eloftr_ops.errors import ArgumentError
from eloftr_ops.geometry import _precision
from eloftr_ops.training.batches import DEPTH, HOMOGRAPHY, POSE, TrainingBatch
from eloftr_ops.training.data import PairMixture, Textures
from eloftr_ops.training.loop import build_fabric, build_model
from eloftr_ops.training.trainer import Trainer
from eloftr_ops.training.validation import validate
from support.no_float64 import STAND_IN, NoFloat64Device, on_device
from support.training_runs import short


class StandInFabric(Fabric):
    """Fabric of one process that says it runs on the stand-in device."""

    @property
    def device(self) -> torch.device:
        return STAND_IN

    def to_device(self, obj: Any) -> Any:
        return TrainingBatch(*(on_device(x) if isinstance(x, Tensor) else x for x in obj))

    def setup(self, module: nn.Module, *optimizers: Any, **_: Any) -> Any:
        return module, *optimizers

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> Any:
        return contextlib.nullcontext()

    def clip_gradients(self, module: nn.Module, *_: Any, max_norm: float, **__: Any) -> Any:
        return nn.utils.clip_grad_norm_(module.parameters(), max_norm)


def moved(model: EfficientLoFTR) -> EfficientLoFTR:
    """The same model with its tensors on the stand-in device."""
    for part in model.modules():
        for name, value in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(on_device(value)))
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, on_device(value))
    return model


def test_a_step_and_a_validation_are_those_of_the_cpu(tmp_path: Path) -> None:
    config = short(tmp_path, loss={"homography_weight": 0.01, "pose_weight": 0.1, "windows": 8})
    mixture = PairMixture(config.data, Textures(config.data, 0.0, 0), 0)
    drawn = {int(batch.kinds): batch for batch in (mixture[(0, position)] for position in range(4))}
    parts = [drawn[HOMOGRAPHY], drawn[DEPTH], drawn[DEPTH]._replace(kinds=torch.tensor([POSE]))]
    flat = [parts[0]._replace(image1=parts[0].image0, H_0to1=torch.eye(3)[None])]
    trainer = Trainer(config, build_fabric(config), build_model(config.model, 0))
    expected, precise = trainer.take_step(parts), validate(trainer.matcher, flat)
    assert expected.taken
    with NoFloat64Device():
        there = Trainer(config, StandInFabric(accelerator="cpu"), moved(build_model(config.model, 0)))
        found = there.take_step(parts)
        assert found._replace(losses=0) == pytest.approx(expected._replace(losses=0), rel=1e-4)
        assert found.losses == pytest.approx(expected.losses, rel=1e-4)
        for here, wanted in zip(there.matcher.parameters(), trainer.matcher.parameters(), strict=True):
            assert here.device == STAND_IN
            torch.testing.assert_close(here.detach().cpu(), wanted.detach(), rtol=1e-3, atol=1e-5)
        assert validate(there.matcher, flat) == pytest.approx(precise, abs=0.1)
    assert precise.matches > 0


def test_pairs_are_rendered_on_devices_with_float64_only(monkeypatch: pytest.MonkeyPatch) -> None:
    texture = torch.zeros(64, 64, dtype=torch.uint8)
    generator = torch.Generator()
    monkeypatch.setattr(_precision, "has_float64", lambda device: False)
    for render in (lambda: HomographyPairs([texture]), lambda: ScenePairs([texture])):
        with pytest.raises(ArgumentError, match=r"textures: expected a device that has float64, got cpu\. Draw"):
            render()
    with pytest.raises(ArgumentError, match="generator: expected a device that has float64"):
        sample_homographies(1, (64, 64), generator)
