# SPDX-License-Identifier: Apache-2.0
"""Minimal samples of matches and the models that fit them exactly: 4, 7 and 5 points. No gradient."""

import torch
from torch import Tensor

from eloftr_ops.geometry._five_point import essentials_of_five
from eloftr_ops.geometry._linalg import adjugate, homogeneous, unit_magnitude
from eloftr_ops.geometry._polynomials import cubic_roots, null_space

SAMPLE_SIZE = {"homography": 4, "fundamental": 7, "essential": 5}
SOLUTIONS = {"homography": 1, "fundamental": 3, "essential": 10}


def gumbel_noise(count: int, samples: int, generator: torch.Generator) -> Tensor:
    """Gumbel noise `(S, N)` for the samples of pairs of at most N matches, on the CPU.

    The same noise serves every pair. The first n columns do not depend on N, so a pair gets the same samples alone
    and in a batch.
    """
    uniform = torch.rand(count, samples, generator=generator).clamp(1e-30, 1.0 - 1e-7)
    return -(-uniform.log()).log().mT


def draw_samples(weights: Tensor, noise: Tensor, size: int) -> Tensor:
    """Draw samples of distinct matches in proportion to their weights: Gumbel top-k (Kool et al. 2019).

    The largest keys `log w + noise` are a sample without replacement, in the order of the draws.

    Args:
        weights: `(B, N)`, non-negative; a match of weight zero comes after all others.
        noise: `(S, N)`, Gumbel.
        size: m, at most N.

    Returns:
        Indexes `(B, S, m)` into the N matches.
    """
    # The finite floor keeps keys of weight zero apart from each other and below all others.
    logs = torch.where(weights > 0, weights.log(), -1e9)
    keys = logs.float()[:, None] + noise.float()[None]
    chosen: Tensor = keys.topk(size, dim=2).indices
    return chosen


def log_probability_of_samples(weights: Tensor, index: Tensor) -> Tensor:
    """Logarithm `(B, S)` of the probability of drawing samples `(B, S, m)` in their order; gradient to the weights.

    `prod_i w_i / (W - w_1 - ... - w_(i-1))`, W the sum of all weights (Plackett 1975; Kool et al. 2019).
    """
    batch = torch.arange(weights.shape[0], device=weights.device)[:, None, None].expand_as(index)
    drawn = weights[batch, index]
    before = drawn.cumsum(2) - drawn
    left = weights.sum(1)[:, None, None] - before
    possible = (drawn > 0) & (left > 0)
    chance = torch.where(possible, drawn, 1.0) / torch.where(possible, left, 1.0)
    return torch.where(possible.all(2), chance.clamp(max=1.0).log().sum(2), 0.0)


def minimal_models(model: str, points0: Tensor, points1: Tensor) -> Tensor:
    """All models through minimal samples.

    Homographies by the projective bases of four points (Hartley and Zisserman, section 4.1.3), fundamental matrices
    by seven points (section 11.1.2), essential ones by five (Nister 2004).

    Args:
        model: "homography", "fundamental" or "essential".
        points0: `(S, m, 2)` in coordinates of about unit size; camera coordinates for "essential".
        points1: `(S, m, 2)`.

    Returns:
        `(S, C, 3, 3)` with C = 1, 3 or 10, of magnitude 1; zero where there is no such solution.
    """
    if model == "homography":
        found = _homography_of_four(points0, points1)[:, None]
    else:
        rows = (homogeneous(points1)[..., :, None] * homogeneous(points0)[..., None, :]).flatten(2)
        found = _fundamentals_of_seven(rows) if model == "fundamental" else essentials_of_five(rows)
    finite = torch.isfinite(found).flatten(2).all(2)[..., None, None]
    return unit_magnitude(torch.where(finite, found, 0.0), (2, 3))


def _homography_of_four(points0: Tensor, points1: Tensor) -> Tensor:
    return _basis(points1) @ adjugate(_basis(points0))


def _basis(points: Tensor) -> Tensor:
    """Matrices that map the canonical projective basis, the axes and (1, 1, 1), to four points `(S, 4, 2)`."""
    x = homogeneous(points).mT
    axes = x[..., :3]
    return axes * (adjugate(axes) @ x[..., 3:]).mT


def _fundamentals_of_seven(rows: Tensor) -> Tensor:
    """Singular members of the pencil `c A + s B` that seven equations `(S, 7, 9)` leave: a cubic in (c, s)."""
    A, B = (vector.view(-1, 3, 3) for vector in null_space(rows).unbind(1))
    adjugate_a, adjugate_b = adjugate(A), adjugate(B)

    def trace(left: Tensor, right: Tensor) -> Tensor:
        return (left.mT * right).sum((1, 2))

    cubic = [trace(adjugate_a, A) / 3, trace(adjugate_a, B), trace(adjugate_b, A), trace(adjugate_b, B) / 3]
    cosine, sine, real = cubic_roots(torch.stack(cubic, dim=1))
    found = cosine[..., None, None] * A[:, None] + sine[..., None, None] * B[:, None]
    return torch.where(real[..., None, None], found, 0.0)
