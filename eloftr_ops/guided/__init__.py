# SPDX-License-Identifier: Apache-2.0
"""Guided re-matching: match, warp the images so that they look alike, match again; search where little is found."""

from eloftr_ops.guided.matcher import GuidedMatcher, GuidedMatches, LookReport

__all__ = ["GuidedMatcher", "GuidedMatches", "LookReport"]
