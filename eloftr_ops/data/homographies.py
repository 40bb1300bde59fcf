# SPDX-License-Identifier: Apache-2.0
"""Random homographies between two images of one size that keep a guaranteed overlap.

Convention:
    Coordinates are (x, y) with the centre of pixel (x, y) at (x + 0.5, y + 0.5), in every function here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.geometry import get_perspective_transform, transform_points

from eloftr_ops.geometry._precision import check_has_float64

_SHRINKS = (0.75, 0.5, 0.25, 0.0)  # what a draw that never fits is multiplied by; 0 is the identity
_MIN_DENOMINATOR = 0.3  # of the homogeneous denominator at the corners, relative to the centre


@dataclass(frozen=True)
class HomographyConfig:
    """How far a random homography goes.

    Attributes:
        rotation_sigma: standard deviation of the rotation, degrees.
        rotation_max: bound on its magnitude, degrees.
        scale: isotropic scale is log-uniform in this interval.
        anisotropy: stretch along a random axis is log-uniform in [1 / anisotropy, anisotropy]; the other axis
            is stretched by the inverse.
        translation: each axis moves by at most this share of the side.
        perspective: each corner moves by at most this share of the sides, before the rest.
        min_overlap: both images show each other with at least this share of their area; at most 1.
        tries: draws before the last one is shrunk towards the identity.
    """

    rotation_sigma: float = 15.0
    rotation_max: float = 45.0
    scale: tuple[float, float] = (0.6, 1.6)
    anisotropy: float = 1.2
    translation: float = 0.25
    perspective: float = 0.2
    min_overlap: float = 0.3
    tries: int = 6

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {self.scale}")
        if self.anisotropy < 1:
            raise ValueError(f"anisotropy must be >= 1, got {self.anisotropy}; 1 switches it off")
        for name in ("rotation_sigma", "rotation_max", "translation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}; 0 switches it off")
        if not 0 <= self.perspective < 0.5:
            raise ValueError(f"perspective must be in [0, 0.5), got {self.perspective}")
        if not 0 <= self.min_overlap <= 1:
            raise ValueError(f"min_overlap must be in [0, 1], got {self.min_overlap}")
        if self.tries < 1:
            raise ValueError(f"tries must be >= 1, got {self.tries}")


def homography_overlap(H_0to1: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Share of area that two images of one size show in common: the smaller of the two images' shares.

    Counted on a 16 x 16 grid of points in each image. Not differentiable.

    Convention:
        ``H_0to1`` maps (x, y) of image 0 to image 1, pixel centres at (x + 0.5, y + 0.5).

    Args:
        H_0to1: (B, 3, 3) invertible homographies, positive denominators on the images.
        size_hw: height and width in pixels.

    Returns:
        (B,) shares in [0, 1].
    """
    height, width = size_hw
    extent = torch.tensor([width, height], device=H_0to1.device, dtype=H_0to1.dtype)
    steps = (torch.arange(16, device=H_0to1.device, dtype=H_0to1.dtype) + 0.5) / 16
    grid = torch.cartesian_prod(steps, steps) * extent

    def share(H: torch.Tensor) -> torch.Tensor:
        points = transform_points(H, grid.expand(len(H), -1, -1))
        return ((points > 0) & (points < extent)).all(dim=-1).to(H.dtype).mean(dim=-1)

    return torch.minimum(share(H_0to1), share(torch.linalg.inv(H_0to1)))


