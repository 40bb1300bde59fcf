# SPDX-License-Identifier: Apache-2.0
"""A matcher for vismatch (formerly image-matching-models), which gives many matchers one interface.

    from eloftr_ops.integrations.vismatch import matcher_class

    matcher = matcher_class()(device="cpu", weights="small")
    result = matcher("left.jpg", "right.jpg")  # matched_kpts0, matched_kpts1, inlier_kpts0, H, ...

Convention:
    Keypoints are (x, y) in pixels of the images given to the matcher, the centre of pixel (x, y) at (x + 0.5, y + 0.5):
    the frame that vismatch's own wrappers of LoFTR and EfficientLoFTR give, and that its scaling by the ratio of the
    sizes supposes. ``H`` maps between these frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eloftr_ops.checks import MIN_SIZE
from eloftr_ops.integrations.common import PairMatcher, load_package

__all__ = ["matcher_class"]

_ADVICE = "Install it with: pip install vismatch"


def matcher_class() -> type[Any]:
    """The matcher, a class of vismatch's ``BaseMatcher``.

    Its arguments: ``device``, ``weights`` ("small", a file, a folder or a Hugging Face repository), ``threshold``
    (None: the weights' own), and those of the base class for its RANSAC. Images may have any size from 32 pixels;
    smaller ones give no match.

    Raises:
        ImportError: neither vismatch nor image-matching-models is installed.
    """
    try:
        base = load_package("vismatch", _ADVICE).BaseMatcher
        with_confidence = True
    except ImportError as missing:
        try:
            base = load_package("imm", _ADVICE).BaseMatcher  # its name before, without confidences
        except ImportError:
            raise missing from None
        with_confidence = False

    class EfficientLoFTRMatcher(base):  # type: ignore[misc, valid-type]
        def __init__(
            self, device: str = "cpu", weights: str = "small", threshold: float | None = None, **options: Any
        ) -> None:
            super().__init__(device, **options)
            self.matcher = PairMatcher(weights, threshold).to(device)

        def _forward(self, img0: Tensor, img1: Tensor) -> tuple[Tensor | None, ...]:
            """Two images (3 or 1, H, W) in [0, 1]; what vismatch expects of a method without a detector."""
            if min(*img0.shape[-2:], *img1.shape[-2:]) < MIN_SIZE:
                none = torch.zeros(0, 2)
                keypoints0, keypoints1, confidence = none, none, torch.zeros(0)
            else:
                with torch.inference_mode():
                    found = self.matcher({"image0": img0[None].float(), "image1": img1[None].float()})
                keypoints0, keypoints1, confidence = (
                    found[name] for name in ("keypoints0", "keypoints1", "confidence")
                )
            result: tuple[Tensor | None, ...] = (keypoints0, keypoints1, None, None, None, None)
            return (*result, confidence) if with_confidence else result

    return EfficientLoFTRMatcher
