# SPDX-License-Identifier: Apache-2.0
"""Draws from the dual softmax and from windows: right frequencies, whatever the blocks, without the whole matrix."""

import math

import pytest
import torch
from torch import Tensor

from eloftr_kernels import dual_softmax_lse
from eloftr_kernels.dual_softmax import cpu
from eloftr_kernels.dual_softmax.naive import dense_scores
from eloftr_kernels.dual_softmax.sampled_pairs import sample_pairs
from eloftr_kernels.noise import counters, gumbel, keys
from eloftr_kernels.window_match import pixel_log_joint, windows
from eloftr_kernels.window_match.sampled_pixels import sample_pixels, window_log_joint
from support.memory import LargestTensor

FALSE_ALARM = 1e-6  # probability that a right sampler fails; the seeds are fixed, so it does so always or never


def _most(freedom: int) -> float:
    """A bound of chi-square that is passed with probability FALSE_ALARM at most (Laurent and Massart 2000, lemma 1)."""
    x = -math.log(FALSE_ALARM)
    return freedom + 2 * math.sqrt(freedom * x) + 2 * x


def _features(batch: int, cells0: int, cells1: int, channels: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(batch, n, channels, generator=generator) for n in (cells0, cells1)]
    return made[0], made[1]


def _log_probability(features0: Tensor, features1: Tensor, temperature: float) -> Tensor:
    scores = dense_scores(features0.double(), features1.double(), temperature)
    return scores.log_softmax(1) + scores.log_softmax(2)


