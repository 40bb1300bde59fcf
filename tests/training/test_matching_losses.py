# SPDX-License-Identifier: Apache-2.0
"""The supervised losses are right, finite, and zero where there is nothing to learn from."""

import math

import pytest
import torch

from eloftr_kernels.window_match import subpixel_offsets
from eloftr_ops.losses.matching import coarse_focal_loss, subpixel_divergence, window_losses
from eloftr_ops.training.supervision import (
    CoarsePairs,
    pairs_from_homography,
    sample_pairs,
    window_targets_from_homography,
)
from eloftr_ops.types import WindowTargets
from support.models import coarse_stage, tiny_model


def test_losses_of_no_pair_are_zero_with_zero_gradient() -> None:
    model = tiny_model().train()
    image = torch.rand(1, 1, 64, 64)
    *features, coarse = coarse_stage(model, {"image0": image, "image1": image}, nearest=False)
    none = CoarsePairs(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    focal, confidence = coarse_focal_loss(coarse.scores, none, model.config)
    targets = window_targets_from_homography(torch.eye(3)[None], none, coarse.grid0, coarse.grid1)
    pixel, subpixel = window_losses(*model.fine_features(*features, coarse), none, targets, model.config)
    assert [x.item() for x in (focal, confidence, pixel, subpixel)] == [0, 0, 0, 0]
    (focal + pixel + subpixel).backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())


def test_focal_loss_agrees_with_the_dense_confidence_matrix() -> None:
    model = tiny_model(temperature=50.0)  # random features score high: keep the dense softmax representable
    data = {"image0": torch.rand(1, 1, 64, 64), "image1": torch.rand(1, 1, 64, 96)}
    coarse = coarse_stage(model.double(), {k: v.double() for k, v in data.items()}).coarse
    scores = coarse.scores
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


def test_reductions_agree() -> None:
    model = tiny_model()
    image = torch.rand(1, 1, 64, 64)
    *features, coarse = coarse_stage(model, {"image0": image, "image1": image}, nearest=False)
    cells = torch.arange(0, 64, 3)
    pairs = CoarsePairs(torch.zeros_like(cells), cells, cells)
    targets = window_targets_from_homography(torch.eye(3)[None], pairs, coarse.grid0, coarse.grid1)
    fine = model.fine_features(*features, coarse)
    each = {
        reduction: (
            *coarse_focal_loss(coarse.scores, pairs, model.config, reduction=reduction),
            *window_losses(*fine, pairs, targets, model.config, reduction=reduction),
        )
        for reduction in ("mean", "sum", "none")
    }
    assert [len(values) for values in each["none"]] == [22, 22, *[int(targets.visible.sum())] * 2]
    for mean, total, values in zip(*each.values(), strict=True):
        torch.testing.assert_close(total, values.sum())
        torch.testing.assert_close(mean, values.mean())
    with pytest.raises(ValueError, match="reduction"):
        coarse_focal_loss(coarse.scores, pairs, model.config, reduction="median")  # type: ignore[arg-type]


def _with_offset(offset: tuple[float, float], scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sub-pixel losses, without and with the divergence, of one window pixel whose true offset is given."""
    generator = torch.Generator().manual_seed(0)
    coarse = [scale * torch.randn(1, 12, 8, 8, generator=generator) for _ in range(2)]
    cell = torch.tensor([3])
    pairs = CoarsePairs(torch.zeros_like(cell), cell, cell)
    visible = torch.zeros(1, 64, dtype=torch.bool)
    visible[0, 27] = True
    targets = WindowTargets(visible, torch.full((1, 64), 27), torch.tensor(offset).expand(1, 64, 2))
    config = tiny_model().config
    return tuple(window_losses(*coarse, pairs, targets, config, divergence=w)[1] for w in (0.0, 1.0))  # type: ignore[return-value]


def test_the_divergence_is_that_from_bilinear_weights() -> None:
    """Flat scores: KL(w || 1/9) = log 9 - H(w), w the bilinear weights of (0.25, -0.5)."""
    alone, both = _with_offset((0.25, -0.5), scale=0.0)
    weights = torch.tensor([0.5 * 0.75, 0.5 * 0.25] * 2)
    expected = math.log(9) + (weights * weights.log()).sum()
    torch.testing.assert_close(alone, torch.tensor(0.25**2 + 0.5**2))
    torch.testing.assert_close(both - alone, expected)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.5, -0.5), (-0.3, 0.2)])
def test_the_divergence_is_zero_at_the_bilinear_weights_and_only_there(offset: tuple[float, float]) -> None:
    """The weights written out here: (1 - |d|) on each axis, d the distance from the pixel."""
    x, y = offset
    weights = torch.tensor(
        [max(0.0, 1 - abs(y - j)) * max(0.0, 1 - abs(x - i)) for j in (-1, 0, 1) for i in (-1, 0, 1)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(weights @ subpixel_offsets(weights), torch.tensor(offset, dtype=torch.float64))
    scores = weights.clamp(min=1e-300).log()[None] + 3.0  # a constant changes no softmax
    offsets = torch.tensor([offset], dtype=torch.float64)
    assert abs(float(subpixel_divergence(scores, offsets))) < 1e-14
    for pixel in (weights < 1).nonzero()[:, 0].tolist():
        moved = scores.clone()
        moved[0, pixel] = scores.max() + 0.5
        assert float(subpixel_divergence(moved, offsets)) > 1e-2


def test_the_divergence_has_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(4, 9, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([[0.0, 0.0], [0.5, 0.5], [-0.5, 0.25], [0.1, -0.4]], dtype=torch.float64)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: subpixel_divergence(s, offsets), (scores,))
    (gradient,) = torch.autograd.grad(subpixel_divergence(scores, offsets).sum(), scores)
    assert gradient.abs().amax(1).min() > 1e-3
    extreme = (1e4 * scores.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(subpixel_divergence(extreme, offsets).sum(), extreme)
    assert gradient.isfinite().all()
