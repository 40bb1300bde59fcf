# SPDX-License-Identifier: Apache-2.0
"""No gradient is NaN or infinite: no match, one match, ties, extreme contrast, extreme scores, low precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eloftr_ops import EfficientLoFTR
from eloftr_ops.model.coarse import match_cells, select_matches
from support.gradients import finite_gradients
from support.models import coarse_stage, random_images, tiny_model

MODES = ("hard", "straight_through", "soft")
SIZE = (64, 96)


def constant(value: float) -> Tensor:
    return torch.full((1, 1, *SIZE), value)


def checkerboard(period: int) -> Tensor:
    rows, columns = torch.arange(SIZE[0])[:, None] // period, torch.arange(SIZE[1]) // period
    return ((rows + columns) % 2).float()[None, None]


IMAGES = {
    "black": constant(0.0),
    "white": constant(1.0),
    "gray": constant(0.5),
    "checkerboard of pixels": checkerboard(1),
    "checkerboard of cells": checkerboard(8),
    "noise": random_images(1, *SIZE),
}


def projected(out: dict[str, Tensor]) -> Tensor:
    """All differentiable outputs in one vector."""
    return torch.cat([out["keypoints0"].flatten(), out["keypoints1"].flatten(), out["confidence"]])


def gradients(model: EfficientLoFTR, image0: Tensor, image1: Tensor, mode: str) -> tuple[int, list[Tensor]]:
    """Number of matches and finite gradients in both images and all parameters."""
    leaves = [image0.clone().requires_grad_(), image1.clone().requires_grad_()]
    out = model({"image0": leaves[0], "image1": leaves[1]}, mode=mode)
    return len(out["confidence"]), finite_gradients(projected(out), [*leaves, *model.parameters()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(IMAGES))
def test_repetitive_images_are_full_of_ties(name: str, mode: str) -> None:
    model = tiny_model(border_removal=0)
    count, found = gradients(model, IMAGES[name], IMAGES[name], mode)
    assert count > 0
    assert any(bool(g.any()) for g in found)


def test_exact_ties_between_cells_and_between_pixels() -> None:
    """One feature everywhere: every score and every window probability ties; soft positions average."""
    model = tiny_model(border_removal=0)
    image = random_images(1, *SIZE)
    features0, features1, coarse = coarse_stage(model, {"image0": image, "image1": image})
    flat = [torch.ones_like(x).requires_grad_() for x in (coarse.coarse0, coarse.coarse1)]
    features = [
        f._replace(half=torch.ones_like(f.half), quarter=torch.ones_like(f.quarter)) for f in (features0, features1)
    ]
    tied = match_cells(*flat, None, None, model.config)
    for mode in MODES:
        matches = model.refine(*features, tied, select_matches(tied, model.config), mode)
        assert len(matches.confidence) == 1  # the first cell of each image
        found = finite_gradients(projected(matches._asdict()), flat)
        assert any(bool(g.any()) for g in found)


@pytest.mark.parametrize("mode", MODES)
def test_no_match_gives_zero_gradient(mode: str) -> None:
    count, found = gradients(tiny_model(threshold=1.0), IMAGES["noise"], IMAGES["noise"].flip(-1), mode)
    assert count == 0
    assert not any(bool(g.any()) for g in found)


@pytest.mark.parametrize("mode", MODES)
def test_one_match(mode: str) -> None:
    model = tiny_model(border_removal=1)
    image0 = random_images(1, *SIZE)
    image1 = image0.roll((3, 5), (-2, -1))
    with torch.no_grad():
        best, second = model({"image0": image0, "image1": image1})["confidence"].sort(descending=True).values[:2]
    assert best > second
    model = tiny_model(border_removal=1, threshold=float(best + second) / 2)
    count, found = gradients(model, image0, image1, mode)
    assert count == 1
    assert any(bool(g.any()) for g in found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_extreme_temperatures(temperature: float, mode: str) -> None:
    """Scores of 1e6 (certain matches, saturated probabilities) and of 1e-2 (uniform ones)."""
    model = tiny_model(
        border_removal=0,
        temperature=temperature,
        subpixel_temperature=temperature,
        soft_temperature=temperature,
    )
    count, _ = gradients(model, IMAGES["noise"], IMAGES["noise"], mode)
    assert count > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("score", ["dual_softmax", "similarity"])
def test_both_scores(score: str, mode: str) -> None:
    count, found = gradients(
        tiny_model(score=score, threshold=0.0, border_removal=0), IMAGES["noise"], IMAGES["noise"], mode
    )
    assert count > 0
    assert any(bool(g.any()) for g in found)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), mode=st.sampled_from(MODES), training=st.booleans())
def test_autocast_and_float32(seed: int, mode: str, training: bool) -> None:
    model = tiny_model(seed, border_removal=0).train(training)
    image0 = random_images(2, *SIZE, seed)
    image1 = image0.roll((3, 5), (-2, -1))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            count, found = gradients(model, image0, image1, mode)
        assert count > 0
        assert any(bool(g.any()) for g in found)


@pytest.mark.parametrize("mode", MODES)
def test_what_lies_under_a_mask_has_zero_gradient(mode: str) -> None:
    model = tiny_model(border_removal=0)
    data = {"image0": random_images(1, *SIZE).requires_grad_(), "image1": random_images(1, *SIZE)}
    mask = torch.ones((1, *SIZE), dtype=torch.bool)
    mask[:, :, 48:] = False
    out = model({**data, "mask0": mask}, mode=mode)
    assert len(out["confidence"]) > 0
    (found,) = finite_gradients(projected(out), [data["image0"]])
    assert bool(found[..., :48].any())
    assert not bool(found[..., 48:].any())


@pytest.mark.parametrize("mode", MODES)
def test_a_pair_without_matches_gets_no_gradient_in_a_batch(mode: str) -> None:
    """The black pair is masked out; the gradient of the other is what it is alone."""
    model = tiny_model().double()
    image = random_images(1, 96, 128).double()
    pair = torch.cat([image, torch.zeros_like(image)]).requires_grad_()
    mask = torch.ones((2, 96, 128), dtype=torch.bool)
    mask[1] = False
    out = model({"image0": pair, "image1": pair.detach(), "mask0": mask}, mode=mode)
    assert set(out["batch_indexes"].tolist()) == {0}
    (found,) = finite_gradients(projected(out), [pair])
    assert bool(found[0].any())
    assert not bool(found[1].any())
