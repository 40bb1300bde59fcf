# SPDX-License-Identifier: Apache-2.0
"""EfficientLoFTR as a differentiable geometry operator for kornia."""

from typing import TYPE_CHECKING, Any

from eloftr_ops._version import __version__
from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.inference.cpu import stages as _cpu_stages  # noqa: F401 - registers how a CPU runs inference
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.types import Matches

if TYPE_CHECKING:
    from eloftr_ops.matching import ImageMatches, match_images

__all__ = [
    "EfficientLoFTR",
    "EfficientLoFTRConfig",
    "ImageMatches",
    "Matches",
    "__version__",
    "match_images",
]


def __getattr__(name: str) -> Any:
    """What reads images is loaded at its first use: the matcher alone needs none of it."""
    if name in ("ImageMatches", "match_images"):
        from eloftr_ops import matching

        return getattr(matching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
