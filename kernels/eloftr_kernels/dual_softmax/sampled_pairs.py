# SPDX-License-Identifier: Apache-2.0
"""Pairs of cells drawn from the dual softmax, without the (L, S) matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from eloftr_kernels.arithmetic import upcast_for_accumulation
from eloftr_kernels.dual_softmax.cpu import block_memory, score_blocks
from eloftr_kernels.noise import counters, gumbel, keys


@torch.no_grad()
def sample_pairs(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    row_lse: Tensor,  # (B, L)
    col_lse: Tensor,  # (B, S)
    mask0: Tensor | None = None,  # (B, L) bool
    mask1: Tensor | None = None,  # (B, S) bool
    *,
    seeds: Tensor,  # (B,) int64
    draws: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Draw ``count`` pairs of cells without replacement, in proportion to :math:`P_{ij}`, ``draws`` times.

    Gumbel top-k (Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them", ICML 2019): the largest values
    of :math:`\log P_{ij} + g_{ij}` with independent standard Gumbel numbers. The matrix exists one block at a time,
    and each block leaves its largest values. Memory is that of one block and O(B (L + S) C + B D K).

    Convention:
        The draws are independent of each other. Pairs come in the order in which they would be drawn one after the
        other. The result of a pair of images depends on its own seed, not on the batch. Plain PyTorch, on every device.

    Returns:
        ``cells0`` and ``cells1``, (B, D, K) int64, and ``valid`` (B, D, K): False, with cells (0, 0), where fewer
        than K pairs of cells can be drawn.
    """
    features0, features1 = upcast_for_accumulation(features0), upcast_for_accumulation(features1)
    batch, width = features0.shape[0], features1.shape[1]
    best = features0.new_full((batch, draws, count), -torch.inf)
    index = torch.zeros(best.shape, dtype=torch.int64, device=best.device)
    memory = block_memory(features0, features1)
    with torch.autocast(features0.device.type, enabled=False):
        for rows, columns, scores, masked in score_blocks(features0, features1, temperature, mask0, mask1, memory):
            half = scores.sub_(row_lse[:, rows, None] / 2).sub_(col_lse[:, None, columns] / 2)
            if masked is not None:
                half = half.masked_fill_(masked, -torch.inf)
            across = counters(columns.start, half.shape[2], half.device)
            down = torch.arange(rows.start, rows.start + half.shape[1], device=half.device)
            for draw in range(draws):
                noise = gumbel(keys(keys(seeds, draw)[:, None].long(), down)[..., None], across)
                value, where = torch.add(noise, half, alpha=2).flatten(1).topk(min(count, half[0].numel()), 1)
                row = where // half.shape[2] + rows.start
                found = row * width + where % half.shape[2] + columns.start
                _keep_largest(best[:, draw], index[:, draw], value, found)
    valid = best > -torch.inf
    index = index * valid
    return index // max(1, width), index % max(1, width), valid


def _keep_largest(best: Tensor, index: Tensor, value: Tensor, found: Tensor) -> None:
    """Replace, in place, (B, K) values and what they belong to by the K largest of them and the new ones."""
    value, order = torch.cat([best, value], 1).topk(best.shape[1], 1)
    best.copy_(value)
    index.copy_(torch.cat([index, found], 1).gather(1, order))
