# SPDX-License-Identifier: Apache-2.0
"""Models from drawn matches: found among few right ones, and brought nearer to the truth by the reward."""

from functools import partial

import pytest
import torch
from torch import Tensor

from eloftr_kernels.noise import keys
from eloftr_ops.geometry import (
    apply_homography,
    fundamental_from_pose,
    sampson_residuals,
    transfer_residuals,
)
from eloftr_ops.losses import corner_error_loss, homography_reward
from eloftr_ops.training.drawn_models import (
    Geometry,
    Points,
    agreeing,
    judge_cells,
    refits,
    similarities,
    squared_distances,
)
from eloftr_ops.types import SampledMatches

SIZE = (224, 224)
PLANE = torch.tensor([[[0.95, -0.12, 20.0], [0.1, 1.02, -9.0], [2e-4, -1e-4, 1.0]]])
MOTION = torch.eye(4)
MOTION[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.1, 0.2], [0.1, 0.0, -0.05], [-0.2, 0.05, 0.0]]))
MOTION[:3, 3] = torch.tensor([0.96, 0.1, 0.25])
CAMERA = torch.tensor([[[200.0, 0.0, 112.0], [0.0, 200.0, 112.0], [0.0, 0.0, 1.0]]])


def _drawn(right: float, count: int = 384, seed: int = 0) -> SampledMatches:
    """Centres of cells of 8 pixels, one draw of one pair; the share ``right`` follows the plane."""
    generator = torch.Generator().manual_seed(seed)
    points0 = torch.rand(1, 1, count, 2, generator=generator) * 224
    points1 = apply_homography(PLANE, points0[0])[None]
    wrong = torch.rand(1, 1, count, generator=generator) >= right
    points1 = torch.where(wrong[..., None], torch.rand(1, 1, count, 2, generator=generator) * 224, points1)
    cells = [(points.clamp(0, 223) / 8).floor().long() for points in (points0, points1)]
    valid = ((points1 >= 0) & (points1 < 224)).all(-1)
    centres = [8.0 * cell + 4 for cell in cells]
    numbers = [cell[..., 1] * 28 + cell[..., 0] for cell in cells]
    return SampledMatches(*centres, torch.zeros(1, 1, count), valid, *numbers)


def _corner_error(models: Tensor) -> Tensor:
    return corner_error_loss(models, PLANE.expand(len(models), 3, 3), SIZE, reduction="none")


def test_a_similarity_is_found_among_many_wrong_matches() -> None:
    drawn = _drawn(0.05)
    found = similarities(drawn, keys(torch.zeros(1, 1, dtype=torch.int64)), threshold=14.0, kept=64)
    assert found.shape == (1, 1, 64, 3, 3)
    assert float(_corner_error(found[0, 0]).min()) < 12


@pytest.mark.parametrize(("right", "most"), [(0.05, 10.0), (0.5, 2.5)])
def test_the_reward_leads_to_a_good_homography(right: float, most: float) -> None:
    drawn = _drawn(right)
    seeds = torch.tensor([5])
    reward = partial(homography_reward, H_gt_0to1=PLANE, size_hw=SIZE, scale=16.0)
    judged = judge_cells(drawn, seeds, reward, Geometry("homography"), threshold=7.0)
    assert float(_corner_error(judged.models[0])) < most
    assert float(judged.rewards) == pytest.approx(1 - float(_corner_error(judged.models[0])) / 16, abs=1e-4)
    expected = squared_distances(drawn.keypoints0, drawn.keypoints1, judged.models, Geometry("homography")) < 49
    assert torch.equal(judged.agrees, expected & drawn.valid)
    assert float(judged.support) == pytest.approx(float(judged.agrees.sum() / drawn.valid.sum()))


def test_refits_lie_around_the_truth() -> None:
    drawn, seeds = _drawn(0.5), torch.tensor([5])
    reward = partial(homography_reward, H_gt_0to1=PLANE, size_hw=SIZE, scale=16.0)
    judged = judge_cells(drawn, seeds, reward, Geometry("homography"), threshold=7.0)
    cells = agreeing(drawn, judged)
    nothing = Points(*(x[:0] for x in cells))
    finer = refits(cells, nothing, seeds, judged.models[:, 0], Geometry("homography"), count=32)
    errors = _corner_error(finer.models_0to1[finer.valid])
    assert finer.valid.tolist() == [True] * 16 + [False] * 16
    assert float(errors.min()) < 1.5 < float(errors.max()) < 8


def test_what_is_judged_depends_on_the_seed_alone() -> None:
    one, two = _drawn(0.3, seed=1), _drawn(0.3, seed=2)
    both = SampledMatches(*(torch.cat(pair) for pair in zip(one[:6], two[:6], strict=True)))
    seeds = torch.tensor([3, 4])

    def judged(drawn: SampledMatches, seeds: Tensor) -> Tensor:
        truth = PLANE.expand(len(seeds), 3, 3)
        reward = partial(homography_reward, H_gt_0to1=truth, size_hw=SIZE, scale=16.0)
        return judge_cells(drawn, seeds, reward, Geometry("homography"), threshold=7.0).models

    torch.testing.assert_close(judged(both, seeds)[1:], judged(two, seeds[1:]))


def test_distances_are_those_of_the_public_residuals() -> None:
    generator = torch.Generator().manual_seed(0)
    points0, points1 = torch.rand(2, 1, 20, 2, dtype=torch.float64, generator=generator) * 224
    index = torch.zeros(20, dtype=torch.int64)
    plane = PLANE.double()
    found = squared_distances(points0, points1, plane * 1e9, Geometry("homography"))
    expected = transfer_residuals(points0[0], points1[0], index, plane).square().sum(-1)
    torch.testing.assert_close(found[0], expected)
    lines = fundamental_from_pose(MOTION[None].double(), CAMERA.double(), CAMERA.double())
    found = squared_distances(points0, points1, lines, Geometry("fundamental"))
    torch.testing.assert_close(found[0], sampson_residuals(points0[0], points1[0], index, lines).square())
    for model, geometry in ((plane, Geometry("homography")), (lines, Geometry("fundamental"))):
        table = squared_distances(points0, points1, model, geometry, pairwise=True)
        single = squared_distances(points0, points1, model, geometry)
        assert table.shape == (1, 20, 20)
        torch.testing.assert_close(table.diagonal(dim1=1, dim2=2), single)


def test_no_right_match_gives_no_reward_and_no_error() -> None:
    drawn = _drawn(0.0, count=40)
    for nothing in (drawn, drawn._replace(valid=torch.zeros_like(drawn.valid))):
        reward = partial(homography_reward, H_gt_0to1=PLANE, size_hw=SIZE, scale=1.0)
        judged = judge_cells(nothing, torch.tensor([1]), reward, Geometry("homography"), threshold=7.0)
        assert float(judged.rewards) == 0
        assert bool(torch.isfinite(judged.models).all())
        assert len(agreeing(nothing, judged).group) == 0
