# SPDX-License-Identifier: Apache-2.0
"""Fused kernels of EfficientLoFTR with PyTorch references; torch only at import, usable without ``eloftr_ops``."""

from eloftr_kernels.aggregated_attention.op import aggregated_attention
from eloftr_kernels.dispatch import backend
from eloftr_kernels.dual_softmax.op import dual_softmax_lse, mutual_best, pair_scores
from eloftr_kernels.upsample_mlp.op import upsample_mlp
from eloftr_kernels.window_match import WindowMatches, window_match

__all__ = [
    "WindowMatches",
    "aggregated_attention",
    "backend",
    "dual_softmax_lse",
    "mutual_best",
    "pair_scores",
    "upsample_mlp",
    "window_match",
]
