# SPDX-License-Identifier: Apache-2.0
"""Streaming dual softmax in plain PyTorch: the L x S matrix exists one block at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eloftr_kernels.arithmetic import Scratch, first_best, tie_margin, two_way_logsumexp, upcast_for_accumulation
from eloftr_kernels.dual_softmax.naive import MASKED

BLOCK_ELEMENTS = 1 << 22  # scores held at once: 16 MB in float32
BLOCK_COLUMNS = 1 << 13  # more of them leave a block too few rows for what a product reads


def dual_softmax_lse(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    mask0: Tensor | None = None,  # (B, L) bool
    mask1: Tensor | None = None,  # (B, S) bool
) -> tuple[Tensor, Tensor]:
    r"""Normalisers of the dual softmax (LoFTR, equation 3; EfficientLoFTR, section 3.3).

    As :func:`naive.dual_softmax_lse`, block by block. Accumulated in float32 (float64 for float64 input), also
    under autocast. The backward recomputes each block (:class:`_NormalisersFunction`), so memory is
    O(B (L + S) C) in both directions.

    Returns:
        ``row_lse`` (B, L) and ``col_lse`` (B, S). Masked rows and columns hold about -1e9.
    """
    features0, features1 = upcast_for_accumulation(features0), upcast_for_accumulation(features1)
    return _normalisers(features0, features1, temperature, mask0, mask1)


class _NormalisersFunction(torch.autograd.Function):
    r"""Both passes in blocks.

    With the slopes :math:`g` of the loss,

    .. math::
        g_{s_{ij}} = g_{r_i} e^{s_{ij} - r_i} + g_{c_j} e^{s_{ij} - c_j}, \qquad
        g_{f^0_i} = \tfrac{1}{\tau} \sum_j g_{s_{ij}} f^1_j, \qquad
        g_{f^1_j} = \tfrac{1}{\tau} \sum_i g_{s_{ij}} f^0_i,

    zero at masked pairs. Under ``create_graph`` the backward is recorded, so that second derivatives exist.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features0: Tensor,
        features1: Tensor,
        temperature: float,
        mask0: Tensor | None,
        mask1: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        row_lse = features0.new_full(features0.shape[:2], -torch.inf)
        col_lse = features1.new_full(features1.shape[:2], -torch.inf)
        held, scratch = block_memory(features0, features1), block_memory(features0, features1)
        with torch.autocast(features0.device.type, enabled=False):
            for block in score_blocks(features0, features1, temperature, mask0, mask1, held):
                add_block(row_lse, col_lse, block, scratch)
        ctx.temperature = temperature
        ctx.save_for_backward(features0, features1, mask0, mask1, row_lse, col_lse)
        return row_lse, col_lse

    @staticmethod
    def backward(ctx: Any, grad_row: Tensor, grad_col: Tensor) -> tuple[Tensor | None, ...]:
        features0, features1, mask0, mask1, row_lse, col_lse = ctx.saved_tensors
        recorded = torch.is_grad_enabled()
        held, scratch = [None if recorded else block_memory(features0, features1) for _ in range(2)]
        grad0, grad1 = torch.zeros_like(features0), torch.zeros_like(features1)
        with torch.autocast(features0.device.type, enabled=False):
            for rows, columns, scores, masked in score_blocks(
                features0, features1, ctx.temperature, mask0, mask1, held
            ):
                slopes = _slopes(
                    scores,
                    row_lse[:, rows, None],
                    col_lse[:, None, columns],
                    grad_row[:, rows, None],
                    grad_col[:, None, columns],
                    scratch,
                )
                if masked is not None:
                    slopes = slopes.masked_fill(masked, 0)
                grad0[:, rows] += slopes @ features1[:, columns]
                grad1[:, columns] += slopes.mT @ features0[:, rows]
        return grad0 / ctx.temperature, grad1 / ctx.temperature, None, None, None


_normalisers: Callable[..., tuple[Tensor, Tensor]] = _NormalisersFunction.apply


def _slopes(
    scores: Tensor,  # (B, R, S), overwritten where there is scratch
    row_lse: Tensor,  # (B, R, 1)
    col_lse: Tensor,  # (B, 1, S)
    grad_row: Tensor,  # (B, R, 1)
    grad_col: Tensor,  # (B, 1, S)
    scratch: Scratch | None,
) -> Tensor:
    """Derivative of the loss by the scores; without scratch a graph of it can be recorded."""
    if scratch is None:
        return grad_row * (scores - row_lse).exp() + grad_col * (scores - col_lse).exp()
    # Far below rounding, and far above where a product with the gradients or features would be denormal.
    least = math.log(torch.finfo(scores.dtype).tiny) / 2
    out = torch.sub(scores, row_lse, out=scratch.view(*scores.shape)).clamp_(min=least).exp_().mul_(grad_row)
    return out.addcmul_(scores.sub_(col_lse).clamp_(min=least).exp_(), grad_col)


