# SPDX-License-Identifier: Apache-2.0
"""The training loop: it learns, resumes where it stopped, skips bad steps, and its losses are finite and right."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from eloftr_ops.data import HomographyPairs, SyntheticConfig, procedural_textures
from eloftr_ops.losses.matching import coarse_focal_loss, window_losses
from eloftr_ops.training.__main__ import read_recipe
from eloftr_ops.training.supervised import TrainingConfig, learning_rate, train
from eloftr_ops.training.supervision import (
    CoarsePairs,
    pairs_from_homography,
    sample_pairs,
    window_targets_from_homography,
)
from support.models import tiny_model

SHORT = TrainingConfig(
    steps=6, batch_pixels=2 * 64 * 64, sizes=((64, 64), (64, 96)), warmup_steps=2, decay_steps=2, windows=8,
    checkpoint_every=3, log_every=1, bfloat16=False, learning_rate=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs() -> HomographyPairs:
    textures = procedural_textures(torch.Generator().manual_seed(0), 3, 128)
    return HomographyPairs(list(textures), SyntheticConfig(photometric=None))


def _log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_interrupted_and_resumed_is_uninterrupted(pairs: HomographyPairs, tmp_path: Path) -> None:
    """Stopped after a step past its last checkpoint, as a kill would: the weights end the same."""
    whole = train(tiny_model(), pairs, SHORT, tmp_path / "whole")
    train(tiny_model(), pairs, SHORT, tmp_path / "cut", until=5)  # the last checkpoint is of step 3
    resumed = train(tiny_model(seed=1), pairs, SHORT, tmp_path / "cut")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    losses = [{r["step"]: r["coarse"] for r in _log(tmp_path / f)} for f in ("whole", "cut")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_non_finite_step_is_skipped_and_too_many_stop_the_run(
    pairs: HomographyPairs, tmp_path: Path
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.transformer.layers[0].self_attention.merge.weight.fill_(torch.nan)
    before = {k: v.clone() for k, v in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        train(model, pairs, dataclasses.replace(SHORT, max_bad_steps=2), tmp_path)
    for name, value in model.named_parameters():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())


def test_learning_rate_warms_up_stays_and_decays() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10, decay_steps=50, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(rates[10:50]) == {1.0}
    assert rates[75] == pytest.approx(0.5)
    assert min(rates) >= 0.01


def test_losses_of_no_pair_are_zero_with_zero_gradient() -> None:
    model = tiny_model().train()
    image = torch.rand(1, 1, 64, 64)
    features = model.pair_features({"image0": image, "image1": image})
    maps = model.match_maps(*features, with_best=False)
    none = CoarsePairs(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    coarse, confidence = coarse_focal_loss(maps.scores, none, model.config)
    targets = window_targets_from_homography(torch.eye(3)[None], none, *maps.grids)
    pixel, subpixel = window_losses(*model.fine_maps(*features, maps), none, targets, model.config)
    assert [x.item() for x in (coarse, confidence, pixel, subpixel)] == [0, 0, 0, 0]
    (coarse + pixel + subpixel).backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())


def test_focal_loss_agrees_with_the_dense_confidence_matrix() -> None:
    model = tiny_model(temperature=50.0)  # random features score high: keep the dense softmax representable
    data = {"image0": torch.rand(1, 1, 64, 64), "image1": torch.rand(1, 1, 64, 96)}
    maps = model.double().match_maps(*model.pair_features({k: v.double() for k, v in data.items()}))
    scores = maps.scores
    dense = scores.features0 @ scores.features1.mT / model.config.temperature
    confidence = dense.softmax(1) * dense.softmax(2)
    i, j = torch.tensor([0, 5, 60]), torch.tensor([3, 5, 90])
    loss, mean = coarse_focal_loss(scores, CoarsePairs(torch.zeros_like(i), i, j), model.config)
    c = confidence[0, i, j]
    torch.testing.assert_close(loss, (-((1 - c) ** 2) * c.log()).mean())
    torch.testing.assert_close(mean, c.mean())


def test_true_pairs_of_a_shift_and_their_pixels() -> None:
    """Image 1 shows image 0 moved by (16, -8) + (0.25, 0): cell (c, r) goes to (c + 2, r - 1), pixels move along."""
    H = torch.eye(3)[None].clone()
    H[0, :2, 2] = torch.tensor([16.25, -8.0])
    pairs = pairs_from_homography(H, (6, 8), (6, 8))
    assert torch.equal(pairs.cells1, pairs.cells0 + 2 - 8)
    assert len(pairs.cells0) == 6 * 5
    targets = window_targets_from_homography(H, pairs, (6, 8), (6, 8))
    # windows of the first row and column reach off the image
    inner = (pairs.cells0 % 8 > 0) & (pairs.cells1 // 8 > 0)
    assert int(inner.sum()) == 20
    assert targets.visible[inner].all()
    assert torch.equal(targets.pixels1[inner], torch.arange(64).expand(20, 64))
    shift = torch.tensor([0.25, 0.0]).expand(20, 64, 2)
    torch.testing.assert_close(targets.offsets[inner], shift, rtol=0, atol=1e-4)
    few = sample_pairs(pairs, 7, torch.Generator().manual_seed(0))
    assert len(few.batch) == 7


def test_recipe_errors_name_the_field(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("photos: a\nfolder: b\ntraining: {stepz: 3}\n")
    with pytest.raises(ValueError, match=r"unknown training\.stepz"):
        read_recipe(path)
    path.write_text("folder: b\n")
    with pytest.raises(ValueError, match="missing photos"):
        read_recipe(path)


def test_the_shipped_recipe_is_readable() -> None:
    import eloftr_ops.training

    recipe = read_recipe(Path(eloftr_ops.training.__file__).parent / "recipes" / "small.yaml")
    assert recipe.training.sizes[0] == (256, 256)
