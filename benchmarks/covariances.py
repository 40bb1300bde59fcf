# SPDX-License-Identifier: Apache-2.0
"""What covariances of matches are worth: estimates on real pairs with and without them, on the same matches.

`python -m benchmarks.covariances INDEX.json ...` reads lists of pairs: `image0` and `image1` relative to the file, and
either `K0`, `K1`, `T_0to1`, or `H` and for real images `gt_pts0`, `gt_pts1`; pixel centres at integers. Prints a
Markdown table. `--photographs FOLDER --plot FILE.png` plots the calibration on held-out photographs instead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eloftr_ops import EfficientLoFTR
from eloftr_ops.data.synthetic import HomographyPairs
from eloftr_ops.data.textures import PhotoTextures
from eloftr_ops.geometry import PoseEstimate, apply_homography, homography_from_matches, relative_pose_from_matches
from eloftr_ops.losses import rotation_angle, translation_direction_angle
from eloftr_ops.training.calibration import measure_errors, squared_mahalanobis

LEVELS = (1.0, 3.0, 5.0, 10.0)
KERNEL = "geman_mcclure"
RIGHT = 3.0  # pixels


class Pair(NamedTuple):
    """Matches of one pair in pixels of the images as stored, centres at halves, and its truth."""

    matches: dict[str, Tensor]
    truth: dict[str, Tensor]
    size0: tuple[int, int]  # width, height


def matched(matcher: EfficientLoFTR, index: Path, split: str, limit: int | None, longest: int) -> list[Pair]:
    """Match every pair of a split."""
    listed: Any = json.loads(index.read_text())
    pairs = listed["pairs"] if isinstance(listed, dict) else listed
    pairs = [p for p in pairs if p.get("split", split) == split]
    pairs = pairs if limit is None else pairs[:: -(-len(pairs) // limit)]  # of all scenes
    found = []
    for pair in pairs:
        images, sizes, scales = {}, [], []
        for k in (0, 1):
            picture = Image.open(index.parent / pair[f"image{k}"]).convert("L")
            sizes.append(picture.size)
            factor = min(1.0, longest / max(picture.size))
            size = tuple(round(factor * side) for side in picture.size)
            scales.append(torch.tensor(size, dtype=torch.float64) / torch.tensor(picture.size))
            resized = picture.resize(size, Image.Resampling.LANCZOS)
            images[f"image{k}"] = torch.from_numpy(np.array(resized, dtype=np.float32) / 255)[None, None]
        with torch.no_grad():
            out = {name: x.double() for name, x in matcher(images, covariance=True).items()}
        for k, scale in enumerate(scales):
            out[f"keypoints{k}"] = out[f"keypoints{k}"] / scale
            out[f"covariance{k}"] = out[f"covariance{k}"] / scale / scale[:, None]
        names = ("K0", "K1", "T_0to1", "H", "gt_pts0", "gt_pts1")
        truth = {name: torch.tensor(pair[name], dtype=torch.float64) for name in names if name in pair}
        found.append(Pair(out, truth, sizes[0]))
    return found


def estimated_pose(pair: Pair, options: dict[str, Any]) -> PoseEstimate:
    """The robust, refined pose."""
    half = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    K0, K1 = ((pair.truth[name] + half)[None] for name in ("K0", "K1"))
    x0, x1, index = (pair.matches[name] for name in ("keypoints0", "keypoints1", "batch_indexes"))
    return relative_pose_from_matches(x0, x1, K0, K1, index.long(), robust=KERNEL, robust_scale=1.0, **options)


def pose_angle(T_a: Tensor, T_b: Tensor) -> Tensor:
    """Larger of the angles of rotation and of translation direction, up to its sign, in degrees `(B,)`."""
    slide = translation_direction_angle(T_a[:, :3, 3], T_b[:, :3, 3], ignore_sign=True)
    return torch.rad2deg(torch.maximum(rotation_angle(T_a[:, :3, :3], T_b[:, :3, :3]), slide))


def pose_error(pair: Pair, options: dict[str, Any]) -> float:
    """Angle to the true pose."""
    found = estimated_pose(pair, options)
    return float(pose_angle(found.T_0to1, pair.truth["T_0to1"][None])) if bool(found.valid) else float("inf")


def homography_error(pair: Pair, options: dict[str, Any]) -> float:
    """Mean distance in pixels at the labelled points, or at the corners where the truth is exact."""
    x0, x1, index = (pair.matches[name] for name in ("keypoints0", "keypoints1", "batch_indexes"))
    found = homography_from_matches(
        x0, x1, index.long(), batch_size=1, robust=KERNEL, robust_scale=2.0, **options
    )  # fmt: skip
    if not bool(found.valid):
        return float("inf")
    if "gt_pts0" in pair.truth:
        source, target = pair.truth["gt_pts0"][None] + 0.5, pair.truth["gt_pts1"][None] + 0.5
    else:
        width, height = pair.size0
        corners = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
        centres = torch.tensor([corners], dtype=torch.float64)
        source, target = centres + 0.5, apply_homography(pair.truth["H"][None], centres) + 0.5
    return float((apply_homography(found.H_0to1, source) - target).norm(dim=-1).mean())


def estimators(pair: Pair) -> dict[str, dict[str, Any]]:
    """Options by name: nothing else differs."""
    both = {name: pair.matches[name] for name in ("covariance0", "covariance1")}
    round_ones = {
        name: 0.5 * S.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(2, dtype=S.dtype)
        for name, S in both.items()
    }
    confidence = {"weights": pair.matches["confidence"]}
    return {
        "plain": {},
        "confidence as weights": confidence,
        "covariances, made round": round_ones,
        "covariances": both,
    }


def report(index: Path, pairs: list[Pair]) -> None:
    """A table of AUC, and how large the noise of matches is beside that of the pair."""
    kind = pose_error if "T_0to1" in pairs[0].truth else homography_error
    errors: dict[str, list[float]] = {}
    for pair in pairs:
        for name, options in estimators(pair).items():
            errors.setdefault(name, []).append(kind(pair, options))
    count = sum(len(pair.matches["confidence"]) for pair in pairs) // len(pairs)
    print(f"\n{index.stem}: {len(pairs)} pairs, {count} matches each\n")
    print(f"| estimate | {' | '.join(f'AUC@{level:.0f}' for level in LEVELS)} | median error | better in |")
    print("|---" * (len(LEVELS) + 3) + "|")
    plain = torch.tensor(errors["plain"])
    for name, found in errors.items():
        values = torch.tensor(found)
        cells = [f"{100 * float((1 - values / level).clamp(0, 1).mean()):.1f}" for level in LEVELS]
        better = f"{int((values < plain).sum())} of {len(pairs)}"
        print(f"| {name} | {' | '.join(cells)} | {float(values.median()):.3f} | {better} |", flush=True)
    if kind is pose_error:
        halves(pairs)


def halves(pairs: list[Pair]) -> None:
    """How much of a pose's error is noise of single matches: what two random halves of the matches disagree by."""
    generator = torch.Generator().manual_seed(0)
    spreads: dict[str, list[float]] = {"plain": [], "covariances": []}
    for pair in pairs:
        first = torch.rand(len(pair.matches["confidence"]), generator=generator) < 0.5
        sides = [pair._replace(matches={k: x[rows] for k, x in pair.matches.items()}) for rows in (first, ~first)]
        for name, found in spreads.items():
            T = [estimated_pose(side, estimators(side)[name]).T_0to1 for side in sides]
            found.append(float(pose_angle(T[0], T[1])))
    for name, found in spreads.items():
        print(f"\nmedian angle between the poses of two halves of the matches, {name}: {np.median(found):.3f}")