def _drawn(features0: Tensor, features1: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    masks = {name: options.get(name) for name in ("mask0", "mask1")}
    lse = dual_softmax_lse(features0, features1, 0.7, **masks)  # type: ignore[arg-type]
    return sample_pairs(features0, features1, 0.7, *lse, **options)  # type: ignore[arg-type]


def _chi_square(counts: Tensor, expected: Tensor) -> float:
    assert float(expected.min()) >= 5, "too few for the chi-square law"
    return float(((counts - expected).square() / expected).sum())


def test_noise_follows_the_gumbel_law_and_neighbours_are_independent() -> None:
    noise = gumbel(counters(7, 1000, torch.device("cpu"))[:, None], counters(0, 1000, torch.device("cpu")))
    uniform = torch.exp(-torch.exp(-noise.double()))
    counts = torch.histc(uniform, 64, 0, 1)
    assert _chi_square(counts, torch.full((64,), 1e6 / 64)) < _most(63)
    for shift, dim in ((1, 0), (1, 1), (2, 0), (8, 1)):
        cells = (uniform * 8).long() * 8 + (uniform.roll(shift, dim) * 8).long()
        both = torch.bincount(cells.flatten(), minlength=64).double()
        assert _chi_square(both, torch.full((64,), 1e6 / 64)) < _most(63)


def test_ordered_pairs_are_drawn_as_one_after_the_other_without_replacement() -> None:
    """P(a, then b) = p_a p_b / (1 - p_a), with p the dual softmax divided by its sum."""
    features0, features1 = (0.5 * f for f in _features(1, 2, 3))
    count, draws = 20_000, 2
    seeds = torch.arange(count) * 1_000_003
    cells0, cells1, valid = _drawn(
        *(f.expand(count, -1, -1) for f in (features0, features1)), seeds=seeds, draws=draws, count=2
    )
    assert bool(valid.all())
    p = _log_probability(features0, features1, 0.7).exp().flatten()
    p = p / p.sum()
    first, second = (cells0 * 3 + cells1).unbind(2)
    observed = torch.bincount((first * 6 + second).flatten(), minlength=36).view(6, 6).double()
    expected = count * draws * p[:, None] * p / (1 - p[:, None])
    off = ~torch.eye(6, dtype=torch.bool)
    assert not observed.diagonal().any()
    assert _chi_square(observed[off], expected[off]) < _most(29)


def test_blocks_change_nothing_and_no_tensor_is_as_large_as_the_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features0, features1 = _features(2, 150, 130)
    options = {"seeds": torch.tensor([5, 2**61 + 3]), "draws": 2, "count": 40}
    whole = _drawn(features0, features1, **options)
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(cpu, "BLOCK_COLUMNS", 50)
    with LargestTensor() as seen:
        pieces = _drawn(features0, features1, **options)
    # Rounding of blocked products can swap two neighbours: compare what was drawn, not the order.
    flat = [(c0 * 130 + c1).sort(2).values for c0, c1, _ in (whole, pieces)]
    assert torch.equal(*flat)
    assert seen.elements < 150 * 130 / 2
    assert len(flat[0].unique(dim=1)[0]) == 2  # draws differ


def test_masked_cells_are_never_drawn_and_missing_ones_are_not_valid() -> None:
    features0, features1 = _features(2, 6, 5)
    mask0, mask1 = torch.zeros(2, 6, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    mask0[0, 2:4], mask1[1] = True, False
    options = {"mask0": mask0, "mask1": mask1, "seeds": torch.tensor([1, 2]), "draws": 3, "count": 12}
    cells0, cells1, valid = _drawn(features0, features1, **options)
    assert valid.sum(2).tolist() == [[10] * 3, [0] * 3]  # all 2 x 5 pairs of image pair 0
    assert bool(((cells0[0] == 2) | (cells0[0] == 3))[valid[0]].all())
    assert not cells0[~valid].any()
    assert not cells1[~valid].any()


def test_pixels_are_drawn_by_the_joint_probability_of_the_window() -> None:
    generator = torch.Generator().manual_seed(3)
    map0, map1 = (6 * torch.randn(1, 6, 4, 4, generator=generator) for _ in "ab")
    zero = torch.zeros(1, dtype=torch.int64)
    count = 900  # chunks of 256 on a CPU
    with LargestTensor() as seen:
        drawn = sample_pixels(
            map0, map1, *(zero.expand(count) for _ in "abc"), 2, keys=keys(torch.arange(count)), draws=20
        )
    assert seen.elements < count * 64**2 / 2
    w0, w1 = windows(map0, zero, zero, ring=0)[..., :4], windows(map1, zero, zero, ring=1)[..., :4]
    log_p = pixel_log_joint(w0, w1, 6).flatten(1).log_softmax(1)[0].double()
    place = (drawn.pixel0[..., 1] + 3.5) * 8 + drawn.pixel0[..., 0] + 3.5
    place = (place * 64 + (drawn.pixel1[..., 1] + 3.5) * 8 + drawn.pixel1[..., 0] + 3.5).long()
    torch.testing.assert_close(drawn.log_probability.double(), log_p[place], rtol=1e-5, atol=1e-5)
    assert all(len(row.unique()) == 20 for row in place[:10])
    # First draws in 16 groups of equal probability, by rank.
    order = log_p.argsort(descending=True)
    group = ((log_p[order].exp().cumsum(0) - 1e-12) * 16).long().clamp(max=15)[order.argsort()]
    expected = torch.zeros(16, dtype=torch.float64).index_add(0, group, log_p.exp()) * count
    kept = expected > 5
    observed = torch.bincount(group[place[:, 0]], minlength=16).double()
    assert _chi_square(observed[kept], expected[kept]) < _most(int(kept.sum()))


def test_the_joint_probability_of_windows_in_chunks_is_that_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(4)
    map0, map1 = (torch.randn(2, 6, 8, 8, generator=generator).requires_grad_() for _ in "ab")
    batch, cells0, cells1 = (torch.randint(high, (300,), generator=generator) for high in (2, 4, 4))
    w0, w1 = windows(map0, batch, cells0, ring=0)[..., :4], windows(map1, batch, cells1, ring=1)[..., :4]
    expected = pixel_log_joint(w0, w1, 6)
    found = window_log_joint(map0, map1, batch, cells0, cells1, 2)
    torch.testing.assert_close(found, expected)
    pull = torch.randn(found.shape, generator=generator)
    slopes = torch.autograd.grad((found * pull).sum(), (map0, map1))
    torch.testing.assert_close(slopes, torch.autograd.grad((expected * pull).sum(), (map0, map1)), rtol=1e-4, atol=1e-4)
    assert window_log_joint(map0, map1, batch[:0], cells0[:0], cells1[:0], 2).shape == (0, 64, 64)
