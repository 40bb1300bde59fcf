# SPDX-License-Identifier: Apache-2.0
"""EfficientLoFTR as a differentiable geometry operator for kornia."""

from eloftr_ops._version import __version__
from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.inference.cpu import stages as _cpu_stages  # noqa: F401 - registers how a CPU runs inference
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.types import Matches

__all__ = ["EfficientLoFTR", "EfficientLoFTRConfig", "Matches", "__version__"]
