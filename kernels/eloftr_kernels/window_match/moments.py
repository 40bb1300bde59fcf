# SPDX-License-Identifier: Apache-2.0
"""How sure the fine windows are: second moments of the probabilities that the matched pixels come from."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.window_match.cpu import CHUNK, CHUNK_CPU, pixel_log_joint, recomputed, windows
from eloftr_kernels.window_match.naive import RING, WINDOW, pixel_offsets, subpixel_offsets, subpixel_scores


class WindowMoments(NamedTuple):
    """Second moments (x, y), pixels squared: symmetric, positive semi-definite; with gradient to both maps."""

    pixel0: Tensor  # (M, 2, 2) of the pixel of image 0 about the matched one, given that of image 1
    pixel1: Tensor  # (M, 2, 2) of the pixel of image 1 about the matched one, given that of image 0
    subpixel1: Tensor  # (M, 2, 2) of the 3x3 neighbourhood about its expectation
    log_mass: Tensor  # (M,) logarithm of the sum of the joint probability: of how many pixels have a partner


def window_moments(
    map0: Tensor,  # (B, D, 4h, 4w) fused fine features at 1/2
    map1: Tensor,  # (B, D, 4h', 4w')
    batch: Tensor,  # (M,) int64
    cells0: Tensor,  # (M,) int64, row * w + column
    cells1: Tensor,  # (M,) int64
    pixel0: Tensor,  # (M, 2) matched pixel of image 0, as in WindowMatches
    pixel1: Tensor,  # (M, 2)
    subpixel_channels: int,
    subpixel_temperature: float,
    centred_subpixel: bool = False,
) -> WindowMoments:
    r"""Second moments of the distributions behind :func:`window_match`.

    With its joint probability :math:`p_{lr}` of the 64 x 64 pairs of pixels and the matched pair :math:`(l^*, r^*)`,

    .. math::
        S_1 = \sum_r (r - r^*)(r - r^*)^T \; p_{l^* r} / \sum_r p_{l^* r}, \qquad
        S_0 = \sum_l (l - l^*)(l - l^*)^T \; p_{l r^*} / \sum_l p_{l r^*},

    the covariance of the 3x3 softmax, and the logarithm of the sum of all :math:`p_{lr}`. Windows are worked off in
    chunks, each recomputed in the backward pass, by PyTorch's own operations on every device.

    Returns:
        As the fields say; float32, or float64 for float64 maps. No match gives empty tensors.
    """
    moments = partial(_moments, channels=subpixel_channels, temperature=subpixel_temperature, centred=centred_subpixel)
    chunk = CHUNK_CPU if map0.device.type == "cpu" else CHUNK
    if torch.compiler.is_compiling():  # loops would be written out
        chunk = max(1, len(batch))
    rows = (batch, cells0, cells1, _index(pixel0), _index(pixel1))
    parts = [
        recomputed(moments, map0, map1, *(x[start : start + chunk] for x in rows))
        for start in range(0, max(1, len(batch)), chunk)
    ]
    return WindowMoments(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _index(pixel: Tensor) -> Tensor:
    """(M, 2) offsets from the middle of a window -> (M,) int64, rows first."""
    column, row = (pixel.detach() + (WINDOW - 1) / 2).round().long().unbind(1)
    return row * WINDOW + column


def _moments(
    map0: Tensor,
    map1: Tensor,
    batch: Tensor,
    cells0: Tensor,
    cells1: Tensor,
    index0: Tensor,
    index1: Tensor,
    channels: int,
    temperature: float,
    centred: bool,
) -> WindowMoments:
    """One chunk of matches."""
    sizes = [map0.shape[1] - channels, channels]
    coarse0, sub0 = windows(map0, batch, cells0, ring=0).split(sizes, -1)
    coarse1, sub1 = windows(map1, batch, cells1, ring=RING).split(sizes, -1)
    log_joint = pixel_log_joint(coarse0, coarse1, map0.shape[1])
    match = torch.arange(len(batch), device=batch.device)
    scores = subpixel_scores(sub0, sub1, index0, index1, temperature, centred)
    with torch.autocast(log_joint.device.type, enabled=False):
        grid = pixel_offsets(log_joint)
        given0, given1 = log_joint[match, index0], log_joint[match, :, index1]
        offsets, probability = subpixel_offsets(scores), F.softmax(scores, 1)
        mean = (probability @ offsets)[:, None]
        return WindowMoments(
            _second_moment(F.softmax(given1, 1), grid - grid[index0, None]),
            _second_moment(F.softmax(given0, 1), grid - grid[index1, None]),
            _second_moment(probability, offsets - mean),
            log_joint.flatten(1).logsumexp(1),
        )


def _second_moment(probability: Tensor, offsets: Tensor) -> Tensor:
    """(M, P) and (M, P, 2) -> (M, 2, 2)."""
    moment: Tensor = (offsets * probability[..., None]).mT @ offsets
    return 0.5 * (moment + moment.mT)  # products may round the two entries differently
