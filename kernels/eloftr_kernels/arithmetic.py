# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that the references of several ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> Tensor:
    """``x`` in the dtype that sums of its products are kept in: float64 as it is, all others float32."""
    return x if x.dtype == torch.float64 else x.float()


def two_way_logsumexp(scores: Tensor, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Log-sum-exp of a matrix along both of its dimensions.

    Without gradient on a CPU both come from one exponential: with the row maxima :math:`m_i` and their maximum
    :math:`m`, the columns' sums are :math:`\sum_i e^{m_i - m} e^{s_{ij} - m_i}`, a product of a vector and a matrix.
    Where that underflows, a column far below the largest score, the columns are summed from their own maxima.
    Exponents that would underflow are raised to the least that do not: CPUs take tens of times longer over
    exponentials that vanish.

    Args:
        scores: (B, R, S). Sums of nothing are -inf.
        scratch: memory of the shape and dtype of ``scores`` to work in, for callers that have many matrices.

    Returns:
        Over the columns (B, R), and over the rows (B, S).
    """
    differentiable = torch.is_grad_enabled() and scores.requires_grad
    one_graph = torch.compiler.is_compiling()  # which a branch on values would break
    if scores.device.type != "cpu" or differentiable or one_graph or scores.numel() == 0:
        return torch.logsumexp(scores, 2), torch.logsumexp(scores, 1)
    limits = torch.finfo(scores.dtype)
    least = math.log(limits.tiny) + 7  # e^least is negligible beside 1, and still no denormal number
    top = scores.amax(2, keepdim=True)
    powers = torch.sub(scores, top, out=scratch).clamp_(min=least).exp_()
    over_columns = powers.sum(2).log_().add_(top[..., 0])
    highest = top.amax(1, keepdim=True)
    weights = (top - highest).clamp_(min=least).exp_()
    sums = (weights.mT @ powers)[:, 0]
    # What the raised exponents add must be below rounding.
    if bool((sums < scores.shape[1] * math.exp(least) / limits.eps).any()):
        highest = scores.amax(1, keepdim=True)
        sums = torch.sub(scores, highest, out=powers).clamp_(min=least).exp_().sum(1)
    return over_columns, sums.log_().add_(highest[:, 0])
