# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops match`` and ``eloftr-ops demo``: from two image files to a file of matches."""

from __future__ import annotations

import contextlib
import enum
import importlib.resources
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer

from eloftr_ops.cli.common import (
    Device,
    Report,
    Threads,
    UsageError,
    Weights,
    print_line,
    reported_mistakes,
)
from eloftr_ops.image_matches import INLIER_THRESHOLD
from eloftr_ops.io import MATCH_SUFFIXES, FileError, check_output
from eloftr_ops.matching import DEFAULT_RESIZE, DEFAULT_WEIGHTS, ImageMatches, match_images
from eloftr_ops.visualization import PICTURE_SUFFIXES
from eloftr_ops.wording import describe_device, describe_inliers, describe_verdict


class Model(enum.StrEnum):
    """Two-view model whose inliers are counted."""

    homography = "homography"
    fundamental = "fundamental"
    none = "none"


class EffortChoice(enum.StrEnum):
    """How often to look at a pair."""

    fast = "fast"
    normal = "normal"
    thorough = "thorough"


_Image = typer.Argument(help="Image file or http(s) URL.", show_default=False)
_Output = typer.Option("--output", "-o", help="Write the matches: .npz, .json or .csv.")
_Viz = typer.Option(help="Write a picture (.png, .jpg, .webp, .pdf, .svg), or a page with a slider and zoom (.html).")
_Resize = typer.Option(min=0, help="Reduce longer images to this long side, in pixels, to match them; 0: never.")
_Threshold = typer.Option(help="Least confidence of a match; the weights' own by default.")
_MaxMatches = typer.Option(min=1, help="Keep the most confident ones only.")
_Model = typer.Option(help="Count the inliers of this model (OpenCV's MAGSAC++).")
_Tile = typer.Option(
    min=256,
    help="Match large images at full size, in tiles of so many pixels: 1024; --resize is for a first pass.",
)
_Effort = typer.Option(
    help="fast: look once. normal: warp the images so that they look alike, look again. "
    "thorough: also search through turned, reduced and slanted views."
)
_Seconds = typer.Option(min=0, help="With more effort: start no new look after so many seconds.")
_InlierThreshold = typer.Option(help="Largest error of an inlier, in pixels of the images as matched.")


def match(
    image0: Annotated[str, _Image],
    image1: Annotated[str, _Image],
    output: Annotated[Path | None, _Output] = None,
    viz: Annotated[Path | None, _Viz] = None,
    weights: Weights = DEFAULT_WEIGHTS,
    resize: Annotated[int, _Resize] = DEFAULT_RESIZE,
    device: Device = "auto",
    threshold: Annotated[float | None, _Threshold] = None,
    max_matches: Annotated[int | None, _MaxMatches] = None,
    tile: Annotated[int | None, _Tile] = None,
    effort: Annotated[EffortChoice, _Effort] = EffortChoice.fast,
    seconds: Annotated[float | None, _Seconds] = None,
    model: Annotated[Model, _Model] = Model.fundamental,
    inlier_threshold: Annotated[float, _InlierThreshold] = INLIER_THRESHOLD,
    threads: Threads = None,
) -> None:
    """Match two images; keypoints are in pixels of the images as they are stored, upright."""
    with reported_mistakes():
        if output is not None:
            check_output(output, MATCH_SUFFIXES)
        if viz is not None:
            check_output(viz, PICTURE_SUFFIXES)
        if not 0 < inlier_threshold < float("inf"):
            raise UsageError(f"--inlier-threshold: expected a positive number, got {inlier_threshold}.")
        if threads is not None:
            torch.set_num_threads(threads)
        matches = match_images(
            image0,
            image1,
            weights=weights,
            device=device,
            resize=resize,
            threshold=threshold,
            max_matches=max_matches,
            tile=tile,
            effort=effort.value,
            seconds=seconds,
        )
        _write_and_print(matches, model, inlier_threshold, output, viz)


def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder to write into; made if it is missing.")] = (
        Path("eloftr-demo")
    ),
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Match a bundled pair of images, write the matches and a picture, and compare with the true homography."""
    assets = importlib.resources.files("eloftr_ops") / "assets"
    with reported_mistakes(), contextlib.ExitStack() as stack:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{output_dir}: the folder cannot be made: {error.strerror}.") from error
        if threads is not None:
            torch.set_num_threads(threads)
        names = ("demo_0.jpg", "demo_1.jpg")
        paths = [stack.enter_context(importlib.resources.as_file(assets / name)) for name in names]
        matches = match_images(paths[0], paths[1], weights=weights, device=device)
        output, viz = output_dir / "matches.npz", output_dir / "matches.png"
        console = _write_and_print(matches, Model.homography, INLIER_THRESHOLD, output, viz)
        truth = json.loads((assets / "demo.json").read_text(encoding="utf-8"))["H_0to1"]
        found = matches.homography().matrix
        if found is not None:
            error_px = _corner_error(found.numpy(), np.array(truth), matches.image0.original_size_wh)
            value = f"{error_px:.2f} px, mean over the four corners, to the true homography"
            print_line(console, "corner error", value)


def _write_and_print(
    matches: ImageMatches, model: Model, inlier_threshold: float, output: Path | None, viz: Path | None
) -> Report:
    """Files first: the reader of what is printed may be gone."""
    chosen = None if model is Model.none else model.value
    written = [path for path in (output, viz) if path is not None]
    for path in written:
        matches.save(path, model=chosen, threshold=inlier_threshold)
    console = Report()
    for side, name, loaded in zip("01", matches.names, (matches.image0, matches.image1), strict=True):
        width, height = loaded.original_size_wh
        if matches.coarse is not None:
            print_line(console, f"image {side}", f"{name}  {width}x{height} in tiles")
            continue
        reduced = "" if loaded.size_wh == loaded.original_size_wh else " as {}x{}".format(*loaded.size_wh)
        print_line(console, f"image {side}", f"{name}  {width}x{height}{reduced}")
        for note in loaded.notes:
            print_line(console, "", note)
    count = len(matches)
    none = "0: no match above the threshold; try a lower --threshold"
    print_line(console, "matches", f"{count}" if count else none)
    if matches.looks > 1 or matches.expired:
        ended = "; the time was spent" if matches.expired else ""
        views = ", then ".join(matches.views)
        print_line(console, "looks", f"{matches.looks}; the matches come from: {views}{ended}")
    print_line(console, "time", f"{matches.seconds:.2f} s on {describe_device(matches.device)}")
    if chosen is not None and count:
        inliers = describe_inliers(matches, chosen, inlier_threshold)
        other = "; try --model homography" if inliers.startswith("not") and chosen == "fundamental" else ""
        print_line(console, chosen, inliers + other)
    if count:
        print_line(console, "verdict", describe_verdict(matches))
    for path in written:
        print_line(console, "written", str(path))
    return console


def _corner_error(H: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], size_wh: tuple[int, int]) -> float:
    """Mean distance, in image 1, between the corners of image 0 mapped by both homographies."""
    width, height = size_wh
    corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], dtype=np.float64)
    mapped = [(corners @ matrix.T)[:, :2] / (corners @ matrix.T)[:, 2:] for matrix in (H, truth)]
    return float(np.linalg.norm(mapped[0] - mapped[1], axis=1).mean())
