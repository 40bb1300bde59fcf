# SPDX-License-Identifier: Apache-2.0
r"""Dual softmax as a formula, with the whole (L, S) matrix: documentation, oracle, and what exported graphs hold.

With scores :math:`s_{ij} = \langle f^0_i, f^1_j\rangle / \tau`, minus 1e9 where a cell is masked,

.. math:: r_i = \log\sum_j e^{s_{ij}}, \qquad c_j = \log\sum_i e^{s_{ij}}, \qquad
    \log P_{ij} = 2 s_{ij} - r_i - c_j

(LoFTR, equation 3; EfficientLoFTR, section 3.3). Every function is differentiable by autograd, in any dtype.
"""

from __future__ import annotations

from torch import Tensor

from eloftr_kernels.arithmetic import first_best

MASKED = -1e9  # the score of a pair with a masked cell: finite, so that no softmax is empty


def dense_scores(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    mask0: Tensor | None = None,  # (B, L) bool
    mask1: Tensor | None = None,  # (B, S) bool
) -> Tensor:
    """(B, L, S) scores."""
    scores = (features0 / temperature) @ features1.mT
    if mask0 is not None:
        scores = scores.masked_fill(~mask0[:, :, None], MASKED)
    if mask1 is not None:
        scores = scores.masked_fill(~mask1[:, None, :], MASKED)
    return scores


def dual_softmax_lse(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    mask0: Tensor | None = None,
    mask1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalisers :math:`r` (B, L) and :math:`c` (B, S)."""
    scores = dense_scores(features0, features1, temperature, mask0, mask1)
    return _logsumexp(scores, 2), _logsumexp(scores, 1)


def mutual_best(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    row_lse: Tensor | None = None,  # (B, L)
    col_lse: Tensor | None = None,  # (B, S)
    mask0: Tensor | None = None,
    mask1: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (B, L) and (B, S) of the best partners under log P, or under s without normalisers; scores (B, L).

    Of scores that are equal but for rounding the lowest index wins.
    """
    scores = dense_scores(features0, features1, temperature, mask0, mask1).detach()
    if row_lse is not None and col_lse is not None:
        # Twice the half: large scores and normalisers cancel before anything is doubled.
        scores = 2 * (scores - row_lse[:, :, None] / 2 - col_lse[:, None, :] / 2)
    best, index0 = first_best(scores, 2, None if row_lse is None else 2 * row_lse)
    return index0, first_best(scores, 1, None if col_lse is None else 2 * col_lse)[1], best


def _logsumexp(scores: Tensor, dim: int) -> Tensor:
    """The maximum is taken out by hand: not every runtime of exported graphs does that in its own log-sum-exp."""
    top = scores.detach().amax(dim, keepdim=True)
    return (scores - top).exp().sum(dim).log() + top.squeeze(dim)
