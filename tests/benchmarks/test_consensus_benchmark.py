# SPDX-License-Identifier: Apache-2.0
"""Problems of the consensus benchmark: their right matches fit the truth, and an exact answer has no error."""

import pytest
import torch

from benchmarks.consensus import SUCCESS, errors, problems
from benchmarks.gradient_direction import cosines, of_kernel
from eloftr_ops.geometry import fundamental_from_pose


@pytest.mark.parametrize("model", SUCCESS)
def test_the_truth_has_no_error(model: str) -> None:
    data = problems(model, 3, 20, 0.4, noise=1.0, seed=1)
    assert data.right.view(3, 20).sum(1).tolist() == [12, 12, 12]
    off = (data.keypoints1 - data.exact1).norm(dim=1)
    assert float(off[data.right].max()) < 6.0 < float(off[~data.right].median())
    truth = fundamental_from_pose(data.truth, data.K, data.K) if model == "fundamental" else data.truth
    assert float(errors(model, truth, data).max()) < 1e-4


def test_without_wrong_matches_the_gradient_is_that_of_the_right_ones() -> None:
    same = cosines(of_kernel(None, 2.0), 0.0, None, 2, 0)
    assert torch.allclose(same, torch.ones(2, dtype=torch.float64))
