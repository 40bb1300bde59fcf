# SPDX-License-Identifier: Apache-2.0
"""Aligns small windows of two images by their pixels: least-squares matching, to a tenth of a pixel and better.

A window of image 0 is compared with image 1, seen through the local affine map between the two. The window of image 1
moves until both agree best, whatever their brightness and contrast. The place that it came from counts as one more
measurement: where the pixels leave a direction open, as along an edge, the window stays.

Source: Gruen: "Adaptive least squares correlation: a powerful image matching technique", 1985; Lucas, Kanade: "An
iterative image registration technique", 1981. Brightness and contrast are projected out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Aligned", "align_windows", "prepare_image"]

_RADIUS = 7  # pixels: windows have 2 * 7 + 1 pixels per side
_SCALE = 3.5  # pixels, standard deviation of the weights over a window
_BLUR = 0.5  # pixels, before sampling between pixels
_STEPS = 6
_LONGEST = 0.7  # pixels, of one step
_PRIOR = 0.5  # pixels, standard deviation of the places at the start
_MEASUREMENTS = 20.0  # independent ones in a window: neighbouring pixels err together
_TINY = 1e-4  # contrast, of images in [0, 1]
_CHUNK = 4096  # windows at once


class Aligned(NamedTuple):
    """N windows."""

    position: Tensor  # (N, 2) float64, pixels of image 1
    likeness: Tensor  # (N,) correlation of the two windows there, at most 1; about 0 where one of them is blank


def prepare_image(image: Tensor) -> Tensor:
    """(1, 3, H, W): an image (1, 1, H, W), slightly blurred, and its derivatives along x and y."""
    line = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / _BLUR) ** 2)
    line = (line / line.sum()).to(image)
    padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, line.view(1, 1, 1, 5)), line.view(1, 1, 5, 1))
    wide = F.pad(blurred, (1, 1, 1, 1), mode="replicate")
    dx = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    dy = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    return torch.cat([blurred, dx, dy], 1)


def align_windows(image0: Tensor, image1: Tensor, places0: Tensor, places1: Tensor, jacobian: Tensor) -> Aligned:
    """Move places of image 1 to where they look most like places of image 0.

    Convention:
        (x, y) in pixels, the centre of pixel (x, y) at (x + 0.5, y + 0.5). Outside an image its border goes on.

    Args:
        image0: of `prepare_image`.
        image1: of `prepare_image`; another size is fine.
        places0: (N, 2).
        places1: (N, 2) where they lie in image 1, to about a pixel.
        jacobian: (N, 2, 2) of the map from image 0 to image 1 there.
    """
    parts = [
        _align(image0, image1, *(values[start : start + _CHUNK].float() for values in (places0, places1, jacobian)))
        for start in range(0, len(places0), _CHUNK)
    ]
    none = Aligned(places1.new_zeros(0, 2), places1.new_zeros(0))
    columns = zip(none, *parts, strict=True)
    position, likeness = (torch.cat([value.double() for value in column]) for column in columns)
    return Aligned(position, likeness)


def _align(image0: Tensor, image1: Tensor, places0: Tensor, places1: Tensor, jacobian: Tensor) -> Aligned:
    line = torch.arange(-_RADIUS, _RADIUS + 1, dtype=places0.dtype)
    offsets = torch.cartesian_prod(line, line)  # (P, 2)
    root = torch.exp(-offsets.square().sum(1) / (4 * _SCALE**2))
    root = root / root.norm()  # root of the weights, which add up to 1
    there = offsets @ jacobian.mT  # (N, P, 2)
    pattern = _normalised(_sample(image0[:, :1], places0[:, None] + offsets)[0], root)
    position = places1
    for _ in range(_STEPS):
        values, *slopes = _sample(image1, position[:, None] + there)
        centred = _centred(values, root)
        contrast = centred.norm(dim=1, keepdim=True) + _TINY
        seen = centred / contrast
        J = torch.stack([_centred(slope, root) / contrast for slope in slopes], 2)  # (N, P, 2)
        J = J - seen[:, :, None] * (seen[:, None] @ J)
        likeness = (seen * pattern).sum(1)
        # The window of image 1 times its likeness is the best copy of the pattern; what it leaves is the noise.
        noise = (1 - likeness.square()).clamp_min(0.0) + _TINY
        pull = noise / (_MEASUREMENTS * _PRIOR**2) / likeness.clamp_min(0.1).square()
        A = J.mT @ J + pull[:, None, None] * torch.eye(2, dtype=J.dtype)
        b = (J.mT @ pattern[:, :, None])[:, :, 0] / likeness.clamp_min(0.1)[:, None]
        step = torch.linalg.solve(A, b + pull[:, None] * (places1 - position))
        length = step.norm(dim=1, keepdim=True)
        position = position + step * (_LONGEST / length.clamp_min(_LONGEST))
    seen = _normalised(_sample(image1[:, :1], position[:, None] + there)[0], root)
    return Aligned(position, (seen * pattern).sum(1))


def _centred(values: Tensor, root: Tensor) -> Tensor:
    """Values (N, P) without their weighted mean, times the roots of the weights (P,)."""
    return (values - (values @ root.square())[:, None]) * root


def _normalised(values: Tensor, root: Tensor) -> Tensor:
    centred = _centred(values, root)
    normalised: Tensor = centred / (centred.norm(dim=1, keepdim=True) + _TINY)
    return normalised


def _sample(image: Tensor, places: Tensor) -> Tensor:
    """(C, N, P) values between the pixels of an image (1, C, H, W) at places (N, P, 2)."""
    height, width = image.shape[-2:]
    grid = places * places.new_tensor([2 / width, 2 / height]) - 1
    return F.grid_sample(image, grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
