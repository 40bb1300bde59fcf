# SPDX-License-Identifier: Apache-2.0
"""Photometric change of gray images: exposure, illumination, shadow, blur, noise and block compression."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# ITU-T T.81, table K.1: luminance quantisation steps of the 8x8 cosine transform, in 1/255 of the gray range.
_JPEG_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_FIELD = 32  # side of the coarse illumination field


@dataclass(frozen=True)
class PhotometricConfig:
    """Strengths of the photometric change; every image draws its own values.

    Attributes:
        gamma: exponent is log-uniform in [1 / gamma, gamma]; >= 1.
        contrast: factor about the image's mean is log-uniform in [1 / contrast, contrast]; >= 1.
        brightness: the mean moves by an offset uniform in [-brightness, brightness], in gray range units, and
            is kept in [0.2, 0.8].
        illumination: largest standard deviation of the smooth log gain over the image.
        shadow_probability: share of images with a soft-edged shadow.
        shadow_strength: largest share of light that the shadow takes, in [0, 1).
        blur_probability: share of images with a Gaussian blur.
        blur_sigma: largest Gaussian sigma in pixels; the smallest is a quarter of it.
        motion_probability: share of images with a linear motion blur.
        motion_length: largest motion in pixels.
        noise_probability: share of images with Gaussian noise.
        noise_sigma: largest standard deviation of the noise, in gray range units.
        jpeg_probability: share of images with 8x8 block compression.
        jpeg_quality: lowest JPEG quality, in [1, 100].
    """

    gamma: float = 1.6
    contrast: float = 1.5
    brightness: float = 0.15
    illumination: float = 0.3
    shadow_probability: float = 0.2
    shadow_strength: float = 0.7
    blur_probability: float = 0.2
    blur_sigma: float = 1.5
    motion_probability: float = 0.05
    motion_length: float = 7.0
    noise_probability: float = 0.5
    noise_sigma: float = 0.04
    jpeg_probability: float = 0.15
    jpeg_quality: float = 25.0

    def __post_init__(self) -> None:
        for name in ("gamma", "contrast"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}; 1 switches it off")
        for name in ("brightness", "illumination", "blur_sigma", "motion_length", "noise_sigma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}; 0 switches it off")
        for name in ("shadow", "blur", "motion", "noise", "jpeg"):
            value = getattr(self, f"{name}_probability")
            if not 0 <= value <= 1:
                raise ValueError(f"{name}_probability must be in [0, 1], got {value}")
        if not 0 <= self.shadow_strength < 1:
            raise ValueError(f"shadow_strength must be in [0, 1), got {self.shadow_strength}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must be in [1, 100], got {self.jpeg_quality}")


def photometric_change(
    images: torch.Tensor, generator: torch.Generator, config: PhotometricConfig | None = None
) -> torch.Tensor:
    """Change the look of each image on its own, leaving its geometry alone.

    In this order: blur (Gaussian or motion), gamma, contrast and brightness, smooth illumination and shadow,
    noise, block compression. No gradient flows.

    Args:
        images: (B, 1, H, W) float gray images in [0, 1].
        generator: source of randomness, on the images' device.
        config: strengths; defaults to ``PhotometricConfig()``.

    Returns:
        (B, 1, H, W) images in [0, 1], a new tensor of the same dtype.

    Raises:
        ValueError: images is not (B, 1, H, W).
    """
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images must have shape (B, 1, H, W), got {tuple(images.shape)}")
    config = config or PhotometricConfig()
    with torch.no_grad():
        changed = images.clone()
        _blur(changed, generator, config)
        _motion(changed, generator, config)
        _expose(changed, generator, config)
        _noise(changed, generator, config)
        changed.clamp_(0, 1)
        _compress(changed, generator, config)
        return changed.clamp_(0, 1)


def _rand(images: torch.Tensor, generator: torch.Generator, *tail: int) -> torch.Tensor:
    return torch.rand(images.shape[0], *tail, generator=generator, device=images.device, dtype=images.dtype)


def _chosen(images: torch.Tensor, generator: torch.Generator, probability: float) -> torch.Tensor:
    return (_rand(images, generator) < probability).nonzero()[:, 0]


def _log_uniform(images: torch.Tensor, generator: torch.Generator, bound: float) -> torch.Tensor:
    return torch.exp((_rand(images, generator, 1, 1, 1) * 2 - 1) * math.log(bound))


def _expose(images: torch.Tensor, generator: torch.Generator, config: PhotometricConfig) -> None:
    images.pow_(_log_uniform(images, generator, config.gamma))
    factor = _log_uniform(images, generator, config.contrast)
    offset = (_rand(images, generator, 1, 1, 1) * 2 - 1) * config.brightness
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    # The new mean stays off both ends: dark photos made darker would clip to nothing but black.
    centre = (mean + offset).clamp(0.2, 0.8)
    images.mul_(factor).add_(centre - mean * factor)
    images.mul_(_light(images, generator, config))


def _light(images: torch.Tensor, generator: torch.Generator, config: PhotometricConfig) -> torch.Tensor:
    """Gain (B, 1, H, W): exp of a smooth random field, times a soft-edged wedge of shadow."""
    coarse = torch.randn(images.shape[0], 1, 4, 4, generator=generator, device=images.device, dtype=images.dtype)
    field = F.interpolate(coarse, size=(_FIELD, _FIELD), mode="bicubic", align_corners=True)
    gain = torch.exp(field * _rand(images, generator, 1, 1, 1) * config.illumination)
    axis = torch.linspace(-1, 1, _FIELD, device=images.device, dtype=images.dtype)
    turn = _rand(images, generator, 2, 1, 1) * (2 * math.pi)
    shift = _rand(images, generator, 2, 1, 1) - 0.5
    softness = _rand(images, generator, 1, 1, 1) * 0.3 + 0.03
    edges = (torch.cos(turn) * axis + torch.sin(turn) * axis[:, None] - shift) / softness
    wedge = torch.sigmoid(edges).prod(dim=1, keepdim=True)
    depth = _rand(images, generator, 1, 1, 1) * config.shadow_strength
    shaded = _rand(images, generator, 1, 1, 1) < config.shadow_probability
    gain = gain * (1 - wedge * depth * shaded)
    return F.interpolate(gain, size=images.shape[-2:], mode="bilinear", align_corners=True)


def _filter(images: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Correlate each (1, H, W) image with its own (kh, kw) kernel, edges replicated."""
    kh, kw = kernels.shape[-2:]
    padded = F.pad(images, (kw // 2, kw // 2, kh // 2, kh // 2), mode="replicate")
    return F.conv2d(padded.transpose(0, 1), kernels[:, None], groups=images.shape[0]).transpose(0, 1)


def _blur(images: torch.Tensor, generator: torch.Generator, config: PhotometricConfig) -> None:
    index = _chosen(images, generator, config.blur_probability)
    sigma = (0.25 + 0.75 * _rand(images, generator, 1)[index]) * max(config.blur_sigma, 0.1)
    if len(index) == 0:
        return
    radius = max(1, math.ceil(2.5 * config.blur_sigma))
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.softmax(-0.5 * (steps / sigma) ** 2, dim=-1)
    images[index] = _filter(_filter(images[index], weights[:, None, :]), weights[:, :, None])


def _motion(images: torch.Tensor, generator: torch.Generator, config: PhotometricConfig) -> None:
    index = _chosen(images, generator, config.motion_probability)
    half = _rand(images, generator, 1, 1)[index] * config.motion_length / 2
    turn = _rand(images, generator, 1, 1)[index] * math.pi
    if len(index) == 0:
        return
    radius = max(1, math.ceil(config.motion_length / 2))
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    along = torch.cos(turn) * steps + torch.sin(turn) * steps[:, None]
    across = torch.cos(turn) * steps[:, None] - torch.sin(turn) * steps
    # A one-pixel-wide segment; the weight of a tap falls linearly over one pixel past either boundary.
    weights = (1 - across.abs()).clamp_min(0) * (half + 1 - along.abs()).clamp(0, 1)
    images[index] = _filter(images[index], weights / weights.sum(dim=(1, 2), keepdim=True))


def _noise(images: torch.Tensor, generator: torch.Generator, config: PhotometricConfig) -> None:
    index = _chosen(images, generator, config.noise_probability)
    sigma = _rand(images, generator, 1, 1, 1)[index] * config.noise_sigma
    shape = (len(index), *images.shape[1:])
    noise = torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)
    images.index_add_(0, index, noise.mul_(sigma))


def _compress(images: torch.Tensor, generator: torch.Generator, config: PhotometricConfig) -> None:
    index = _chosen(images, generator, config.jpeg_probability)
    span = 100 - config.jpeg_quality
    quality = config.jpeg_quality + _rand(images, generator)[index] * span
    if len(index) == 0:
        return
    # The quality scale that encoders share: 50 keeps the table, 100 removes it.
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
    table = torch.tensor(_JPEG_STEPS, device=images.device, dtype=images.dtype)
    steps = (table * scale[:, None, None]).clamp_min(1)[:, None, None] / 255
    height, width = images.shape[-2:]
    padded = F.pad(images[index] - 0.5, (0, -width % 8, 0, -height % 8), mode="replicate")[:, 0]
    blocks = padded.view(len(index), padded.shape[1] // 8, 8, -1, 8).transpose(2, 3)  # (N, h, w, 8, 8)
    basis = _cosine_basis(images)
    coefficients = basis @ blocks @ basis.T
    restored = basis.T @ ((coefficients / steps).round_() * steps) @ basis
    merged = restored.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    images[index, 0] = merged[:, :height, :width] + 0.5


def _cosine_basis(images: torch.Tensor) -> torch.Tensor:
    """The orthonormal 8-point cosine transform, (8, 8), rows are frequencies."""
    k = torch.arange(8, device=images.device, dtype=images.dtype)
    basis = torch.cos(math.pi / 8 * (k + 0.5) * k[:, None]) / 2
    basis[0] /= math.sqrt(2)
    return basis
