# SPDX-License-Identifier: Apache-2.0
"""Checks of what users pass in, made once, at the public layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eloftr_ops.types import CELL, Features, ImageInput, PairInput

MIN_SIZE = 32
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LOWEST, _HIGHEST = -1e-3, 1 + 1e-3  # of an image; the slack is for resampling and rounding


def check_image(name: str, image: Any, device: torch.device) -> Tensor:
    """A batch of gray images: (B, 1, H, W) floating point, H and W at least 32; see `check_range` for the values.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: another shape, size or device.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape (B, 1, H, W), got {type(image).__name__}.")
    if image.ndim != 4:
        hint = " Add the batch dimension: image[None]." if image.ndim == 3 else ""
        raise ValueError(f"{name}: expected shape (B, 1, H, W), got {tuple(image.shape)}.{hint}")
    if image.shape[1] != 1:
        hint = " Convert it with kornia.color.rgb_to_grayscale(image)." if image.shape[1] == 3 else ""
        raise ValueError(f"{name}: expected one gray channel, (B, 1, H, W), got {tuple(image.shape)}.{hint}")
    if image.dtype not in _FLOATS:
        hint = " Scale it: image.float() / 255." if image.dtype == torch.uint8 else ""
        raise TypeError(f"{name}: expected a floating point image in [0, 1], got {image.dtype}.{hint}")
    if min(image.shape[-2:]) < MIN_SIZE:
        raise ValueError(
            f"{name}: expected height and width of at least {MIN_SIZE} pixels, got {tuple(image.shape[-2:])}. "
            "Resize or pad the image."
        )
    _check_device(name, image, device)
    return image


def check_mask(
    name: str,
    mask: Any,
    image_name: str,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    values: bool = True,
) -> Tensor:
    """A mask at the size of its image: (B, H, W), bool, or numbers of which zero means masked.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape or device, or NaN.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape (B, H, W), got {type(mask).__name__}.")
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"{name}: expected the size of {image_name}, (B, H, W) = {shape}, got {tuple(mask.shape)}. "
            "Masks are given at image resolution."
        )
    _check_device(name, mask, device)
    if values and mask.is_floating_point() and not bool(_is_finite(mask)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity. Pass a bool mask.")
    return mask != 0


def check_range(name: str, image: Tensor, mask: Tensor | None) -> None:
    """Visible pixels are finite and in [0, 1]; what lies under a mask (B, H, W) does not matter.

    One reduction and, on a GPU, one synchronisation: cheap beside the backbone. Skipped while compiling.

    Raises:
        ValueError: they are not.
    """
    if torch.compiler.is_compiling() or image.numel() == 0:
        return
    low, high = (float(v) for v in _visible_extremes(image, mask))
    if not (low >= _LOWEST and high <= _HIGHEST):  # also false for NaN
        if low != low or high != high or abs(low) == float("inf") or abs(high) == float("inf"):
            raise ValueError(f"{name}: expected finite values in [0, 1], got NaN or infinity.")
        raise ValueError(f"{name}: expected values in [0, 1], got [{low:g}, {high:g}]. Scale the image, e.g. by 1/255.")


def acceptable_values(data: Mapping[str, Any], pair: PairInput) -> Tensor:
    """() bool on the device: whether the values pass the checks that :func:`checked_pair` makes of them.

    Nothing waits for the device.

    Args:
        data: what was given.
        pair: the same, checked without values.
    """
    passed = []
    for side in pair:
        if isinstance(side, ImageInput):
            low, high = (x.double() for x in _visible_extremes(*side))
            passed.append((low >= _LOWEST) & (high <= _HIGHEST))
        else:
            passed += [_is_finite(x) for x in side[:3]]
    masks = [data[name] for name in ("mask0", "mask1") if data.get(name) is not None]
    passed += [_is_finite(mask) for mask in masks if mask.is_floating_point()]
    return torch.stack(passed).all()


def check_features(
    name: str,
    features: Any,
    widths: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    values: bool = True,
) -> Features:
    """What ``extract_features`` of a model of the same widths and dtype returned. Errors name the entry.

    Raises:
        TypeError: something else, or maps of another dtype (under autocast any floating one).
        ValueError: missing or unknown entries, maps of another model or of images of another batch, another device,
            values that are not finite.
    """
    if not isinstance(features, Mapping) or not all(isinstance(v, Tensor) for v in features.values()):
        raise TypeError(
            f"{name}: expected the dict of tensors that extract_features() returns, got {type(features).__name__}."
        )
    maps = ("half", "quarter", "coarse")
    if set(features) not in (set(maps), {*maps, "mask"}):
        raise ValueError(
            f"{name}: expected the entries half, quarter, coarse and perhaps mask, got {sorted(features)}. "
            "Pass what extract_features() returned."
        )
    coarse = features["coarse"]
    if coarse.ndim != 4:
        raise ValueError(f"{name}: expected maps of shape (B, C, h, w), got {tuple(coarse.shape)}.")
    batch, _, height, width = coarse.shape
    for key, channels, scale in zip(maps, widths, (4, 2, 1), strict=True):
        _check_shape(f"{name}[{key!r}]", features[key], (batch, channels, scale * height, scale * width))
    for key, value in features.items():
        _check_device(f"{name}[{key!r}]", value, device)
    for key in maps:
        _check_map(f"{name}[{key!r}]", features[key], dtype, values=values)
    mask = features.get("mask")
    if mask is not None:
        _check_shape(f"{name}['mask']", mask, (batch, 8 * height, 8 * width))
    return Features(features["half"], features["quarter"], coarse, mask)


def check_pair(data: Any) -> None:
    """Each side of the pair given once, as an image or as features; no unknown keys.

    Raises:
        TypeError: not a mapping.
        ValueError: a side missing or given twice, a mask beside features, an unknown key.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f'data: expected a dict with "image0" and "image1", got {type(data).__name__}.')
    known = {f"{kind}{side}" for kind in ("image", "features", "mask") for side in "01"}
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise ValueError(f"data: expected keys among {', '.join(sorted(known))}, got {', '.join(unknown)}.")
    for side in "01":
        if (f"image{side}" in data) == (f"features{side}" in data):
            which = "both" if f"image{side}" in data else "neither"
            raise ValueError(f'data: expected exactly one of "image{side}" and "features{side}", got {which}.')
        if f"mask{side}" in data and f"image{side}" not in data:
            raise ValueError(
                f'mask{side}: expected together with "image{side}". Give the mask to extract_features instead.'
            )