def sample_homographies(
    batch: int,
    size_hw: tuple[int, int],
    generator: torch.Generator,
    *,
    config: HomographyConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Draw homographies between two images of one size.

    Corner displacement, stretch, scale, rotation about the centre, translation, in this order. Of
    ``config.tries`` draws the first counts whose overlap (`homography_overlap`) is at least
    ``config.min_overlap`` and that keeps the horizon away from both images; if there is none, the last draw
    is shrunk towards the identity, which always passes.

    Convention:
        ``H_0to1`` maps (x, y) of image 0 to image 1, pixel centres at (x + 0.5, y + 0.5).

    Args:
        batch: number of homographies B.
        size_hw: height and width of both images, pixels.
        generator: source of randomness; its device is the result's.
        config: how far they go; defaults to ``HomographyConfig()``.
        dtype: of the result; the computation is in float64.

    Returns:
        (B, 3, 3) homographies with last entry 1, determinant and denominators on the images positive.

    Raises:
        ValueError: batch or a size is not positive, or the device has no float64.
    """
    height, width = size_hw
    if batch < 1 or height < 1 or width < 1:
        raise ValueError(f"batch and size_hw must be positive, got {batch} and {size_hw}")
    check_has_float64("generator", generator.device)
    config = config or HomographyConfig()
    draws = _draw_parameters(config.tries * batch, generator, config).view(config.tries, batch, -1)
    shrunk = [draws[-1] * factor for factor in _SHRINKS]
    candidates = torch.cat([draws, torch.stack(shrunk)])  # (candidates, B, 14)
    H = _compose(candidates.flatten(0, 1), size_hw)
    passes = _is_safe(H, size_hw) & (homography_overlap(H, size_hw) >= config.min_overlap)
    passes = passes.view(-1, batch)
    passes[-1] = True  # the identity
    first = passes.to(torch.int8).argmax(dim=0)
    return H.view(-1, batch, 3, 3)[first, torch.arange(batch, device=H.device)].to(dtype)


def _draw_parameters(count: int, generator: torch.Generator, config: HomographyConfig) -> torch.Tensor:
    """Parameters (count, 14) that are all zero at the identity, but for the stretch axis (column 3)."""
    device = generator.device
    u = torch.rand(count, 15, generator=generator, device=device, dtype=torch.float64)
    symmetric = u * 2 - 1
    angle = torch.randn(count, generator=generator, device=device, dtype=torch.float64)
    angle = (angle * config.rotation_sigma).clamp(-config.rotation_max, config.rotation_max)
    low, high = math.log(config.scale[0]), math.log(config.scale[1])
    columns = [
        torch.deg2rad(angle),
        low + (high - low) * u[:, 0],
        symmetric[:, 1] * math.log(config.anisotropy),
        u[:, 2] * math.pi,
        symmetric[:, 3] * config.translation,
        symmetric[:, 4] * config.translation,
    ]
    # One strength per draw, so that nearly affine pairs occur as often as strongly tilted ones.
    corners = symmetric[:, 5:13] * u[:, 13:14] * config.perspective
    return torch.cat([torch.stack(columns, dim=-1), corners], dim=-1)


def _compose(parameters: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    height, width = size_hw
    angle, log_scale, log_stretch, axis, tx, ty = parameters[:, :6].unbind(-1)
    corners = image_corners(size_hw, parameters).expand(len(parameters), -1, -1)
    extent = corners[:, 2:3]
    tilt = get_perspective_transform(corners, corners + parameters[:, 6:].reshape(-1, 4, 2) * extent)
    scale, stretch = torch.exp(log_scale), torch.exp(log_stretch)
    diagonal = torch.diag_embed(torch.stack([scale * stretch, scale / stretch], dim=-1))
    linear = _rotation(angle + axis) @ diagonal @ _rotation(-axis)
    centre = extent[:, 0] / 2
    shift = torch.stack([tx * width, ty * height], dim=-1)
    affine = torch.eye(3, device=parameters.device, dtype=parameters.dtype).repeat(len(parameters), 1, 1)
    affine[:, :2, :2] = linear
    affine[:, :2, 2] = centre + shift - (linear @ centre[..., None])[..., 0]
    H = affine @ tilt
    return H / H[:, 2:, 2:]


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([cos, -sin, sin, cos], dim=-1).view(-1, 2, 2)


def image_corners(size_hw: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Outer corners (1, 4, 2) of the image area, in `like`'s dtype; the third one is its (width, height)."""
    height, width = size_hw
    corners = [[0, 0], [width, 0], [width, height], [0, height]]
    return torch.tensor([corners], device=like.device, dtype=like.dtype)


def horizon_is_far(H: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Whether the denominator keeps its sign and some of its size over the image; corners suffice."""
    corners = F.pad(image_corners(size_hw, H), (0, 1), value=1.0)
    denominators = (corners @ H[:, 2, :, None])[..., 0]
    return (denominators / denominators.mean(dim=-1, keepdim=True) > _MIN_DENOMINATOR).all(dim=-1)


def _is_safe(H_0to1: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    forth = horizon_is_far(H_0to1, size_hw)
    back = horizon_is_far(torch.linalg.inv(H_0to1), size_hw)
    upright: torch.Tensor = torch.linalg.det(H_0to1) > 0
    return forth & back & upright
