# SPDX-License-Identifier: Apache-2.0
"""Two images in, their matches out: one call for files, URLs, Pillow images, arrays and tensors."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eloftr_ops.checks import MIN_SIZE
from eloftr_ops.config import check_choice
from eloftr_ops.efforts import Effort
from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.image_matches import ImageMatches, TwoViewModel
from eloftr_ops.images import ImageSource, LoadedImage, load_image
from eloftr_ops.matchers import Matcher, checked_matcher, choose_device, device_of, kept_matcher, load_matcher
from eloftr_ops.tiles import match_tiles

if TYPE_CHECKING:
    from eloftr_ops.guided import GuidedMatcher

__all__ = [
    "ImageMatches",
    "Matcher",
    "TwoViewModel",
    "choose_device",
    "load_matcher",
    "match_images",
    "match_loaded",
]

DEFAULT_WEIGHTS = "small"
DEFAULT_RESIZE = 640
_LEAST_TILE = 256
_LEAST_CONTRAST = 2 / 255  # between the brightest and the darkest pixel; less is no texture


def match_images(
    image0: ImageSource,
    image1: ImageSource,
    weights: str | os.PathLike[str] | Matcher = DEFAULT_WEIGHTS,
    device: str | torch.device = "auto",
    resize: int | None = DEFAULT_RESIZE,
    threshold: float | None = None,
    max_matches: int | None = None,
    *,
    mask0: npt.NDArray[Any] | Tensor | None = None,
    mask1: npt.NDArray[Any] | Tensor | None = None,
    tile: int | None = None,
    effort: Effort = "fast",
    seconds: float | None = None,
) -> ImageMatches:
    """Match two images.

    The matcher is kept: the next call with the same weights, device and threshold starts at once.

    Convention:
        Keypoints are (x, y) in pixels of the images as given, whatever ``resize`` is; the centre of pixel (x, y) is
        (x + 0.5, y + 0.5). No gradient; for gradients call the matcher itself.

    Args:
        image0: a path, an http(s) URL, a ``PIL.Image.Image``, an array (H, W) or (H, W, C), or a tensor (H, W),
            (C, H, W) or (1, C, H, W): gray, RGB or RGBA; uint8, uint16, bool, or floating point in [0, 1].
        image1: likewise.
        weights: "small" (embedded), a file, a folder or a Hugging Face repository; or a matcher: an `EfficientLoFTR`
            in evaluation mode, its optimized copy, or anything that takes and gives kornia LoFTR's dictionaries.
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1", ...
        resize: images with a longer long side are reduced to it before matching; 0 or None: never.
        threshold: least confidence of a match; the weights' own by default. For a matcher: its own, or a higher one.
        max_matches: keep so many matches, the most confident; None: all.
        mask0: (H, W) of the size of image 0 as given, zero where no match may lie.
        mask1: likewise.
        tile: match the images at full size, in tiles of this long side (at least 256, 1024 is good); for large images.
            A first pass at ``resize`` finds which parts correspond. See `eloftr_ops.tiles.match_tiles`.
        effort: ``fast``: look once. ``normal``: warp the images so that they look alike, and look again. ``thorough``:
            search through turned, reduced and slanted views, too, where the first look finds little. See
            `eloftr_ops.guided.GuidedMatcher`.
        seconds: with more effort: start no new look after so many seconds.

    Returns:
        The matches. M = 0 if there are none; also if an image is blank: less than two of 255 gray levels between its
        darkest and its brightest pixel.

    Raises:
        FileError: an image that cannot be read.
        ArgumentError: anything else that cannot be used; the message begins with the argument's name. Both are
            ValueErrors.
        torch.OutOfMemoryError: the images are too large for the GPU.
    """
    _check_numbers(resize, threshold, max_matches, tile)
    guided = _checked_effort(effort, seconds, tile)
    size = None if tile or guided else resize  # looks at a part of an image take what detail there is
    pair = (_loaded("image0", image0, size, mask0), _loaded("image1", image1, size, mask1))
    if isinstance(weights, (str, os.PathLike)):
        matcher = kept_matcher(weights, device, threshold)
    else:
        matcher = checked_matcher(weights, device, threshold)
    names = (_name("image0", image0), _name("image1", image1))
    if guided:
        from eloftr_ops.guided import GuidedMatcher  # OpenCV is not loaded for one look

        looking = GuidedMatcher(matcher, effort, size=resize or None, seconds=seconds)
        return _match_guided(looking, *pair, names, threshold, max_matches)
    if tile and max(*pair[0].size_wh, *pair[1].size_wh) > (resize or DEFAULT_RESIZE):
        coarse_size = resize or DEFAULT_RESIZE
        return _match_in_tiles(matcher, *pair, names, threshold, max_matches, tile, coarse_size)
    return match_loaded(matcher, *pair, names=names, threshold=threshold, max_matches=max_matches)


def _checked_effort(effort: Effort, seconds: float | None, tile: int | None) -> bool:
    """Whether it takes a guided matcher."""
    try:
        guided = bool(check_choice("effort", effort, Effort) != "fast")
    except ValueError as error:
        raise ArgumentError("effort", str(error).removeprefix("effort: ")) from error
    if guided and tile:
        raise ArgumentError("effort", f"expected fast with tile, got {effort}. Leave out one of them.")
    if seconds is not None and not guided:
        raise ArgumentError(
            "seconds", "expected None with effort fast, which looks once. Pass effort normal or thorough."
        )
    return guided


def _match_guided(
    matcher: GuidedMatcher,
    image0: LoadedImage,
    image1: LoadedImage,
    names: tuple[str, str],
    threshold: float | None,
    max_matches: int | None,
) -> ImageMatches:
    """Several looks at both images."""
    device = device_of(matcher.matcher)
    start = time.perf_counter()
    if has_texture(image0) and has_texture(image1):
        with torch.inference_mode():
            masks = [None if image.mask is None else image.mask.to(device) for image in (image0, image1)]
            found = matcher.match(image0.image.to(device), image1.image.to(device), *masks)
        fields = [field.cpu().float().clone() for field in found[:3]]
        report = found.reports[0]
    else:
        fields, report = [torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0)], None
    seconds = time.perf_counter() - start
    kept = _kept(fields[2], threshold, max_matches)
    return ImageMatches(
        image0.to_original(fields[0][kept]),
        image1.to_original(fields[1][kept]),
        fields[2][kept],
        image0 if matcher.size is None else image0.reduced(matcher.size),
        image1 if matcher.size is None else image1.reduced(matcher.size),
        names,
        seconds,
        device,
        effort=matcher.effort,
        looks=1 if report is None else report.looks,
        expired=report is not None and report.expired,
        views=("as they are",) if report is None else report.views,
    )


def _match_in_tiles(
    matcher: Matcher,
    image0: LoadedImage,
    image1: LoadedImage,
    names: tuple[str, str],
    threshold: float | None,
    max_matches: int | None,
    tile: int,
    resize: int,
) -> ImageMatches:
    """A coarse pass, then both images at full size tile by tile."""
    start = time.perf_counter()
    coarse = match_loaded(matcher, image0.reduced(resize), image1.reduced(resize), names=names, threshold=threshold)

    def match(part0: LoadedImage, part1: LoadedImage) -> tuple[Tensor, Tensor, Tensor]:
        return _found(matcher, part0, part1, coarse.device)

    fine = match_tiles(
        match,
        image0,
        image1,
        coarse.keypoints0.double().numpy(),
        coarse.keypoints1.double().numpy(),
        tile=tile,
    )
    kept = _kept(fine.confidence, threshold, max_matches)
    return dataclasses.replace(
        coarse,
        keypoints0=fine.keypoints0[kept],
        keypoints1=fine.keypoints1[kept],
        confidence=fine.confidence[kept],
        seconds=time.perf_counter() - start,
        coarse=coarse,
        _kept={},
    )


def match_loaded(
    matcher: Matcher,
    image0: LoadedImage,
    image1: LoadedImage,
    *,
    names: tuple[str, str] = ("image0", "image1"),
    threshold: float | None = None,
    max_matches: int | None = None,
) -> ImageMatches:
    """Match images that are loaded already, by anything that speaks kornia LoFTR's dictionaries.

    Args:
        matcher: takes a dictionary with ``image0``, ``image1`` (1, 1, H, W) and perhaps ``mask0``, ``mask1``
            (1, H, W), on its device; gives one with ``keypoints0``, ``keypoints1`` (M, 2) and ``confidence`` (M,).
        image0: from `load_image`.
        image1: likewise.
        names: what to call the images.
        threshold: matches whose confidence is not above it are left out.
        max_matches: keep so many matches, the most confident.
    """
    device = device_of(matcher)
    start = time.perf_counter()
    keypoints0, keypoints1, confidence = _found(matcher, image0, image1, device)
    seconds = time.perf_counter() - start
    kept = _kept(confidence, threshold, max_matches)
    return ImageMatches(
        image0.to_original(keypoints0[kept]),
        image1.to_original(keypoints1[kept]),
        confidence[kept],
        image0,
        image1,
        names,
        seconds,
        device,
    )


def _found(
    matcher: Matcher, image0: LoadedImage, image1: LoadedImage, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints of both images in pixels of these, and confidence, on the CPU in float32."""
    if not (has_texture(image0) and has_texture(image1)):
        # Whatever a matcher finds in a blank image lies anywhere.
        return torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0)
    data: dict[str, Any] = {}
    for side, loaded in zip("01", (image0, image1), strict=True):
        data[f"image{side}"] = loaded.image.to(device)
        if loaded.mask is not None:
            data[f"mask{side}"] = loaded.mask.to(device)
    with torch.inference_mode():
        found = matcher(data)
        keypoints0, keypoints1, confidence = (
            found[name].cpu().float() for name in ("keypoints0", "keypoints1", "confidence")
        )
    return keypoints0.clone(), keypoints1.clone(), confidence.clone()


