# SPDX-License-Identifier: Apache-2.0
"""A loss for image pairs without any labels."""

import torch
from torch import Tensor

from eloftr_ops.geometry._checks import check_matrices
from eloftr_ops.geometry._linalg import unit_magnitude
from eloftr_ops.geometry._precision import result_dtype, to_work
from eloftr_ops.geometry.homography import apply_homography
from eloftr_ops.losses._reduction import check_options, reduce_pairs, smooth_distance

__all__ = ["photometric_loss"]


def photometric_loss(
    image0: Tensor,
    image1: Tensor,
    H_0to1: Tensor,
    *,
    valid: Tensor | None = None,
    match_contrast: bool = True,
    least_overlap: float = 0.1,
    smoothing: float = 1e-2,
    reduction: str = "mean",
) -> Tensor:
    """Difference between image 0 and image 1 seen through a homography, over their overlap.

    Convention:
        - `(x1, 1) ~ H_0to1 @ (x0, 1)` in the frame where the centre of pixel (x, y) is (x + 0.5, y + 0.5);
          sampling is bilinear. Units: grey values, or standard deviations with `match_contrast`.
        - A pixel counts where it lands inside image 1, in front of the camera. The mask carries no gradient.
        - A pair whose overlap is below `least_overlap` of image 0 costs zero with zero gradient: there is
          nothing to compare. So this loss alone does not keep the images overlapping.
        - At equal images and the identity, value and gradient are zero; both are finite on constant images.

    Args:
        image0: `(B, C, H, W)`, floating point, typically in [0, 1].
        image1: `(B, C, H1, W1)`, same B, C and dtype.
        H_0to1: `(B, 3, 3)`, any scale and sign.
        valid: `(B,)` bool; pairs that are not valid count for nothing.
        match_contrast: compare grey values after subtracting each image's mean over the overlap and dividing
            by its standard deviation, so that a change of exposure costs nothing.
        least_overlap: share of image 0 in [0, 1] that must be seen in image 1.
        smoothing: difference below which the loss turns quadratic.
        reduction: "none" `(B,)`, "mean" over the valid pairs with enough overlap, or "sum".

    Returns:
        `(B,)` or a scalar; the images' dtype, at least float32. The gradient flows to both images and to the
        homography.

    Raises:
        ValueError: shapes that do not fit, a non-finite homography, an option out of range.
        TypeError: integer images.
    """
    _check_images(image0, image1)
    check_options(smoothing, None, reduction)
    if not 0.0 <= least_overlap <= 1.0:
        raise ValueError(f"least_overlap: expected a share in [0, 1], got {least_overlap}")
    check_matrices("H_0to1", H_0to1, image0.shape[0])
    dtype = result_dtype(image0.dtype)
    seen, inside = _warped(image1.to(dtype), H_0to1, (image0.shape[2], image0.shape[3]))
    reference = image0.to(dtype)
    if match_contrast:
        reference, seen = _standardised(reference, inside), _standardised(seen, inside)
    difference = smooth_distance((reference - seen).square(), smoothing).mean(1)
    area = inside.sum((1, 2))
    values = (difference * inside).sum((1, 2)) / area.clamp_min(1.0)
    enough = area >= max(least_overlap * inside[0].numel(), 1.0)
    return reduce_pairs(values, enough if valid is None else enough & valid, reduction)


def _check_images(image0: Tensor, image1: Tensor) -> None:
    for name, image in (("image0", image0), ("image1", image1)):
        if not torch.is_floating_point(image):
            raise TypeError(f"{name}: expected a floating point dtype, got {image.dtype}; scale to [0, 1] first")
        if image.ndim != 4:
            raise ValueError(f"{name}: expected shape (B, C, H, W), got {tuple(image.shape)}")
    if image0.shape[:2] != image1.shape[:2]:
        raise ValueError(f"image1: expected B and C of image0 {tuple(image0.shape[:2])}, got {tuple(image1.shape[:2])}")


def _warped(image1: Tensor, H_0to1: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Image 1 `(B, C, H, W)` at the pixels of image 0, and where it was seen `(B, H, W)` as 0 and 1."""
    height, width = size
    H = unit_magnitude(to_work(H_0to1), (1, 2))
    rows = torch.arange(height, dtype=H.dtype, device=H.device) + 0.5
    columns = torch.arange(width, dtype=H.dtype, device=H.device) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centres = torch.stack([x, y], dim=-1).view(1, -1, 2).expand(image1.shape[0], -1, 2)
    landed = apply_homography(H, centres)
    extent = landed.new_tensor([image1.shape[3], image1.shape[2]])
    within = ((landed >= 0.5) & (landed <= extent - 0.5)).all(-1)
    # The side of the image's centre is the front; only a homography gone wrong has pixels on both sides.
    depth = (H[:, None, 2, :2] * centres).sum(-1) + H[:, None, 2, 2]
    front = (depth * depth.mean(1, keepdim=True)) > 0
    visible = within & front
    # A sample far outside has no gradient worth keeping, and its position may overflow float32.
    grid = torch.where(visible[..., None], 2.0 * landed / extent - 1.0, 0.0)
    grid = grid.view(-1, height, width, 2).to(image1.dtype).to(image1.device)
    sampled = torch.nn.functional.grid_sample(image1, grid, mode="bilinear", align_corners=False)
    return sampled, visible.view(-1, height, width).to(image1.device).to(image1.dtype)


def _standardised(image: Tensor, inside: Tensor) -> Tensor:
    """Zero mean and unit deviation over the mask `(B, H, W)`, with a floor that keeps flat images finite."""
    mask = inside[:, None]
    area = mask.sum((2, 3), keepdim=True).clamp_min(1.0)
    mean = (image * mask).sum((2, 3), keepdim=True) / area
    centred = image - mean
    variance = (centred.square() * mask).sum((2, 3), keepdim=True) / area
    return centred / (variance + 1e-4).sqrt()