@torch.no_grad()
def mutual_best(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    row_lse: Tensor | None = None,  # (B, L)
    col_lse: Tensor | None = None,  # (B, S)
    mask0: Tensor | None = None,  # (B, L) bool
    mask1: Tensor | None = None,  # (B, S) bool
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Best partner of every cell under the logarithm of the confidence, :math:`2 s_{ij} - r_i - c_j`.

    Without ``row_lse`` and ``col_lse`` the raw score :math:`s_{ij}` decides (*optimized* inference). Of scores that
    are equal but for rounding the lowest index wins (:func:`eloftr_kernels.arithmetic.first_best`). No gradient.

    Returns:
        ``best1`` (B, L) int64, ``best0`` (B, S) int64, and the highest score (B, L) of each cell of image 0.
    """
    features0, features1 = upcast_for_accumulation(features0), upcast_for_accumulation(features1)
    if 0 in (features0.shape[1], features1.shape[1]):
        best = [torch.zeros(f.shape[:2], dtype=torch.int64, device=f.device) for f in (features0, features1)]
        return best[0], best[1], features0.new_full(features0.shape[:2], -torch.inf)
    best1 = torch.zeros(features0.shape[:2], dtype=torch.int64, device=features0.device)
    best0 = torch.zeros(features1.shape[:2], dtype=torch.int64, device=features1.device)
    score1 = features0.new_full(features0.shape[:2], -torch.inf)
    score0 = features1.new_full(features1.shape[:2], -torch.inf)
    held = block_memory(features0, features1)
    with torch.autocast(features0.device.type, enabled=False):
        for rows, columns, scores, _ in score_blocks(features0, features1, temperature, mask0, mask1, held):
            if row_lse is not None and col_lse is not None:
                # Half of 2 s - r - c, doubled at the end: a pass less over the scores. They are those that the
                # normalisers were computed from, bit for bit, so that rounding cancels in large ones.
                scores = scores.sub_(row_lse[:, rows, None] / 2).sub_(col_lse[:, None, columns] / 2)
            large1 = None if row_lse is None else row_lse[:, rows]
            large0 = None if col_lse is None else col_lse[:, columns]
            _keep_better(score1[:, rows], best1[:, rows], *first_best(scores, 2, large1), columns.start, large1)
            _keep_better(score0[:, columns], best0[:, columns], *first_best(scores, 1, large0), rows.start, large0)
    return best1, best0, score1 if row_lse is None or col_lse is None else 2 * score1


def pair_scores(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    batch: Tensor,  # (M,) int64
    cells0: Tensor,  # (M,) int64
    cells1: Tensor,  # (M,) int64
    row_lse: Tensor | None = None,  # (B, L)
    col_lse: Tensor | None = None,  # (B, S)
) -> Tensor:
    r"""Log-confidence :math:`2 s_{ij} - r_i - c_j` of given pairs, or :math:`s_{ij}` without normalisers.

    Differentiable in the features and, through the normalisers, in every feature of the other image.

    Returns:
        (M,) float32, or float64 for float64 input.
    """
    a = upcast_for_accumulation(features0[batch, cells0])
    b = upcast_for_accumulation(features1[batch, cells1])
    score = (a * b).sum(-1) / temperature
    if row_lse is None or col_lse is None:
        return score
    return 2 * score - row_lse[batch, cells0] - col_lse[batch, cells1]


def add_block(row_lse: Tensor, col_lse: Tensor, block: Block, scratch: Scratch, top: Tensor | None = None) -> None:
    """Add what a block contributes, in place; ``top`` as for ``two_way_logsumexp``."""
    sums = two_way_logsumexp(block.scores, scratch.view(*block.scores.shape), top)
    for lse, where, part in ((row_lse, block.rows, sums[0]), (col_lse, block.columns, sums[1])):
        lse[:, where] = torch.logaddexp(lse[:, where], part)


def _keep_better(
    score: Tensor, best: Tensor, new_score: Tensor, new_best: Tensor, start: int, magnitude: Tensor | None
) -> None:
    """Replace, in place, what a later block improves on by more than rounding; its indices count from ``start``."""
    margin = tie_margin(new_score if magnitude is None else magnitude)
    best.copy_(torch.where(new_score > score + margin, new_best + start, best))
    torch.maximum(score, new_score, out=score)


class Block(NamedTuple):
    """A block of the matrix of scores."""

    rows: slice
    columns: slice
    scores: Tensor  # (B, R, K)
    masked: Tensor | None  # broadcasts to (B, R, K), True where either cell is invalid; None without masks


def score_blocks(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    mask0: Tensor | None,
    mask1: Tensor | None,
    memory: Scratch | None = None,
) -> Iterator[Block]:
    """The scores block by block, rows in the outer loop; in ``memory`` where no gradient is kept."""
    step, width = _block_size(features1)
    for start in range(0, max(1, features0.shape[1]), step):
        rows = slice(start, start + step)
        own = features0[:, rows] / temperature
        for left in range(0, max(1, features1.shape[1]), width):
            columns = slice(left, left + width)
            others = features1[:, columns]
            out = None if memory is None else memory.view(*own.shape[:2], others.shape[1])
            scores = torch.matmul(own, others.mT, out=out)
            masked = _masked(mask0, rows, mask1, columns)
            if masked is not None:
                scores = scores.masked_fill_(masked, MASKED)
            yield Block(rows, columns, scores, masked)


def _masked(mask0: Tensor | None, rows: slice, mask1: Tensor | None, columns: slice) -> Tensor | None:
    if mask0 is None:
        return None if mask1 is None else ~mask1[:, None, columns]
    invalid0 = ~mask0[:, rows, None]
    return invalid0 if mask1 is None else invalid0 | ~mask1[:, None, columns]


def _block_size(features1: Tensor) -> tuple[int, int]:
    """Rows and columns of a block."""
    columns = min(max(1, features1.shape[1]), BLOCK_COLUMNS)
    batch = 1 if torch.compiler.is_compiling() else max(1, features1.shape[0])  # a graph may leave it open
    rows = max(1, BLOCK_ELEMENTS // (batch * columns))
    return rows if rows < 64 else rows // 64 * 64, columns  # whole groups of first_reaching


def block_memory(features0: Tensor, features1: Tensor) -> Scratch:
    """For one block of scores."""
    rows, columns = _block_size(features1)
    return Scratch(features1.shape[0] * min(rows, features0.shape[1]) * columns, features0)