def has_texture(loaded: LoadedImage) -> bool:
    """Whether the image has two gray levels of 255 between its darkest and its brightest visible pixel."""
    pixels = loaded.image[0] if loaded.mask is None else loaded.image[0][loaded.mask]
    return pixels.numel() > 0 and float(pixels.max() - pixels.min()) >= _LEAST_CONTRAST


def _kept(confidence: Tensor, threshold: float | None, max_matches: int | None) -> Tensor:
    """Indexes of the matches to report, ascending."""
    indexes = torch.arange(len(confidence))
    if threshold is not None:
        indexes = indexes[confidence > threshold]
    if max_matches is not None:
        # Ties go to the earlier match, and those kept stay in their order.
        best = confidence[indexes].argsort(descending=True, stable=True)[:max_matches]
        indexes = indexes[best.sort().values]
    return indexes


def _check_numbers(resize: int | None, threshold: float | None, max_matches: int | None, tile: int | None) -> None:
    limits = (("resize", resize, 0), ("max_matches", max_matches, 1), ("tile", tile, _LEAST_TILE))
    for name, value, least in limits:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ArgumentError(name, f"expected an integer of at least {least}, or None, got {value!r}.")
    if threshold is not None and not 0 <= threshold < float("inf"):
        raise ArgumentError("threshold", f"expected a confidence of 0 or more, got {threshold}.")


