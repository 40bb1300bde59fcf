# SPDX-License-Identifier: Apache-2.0
"""Sampled matches: their log-probabilities and gradients, masks, batches, sizes, bad input."""

import pytest
import torch
from torch import Tensor

from eloftr_kernels.dual_softmax.naive import dense_scores
from eloftr_ops.model.coarse import score_cells
from eloftr_ops.model.sampling import draw_cells, draw_pixels
from eloftr_ops.types import Features, SampledMatches
from support.gradients import check_gradients, finite_gradients
from support.models import coarse_stage, random_images, tiny_model

COUNTS = {"draws": 2, "matches": 30, "pixels": 3}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _pixels(drawn: SampledMatches) -> tuple[Tensor, ...]:
    assert drawn.pixels is not None
    return tuple(drawn.pixels)


def test_log_probabilities_are_the_confidences_and_points_lie_in_their_windows() -> None:
    model = tiny_model(border_removal=0)
    image0, image1 = random_images(1, 64, 96), random_images(1, 64, 64, seed=1)
    drawn = model.sample_matches(image0, image1, **COUNTS, generator=_generator())
    assert drawn.log_probability.shape == (1, 2, 30)
    assert bool(drawn.valid.all())
    scores = coarse_stage(model, {"image0": image0, "image1": image1}).coarse.scores
    dense = dense_scores(scores.features0, scores.features1, model.config.temperature)
    dense = dense.log_softmax(1) + dense.log_softmax(2)
    torch.testing.assert_close(drawn.log_probability, dense[0, drawn.cells0, drawn.cells1], rtol=1e-4, atol=1e-4)
    for points, cells, width in ((drawn.keypoints0, drawn.cells0, 12), (drawn.keypoints1, drawn.cells1, 8)):
        assert torch.equal(points, 8.0 * torch.stack([cells % width, cells // width], -1))
    points0, points1, log_probability, _ = _pixels(drawn)
    assert points0.shape == (60, 3, 2)
    for points, centres in ((points0, drawn.keypoints0), (points1, drawn.keypoints1)):
        assert float((points - centres.view(60, 1, 2)).abs().max()) <= 3.5
    assert bool((log_probability < 0).all())


def test_a_batch_draws_what_its_pairs_draw_one_after_the_other() -> None:
    model = tiny_model().double()
    image0, image1 = random_images(2, 64, 64).double(), random_images(2, 64, 96, seed=1).double()
    mask1 = torch.ones(2, 64, 96, dtype=torch.bool)
    mask1[1, :, 40:] = False
    with torch.no_grad():
        both = model.sample_matches(image0, image1, None, mask1, **COUNTS, generator=_generator())
        generator = _generator()
        for k in (slice(0, 1), slice(1, 2)):
            alone = model.sample_matches(image0[k], image1[k], None, mask1[k], **COUNTS, generator=generator)
            for name in ("cells0", "cells1", "valid", "log_probability"):
                torch.testing.assert_close(getattr(both, name)[k], getattr(alone, name))
            for of_both, of_one in zip(_pixels(both), _pixels(alone), strict=True):
                torch.testing.assert_close(of_both.unflatten(0, (2, -1))[k.start], of_one)
    other = model.sample_matches(image0, image1, **COUNTS, generator=torch.Generator().manual_seed(12))
    assert not torch.equal(other.cells0[0], both.cells0[0])


def test_nothing_valid_lies_on_a_mask() -> None:
    model = tiny_model()
    image = random_images(1, 64, 64)
    mask0 = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask0[:, 16:37, 24:] = True
    drawn = model.sample_matches(image, image, mask0, draws=1, matches=2000, pixels=8, generator=_generator())
    assert int(drawn.valid.sum()) == 3 * 5 * 64  # cells whose corner pixel is there, against all 64
    points, _, _, inside = _pixels(drawn)
    column, row = points[inside].long().unbind(1)
    assert bool(mask0[0, row, column].all())
    assert not bool(inside[~drawn.valid.flatten()].any())
    drawn.log_probability.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_gradients_of_log_probabilities() -> None:
    """Of the cells in the coarse maps, and of the pixels in the fine maps, against finite differences."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    side = Features(*(torch.zeros(1, 1, n * 2, n * 3) for n in (4, 2, 1)), None)
    seeds = torch.tensor([3])

    def cells(coarse0: Tensor, coarse1: Tensor) -> Tensor:
        coarse = score_cells(coarse0, coarse1, None, None, model.config)
        return draw_cells(side, side, coarse, model.config, seeds=seeds, draws=2, matches=9).log_probability

    maps = randn(1, 32, 2, 3), randn(1, 32, 2, 3)
    check_gradients(cells, maps, fast=True)
    coarse = score_cells(*maps, None, None, model.config)
    drawn = draw_cells(side, side, coarse, model.config, seeds=seeds, draws=1, matches=3)

    def pixels(fine0: Tensor, fine1: Tensor) -> Tensor:
        rows = torch.tensor([0, 2])
        return draw_pixels(
            side, side, coarse, fine0, fine1, model.config, drawn, rows=rows, seeds=seeds, pixels=5
        ).log_probability

    check_gradients(pixels, (randn(1, 12, 8, 12), randn(1, 12, 8, 12)), fast=True)


def test_certain_and_impossible_matches_have_finite_gradients() -> None:
    config = tiny_model().config
    side = Features(*(torch.zeros(1, 1, n * 2, n * 2) for n in (4, 2, 1)), None)
    for size in (1e3, 0.0):
        maps = (size * torch.eye(4).repeat(1, 8, 1).view(1, 32, 2, 2)).requires_grad_()
        coarse = score_cells(maps, maps, None, None, config)
        drawn = draw_cells(side, side, coarse, config, seeds=torch.tensor([1]), draws=1, matches=16)
        assert bool(torch.isfinite(drawn.log_probability).all())
        finite_gradients(drawn.log_probability, [maps])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws: expected 1 to 1000, got 0"),
        ({"matches": 0}, "matches: expected 1 to"),
        ({"pixels": 5000}, "pixels: expected 0 to 4096"),
        ({"mask0": torch.ones(1, 5, 5)}, "mask0: expected the size of image0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    image = random_images(1, 64, 64)
    with pytest.raises(ValueError, match=message):
        tiny_model().sample_matches(image, image, **options)
    with pytest.raises(TypeError, match="draws: expected an int"):
        tiny_model().sample_matches(image, image, draws=1.5)  # type: ignore[arg-type]


def test_raw_similarities_cannot_be_drawn_from() -> None:
    image = random_images(1, 64, 64)
    with pytest.raises(ValueError, match="score: expected dual_softmax"):
        tiny_model(score="similarity").sample_matches(image, image)
