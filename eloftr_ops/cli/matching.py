# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops match`` and ``eloftr-ops demo``: from two image files to a file of matches."""

from __future__ import annotations

import contextlib
import enum
import importlib.resources
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from torch import Tensor

from eloftr_ops.checks import MIN_SIZE
from eloftr_ops.cli.common import (
    Device,
    Threads,
    UsageError,
    Weights,
    describe_device,
    load_matcher,
    print_line,
    reported_mistakes,
)
from eloftr_ops.io import MATCH_SUFFIXES, FileError, LoadedImage, check_output, read_image, write_matches
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.visualization import PICTURE_SUFFIXES, draw_matches


class Model(str, enum.Enum):
    """Two-view model whose inliers are counted."""

    homography = "homography"
    fundamental = "fundamental"
    none = "none"


_MATRIX = {Model.homography: "H_0to1", Model.fundamental: "F_0to1"}


@dataclass(frozen=True)
class _Settings:
    weights: str = "small"
    resize: int = 640
    device: str = "auto"
    threshold: float | None = None
    max_matches: int | None = None
    model: Model = Model.fundamental
    inlier_threshold: float = 1.5
    threads: int | None = None


class _Result(NamedTuple):
    """Keypoints of both images in the pixels that were matched, on the CPU."""

    keypoints0: Tensor  # (M, 2)
    keypoints1: Tensor  # (M, 2)
    confidence: Tensor  # (M,)
    inliers: (
        npt.NDArray[np.bool_] | None
    )  # (M,), all False if no model was found; None: no model was asked for
    matrix: npt.NDArray[np.float64] | None  # (3, 3) between the original images' pixels; None: no model
    seconds: float


def match(
    image0: Annotated[Path, typer.Argument(help="First image.", show_default=False)],
    image1: Annotated[Path, typer.Argument(help="Second image.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the matches: .npz, .json or .csv.")
    ] = None,
    viz: Annotated[
        Path | None, typer.Option(help="Write a picture: .png, .jpg, .webp, .pdf or .svg.")
    ] = None,
    weights: Weights = "small",
    resize: Annotated[
        int,
        typer.Option(
            min=0, help="Reduce longer images to this long side, in pixels, to match them; 0: never."
        ),
    ] = 640,
    device: Device = "auto",
    threshold: Annotated[
        float | None, typer.Option(help="Least confidence of a match; the weights' own by default.")
    ] = None,
    max_matches: Annotated[int | None, typer.Option(min=1, help="Keep the most confident ones only.")] = None,
    model: Annotated[Model, typer.Option(help="Count the inliers of this model (OpenCV's MAGSAC++).")] = (
        Model.fundamental
    ),
    inlier_threshold: Annotated[
        float, typer.Option(help="Largest error of an inlier, in pixels of the images as matched.")
    ] = 1.5,
    threads: Threads = None,
) -> None:
    """Match two images; keypoints are in pixels of the images as they are stored, upright."""
    settings = _Settings(weights, resize, device, threshold, max_matches, model, inlier_threshold, threads)
    console = Console(highlight=False)
    with reported_mistakes():
        if output is not None:
            check_output(output, MATCH_SUFFIXES)
        if viz is not None:
            check_output(viz, PICTURE_SUFFIXES)
        _check_numbers(settings)
        pair = (_readable(image0, settings.resize), _readable(image1, settings.resize))
        _match_and_report(console, (str(image0), str(image1)), pair, settings, output, viz)


