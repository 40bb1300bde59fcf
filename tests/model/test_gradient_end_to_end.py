# SPDX-License-Identifier: Apache-2.0
"""Matches -> homography or pose -> loss -> backward, on the embedded model and on toy ones."""

import pytest
import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor

from eloftr_ops import EfficientLoFTR
from eloftr_ops.data import HomographyConfig, HomographyPairs, SyntheticConfig, procedural_textures
from eloftr_ops.data.scenes import SceneConfig, ScenePairs
from eloftr_ops.training.end_to_end import (
    EndToEndConfig,
    finite_step,
    homography_objective,
    pose_objective,
)
from support.models import random_images, tiny_model


@pytest.fixture(scope="module")
def small() -> EfficientLoFTR:
    return EfficientLoFTR.from_pretrained("small", threshold=0.05)


def textures() -> Tensor:
    return procedural_textures(torch.Generator().manual_seed(2), 3, 256)


def shift(x: float, y: float) -> Tensor:
    return torch.tensor([[[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]]])


def texture_pair(dx: int, dy: int) -> tuple[Tensor, Tensor]:
    """Two crops (1, 1, 160, 160); image 1 shows what image 0 shows (dx, dy) pixels earlier."""
    texture = textures()[:1, None] / 255
    return texture[..., 32:192, 32:192], texture[..., 32 - dy : 192 - dy, 32 - dx : 192 - dx]


def test_the_loss_is_the_corner_error_in_the_frame_of_the_keypoints(small: EfficientLoFTR) -> None:
    """A shift by (8, -8): the right homography costs a fraction of a pixel, its inverse twice the shift."""
    image0, image1 = texture_pair(8, -8)
    config = EndToEndConfig(robust="cauchy", corner_saturation=None)
    right = homography_objective(small, image0, image1, shift(8, -8), config)
    inverse = homography_objective(small, image0, image1, shift(-8, 8), config)
    assert len(right.matches.confidence) > 20
    assert bool(right.valid)
    assert float(right.loss.detach()) < 1
    assert abs(float(inverse.loss.detach()) - 2 * 128**0.5) < 1


def test_a_few_steps_go_down_the_loss_of_their_own_batch() -> None:
    model = EfficientLoFTR.from_pretrained("small", threshold=0.05)
    geometry = HomographyConfig(
        rotation_sigma=5.0, scale=(0.9, 1.1), translation=0.05, perspective=0.05, min_overlap=0.6
    )
    source = HomographyPairs(textures(), SyntheticConfig(homography=geometry, photometric=None, zoom=(0.8, 1.2)))
    batch = source.sample(2, (160, 160), torch.Generator().manual_seed(0))
    image1 = gaussian_blur2d(batch.image1, (13, 13), (2.0, 2.0))
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    losses = []
    for _ in range(4):
        objective = homography_objective(model, batch.image0, image1, batch.H_0to1)
        assert bool(objective.valid.all())
        assert finite_step(optimizer, objective.loss, parameters)
        losses.append(float(objective.loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("robust", [None, "cauchy"])
@pytest.mark.parametrize("mode", ["hard", "straight_through", "soft"])
def test_every_stage_learns_from_the_homography(small: EfficientLoFTR, mode: str, robust: str | None) -> None:
    image0, image1 = texture_pair(5, 3)
    objective = homography_objective(small, image0, image1, shift(4.5, 3.5), EndToEndConfig(mode=mode, robust=robust))
    stages = {name: list(getattr(small, name).parameters()) for name in ("backbone", "transformer", "pyramid")}
    found = iter(torch.autograd.grad(objective.loss, [p for ps in stages.values() for p in ps]))
    for parameters in stages.values():
        gradients = [next(found) for _ in parameters]
        assert all(bool(torch.isfinite(g).all()) for g in gradients)
        assert any(bool(g.any()) for g in gradients)


def test_a_pair_that_determines_nothing_costs_nothing(small: EfficientLoFTR) -> None:
    image0, image1 = texture_pair(5, 3)
    black = torch.zeros_like(image0)
    truth = shift(5, 3)
    alone = homography_objective(small, image0, image1, truth)
    both = homography_objective(small, torch.cat([image0, black]), torch.cat([image1, black]), truth.repeat(2, 1, 1))
    assert both.valid.tolist() == [True, False]
    assert float(both.per_pair[1].detach()) == 0
    torch.testing.assert_close(both.loss, alone.loss, rtol=1e-2, atol=1e-3)


def test_no_valid_pair_takes_no_step() -> None:
    model = tiny_model(threshold=1.0)
    before = [p.clone() for p in model.parameters()]
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    image = random_images(1, 64, 64)
    objective = homography_objective(model, image, image, torch.eye(3)[None])
    assert not bool(objective.valid)
    assert float(objective.loss.detach()) == 0
    assert not finite_step(optimizer, objective.loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_a_loss_that_is_not_finite_takes_no_step() -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert not finite_step(optimizer, (weight * torch.tensor([1.0, torch.inf])).sum(), [weight])
    assert torch.equal(weight, torch.ones(2))
    assert finite_step(optimizer, weight.sum(), [weight])
    assert bool((weight < 1).all())


def test_gradients_reach_every_stage_from_a_relative_pose(small: EfficientLoFTR) -> None:
    config = SceneConfig(yaw=10.0, pitch=5.0, roll=5.0, distance_ratio=1.1, min_overlap=0.6, photometric=None)
    scenes = ScenePairs(textures(), config).sample(2, (192, 192), torch.Generator().manual_seed(1))
    objective = pose_objective(small, scenes.image0, scenes.image1, scenes.K0, scenes.K1, scenes.T_0to1)
    assert bool(objective.valid.any())
    assert float(objective.loss.detach()) > 0
    for stage in (small.backbone, small.transformer, small.pyramid):
        found = torch.autograd.grad(objective.loss, list(stage.parameters()), retain_graph=True)
        assert all(bool(torch.isfinite(g).all()) for g in found)
        assert any(bool(g.any()) for g in found)
