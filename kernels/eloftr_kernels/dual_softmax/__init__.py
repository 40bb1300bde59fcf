# SPDX-License-Identifier: Apache-2.0
"""Streaming dual softmax: ``op.py`` holds the public functions, ``naive.py`` the formulas."""

from eloftr_kernels.dual_softmax.op import (
    dual_softmax_best,
    dual_softmax_lse,
    mutual_best,
    pair_scores,
    why_not,
)

__all__ = ["dual_softmax_best", "dual_softmax_lse", "mutual_best", "pair_scores", "why_not"]