def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder to write into; made if it is missing.")] = (
        Path("eloftr-demo")
    ),
    weights: Weights = "small",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Match a bundled pair of images, write the matches and a picture, and compare with the true homography."""
    settings = _Settings(weights=weights, device=device, model=Model.homography, threads=threads)
    console = Console(highlight=False)
    assets = importlib.resources.files("eloftr_ops") / "assets"
    with reported_mistakes(), contextlib.ExitStack() as stack:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{output_dir}: the folder cannot be made: {error.strerror}.") from error
        names = ("demo_0.jpg", "demo_1.jpg")
        paths = [stack.enter_context(importlib.resources.as_file(assets / name)) for name in names]
        pair = (_readable(paths[0], settings.resize), _readable(paths[1], settings.resize))
        output, viz = output_dir / "matches.npz", output_dir / "matches.png"
        result = _match_and_report(console, names, pair, settings, output, viz)
    truth = json.loads((assets / "demo.json").read_text(encoding="utf-8"))["H_0to1"]
    if result.matrix is not None:
        error_px = _corner_error(result.matrix, np.array(truth), pair[0].original_size_wh)
        print_line(
            console, "corner error", f"{error_px:.2f} px, mean over the four corners, to the true homography"
        )


def _check_numbers(settings: _Settings) -> None:
    if not 0 < settings.inlier_threshold < float("inf"):
        raise UsageError(f"--inlier-threshold: expected a positive number, got {settings.inlier_threshold}.")


def _readable(path: Path, resize: int) -> LoadedImage:
    loaded = read_image(path, resize=resize or None)
    if min(loaded.size_wh) < MIN_SIZE:
        width, height = loaded.size_wh
        reduced = loaded.size_wh != loaded.original_size_wh
        raise UsageError(
            f"{path}: {width}x{height} pixels{f' after --resize {resize}' if reduced else ''}, expected at least "
            f"{MIN_SIZE} on each side.{' Pass a larger --resize.' if reduced else ''}"
        )
    return loaded


def _match_and_report(
    console: Console,
    names: tuple[str, str],
    pair: tuple[LoadedImage, LoadedImage],
    settings: _Settings,
    output: Path | None,
    viz: Path | None,
) -> _Result:
    matcher = load_matcher(
        settings.weights, settings.device, threads=settings.threads, threshold=settings.threshold
    )
    result = _match(matcher, pair, settings)
    for side, name, loaded in zip("01", names, pair, strict=True):
        width, height = loaded.original_size_wh
        reduced = "" if loaded.size_wh == loaded.original_size_wh else " as {}x{}".format(*loaded.size_wh)
        print_line(console, f"image {side}", f"{name}  {width}x{height}{reduced}")
    count = len(result.confidence)
    print_line(
        console,
        "matches",
        f"{count}" if count else "0: no match above the threshold; try a lower --threshold",
    )
    print_line(
        console, "time", f"{result.seconds:.2f} s on {describe_device(next(matcher.parameters()).device)}"
    )
    if settings.model is not Model.none and count:
        print_line(console, settings.model.value, _describe_inliers(result, settings))
    if output is not None:
        matrices = {} if result.matrix is None else {_MATRIX[settings.model]: result.matrix}
        write_matches(
            output,
            pair[0].to_original(result.keypoints0),
            pair[1].to_original(result.keypoints1),
            result.confidence,
            size0_wh=pair[0].original_size_wh,
            size1_wh=pair[1].original_size_wh,
            inliers=result.inliers,
            matrices=matrices,
        )
        print_line(console, "written", str(output))
    if viz is not None:
        inliers = None if result.matrix is None else result.inliers
        # At the size that was matched, where a picture of a huge photo stays a picture.
        images = (pair[0].image, pair[1].image)
        draw_matches(*images, result.keypoints0, result.keypoints1, result.confidence, inliers, path=viz)
        print_line(console, "written", str(viz))
    return result


def _match(matcher: EfficientLoFTR, pair: tuple[LoadedImage, LoadedImage], settings: _Settings) -> _Result:
    device = next(matcher.parameters()).device
    data: dict[str, Any] = {}
    for side, loaded in zip("01", pair, strict=True):
        data[f"image{side}"] = loaded.image.to(device)
        if loaded.mask is not None:
            data[f"mask{side}"] = loaded.mask.to(device)
    start = time.perf_counter()
    with torch.inference_mode():
        found = {name: value.cpu() for name, value in matcher(data).items()}  # waits for the device
    seconds = time.perf_counter() - start
    keypoints0, keypoints1, confidence = found["keypoints0"], found["keypoints1"], found["confidence"]
    if settings.max_matches is not None:
        # Ties go to the earlier match, and those kept stay in their order.
        best = confidence.argsort(descending=True, stable=True)[: settings.max_matches].sort().values
        keypoints0, keypoints1, confidence = keypoints0[best], keypoints1[best], confidence[best]
    inliers, matrix = _robust_model(settings, keypoints0, keypoints1)
    if matrix is not None:
        matrix = _between_originals(matrix, settings.model, pair)
    return _Result(keypoints0, keypoints1, confidence, inliers, matrix, seconds)


def _robust_model(
    settings: _Settings, keypoints0: Tensor, keypoints1: Tensor
) -> tuple[npt.NDArray[np.bool_] | None, npt.NDArray[np.float64] | None]:
    """Inliers (M,) and the matrix (3, 3) between the frames of the keypoints."""
    if settings.model is Model.none:
        return None, None
    from eloftr_ops.geometry import estimate_robust  # OpenCV is not loaded for anything else

    estimate = estimate_robust(
        keypoints0.double(),
        keypoints1.double(),
        torch.zeros(len(keypoints0), dtype=torch.int64),
        batch_size=1,
        model=settings.model.value,
        threshold=settings.inlier_threshold,
    )
    matrix = estimate.model_0to1[0].numpy() if estimate.valid.item() else None
    return estimate.inliers.numpy(), matrix


def _between_originals(
    matrix: npt.NDArray[np.float64], model: Model, pair: tuple[LoadedImage, LoadedImage]
) -> npt.NDArray[np.float64]:
    """The matrix between the images as matched, made one between the original images."""
    up0, up1 = (np.diag([*loaded.scale_xy, 1.0]) for loaded in pair)
    if model is Model.homography:
        moved = up1 @ matrix @ np.linalg.inv(up0)
        return moved / moved[2, 2] if moved[2, 2] else moved  # OpenCV's and kornia's scale
    moved = np.linalg.inv(up1) @ matrix @ np.linalg.inv(up0)
    scaled: npt.NDArray[np.float64] = moved / np.linalg.norm(moved)
    return scaled


def _corner_error(
    H: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], size_wh: tuple[int, int]
) -> float:
    """Mean distance, in image 1, between the corners of image 0 mapped by both homographies."""
    width, height = size_wh
    corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], dtype=np.float64)
    mapped = [(corners @ matrix.T)[:, :2] / (corners @ matrix.T)[:, 2:] for matrix in (H, truth)]
    return float(np.linalg.norm(mapped[0] - mapped[1], axis=1).mean())


def _describe_inliers(result: _Result, settings: _Settings) -> str:
    if result.inliers is None or result.matrix is None:
        other = "; try --model homography" if settings.model is Model.fundamental else ""
        return f"not determined by the {len(result.confidence)} matches{other}"
    count = int(result.inliers.sum())
    return f"{count} inliers ({count / len(result.inliers):.0%}) within {settings.inlier_threshold:g} px"