def plot(matcher: EfficientLoFTR, photographs: Path, target: Path, count: int) -> None:
    """Quantiles of the squared Mahalanobis errors on held-out photographs against the chi-square law."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    images = PhotoTextures(photographs).images[::3]
    render, generator = HomographyPairs(images), torch.Generator().manual_seed(2)
    errors = measure_errors(matcher, (render(1, (320, 416), generator) for _ in range(count)), right=RIGHT)
    levels = torch.arange(0.005, 0.995, 0.005, dtype=torch.float64)
    law = -2.0 * torch.log1p(-levels)
    calibrated = squared_mahalanobis(errors, matcher.config.covariance_calibration)
    one_for_all = errors.residual.square().sum(1) / (0.5 * errors.residual.square().sum(1).mean())
    figure, axes = pyplot.subplots(figsize=(5, 4.2))
    axes.plot(law, law, color="0.6", label="chi-square law, two degrees of freedom")
    for values, name in ((one_for_all, "one variance for all matches"), (calibrated, "covariance of each match")):
        axes.plot(law, torch.quantile(values, levels), label=f"{name} (mean {float(values.mean()):.2f})")
    axes.set_xlabel("quantile of the law")
    axes.set_ylabel("quantile of squared Mahalanobis errors")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("indexes", type=Path, nargs="*")
    parser.add_argument("--weights", default="small")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--resize", type=int, default=640)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--pairs", type=int, default=32)
    arguments = parser.parse_args()
    matcher = EfficientLoFTR.from_pretrained(arguments.weights)
    if arguments.plot is not None:
        plot(matcher, arguments.photographs, arguments.plot, arguments.pairs)
    for index in arguments.indexes:
        report(index, matched(matcher, index, arguments.split, arguments.limit, arguments.resize))


if __name__ == "__main__":
    main()
