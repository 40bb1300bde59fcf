# SPDX-License-Identifier: Apache-2.0
"""See ``reference.py`` for the formula."""

from eloftr_kernels.window_match.reference import (
    WindowMatches,
    pixel_log_joint,
    pixel_offsets,
    subpixel_expectation,
    window_match,
    windows,
)

__all__ = [
    "WindowMatches",
    "pixel_log_joint",
    "pixel_offsets",
    "subpixel_expectation",
    "window_match",
    "windows",
]
