# SPDX-License-Identifier: Apache-2.0
"""From the model's output to keypoints in pixels of the original images, and to pictures of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from eloftr_ops.integrations.transformers.outputs import EfficientLoFTRKeypointMatchingOutput as Output
from eloftr_ops.integrations.transformers.pairs import flat_pairs, plain_image


def keypoints_on_originals(
    outputs: Output, target_sizes: Tensor | Sequence[Any], threshold: float
) -> list[dict[str, Tensor]]:
    """See :meth:`PairProcessing.post_process_keypoint_matching`."""
    matches, scores, keypoints = outputs.matches, outputs.matching_scores, outputs.keypoints
    if matches is None or scores is None or keypoints is None:
        raise ValueError("outputs: expected keypoints, matches and matching_scores, got an output without them.")
    sizes = _sizes(target_sizes, len(matches)).to(keypoints)
    check_threshold(threshold, scores)
    found = []
    for points, index, score, size in zip(keypoints, matches, scores, sizes, strict=True):
        kept = index[0] >= 0
        if threshold > 0:
            kept = kept & (score[0] > threshold)
        scale = size.flip(-1)  # (2, 2): x, y
        partner = index[0][kept].long()
        found.append(
            {
                "keypoints0": points[0][kept] * scale[0],
                "keypoints1": points[1][partner] * scale[1],
                "matching_scores": score[0][kept],
            }
        )
    return found


def check_threshold(threshold: Any, scores: Tensor | None = None) -> None:
    """A probability; any number where the scores are raw similarities, which exceed 1.

    Raises:
        TypeError: not a number.
        ValueError: another number.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold: expected a number in [0, 1], got {threshold!r}.")
    raw = scores is not None and scores.numel() > 0 and bool((scores > 1.001).any())
    if not (math.isfinite(threshold) if raw else 0 <= threshold <= 1):
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}.")


def drawn_matches(images: Any, found: Sequence[dict[str, Tensor]]) -> list[Image.Image]:
    """See :meth:`PairProcessing.visualize_keypoint_matching`."""
    flat = [_picture(image) for image in flat_pairs(images)]
    if len(flat) != 2 * len(found):
        raise ValueError(
            f"keypoint_matching_output: expected one entry per pair of images, {len(flat) // 2}, got {len(found)}."
        )
    return [_drawn(flat[2 * i], flat[2 * i + 1], matches) for i, matches in enumerate(found)]


def _drawn(image0: Image.Image, image1: Image.Image, matches: dict[str, Tensor]) -> Image.Image:
    canvas = Image.new("RGB", (image0.width + image1.width, max(image0.height, image1.height)))
    canvas.paste(image0, (0, 0))
    canvas.paste(image1, (image0.width, 0))
    draw = ImageDraw.Draw(canvas)
    shift = torch.tensor([image0.width, 0.0])
    # Pillow's pixel centres are integers.
    ends0 = (matches["keypoints0"].detach().cpu().float() - 0.5).tolist()
    ends1 = (matches["keypoints1"].detach().cpu().float() - 0.5 + shift).tolist()
    scores = matches["matching_scores"].detach().cpu().float().clamp(0, 1).tolist()
    for (x0, y0), (x1, y1), score in sorted(zip(ends0, ends1, scores, strict=True), key=lambda m: m[2]):
        draw.line((x0, y0, x1, y1), fill=(round(255 * (1 - score)), round(255 * score), 0), width=1)
        for x, y in ((x0, y0), (x1, y1)):
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill="black")
    return canvas


def _picture(image: Any) -> Image.Image:
    if isinstance(image, str):
        raise ValueError("images: expected images, got a path. Open it: PIL.Image.open(path).")
    if isinstance(image, Image.Image):
        return Image.fromarray(plain_image(image)).convert("RGB")
    values = torch.as_tensor(image).detach().cpu()
    if values.ndim == 3 and values.shape[0] in (1, 3, 4):
        values = values.permute(1, 2, 0)
    if values.is_floating_point():
        values = values * 255 if float(values.max()) <= 1 else values
        values = values.round().clamp(0, 255)
    array = values.to(torch.uint8).numpy()
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array).convert("RGB")


def _sizes(target_sizes: Any, batch: int) -> Tensor:
    """(B, 2, 2): (height, width) of both originals of each pair."""
    count = len(target_sizes) if hasattr(target_sizes, "__len__") else type(target_sizes).__name__
    if count != batch:
        raise ValueError(f"target_sizes: expected one entry per pair of images, {batch}, got {count}.")
    try:
        sizes = torch.as_tensor(target_sizes, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"target_sizes: expected ((height, width), (height, width)) per pair, got {target_sizes!r}."
        ) from error
    if tuple(sizes.shape) != (batch, 2, 2):
        raise ValueError(
            f"target_sizes: expected ((height, width), (height, width)) per pair, shape ({batch}, 2, 2), got "
            f"{tuple(sizes.shape)}."
        )
    if not bool((sizes > 0).all()):
        raise ValueError("target_sizes: expected positive heights and widths, got others.")
    return sizes
