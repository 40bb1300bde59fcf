# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that the references of several ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Roundings between scores that are equal: some are made in the scores themselves, more in the features before them.
TIE = 8


def upcast_for_accumulation(x: Tensor) -> Tensor:
    """``x`` in the dtype that sums of its products are kept in: float64 as it is, all others float32."""
    return x if x.dtype == torch.float64 else x.float()


class Scratch:
    """Memory that the pieces of one computation share: fresh memory costs a CPU more than what is computed into it.

    Args:
        elements: that the largest piece needs.
        like: whose dtype and device it has.
    """

    def __init__(self, elements: int, like: Tensor) -> None:
        self._memory = like.new_empty(elements)

    def view(self, *shape: int) -> Tensor:
        """The beginning of it, in this shape, holding whatever was left there."""
        return self._memory[: math.prod(shape)].view(shape)


def tie_margin(magnitude: Tensor) -> Tensor:
    """How far below the best score another is its equal: ``TIE`` roundings of numbers of this magnitude."""
    return magnitude.abs() * (TIE * torch.finfo(magnitude.dtype).eps)


def first_best(x: Tensor, dim: int, magnitude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest values along ``dim`` and the index of the first that is equal to them, but for rounding; no gradient.

    Scores that are equal in theory differ by what the order of summation leaves of them. So all that are within
    :func:`tie_margin` of the largest are ties, and the lowest index wins, whoever computed the scores.

    Args:
        x: scores.
        dim: along which.
        magnitude: of what ``x`` was computed from, in the shape of the result; default: of the largest value.
    """
    x = x.detach()
    values = x.amax(dim)
    return values, first_reaching(x, values - tie_margin(values if magnitude is None else magnitude), dim)


def first_reaching(x: Tensor, least: Tensor, dim: int) -> Tensor:
    """Index of the first value along ``dim`` that is at least ``least``, which has no such dimension; 0 without any.

    A CPU finds maxima much sooner than where they are. Where the size allows it, groups of up to 64 are reduced first,
    and only the first group that has such a value is searched.
    """
    dim %= x.ndim
    least = least.unsqueeze(dim)
    group = 1 if torch.compiler.is_compiling() else math.gcd(x.shape[dim], 64)
    if x.device.type != "cpu" or group < 32:
        return (x >= least).int().argmax(dim)  # which promises the first
    groups = x.unflatten(dim, (-1, group))
    winner = (groups.amax(dim + 1) >= least).int().argmax(dim, keepdim=True).unsqueeze(dim + 1)
    shape = [*groups.shape]
    shape[dim] = 1
    within = (groups.gather(dim, winner.expand(shape)).squeeze(dim) >= least).int().argmax(dim)
    found: Tensor = winner.squeeze(dim + 1).squeeze(dim) * group + within
    return found


def two_way_logsumexp(
    scores: Tensor, scratch: Tensor | None = None, top: Tensor | None = None, bound: float = math.inf
) -> tuple[Tensor, Tensor]:
    r"""Log-sum-exp of a matrix along both of its dimensions.

    Without gradient on a CPU both come from one exponential: with the row maxima :math:`m_i` and their maximum
    :math:`m`, the columns' sums are :math:`\sum_i e^{m_i - m} e^{s_{ij} - m_i}`, a product of a vector and a matrix.
    Where that underflows, a column far below the largest score, the columns are summed from their own maxima.
    Exponents that would underflow are raised to the least that do not, and the vector is scaled up so that no product
    does: CPUs take tens of times longer over numbers that vanish. Scores that are known to be small need none of this.

    Args:
        scores: (B, R, S). Sums of nothing are -inf.
        scratch: memory of the shape and dtype of ``scores`` to work in, for callers that have many matrices.
        top: (B, R, 1) the rows' maxima, for callers that know them.
        bound: of the magnitude of all scores, for callers that know one.

    Returns:
        Over the columns (B, R), and over the rows (B, S).
    """
    differentiable = torch.is_grad_enabled() and scores.requires_grad
    one_graph = torch.compiler.is_compiling()  # which a branch on values would break
    if scores.device.type != "cpu" or differentiable or one_graph or scores.numel() == 0:
        return torch.logsumexp(scores, 2), torch.logsumexp(scores, 1)
    limits = torch.finfo(scores.dtype)
    if bound < math.log(limits.max) - 2 - math.log(max(scores.shape[1:])):
        powers = torch.exp(scores, out=scratch)
        return powers.sum(2).log_(), powers.sum(1).log_()
    least = math.log(limits.tiny) + 7  # e^least is negligible beside 1, and still no denormal number
    top = scores.amax(2, keepdim=True) if top is None else top
    powers = torch.sub(scores, top, out=scratch).clamp_(min=least).exp_()
    over_columns = powers.sum(2).log_().add_(top[..., 0])
    highest = top.amax(1, keepdim=True)
    scale = 2.0 ** math.floor(-(least + 6) / math.log(2))  # exact; the least product is above limits.tiny
    weights = (top - highest).clamp_(min=least).exp_().mul_(scale)
    sums = (weights.mT @ powers)[:, 0].div_(scale)
    # What the raised exponents add must be below rounding.
    if bool((sums < scores.shape[1] * math.exp(least) / limits.eps).any()):
        highest = scores.amax(1, keepdim=True)
        sums = torch.sub(scores, highest, out=powers).clamp_(min=least).exp_().sum(1)
    return over_columns, sums.log_().add_(highest[:, 0])
