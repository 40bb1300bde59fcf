# SPDX-License-Identifier: Apache-2.0
"""RepVGG backbone: a gray image becomes maps at 1/2, 1/4 and 1/8 of its resolution.

Training uses three branches per block (3x3, 1x1, identity, each with BatchNorm); inference folds them into one 3x3
convolution (Ding et al., CVPR 2021, "RepVGG", section 3.3; used by EfficientLoFTR, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.model.stages import stage

STAGE_STRIDES = (2, 1, 2, 2)


class ConvBatchNorm(nn.Module):
    """Convolution without bias, then BatchNorm."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        # A strided 1x1 convolution reads every stride-th position only: picking them first gives the same values and
        # avoids oneDNN's backward of it on channels-last input, which corrupts memory at some sizes (torch 2.13).
        self.pre_stride = stride if kernel_size == 1 else 1
        self.conv = nn.Conv2d(
            channels_in,
            channels_out,
            kernel_size,
            stride // self.pre_stride,
            padding=kernel_size // 2,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        return self.bn(self.conv(x[..., :: self.pre_stride, :: self.pre_stride]))  # type: ignore[no-any-return]


class RepVGGBlock(nn.Module):
    """ReLU of the sum of three branches, or of the one convolution they fold into."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, *, fused: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.channels_in = channels_in
        if fused:
            self.fused: nn.Conv2d | None = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)
            return
        self.fused = None
        self.conv3x3 = ConvBatchNorm(channels_in, channels_out, 3, stride)
        self.conv1x1 = ConvBatchNorm(channels_in, channels_out, 1, stride)
        self.identity = nn.BatchNorm2d(channels_in) if channels_in == channels_out and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        if self.fused is not None:
            return F.relu(self.fused(x), inplace=True)
        y = self.conv3x3(x).add_(self.conv1x1(x))
        return F.relu(y if self.identity is None else y.add_(self.identity(x)), inplace=True)

    @torch.no_grad()
    def to_fused(self) -> RepVGGBlock:
        """A new block with the three branches folded into one convolution; itself if already folded."""
        if self.fused is not None:
            return self
        weight, bias = fold_batch_norm(self.conv3x3.conv.weight, self.conv3x3.bn)
        weight1, bias1 = fold_batch_norm(self.conv1x1.conv.weight, self.conv1x1.bn)
        weight, bias = weight + F.pad(weight1, (1, 1, 1, 1)), bias + bias1
        if self.identity is not None:
            delta = torch.eye(self.channels_in, dtype=weight.dtype, device=weight.device)[..., None, None]
            weight_id, bias_id = fold_batch_norm(delta, self.identity)
            weight, bias = weight + F.pad(weight_id, (1, 1, 1, 1)), bias + bias_id
        block = RepVGGBlock(self.channels_in, weight.shape[0], self.stride, fused=True)
        block.to(weight).train(self.training)
        block.load_state_dict({"fused.weight": weight, "fused.bias": bias})
        return block


class RepVGG(nn.Module):
    """The four stages; see the module's docstring."""

    def __init__(self, config: EfficientLoFTRConfig, *, fused: bool = False) -> None:
        super().__init__()
        self.widths = config.stage_channels
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    RepVGGBlock(*widths, stride if i == 0 else 1, fused=fused)
                    for i, widths in enumerate(_block_widths(channels_in, channels, blocks))
                )
            )
            for channels_in, channels, blocks, stride in zip(
                (1, *config.stage_channels),
                config.stage_channels,
                config.stage_blocks,
                STAGE_STRIDES,
                strict=False,
            )
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1, H, W), H and W multiples of 8 -> maps (B, C_k, ...) at 1/2, 1/4, 1/8, channels last in memory.

        Every stride-2 convolution is centred on the even positions: cell (column, row) of the map at 1/s sits on
        pixel (s column, s row).
        """
        half = self.to_half(image)
        quarter = self.stages[2](half)
        return half, quarter, self.stages[3](quarter)

    @stage
    def to_half(self, image: Tensor) -> Tensor:
        """The first two stages: (B, 1, H, W) -> (B, C1, H / 2, W / 2)."""
        # A one-channel image counts as channels-last too: state its layout instead of leaving it to strides.
        x = image.contiguous(memory_format=torch.contiguous_format)
        # A gray value needs the bits that bfloat16 lacks: the one layer that reads them keeps them under autocast too.
        with torch.autocast(x.device.type, enabled=False):
            x = self.stages[0](x).contiguous(memory_format=torch.channels_last)
        return self.stages[1](x)  # type: ignore[no-any-return]

    def fuse_(self) -> None:
        """Fold every block in place, for inference."""
        for module in self.modules():
            if isinstance(module, nn.Sequential):
                for i, block in enumerate(module):
                    module[i] = block.to_fused() if isinstance(block, RepVGGBlock) else block


def fold_batch_norm(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals ``bn(conv(x, weight))`` in evaluation mode."""
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn: expected a BatchNorm2d with running statistics, got one without them.")
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale


def _block_widths(channels_in: int, channels: int, blocks: int) -> Iterator[tuple[int, int]]:
    yield channels_in, channels
    for _ in range(blocks - 1):
        yield channels, channels
