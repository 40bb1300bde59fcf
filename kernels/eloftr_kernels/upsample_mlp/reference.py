# SPDX-License-Identifier: Apache-2.0
"""Message upsampling, MLP and residual in plain PyTorch: the formula and the CPU path."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels.aggregated_attention.reference import AGGREGATION, token_mask

LEAKY_SLOPE = 0.01


def upsample_mlp(
    x: Tensor,  # (B, C, H, W)
    message: Tensor,  # (B, C, ceil(H/4), ceil(W/4))
    expand_weight: Tensor,  # (2C, 2C)
    contract_weight: Tensor,  # (C, 2C)
    norm_weight: Tensor,  # (C,)
    norm_bias: Tensor,  # (C,)
    mask: Tensor | None = None,  # (B, H, W) bool
) -> Tensor:
    r"""Update the coarse map with the message (EfficientLoFTR, section 3.2).

    .. math:: x + \mathrm{LN}\bigl(W_2\,\mathrm{LeakyReLU}_{0.01}(W_1\,[x;\, \mathrm{up}_{4}(m)])\bigr)

    with bilinear :math:`\mathrm{up}_4` (``align_corners=False``). Upsampling commutes with the linear map, so the
    message's half of :math:`W_1` is applied before it, on a sixteenth of the positions.

    With a mask, only messages of valid tokens are interpolated (their weights normalised to one, which repeats the
    last valid token beyond it as a cropped map would), and masked cells of the result are zero.

    Returns:
        (B, C, H, W), channels last in memory, dtype of ``x``.
    """
    channels, (height, width) = x.shape[1], x.shape[-2:]
    expand_x, expand_message = expand_weight.split(channels, dim=1)
    hidden_message = F.linear(message.permute(0, 2, 3, 1), expand_message).permute(0, 3, 1, 2)
    hidden_message = _upsample(hidden_message, height, width, mask)
    tokens = x.permute(0, 2, 3, 1)
    # In place where no backward asks for what is overwritten: fresh memory costs a CPU more than the arithmetic.
    hidden = F.linear(tokens, expand_x).add_(hidden_message.permute(0, 2, 3, 1))
    update = F.linear(F.leaky_relu(hidden, LEAKY_SLOPE, inplace=True), contract_weight)
    update = F.layer_norm(update, (channels,), norm_weight, norm_bias)
    y = (tokens + update).permute(0, 3, 1, 2)
    return y if mask is None else y * mask[:, None]


def _upsample(x: Tensor, height: int, width: int, mask: Tensor | None) -> Tensor:
    if mask is not None:
        valid = token_mask(mask)[:, None].to(x.dtype)
        share = _bilinear(valid, height, width)
        # A valid cell lies in a valid token, whose weight is at least (5/8)^2: the bound only guards masked cells.
        return _bilinear(x * valid, height, width) / share.clamp(min=0.25)
    return _bilinear(x, height, width)


def _bilinear(x: Tensor, height: int, width: int) -> Tensor:
    y = F.interpolate(x, scale_factor=float(AGGREGATION), mode="bilinear", align_corners=False)
    return y[..., :height, :width]
