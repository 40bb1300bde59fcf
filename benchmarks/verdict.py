# SPDX-License-Identifier: Apache-2.0
"""Calibrate the verdict "related or not" on photographs that show different things, and count what it keeps.

    python -m benchmarks.verdict --photos FOLDER --pairs INDEX.json ... --cache FOLDER [--effort thorough]

Prints the tail of log10 NFA for unrelated pairs (the constants of `eloftr_ops.geometry.verification`), the share of
unrelated pairs called related (also with the tail of one half, counted on the other), and the share of pairs with
overlap that are kept: of all, and of those in which the matcher finds at least 20 true matches. An index is a JSON file
whose "pairs" name "image0" and "image1", relative to the file, and "H", or "K0", "K1", "T_0to1", or "gt_pts0" and
"gt_pts1" as ground truth, pixel centres at integers.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from eloftr_ops import match_images
from eloftr_ops.efforts import EFFORTS, Effort
from eloftr_ops.geometry import verification

MODELS = ("homography", "fundamental")
_LEAST_PAIRS = 40  # both halves have a 5 % quantile


def kept_matches(paths: tuple[Path, Path], resize: int, effort: Effort, cache: Path) -> dict[str, np.ndarray]:
    """Keypoints in pixels of the images as matched, and sizes; computed once, and kept in a folder."""
    name = hashlib.sha256(f"{paths[0]} {paths[1]} {resize} {effort}".encode()).hexdigest()[:24]
    file = cache / f"{name}.npz"
    if not file.exists():
        matches = match_images(*paths, resize=resize, effort=effort)
        keypoints = (
            matches.image0.from_original(matches.keypoints0),
            matches.image1.from_original(matches.keypoints1),
        )
        sizes = (matches.image0.size_wh, matches.image1.size_wh)
        np.savez(file, keypoints0=keypoints[0], keypoints1=keypoints[1], size0=sizes[0], size1=sizes[1])
    return dict(np.load(file))


def log10_nfas(data: dict[str, np.ndarray]) -> dict[str, float]:
    """Of both models."""
    points = (torch.from_numpy(data["keypoints0"]), torch.from_numpy(data["keypoints1"]))
    sizes = (tuple(data["size0"].tolist()), tuple(data["size1"].tolist()))
    return {model: verification.log10_nfa(model, *points, *sizes)[0] for model in MODELS}


def true_matches(data: dict[str, np.ndarray], pair: dict[str, Any]) -> int:
    """How many matches agree with the ground truth, within 5 pixels."""
    ups = [np.diag([*(np.array(pair[f"size{s}"]) / data[f"size{s}"]), 1.0]) for s in "01"]
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    points0, points1 = data["keypoints0"].astype(np.float64), data["keypoints1"].astype(np.float64)
    if "H" in pair:
        H = np.linalg.inv(ups[1]) @ half @ np.array(pair["H"]) @ np.linalg.inv(half) @ ups[0]
        mapped = np.c_[points0, np.ones(len(points0))] @ H.T
        return int((np.linalg.norm(mapped[:, :2] / mapped[:, 2:] - points1, axis=1) < 5).sum())
    if "T_0to1" in pair:
        T = np.array(pair["T_0to1"])
        tx, ty, tz = T[:3, 3]
        E = np.array([[0, -tz, ty], [tz, 0, -tx], [-ty, tx, 0]]) @ T[:3, :3]
        F = np.linalg.inv(pair["K1"]).T @ E @ np.linalg.inv(pair["K0"])
    else:
        truth0, truth1 = np.array(pair["gt_pts0"]), np.array(pair["gt_pts1"])
        method = cv2.FM_8POINT if len(truth0) > 7 else cv2.FM_7POINT
        F, _ = cv2.findFundamentalMat(truth0, truth1, method)
        F = F[:3]
    to_stored = [np.linalg.inv(half) @ up for up in ups]
    errors = verification.epipolar_errors(to_stored[1].T @ F @ to_stored[0], points0, points1)
    return int((errors < 5).sum())


def tail(values: list[float]) -> tuple[float, float]:
    """(a, b) of the line a - b log10(1 / p) through the 5 % quantile and the strongest pair."""
    low, strongest = float(np.percentile(values, 5)), min(values)
    slope = (low - strongest) / (math.log10(len(values) + 1) - math.log10(20))
    return low + slope * math.log10(20), slope


def called_related(pairs: list[dict[str, float]], tails: dict[str, tuple[float, float]]) -> list[bool]:
    """The verdict of each pair."""
    chances = [verification.log10_chance(pair, tails=tails) for pair in pairs]
    return [chance <= math.log10(verification.ACCEPTED_CHANCE) for chance in chances]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of images that show different things")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[], help="JSON files of pairs that overlap")
    parser.add_argument("--cache", type=Path, required=True, help="folder to keep matches in")
    parser.add_argument("--unrelated", type=int, default=300, help="pairs drawn from the photos")
    parser.add_argument("--same", nargs=2, action="append", default=[], help="two photos that show the same")
    parser.add_argument("--resize", type=int, default=480)
    parser.add_argument("--effort", choices=EFFORTS, default="fast", help="of match_images")
    options = parser.parse_args()
    if options.unrelated < _LEAST_PAIRS:
        parser.error(
            f"--unrelated: expected at least {_LEAST_PAIRS}, a tail has no shape in fewer, got {options.unrelated}"
        )
    options.cache.mkdir(parents=True, exist_ok=True)

    same = {frozenset(pair) for pair in options.same}
    photos = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    drawn = random.Random(0).sample(list(itertools.combinations(photos, 2)), options.unrelated)
    drawn = [pair for pair in drawn if frozenset(path.name for path in pair) not in same]
    unrelated = [log10_nfas(kept_matches(pair, options.resize, options.effort, options.cache)) for pair in drawn]
    tails = {model: tail([pair[model] for pair in unrelated]) for model in MODELS}
    for model, (start, slope) in tails.items():
        print(f"tail of {model}: ({start:.2f}, {slope:.2f})")
    false = called_related(unrelated, tails)
    print(f"unrelated pairs called related: {sum(false)} of {len(false)} ({sum(false) / len(false):.1%})")
    halves = unrelated[::2], unrelated[1::2]
    crossed = [
        called_related(counted, {model: tail([pair[model] for pair in fitted]) for model in MODELS})
        for fitted, counted in (halves, halves[::-1])
    ]
    count = sum(map(sum, crossed))
    print(f"  with the tail of one half, in the other: {count} of {len(unrelated)} ({count / len(unrelated):.1%})")

    outcomes: list[tuple[bool, int]] = []
    for index in options.pairs:
        pairs = json.loads(index.read_text(encoding="utf-8"))["pairs"]
        paths = [(index.parent / pair["image0"], index.parent / pair["image1"]) for pair in pairs]
        found = [kept_matches(pair, options.resize, options.effort, options.cache) for pair in paths]
        kept = called_related([log10_nfas(data) for data in found], tails)
        right = [true_matches(data, pair) for data, pair in zip(found, pairs, strict=True)]
        print(f"{index.stem}: {sum(kept)} of {len(kept)} kept")
        for pair, data, good, count in zip(pairs, found, kept, right, strict=True):
            if not good:
                name = pair.get("name", pair["image0"])
                print(f"  lost: {name}, {count} true of {len(data['keypoints0'])} matches")
        outcomes += zip(kept, right, strict=True)
    for least in (0, 20):
        kept = [good for good, count in outcomes if count >= least]
        if kept:
            share = f"{sum(kept)} of {len(kept)} ({sum(kept) / len(kept):.1%})"
            print(f"pairs with overlap and at least {least} true matches, kept: {share}")


if __name__ == "__main__":
    main()
