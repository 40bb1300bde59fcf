# SPDX-License-Identifier: Apache-2.0
"""What the adapters of matching toolboxes share."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from eloftr_ops.errors import ArgumentError
from eloftr_ops.model.matcher import EfficientLoFTR

__all__ = ["PairMatcher", "load_package", "most_confident", "to_gray"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


class PairMatcher(nn.Module):
    """The matcher with weights by name, and a threshold of the toolbox's configuration.

    Args:
        weights: "small" (embedded), a file, a folder or a Hugging Face repository.
        threshold: least confidence of a match; None: the weights' own.

    Raises:
        ArgumentError: weights that cannot be loaded, or a threshold that cannot be.
    """

    def __init__(self, weights: str, threshold: float | None = None) -> None:
        super().__init__()
        try:
            self.matcher = EfficientLoFTR.from_pretrained(weights)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            raise ArgumentError("weights", f"{weights}: {error}") from error
        if threshold is not None:
            try:
                self.matcher.config = self.matcher.config.replace(threshold=threshold)
            except ValueError as error:
                raise ArgumentError("threshold", str(error).removeprefix("threshold: ")) from error
        self.eval()

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `EfficientLoFTR.forward`: kornia LoFTR's dictionaries, colour images included."""
        gray = {key: to_gray(value) if key.startswith("image") else value for key, value in data.items()}
        found: dict[str, Tensor] = self.matcher(gray)
        return found


def to_gray(images: Tensor) -> Tensor:
    """(B, 1, H, W) from gray or RGB, (B, 1 or 3, H, W); ITU-R 601 luma, as OpenCV and kornia. Differentiable."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ArgumentError("image", f"expected (B, 1, H, W) or (B, 3, H, W), got {tuple(images.shape)}.")
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor(_LUMA)[:, None, None]
    return (images * weights).sum(dim=1, keepdim=True)


def most_confident(confidence: Tensor, count: int | None) -> Tensor:
    """Indexes of so many matches, the most confident, in their order; of all without a count."""
    if count is None or len(confidence) <= count:
        return torch.arange(len(confidence), device=confidence.device)
    return confidence.argsort(descending=True, stable=True)[:count].sort().values


def load_package(name: str, advice: str) -> ModuleType | Any:
    """A module of a toolbox.

    Raises:
        ImportError: the toolbox is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported: {error}. {advice}") from error
