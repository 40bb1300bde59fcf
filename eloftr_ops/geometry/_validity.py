# SPDX-License-Identifier: Apache-2.0
"""Is the agreement of matches with a model an accident? What the flags of robust estimates say."""

import torch
from torch import Tensor

from eloftr_ops.geometry._consensus import Framed, squared_residuals
from eloftr_ops.geometry._minimal import SAMPLE_SIZE
from eloftr_ops.geometry._robust import log_false_alarms


def agreement_is_no_accident(problem: Framed, matrices: Tensor) -> Tensor:
    """Pairs `(B,)` whose model `(B, 3, 3)`, in the frame of the problem, agrees with more matches than by accident."""
    plain = problem.problem
    with torch.no_grad():
        squared = squared_residuals(plain.model, matrices, plain.points0, plain.points1)
        squared = squared * problem.unit.square()[:, None]
        size, dimension = SAMPLE_SIZE[plain.model], 2 if plain.model == "homography" else 1
        return log_false_alarms(squared, problem.share, plain.scale * problem.unit, dimension, size) <= 0
