# SPDX-License-Identifier: Apache-2.0
"""Window matches: ``op.py`` holds the public function, ``reference.py`` the formulas."""

from eloftr_kernels.window_match.op import why_not, window_match
from eloftr_kernels.window_match.reference import (
    WINDOW,
    WindowMatches,
    pixel_log_joint,
    pixel_offsets,
    subpixel_expectation,
    subpixel_offsets,
    subpixel_scores,
    windows,
)

__all__ = [
    "WINDOW",
    "WindowMatches",
    "pixel_log_joint",
    "pixel_offsets",
    "subpixel_expectation",
    "subpixel_offsets",
    "subpixel_scores",
    "why_not",
    "window_match",
    "windows",
]