def _name(argument: str, source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else argument


def _loaded(argument: str, source: ImageSource, resize: int | None, mask: Any) -> LoadedImage:
    loaded = load_image(argument, source, resize=resize or None)
    if min(loaded.size_wh) < MIN_SIZE:
        width, height = loaded.size_wh
        reduced = loaded.size_wh != loaded.original_size_wh
        raise FileError(
            f"{_name(argument, source)}: {width}x{height} pixels{f' after a resize to {resize}' if reduced else ''}, "
            f"expected at least {MIN_SIZE} on each side.{' Pass a larger resize.' if reduced else ''}"
        )
    return loaded if mask is None else _masked(argument.replace("image", "mask"), loaded, mask)


def _masked(argument: str, loaded: LoadedImage, mask: Any) -> LoadedImage:
    """The image with a mask at its original size laid over it."""
    values = torch.as_tensor(mask).detach().cpu() if isinstance(mask, (np.ndarray, Tensor)) else None
    if values is None:
        raise ArgumentError(argument, f"expected an array or a tensor (H, W), got {type(mask).__name__}.")
    width, height = loaded.original_size_wh
    if values.numel() != width * height or tuple(values.shape[-2:]) != (height, width):
        raise ArgumentError(
            argument,
            f"expected the size of its image, (H, W) = {(height, width)}, got {tuple(values.shape)}.",
        )
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise ArgumentError(argument, "expected finite values, got NaN or infinity. Pass a bool mask.")
    seen = (values.reshape(1, 1, height, width) != 0).float()
    if loaded.size_wh != loaded.original_size_wh:
        size = (loaded.size_wh[1], loaded.size_wh[0])
        seen = torch.nn.functional.interpolate(seen, size, mode="bilinear", antialias=True, align_corners=False)
    visible = seen[0] >= 0.5
    return loaded._replace(mask=visible if loaded.mask is None else visible & loaded.mask)
