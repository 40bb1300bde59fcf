# SPDX-License-Identifier: Apache-2.0
"""Results in words, for the command line and for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from eloftr_ops.image_matches import ImageMatches

__all__ = ["describe_device", "describe_inliers", "describe_verdict"]


def describe_device(device: torch.device) -> str:
    """A device in words: the GPU's name, or the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type


def describe_inliers(matches: ImageMatches, model: str, threshold: float) -> str:
    """How many matches agree with a two-view model, or why there is none.

    Args:
        matches: at least one.
        model: "homography" or "fundamental".
        threshold: largest error of an inlier, pixels of the images as matched.
    """
    found = matches.homography(threshold) if model == "homography" else matches.fundamental(threshold)
    if found.matrix is None:
        return found.reason
    count = int(found.inliers.sum())
    return f"{count} inliers ({count / len(matches):.0%}) within {threshold:g} px"


def describe_verdict(matches: ImageMatches) -> str:
    """Whether the images show the same scene, and how sure that is."""
    verdict = matches.verdict
    share = (
        f"{verdict.chance:.1%} of unrelated pairs agree as much"
        if verdict.chance > 1e-3
        else ("less than 0.1% of unrelated pairs agree as much")
    )
    return f"{'related' if verdict.related else 'not known to be related'}: {share}"
