# SPDX-License-Identifier: Apache-2.0
"""Errors of tiled and of reduced matching on a 24-megapixel image and its warp by a known homography.

    python -m benchmarks.tiles --photos FOLDER

Image 0 is a wall of photographs at their own size, 6144 x 4096; image 1 is its warp. Prints, for each way, the number
of matches, the median and the 90 % quantile of the distance to the true place in pixels of the original image 1, the
mean distance of the corners mapped by the estimated homography, the seconds, and the peak of the process's memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from eloftr_ops import match_images
from eloftr_ops.geometry import apply_homography

SIZE = (6144, 4096)
WAYS = {"--resize 640": {"resize": 640}, "--resize 1280": {"resize": 1280}, "--tile 1024": {"tile": 1024}}
H_0TO1 = np.array([[0.93, -0.11, 420.0], [0.10, 0.96, -180.0], [6e-6, -4e-6, 1.0]])  # pixel centres at +0.5


def wall(folder: Path) -> np.ndarray:
    """(4096, 6144) uint8: sixteen photographs of 1536 x 1024."""
    pictures = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as image:
            if image.width >= 1536 and image.height >= 864 and len(pictures) < 16:
                pictures.append(np.array(image.convert("L").resize((1536, 1024), Image.Resampling.BICUBIC)))
    if len(pictures) < 16:
        raise SystemExit(f"{folder}: expected 16 photographs of at least 1536 x 864 pixels, got {len(pictures)}.")
    return np.vstack([np.hstack(pictures[4 * row : 4 * row + 4]) for row in range(4)])


def warped(image: np.ndarray) -> np.ndarray:
    """Image 1."""
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return cv2.warpPerspective(image, np.linalg.inv(half) @ H_0TO1 @ half, SIZE, flags=cv2.INTER_CUBIC)


def measured(folder: Path, way: str) -> dict[str, float]:
    """One way, in this process."""
    image0 = wall(folder)
    image1 = warped(image0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    matches = match_images(image0, image1, **WAYS[way])
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    truth = torch.from_numpy(H_0TO1)[None]
    at = apply_homography(truth, matches.keypoints0.double()[None])[0]
    errors = (at - matches.keypoints1).norm(dim=1).numpy()
    found = matches.homography().matrix
    corners = torch.tensor([[[0.0, 0], [SIZE[0], 0], [0, SIZE[1]], list(SIZE)]], dtype=torch.float64)
    shift = torch.inf
    if found is not None:
        shift = (apply_homography(found[None], corners) - apply_homography(truth, corners)).norm(dim=-1).mean()
    return {
        "matches": len(matches),
        "median_px": float(np.median(errors)),
        "q90_px": float(np.quantile(errors, 0.9)),
        "corner_px": float(shift),
        "seconds": seconds,
        "peak_mib": peak / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--way", choices=list(WAYS), help="this one alone, in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(options.photos, options.way)))
        return
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.tiles", "--photos", str(options.photos), f"--way={way}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout)
        print(f"{way:14} " + "  ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
