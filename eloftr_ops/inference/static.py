# SPDX-License-Identifier: Apache-2.0
"""One module with fixed shapes around ``match_static``: what exports and CUDA graphs take."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from eloftr_kernels import backend
from eloftr_ops.inference.optimized import InferenceMatcher
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.types import StaticMatches

OUTPUT_NAMES = StaticMatches._fields


class StaticMatcher(nn.Module):
    """Images and masks in, the fields of :class:`~eloftr_ops.types.StaticMatches` out, without gradient.

    Backbone branches and BatchNorms are folded. The weights are a copy.

    Args:
        matcher: where the weights come from; no copy of ``optimize_for_inference``.
        max_matches: rows per pair.
        masks: the call takes ``mask0`` and ``mask1`` too.
        dtype: float32, or float16 for the wide convolutions. The transformer and the scores stay in float32, since
            they decide which cells match.

    Raises:
        TypeError: ``matcher`` is optimized for inference already.
        ValueError: another dtype.
    """

    def __init__(
        self,
        matcher: EfficientLoFTR,
        *,
        max_matches: int,
        masks: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if isinstance(matcher, InferenceMatcher):
            raise TypeError(
                "matcher: expected a plain EfficientLoFTR, got a copy optimized for inference. "
                "Pass the matcher that it was made from."
            )
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype: expected torch.float32 or torch.float16, got {dtype}.")
        reduced = None if dtype is torch.float32 else dtype
        plain = copy.deepcopy(matcher).cpu().float()
        self.matcher = InferenceMatcher(plain, dtype=reduced, mixed=True, winograd=False)
        self.max_matches, self.masks = max_matches, masks

    def forward(
        self, image0: Tensor, image1: Tensor, mask0: Tensor | None = None, mask1: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 1, H0, W0), (B, 1, H1, W1) float32 in [0, 1] -> B * K rows; ``hard`` keypoints."""
        keypoints0, keypoints1, confidence, valid = self.matcher.match_static(
            image0, image1, mask0, mask1, max_matches=self.max_matches, mode="hard"
        )
        # A plain tuple: a program that loads the graph does not have our classes.
        return (keypoints0, keypoints1, confidence, valid)


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """No gradient, and PyTorch's own operations: what leaves Python knows no kernel of this project."""
    with torch.no_grad(), backend("reference"):
        yield
