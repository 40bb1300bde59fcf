# SPDX-License-Identifier: Apache-2.0
"""Track a planar target through frames with kornia's tracker."""

from collections.abc import Iterable, Iterator

import kornia.geometry
import kornia.tracking
import torch

from eloftr_ops import EfficientLoFTR
from eloftr_ops.io import demo_pair


def track(target: torch.Tensor, frames: Iterable[torch.Tensor]) -> Iterator[torch.Tensor | None]:
    """Homographies (3, 3) from the target to each frame; gray (1, 1, H, W). None: not found."""
    matcher = EfficientLoFTR.from_pretrained("small").optimize_for_inference()
    tracker = kornia.tracking.HomographyTracker(initial_matcher=matcher, fast_matcher=matcher)
    torch.manual_seed(0)  # RANSAC draws at random
    with torch.inference_mode():
        tracker.set_target(target)  # its features are kept
        for frame in frames:
            homography, found = tracker(frame)
            yield homography.reshape(3, 3) if found else None


if __name__ == "__main__":
    target, _, _ = demo_pair()
    moves = [torch.tensor([[[1.0, 0.02 * t, 6.0 * t], [0.0, 1.0, 3.0 * t]]]) for t in range(1, 4)]
    frames = [kornia.geometry.warp_affine(target, move, target.shape[-2:]) for move in moves]
    for homography in track(target, frames):
        print("lost" if homography is None else f"moved by {[round(x, 1) for x in homography[:2, 2].tolist()]} px")
