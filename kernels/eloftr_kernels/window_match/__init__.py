# SPDX-License-Identifier: Apache-2.0
"""Window matches: ``op.py`` holds the public function, ``naive.py`` the formulas."""

from eloftr_kernels.window_match.cpu import pixel_log_joint, windows
from eloftr_kernels.window_match.moments import WindowMoments, window_moments
from eloftr_kernels.window_match.naive import (
    WINDOW,
    WindowMatches,
    pixel_offsets,
    subpixel_expectation,
    subpixel_offsets,
    subpixel_scores,
)
from eloftr_kernels.window_match.op import why_not, window_match

__all__ = [
    "WINDOW",
    "WindowMatches",
    "WindowMoments",
    "pixel_log_joint",
    "pixel_offsets",
    "subpixel_expectation",
    "subpixel_offsets",
    "subpixel_scores",
    "why_not",
    "window_match",
    "window_moments",
    "windows",
]
