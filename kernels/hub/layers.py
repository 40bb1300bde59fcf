# SPDX-License-Identifier: Apache-2.0
"""Layers whose ``forward`` replaces that of a model's own layer (``kernels.kernelize``)."""

from __future__ import annotations

from torch import Tensor, nn

from eloftr_kernels.aggregated_attention.naive import AttentionWeights
from eloftr_kernels.aggregated_attention.op import aggregated_attention
from eloftr_kernels.upsample_mlp.naive import MlpWeights
from eloftr_kernels.upsample_mlp.op import upsample_mlp


class AggregatedAttention(nn.Module):
    """The attention layer of EfficientLoFTR (section 3.2): message, upsampling, MLP and residual."""

    has_backward: bool = True
    can_torch_compile: bool = True

    # Of the layer that takes this forward.
    num_heads: int
    aggregate: nn.Conv2d
    token_norm: nn.LayerNorm
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    merge: nn.Linear
    expand: nn.Linear
    contract: nn.Linear
    update_norm: nn.LayerNorm

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        rotary: Tensor | None = None,
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, C, h, w) and the map it attends to, (B, C, h', w'), -> (B, C, h, w). Masks (B, h, w) bool."""
        attention = AttentionWeights(
            aggregate=self.aggregate.weight,
            norm=self.token_norm.weight,
            norm_bias=self.token_norm.bias,
            q=self.q_proj.weight,
            k=self.k_proj.weight,
            v=self.v_proj.weight,
            merge=self.merge.weight,
        )
        message = aggregated_attention(
            x,
            source,
            attention,
            num_heads=self.num_heads,
            rotary=rotary,
            mask=mask,
            source_mask=source_mask,
        )
        mlp = MlpWeights(
            expand=self.expand.weight,
            contract=self.contract.weight,
            norm=self.update_norm.weight,
            norm_bias=self.update_norm.bias,
        )
        return upsample_mlp(x, message, mlp, mask=mask)
