# SPDX-License-Identifier: Apache-2.0
"""kornia's own stitcher and tracker run unmodified with EfficientLoFTR, and find a known homography."""

import kornia
import pytest
import torch
from kornia.geometry.transform import warp_perspective

from eloftr_ops import EfficientLoFTR
from eloftr_ops.io import demo_pair

SIZE = (320, 416)
TOLERANCE = 2.0  # pixels, mean over the image; the embedded model's own precision is finer, see docs


@pytest.fixture(scope="module")
def matcher() -> EfficientLoFTR:
    return EfficientLoFTR.from_pretrained("small")


@pytest.fixture(scope="module")
def views() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A photograph, its warp with changed exposure, and the homography, in kornia's integer-centre frame."""
    photo = kornia.geometry.resize(demo_pair().image0, (360, 480), antialias=True)
    image = photo[..., 20 : 20 + SIZE[0], 32 : 32 + SIZE[1]].clamp(0, 1)
    H = torch.tensor([[[1.02, -0.10, 3.0], [0.07, 0.97, 9.0], [1.2e-4, -0.8e-4, 1.0]]])
    return image, (0.8 * warp_perspective(image, H, SIZE) + 0.05), H


def _mean_transfer_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Over the grid of points that the true homography keeps inside the image."""
    grid = kornia.utils.create_meshgrid(*SIZE, normalized_coordinates=False)[0, ::20, ::20].reshape(1, -1, 2)
    a, b = (kornia.geometry.transform_points(H.reshape(1, 3, 3), grid) for H in (found, true))
    inside = ((b >= 0) & (b < torch.tensor([SIZE[1], SIZE[0]]))).all(-1)
    return (a - b).norm(dim=-1)[inside].mean().item()


@pytest.mark.parametrize("estimator", ["ransac", "vanilla"])
def test_stitcher(matcher: EfficientLoFTR, views: tuple, estimator: str) -> None:
    image0, image1, H_0to1 = views
    stitcher = kornia.contrib.ImageStitcher(matcher, estimator=estimator)
    matches = stitcher.on_matcher(stitcher.preprocess(image0.repeat(1, 3, 1, 1), image1.repeat(1, 3, 1, 1)))
    found = stitcher.estimate_transform(**matches)  # the right image into the left one's frame
    assert _mean_transfer_error(torch.linalg.inv(found), H_0to1) < TOLERANCE
    with torch.inference_mode():
        panorama = stitcher(image0.repeat(1, 3, 1, 1), image1.repeat(1, 3, 1, 1))
    assert panorama.shape[:3] == (1, 3, SIZE[0])
    assert SIZE[1] <= panorama.shape[3] <= 2 * SIZE[1]


def test_tracker(matcher: EfficientLoFTR, views: tuple) -> None:
    """The first frame through the initial matcher, the second through the fast one, warped by the first's result."""
    image0, image1, H_0to1 = views
    tracker = kornia.tracking.HomographyTracker(initial_matcher=matcher, fast_matcher=matcher)
    tracker.set_target(image0)
    assert set(tracker.target_fast_representation) == {"features"}  # the target's features are extracted once
    with torch.inference_mode():
        for _ in range(2):
            found, success = tracker(image1)
            assert success
            assert _mean_transfer_error(found, H_0to1) < TOLERANCE
