# SPDX-License-Identifier: Apache-2.0
"""Stitch two images into a panorama with kornia's stitcher."""

import sys

import kornia.contrib
import torch
from kornia.io import ImageLoadType, load_image, write_image

from eloftr_ops import EfficientLoFTR


def stitch(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Lay the right image over the left one; (1, 3, H, W) in [0, 1] each."""
    matcher = EfficientLoFTR.from_pretrained("small").optimize_for_inference()
    stitcher = kornia.contrib.ImageStitcher(matcher, estimator="ransac")
    torch.manual_seed(0)  # RANSAC draws at random
    with torch.inference_mode():
        return stitcher(left, right)


if __name__ == "__main__":
    images = [load_image(path, ImageLoadType.RGB32)[None] for path in sys.argv[1:3]]
    panorama = stitch(*images)
    write_image(sys.argv[3], (panorama[0].clamp(0, 1) * 255).to(torch.uint8))
    print("panorama of", "x".join(str(size) for size in panorama.shape[:1:-1]), "pixels")
