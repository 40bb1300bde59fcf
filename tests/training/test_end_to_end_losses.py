# SPDX-License-Identifier: Apache-2.0
"""End-to-end losses of batches with nothing to learn from: they say so, and can be told not to look perfect."""

import pytest
import torch

from eloftr_ops.training.end_to_end import (
    EndToEndConfig,
    homography_objective,
    homography_objective_of_matches,
    pose_objective_of_matches,
)
from eloftr_ops.types import Matches
from support.models import random_images, tiny_model
from support.two_view import planar_scene, scene


def _matches(keypoints0: torch.Tensor, keypoints1: torch.Tensor, batch_indexes: torch.Tensor) -> Matches:
    return Matches(keypoints0, keypoints1, torch.ones_like(keypoints0[:, 0]), batch_indexes)


@pytest.mark.parametrize("invalid", ["zero", "saturated", "nan"])
def test_a_pair_without_enough_matches_costs_what_the_option_says(invalid: str) -> None:
    planar = planar_scene(2, 20, seed=1, noise=0.5)
    matches = _matches(*(x[:23] for x in planar.matches))  # pair 1 has three
    config = EndToEndConfig(invalid=invalid, corner_saturation=32.0)
    result = homography_objective_of_matches(matches, (480, 640), planar.H_0to1, config)
    assert result.valid.tolist() == [True, False]
    assert result.matches_per_pair.tolist() == [20, 3]
    first = result.per_pair[0]
    assert 0.0 < float(first) < 32.0
    expected = {"zero": first, "saturated": (first + 32.0) / 2, "nan": torch.tensor(float("nan"))}[invalid]
    assert torch.allclose(result.loss, expected.to(result.loss), equal_nan=True)


def test_a_batch_without_any_valid_pair_warns() -> None:
    views = scene(1, 6, seed=2)
    config = EndToEndConfig(invalid="saturated")
    with pytest.warns(RuntimeWarning, match=r"no pair of this batch determines a model .*\[6\]"):
        result = pose_objective_of_matches(_matches(*views.matches), views.K0, views.K1, views.T_0to1, config)
    assert float(result.loss) == 0.5


def test_options_that_make_no_sense_are_named() -> None:
    with pytest.raises(ValueError, match="invalid: expected zero, saturated or nan"):
        EndToEndConfig(invalid="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs corner_saturation"):
        EndToEndConfig(invalid="saturated", corner_saturation=None)


def test_no_match_lies_under_a_mask() -> None:
    model, image = tiny_model(threshold=0.0), random_images(1, 96, 96)
    mask = torch.zeros(1, 96, 96, dtype=torch.bool)
    mask[:, :, :64] = True
    eye = torch.eye(3)[None]
    whole = homography_objective(model, image, image, eye)
    masked = homography_objective(model, image, image, eye, mask0=mask, mask1=mask)
    assert float(whole.matches.keypoints0[:, 0].detach().max()) > 64.0
    assert len(masked.matches.keypoints0) > 0
    assert float(masked.matches.keypoints0[:, 0].detach().max()) <= 64.0
