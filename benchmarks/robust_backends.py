# SPDX-License-Identifier: Apache-2.0
"""Accuracy and time of the backends of `estimate_robust` on real pairs with known poses, on the same matches.

`python -m benchmarks.robust_backends INDEX.json` reads a list of pairs: `image0` and `image1` relative to the file,
`K0`, `K1`, `T_0to1` with pixel centres at integers. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import eloftr_ops
from eloftr_ops.geometry import estimate_robust, to_integer_centers
from eloftr_ops.losses import rotation_angle, translation_direction_angle

LEVELS = (1.0, 3.0, 5.0, 10.0)


class Pair(NamedTuple):
    """Matches of one pair, pixel centres at integers, and its truth."""

    keypoints0: Tensor  # (M, 2)
    keypoints1: Tensor  # (M, 2)
    K0: Tensor  # (3, 3)
    K1: Tensor  # (3, 3)
    T_0to1: Tensor  # (4, 4)


def matched(index: Path, split: str, limit: int | None, resize: int) -> list[Pair]:
    """Match every pair that has a pose."""
    listed: Any = json.loads(index.read_text())
    pairs = listed["pairs"] if isinstance(listed, dict) else listed
    pairs = [p for p in pairs if "T_0to1" in p and p.get("split", split) == split][:limit]
    found = []
    for pair in pairs:
        names = [str(index.parent / pair[name]) for name in ("image0", "image1")]
        out = eloftr_ops.match_images(*names, resize=resize)
        points = [to_integer_centers(torch.as_tensor(x)).double() for x in (out.keypoints0, out.keypoints1)]
        numbers = [torch.tensor(pair[name], dtype=torch.float64) for name in ("K0", "K1", "T_0to1")]
        found.append(Pair(*points, *numbers))
    return found


def auc(errors: Tensor, level: float) -> float:
    """Area under the recall curve up to a level, in percent."""
    return float((1.0 - errors / level).clamp(0.0, 1.0).mean()) * 100.0


def line(backend: str, pairs: list[Pair], threshold: float) -> str:
    """Estimate all pairs in one call, and summarise."""
    index = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(p.keypoints0) for p in pairs]))
    x0, x1 = (torch.cat(points) for points in list(zip(*pairs, strict=True))[:2])
    K0, K1, truth = (torch.stack(values) for values in list(zip(*pairs, strict=True))[2:])
    began, began_cpu = time.perf_counter(), time.process_time()
    found = estimate_robust(
        x0, x1, index, batch_size=len(pairs), model="pose", backend=backend, K0=K0, K1=K1, threshold=threshold
    )
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    T = found.model_0to1
    slide = translation_direction_angle(T[:, :3, 3], truth[:, :3, 3])
    # The sign of a translation shows in no match but by cheirality; it is not counted, as usual.
    slide = torch.minimum(slide, torch.pi - slide)
    errors = torch.rad2deg(torch.maximum(rotation_angle(T[:, :3, :3], truth[:, :3, :3]), slide))
    errors = torch.where(found.valid, errors, float("inf"))
    cells = [f"{auc(errors, level):.1f}" for level in LEVELS]
    each = f"{1000 * wall / len(pairs):.0f} | {1000 * cpu / len(pairs):.0f}"
    return f"| {backend} | {' | '.join(cells)} | {int(found.valid.sum())} of {len(pairs)} | {each} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=Path)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--resize", type=int, default=640)
    parser.add_argument("--threshold", type=float, default=1.0)
    parser.add_argument("--backends", nargs="+", default=["opencv", "poselib", "torch"])
    arguments = parser.parse_args()
    pairs = matched(arguments.index, arguments.split, arguments.limit, arguments.resize)
    heads = ["backend", *(f"AUC@{level:.0f}" for level in LEVELS), "valid", "ms per pair", "of CPU time"]
    print(f"{len(pairs)} pairs, {sum(len(p.keypoints0) for p in pairs) // len(pairs)} matches each\n")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for backend in arguments.backends:
        print(line(backend, pairs, arguments.threshold), flush=True)


if __name__ == "__main__":
    main()
