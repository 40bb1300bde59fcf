# SPDX-License-Identifier: Apache-2.0
"""Fused kernels of EfficientLoFTR with PyTorch references; torch only at import, usable without ``eloftr_ops``.

Three functions have the name of the folder that holds them, and hide it as an attribute: the modules in there
are had by ``from eloftr_kernels.window_match import op``, not by ``import eloftr_kernels.window_match.op as op``.
"""

from eloftr_kernels.aggregated_attention.naive import AttentionWeights
from eloftr_kernels.aggregated_attention.op import aggregated_attention
from eloftr_kernels.dispatch import backend
from eloftr_kernels.dual_softmax.op import dual_softmax_best, dual_softmax_lse, mutual_best, pair_scores
from eloftr_kernels.upsample_mlp.naive import MlpWeights
from eloftr_kernels.upsample_mlp.op import upsample_mlp
from eloftr_kernels.window_match import WindowMatches, window_match

__all__ = [
    "AttentionWeights",
    "MlpWeights",
    "WindowMatches",
    "aggregated_attention",
    "backend",
    "dual_softmax_best",
    "dual_softmax_lse",
    "mutual_best",
    "pair_scores",
    "upsample_mlp",
    "window_match",
]
