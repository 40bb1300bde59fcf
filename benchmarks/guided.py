# SPDX-License-Identifier: Apache-2.0
"""What guided matching gains and costs on an image against itself, turned or reduced.

    python -m benchmarks.guided [--photo FILE ...] [--threads 2]

Prints, for each change and effort, how many matches lie within 2 pixels of the truth, the looks, and the seconds. The
bundled photograph is the default. Medians over the photographs.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from eloftr_ops import match_images
from eloftr_ops.efforts import EFFORTS

_SIZE = 640
_RIGHT = 2.0  # pixels
_CHANGES = ("turned by 15", "turned by 30", "turned by 45", "turned by 90", "reduced 2", "reduced 3")


def changed(photo: Image.Image, change: str) -> tuple[Image.Image, Tensor]:
    """The photograph turned by degrees or reduced so many times, and the map (3, 3) to it."""
    width, height = photo.size
    kind, amount = change.split()[0], float(change.split()[-1])
    if kind == "reduced":
        small = photo.resize((round(width / amount), round(height / amount)), Image.Resampling.LANCZOS)
        scales = [small.width / width, small.height / height, 1.0]
        return small, torch.diag(torch.tensor(scales, dtype=torch.float64))
    cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
    turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    corners = torch.tensor([[0, 0], [width, 0], [0, height], [width, height]], dtype=torch.float64) @ turn.T
    low = corners.amin(0)
    size = tuple(math.ceil(side - 1e-6) for side in (corners.amax(0) - low).tolist())
    H_0to1 = torch.eye(3, dtype=torch.float64)
    H_0to1[:2, :2], H_0to1[:2, 2] = turn, -low
    back = torch.linalg.inv(H_0to1)[:2].flatten().tolist()  # Pillow's frame puts centres at 0.5, too
    return photo.transform((size[0], size[1]), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC), H_0to1


def right_matches(keypoints0: Tensor, keypoints1: Tensor, H_0to1: Tensor) -> int:
    """How many matches lie within 2 pixels of the truth."""
    mapped = keypoints0.double() @ H_0to1[:2, :2].T + H_0to1[:2, 2]
    return int(((mapped - keypoints1).norm(dim=1) < _RIGHT).sum())


def opened(paths: Sequence[Path]) -> list[Image.Image]:
    """Gray photographs with a long side of at most 640."""
    photos = []
    for path in paths:
        with Image.open(path) as image:
            photo = image.convert("L")
        photo.thumbnail((_SIZE, _SIZE), Image.Resampling.LANCZOS)
        photos.append(photo)
    return photos


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = Path(str(resources.files("eloftr_ops") / "assets" / "demo_0.jpg"))
    parser.add_argument("--photo", type=Path, nargs="+", default=[bundled])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--changes", nargs="+", default=_CHANGES, help="for instance 'turned by 45' 'reduced 2'")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    photos = opened(options.photo)
    match_images(photos[0], photos[0])  # loads the weights
    print("| image 1 | " + " | ".join(EFFORTS) + " |")
    print("| --- |" + " --- |" * len(EFFORTS))
    for change in options.changes:
        cells = []
        for effort in EFFORTS:
            rows = []
            for photo in photos:
                other, H_0to1 = changed(photo, change)
                found = match_images(photo, other, effort=effort)
                right = right_matches(found.keypoints0, found.keypoints1, H_0to1)
                rows.append((right, len(found), found.looks, found.seconds))
            right, count, looks, seconds = (statistics.median(column) for column in zip(*rows, strict=True))
            cells.append(f"{right:,.0f} of {count:,.0f}, {looks:g} looks, {seconds:.2f} s")
        print(f"| {change} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