def checked_pair(
    data: Mapping[str, Any],
    widths: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    values: bool = True,
) -> PairInput:
    """Both sides of a batch of pairs: images with their masks, or features of a model of these widths and dtype.

    Raises:
        ValueError, TypeError: as the checks of each entry; or different batch sizes.
    """
    check_pair(data)
    sides: list[ImageInput | Features] = []
    for side in "01":
        if f"features{side}" in data:
            features = data[f"features{side}"]
            sides.append(check_features(f"features{side}", features, widths, device, dtype, values=values))
            continue
        mask = None
        pixels = check_image(f"image{side}", data[f"image{side}"], device)
        if data.get(f"mask{side}") is not None:
            shape = (pixels.shape[0], *pixels.shape[-2:])
            mask = check_mask(f"mask{side}", data[f"mask{side}"], f"image{side}", shape, device, values=values)
        if values:
            check_range(f"image{side}", pixels, mask)
        sides.append(ImageInput(pixels, mask))
    check_same_batch(sides[0][0].shape[0], sides[1][0].shape[0])
    return PairInput(*sides)


def check_max_matches(max_matches: Any, size0: tuple[int, ...], multiple: int) -> None:
    """A number of matches that image 0, completed to multiples of ``multiple`` pixels, has coarse cells for.

    Raises:
        TypeError: no int.
        ValueError: less than 1, or more than there are cells.
    """
    if isinstance(max_matches, bool) or not isinstance(max_matches, int):
        raise TypeError(f"max_matches: expected an int, got {max_matches!r}.")
    height, width = (-(-side // multiple) * multiple // CELL for side in size0)
    if not 1 <= max_matches <= height * width:
        raise ValueError(f"max_matches: expected 1 to {height * width}, the coarse cells of image0, got {max_matches}.")


def check_same_batch(batch0: int, batch1: int) -> None:
    """Both sides hold the same number of images.

    Raises:
        ValueError: they do not.
    """
    if batch0 != batch1:
        raise ValueError(
            f"data: expected the same batch size on both sides, got {batch0} and {batch1}. "
            "To match one image against many, expand its features."
        )


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}. Extract the features with this model.")


def _check_map(name: str, x: Tensor, dtype: torch.dtype, *, values: bool) -> None:
    """One reduction, as `check_range`; skipped while compiling."""
    expected = _FLOATS if torch.is_autocast_enabled(x.device.type) else (dtype,)
    if x.dtype not in expected:
        raise TypeError(
            f"{name}: expected {' or '.join(map(str, expected))}, got {x.dtype}. Extract the features with this model."
        )
    if not values or torch.compiler.is_compiling() or x.numel() == 0:
        return
    if not bool(_is_finite(x)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity. Extract the features again.")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(
            f"{name}: expected on the model's device {device}, got {x.device}. Move it with .to({device!s})."
        )


def _visible_extremes(image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """() each: the least and the largest value that no mask (B, H, W) hides."""
    visible = image.detach() if mask is None else image.detach().masked_fill(~mask[:, None], 0)
    low, high = torch.aminmax(visible)
    return low, high


def _is_finite(x: Tensor) -> Tensor:
    """() bool: no NaN, no infinity; an empty tensor has none."""
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = torch.aminmax(x.detach())
    return torch.isfinite(low) & torch.isfinite(high)
