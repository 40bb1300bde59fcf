# SPDX-License-Identifier: Apache-2.0
r"""Message upsampling, MLP and residual as a formula: documentation, oracle, and what exported graphs hold.

.. math:: x + \mathrm{LN}\bigl(W_2\,\mathrm{LeakyReLU}_{0.01}(W_1\,[x;\, \mathrm{up}_{4}(m)])\bigr)

with bilinear :math:`\mathrm{up}_4`, ``align_corners=False`` (EfficientLoFTR, section 3.2). With a mask, only messages
of valid tokens are interpolated. Their weights are normalised to one, which repeats the last valid token beyond it, as
a cropped map would. Masked cells of the result are zero.

Where :math:`W_1 x` rounds :math:`x`, in half precision or TF32, the first layer is computed as
:math:`W_1 (x - \bar x) + W_1 \bar x` with a common part :math:`\bar x` of all positions of a sample: features that have
much in common would lose to it the bits that tell them apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels import dispatch
from eloftr_kernels.aggregated_attention.naive import AGGREGATION, token_mask

LEAKY_SLOPE = 0.01


def common_part(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(B, C) what all positions of (B, C, H, W) have in common, exact in ``dtype``; None where nothing is rounded.

    Any vector would give the same result but for rounding, so it needs no gradient.
    """
    if not dispatch.rounds_below(x, dtype):
        return None
    return x.detach().mean((2, 3)).to(dtype)


class MlpWeights(NamedTuple):
    """The weights of the update; build it by name."""

    expand: Tensor  # (2C, 2C) first layer
    contract: Tensor  # (C, 2C) second layer
    norm: Tensor  # (C,) scale of the LayerNorm
    norm_bias: Tensor  # (C,)


def upsample_mlp(
    x: Tensor,  # (B, C, H, W)
    message: Tensor,  # (B, C, ceil(H/4), ceil(W/4))
    weights: MlpWeights,
    *,
    mask: Tensor | None = None,  # (B, H, W) bool
) -> Tensor:
    """The updated map (B, C, H, W)."""
    height, width = x.shape[-2:]
    if mask is not None:
        valid = token_mask(mask)[:, None].to(message.dtype)
        message = torch.cat([message * valid, valid], 1)
    up = F.interpolate(message, scale_factor=float(AGGREGATION), mode="bilinear", align_corners=False)
    up = up[..., :height, :width]
    if mask is not None:
        # A valid cell lies in a valid token, whose weight is at least (5/8)^2: the bound only guards masked cells.
        up = up[:, :-1] / up[:, -1:].clamp(min=0.25)
    common = common_part(x, dispatch.compute_dtype(x, weights.expand))
    if common is None:
        hidden = F.linear(torch.cat([x, up], 1).permute(0, 2, 3, 1), weights.expand)
    else:
        own = torch.cat([x - common[:, :, None, None], up.to(x.dtype)], 1)
        shift = F.linear(common.to(x.dtype), weights.expand[:, : x.shape[1]])
        hidden = F.linear(own.permute(0, 2, 3, 1), weights.expand) + shift[:, None, None]
    update = F.linear(F.leaky_relu(hidden, LEAKY_SLOPE), weights.contract)
    y = x + F.layer_norm(update, x.shape[1:2], weights.norm, weights.norm_bias).permute(0, 3, 1, 2)
    return y if mask is None else y * mask[:, None]
