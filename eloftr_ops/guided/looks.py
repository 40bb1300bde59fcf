# SPDX-License-Identifier: Apache-2.0
"""What is looked at, what was found, and how far that agrees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry.consensus import estimate_robust
from eloftr_ops.geometry.verification import log10_chance, log10_nfa
from eloftr_ops.guided.warps import Warp

__all__ = ["Found", "Look", "Setting", "Support", "model_between", "plane_between", "support_of"]

_MOST_SCORED = 1000  # matches that agreement is judged by, the most confident
_PLANE = 6.0  # pixels of a frame: how far a match may lie off the plane that most matches lie near
_LEAST_ON_PLANE = 10
_ITERATIONS = 2000
_CONFIDENCE = 0.999


class Setting(NamedTuple):
    """What looks of a pair may be like."""

    sizes: tuple[tuple[int, int], tuple[int, int]]  # (width, height) that images 0 and 1 count as: working sizes
    longest: int  # pixels: long side of a frame, at most
    finest: float  # pixels of a frame per working pixel of image 0, at most: what the image holds
    at_once: int  # looks of a search that are asked for together


class Look(NamedTuple):
    """Two frames to match with each other."""

    warp0: Warp  # from the first frame to image 0; it has no field
    warp1: Warp  # from the second frame to image 1
    view: str  # in words

    @property
    def warps(self) -> tuple[Warp, Warp]:
        """Both."""
        return self.warp0, self.warp1

    def assumed(self, points0: Tensor) -> Tensor:
        """Where points (N, 2) of image 0 lie in image 1 if both frames show the same; float64."""
        return self.warp1.to_image(self.warp0.from_image(points0))


class Found(NamedTuple):
    """What a look found."""

    points0: Tensor  # (M, 2) float64, working pixels of image 0
    points1: Tensor  # (M, 2) float64
    confidence: Tensor  # (M,)
    seen0: Tensor  # (M, 2), pixels of the first frame: there errors are alike in all directions
    seen1: Tensor  # (M, 2), pixels of the second frame

    def rows(self, index: Tensor) -> Found:
        """Some of the matches."""
        return Found(*(field[index] for field in self))

    def detached(self) -> Found:
        """The same without gradient."""
        return Found(*(field.detach() for field in self))


class Support(NamedTuple):
    """How far the matches of a look agree."""

    inliers: int  # places that agree with the better one of both models
    evidence: float  # -log10 of the share of unrelated pairs that agree as much

    def beats(self, other: Support) -> bool:
        """Whether this agreement says more."""
        return (self.evidence, self.inliers) > (other.evidence, other.inliers)


def support_of(look: Look, found: Found) -> Support:
    """Agreement with a homography or with a fundamental matrix, whichever is less likely by chance.

    It is judged in the frames: a simulated slant stretches errors in the image.
    """
    found = found.detached()
    if len(found.confidence) > _MOST_SCORED:
        found = found.rows(found.confidence.argsort(descending=True, stable=True)[:_MOST_SCORED])
    seen = found.seen0.double(), found.seen1.double()
    supports = []
    for model in ("homography", "fundamental"):
        nfa, inliers = log10_nfa(model, *seen, look.warp0.size_wh, look.warp1.size_wh)
        supports.append(Support(inliers, -log10_chance({model: nfa})))
    return max(supports, key=lambda support: (support.evidence, support.inliers))


def model_between(model: str, points0: Tensor, points1: Tensor, threshold: float) -> tuple[Tensor, Tensor] | None:
    """A homography or fundamental matrix (3, 3), and its inliers (M,) bool; None where the matches determine none."""
    estimate = estimate_robust(
        points0,
        points1,
        torch.zeros(len(points0), dtype=torch.int64),
        batch_size=1,
        model=model,
        threshold=threshold,
        max_iterations=_ITERATIONS,
        confidence=_CONFIDENCE,
    )
    return (estimate.model_0to1[0], estimate.inliers) if estimate.valid.item() else None


def plane_between(look: Look, found: Found) -> tuple[Tensor, Tensor] | None:
    """The homography (3, 3) from image 0 to image 1 that most matches lie near, and those matches (M,) bool.

    Returns:
        None where there is none, or too few matches lie near it.
    """
    found = found.detached()
    bent = look.warp0.field is not None or look.warp1.field is not None
    points = (found.points0, found.points1) if bent else (found.seen0.double(), found.seen1.double())
    model = model_between("homography", *points, _PLANE)
    if model is None or int(model[1].sum()) < _LEAST_ON_PLANE:
        return None
    plane, near = model
    if not bent:
        plane = look.warp1.matrix @ plane @ torch.linalg.inv(look.warp0.matrix)
    middle = torch.cat([found.points0[near].mean(0), torch.ones(1, dtype=torch.float64)])
    return plane / (plane[2] @ middle), near  # depth 1 amid the matches
