# SPDX-License-Identifier: Apache-2.0
"""Supervised matching losses at true pairs (EfficientLoFTR, section 3.5), in memory linear in the cells.

Nothing here looks at the (L, S) matrix: the confidence of true pairs comes from the streaming log-sum-exps, the
windows are those of a sample of true pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels import pair_scores
from eloftr_kernels.window_match import pixel_log_joint, subpixel_offsets, subpixel_scores, windows
from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.types import CoarsePairs, CoarseScores, WindowTargets

Reduction = Literal["mean", "sum", "none"]


class MatchingLosses(NamedTuple):
    """Scalars; each is zero, with zero gradient, where the batch has no true pair."""

    coarse: Tensor  # focal loss of the dual-softmax confidence at true pairs
    pixel: Tensor  # negative log-likelihood of the true pixel pairs in their windows
    subpixel: Tensor  # of the 3x3 expectation, see window_losses


def coarse_focal_loss(
    scores: CoarseScores,
    pairs: CoarsePairs,
    config: EfficientLoFTRConfig,
    *,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    r""":math:`-(1 - c)^\gamma \log c` at the M true pairs, c their dual-softmax confidence.

    Evaluated from :math:`\log c`, so value and gradient stay finite at c = 0 and c = 1. No pair: zero.

    Args:
        scores: of the matcher.
        pairs: the true pairs.
        config: temperature.
        gamma: of the focal loss.
        reduction: "mean" and "sum" over the pairs give scalars, "none" gives (M,).

    Returns:
        The loss, and c (without gradient) to watch, reduced alike.

    Raises:
        ValueError: unknown reduction.
    """
    log_confidence = pair_scores(
        scores.features0,
        scores.features1,
        config.temperature,
        *pairs,
        scores.row_lse,
        scores.col_lse,
    ).clamp(max=0)  # rounding can put a certain pair above probability one
    weight = (-torch.expm1(log_confidence)).pow(gamma)
    return _reduced(-weight * log_confidence, reduction), _reduced(log_confidence.detach().exp(), reduction)


def window_losses(
    fine0: Tensor,
    fine1: Tensor,
    pairs: CoarsePairs,
    targets: WindowTargets,
    config: EfficientLoFTRConfig,
    *,
    divergence: float = 0.0,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    r"""Pixel-level and sub-pixel loss in the windows of true pairs.

    The sub-pixel loss is the squared distance of the 3x3 expectation from the true offset, and ``divergence`` times
    :func:`subpixel_divergence`.

    Args:
        fine0: (B, D, 4h0, 4w0) fused fine map.
        fine1: (B, D, 4h1, 4w1).
        pairs: the M cell pairs whose windows are looked at.
        targets: (M, 64) true pixel of image 1 for each window pixel of image 0, and the offset left over.
        config: channel split and temperatures.
        divergence: weight of the divergence.
        reduction: "mean" and "sum" over the N visible targets give scalars, "none" gives (N,).

    Returns:
        The two losses; as scalars zero where there is no target.

    Raises:
        ValueError: unknown reduction.
    """
    channels, kept = fine0.shape[1], config.subpixel_channels
    windows0 = windows(fine0, pairs.batch, pairs.cells0, ring=0)
    windows1 = windows(fine1, pairs.batch, pairs.cells1, ring=1)
    log_joint = pixel_log_joint(windows0[..., :-kept], windows1[..., :-kept], channels)
    match, pixel0 = targets.visible.nonzero(as_tuple=True)
    pixel1, offset = targets.pixels1[match, pixel0], targets.offsets[match, pixel0]
    pixel = _reduced(-log_joint[match, pixel0, pixel1], reduction)
    scores = subpixel_scores(
        windows0[..., -kept:],
        windows1[..., -kept:],
        pixel0,
        pixel1,
        config.subpixel_temperature,
        config.centred_subpixel,
        match,
    )
    with torch.autocast(scores.device.type, enabled=False):
        expected = F.softmax(scores, 1) @ subpixel_offsets(scores)
    subpixel = (expected - offset).square().sum(-1)
    if divergence:
        subpixel = subpixel + divergence * subpixel_divergence(scores, offset)
    return pixel, _reduced(subpixel, reduction)


def subpixel_divergence(scores: Tensor, offsets: Tensor) -> Tensor:
    r""":math:`\mathrm{KL}(w(o) \,\|\, \mathrm{softmax}(s))` of 3x3 scores from the bilinear weights of offsets.

    The weights :math:`w(o)` are those of bilinear interpolation at :math:`o`; their expectation is :math:`o`. The
    squared distance fixes only the mean of the distribution; the divergence fixes its shape, too.

    Convention:
        Rows first, offsets (x, y) in pixels from the centre of the neighbourhood.

    Gradient:
        To the scores, :math:`\mathrm{softmax}(s) - w(o)`: bounded, and zero at the minimum, which is zero. None to the
        offsets.

    Args:
        scores: (N, 9) before the softmax.
        offsets: (N, 2) within [-1, 1].

    Returns:
        (N,), in the dtype of ``scores``.
    """
    target = _bilinear_weights(offsets.detach()).to(scores)
    return F.kl_div(F.log_softmax(scores, 1), target, reduction="none").sum(1)


def _bilinear_weights(offsets: Tensor) -> Tensor:
    """(N, 2) offsets (x, y) within a pixel -> (N, 9) weights of the 3x3 neighbourhood, rows first."""
    steps = torch.arange(-1, 2, device=offsets.device, dtype=offsets.dtype)
    across, down = (1 - (offsets[..., None] - steps).abs()).clamp(min=0).unbind(1)
    return (down[:, :, None] * across[:, None]).flatten(1)


def _reduced(x: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return x
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}.")
    return x.sum() / (max(1, x.numel()) if reduction == "mean" else 1)
