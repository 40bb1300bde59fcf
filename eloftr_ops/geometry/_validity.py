# SPDX-License-Identifier: Apache-2.0
"""Is the agreement of matches with a model an accident? What the flags of robust estimates say."""

import math

import torch
from torch import Tensor

from eloftr_ops.geometry._linalg import FAR
from eloftr_ops.geometry._minimal import SAMPLE_SIZE, SOLUTIONS
from eloftr_ops.geometry._residuals import line_distances, symmetric_transfer

# Accidental models as good as the found one that wrong matches may be expected to give.
ACCEPTED_ALARMS = 0.05


def is_no_accident(
    model: str, matrices: Tensor, points: tuple[Tensor, Tensor], votes: Tensor, scale: Tensor, unit: Tensor
) -> Tensor:
    """Pairs `(B,)` whose model agrees with more matches than a model of wrong matches would by accident.

    Args:
        model: "homography", "fundamental" or "essential".
        matrices: `(B, 3, 3)`, in the coordinates of the points.
        points: both `(B, N, 2)`.
        votes: `(B, N)`, in [0, 1] per match; zero for none.
        scale: `(B,)`, robust scale in the unit of the points.
        unit: `(B,)`, from that unit to that of Hartley's frame.
    """
    with torch.no_grad():
        if model == "homography":
            # The larger of both errors is at most twice their mean.
            squared = 2.0 * symmetric_transfer(matrices, *points)
        else:
            squared = line_distances(matrices, *points).clamp(-FAR, FAR).square().amax(-1)
        dimension, size = 2 if model == "homography" else 1, SAMPLE_SIZE[model]
        alarms = log_false_alarms(squared * unit.square()[:, None], votes, scale * unit, dimension, size)
        # Each minimal sample has several models.
        chance_is_low = alarms + math.log(SOLUTIONS[model]) <= math.log(ACCEPTED_ALARMS)
        untestable = votes.sum(1) <= size + 1e-6
        return untestable | chance_is_low


def log_false_alarms(squared: Tensor, votes: Tensor, scale: Tensor, dimension: int, size: int) -> Tensor:
    """Logarithm of how many models as well supported as this one wrong matches give by accident.

    A-contrario: a wrong match lies anywhere, so it agrees within r with the probability that a disc (for a
    point) or a strip (for a line) of that size has in the image; of all subsets of the matches and all minimal
    samples in them, how many agree that well? (Moisan and Stival 2004.) Below zero the support is no accident.

    Args:
        squared: `(B, N)`, squared residuals in Hartley's normalised frame.
        votes: `(B, N)`, in [0, 1] per match; zero for none.
        scale: `(B,)`, robust scale in that frame; only matches within three times that count as support.
        dimension: 2 for the distance of points, 1 for that from a line.
        size: of the minimal sample.

    Returns:
        `(B,)`; infinite where no match is near.
    """
    squared, order = squared.masked_fill(votes <= 0, float("inf")).sort(1)
    support = votes.gather(1, order).cumsum(1)
    count = support[:, -1:].clamp_min(size)
    distance = squared.clamp_min(1e-24).sqrt()
    # A uniform square with mean distance sqrt(2) from its centre has side 3.70 and diagonal 5.23.
    chance = math.pi * squared / 3.70**2 if dimension == 2 else 2.0 * 5.23 * distance / 3.70**2
    chance = chance.clamp(1e-24, 1.0)

    def log_choose(n: Tensor, k: Tensor) -> Tensor:
        return torch.lgamma(n + 1.0) - torch.lgamma(k + 1.0) - torch.lgamma((n - k).clamp_min(0.0) + 1.0)

    k, s = support.clamp_min(size), torch.full_like(support, size)
    alarms = (count - s).clamp_min(1.0).log() + log_choose(count, k) + log_choose(k, s) + (k - s) * chance.log()
    near = (distance <= 3.0 * scale[:, None]) & (support >= size)
    return alarms.masked_fill(~near, float("inf")).amin(1)
