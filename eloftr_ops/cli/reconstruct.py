# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops reconstruct``: a folder of photographs in, a sparse model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from eloftr_ops.cli.common import Report, Threads, UsageError, Weights, print_line, reported_mistakes
from eloftr_ops.cli.match_pairs import watch_pairs
from eloftr_ops.cli.pair_options import (
    Batch,
    Devices,
    Images,
    Memory,
    Neighbours,
    Pairs,
    PairsOption,
    Resize,
    Source,
    Threshold,
    Window,
)
from eloftr_ops.matching import DEFAULT_RESIZE, DEFAULT_WEIGHTS
from eloftr_ops.reconstruction.bulk import PairChoice
from eloftr_ops.reconstruction.engine import MatchSettings
from eloftr_ops.reconstruction.reconstruct import Grid, ReconstructionReport, reconstruct
from eloftr_ops.reconstruction.tracks import TrackConfig
from eloftr_ops.storage import FolderInUseError

__all__ = ["reconstruct_command"]

_Output = typer.Option("--output", "-o", help="Folder to write into; made if it is missing.")
_CameraModel = typer.Option(help="COLMAP's: SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL, OPENCV, ...")
_CellSize = typer.Option(help="Round keypoints to cells of so many pixels, as hloc does, in place of tracks.")
_MaxError = typer.Option(help="With --cell-size: side of the squares that keypoints are rounded to.")
_Overwrite = typer.Option("--overwrite", help="Match anew, too; without it, finished pairs are used again.")


def reconstruct_command(
    source: Source,
    output: Annotated[Path, _Output],
    pairs: PairsOption = Pairs.exhaustive,
    images: Images = None,
    window: Window = 10,
    neighbours: Neighbours = 20,
    weights: Weights = DEFAULT_WEIGHTS,
    resize: Resize = DEFAULT_RESIZE,
    threshold: Threshold = None,
    batch: Batch = 4,
    devices: Devices = "auto",
    memory: Memory = 4.0,
    camera_model: Annotated[str, _CameraModel] = "SIMPLE_RADIAL",
    cell_size: Annotated[float | None, _CellSize] = None,
    max_error: Annotated[float | None, _MaxError] = None,
    overwrite: Annotated[bool, _Overwrite] = False,
    threads: Threads = None,
) -> None:
    """Reconstruct a scene from photographs: matches, tracks, and a sparse model by COLMAP."""
    with reported_mistakes():
        if max_error is not None and cell_size is None:
            raise UsageError("--max-error: it needs --cell-size.")
        if threads is not None:
            torch.set_num_threads(threads)
        grid = None if cell_size is None else Grid(cell_size, max_error or cell_size)
        try:
            report = reconstruct(
                PairChoice(source, pairs.value, images, window, neighbours),
                output,
                MatchSettings(weights, resize, threshold, batch, int(memory * 2**30)),
                grid or TrackConfig(),
                devices=devices,
                camera_model=camera_model,
                threads=threads or -1,
                overwrite=overwrite,
                watch=watch_pairs,
            )
        except FolderInUseError as error:
            raise UsageError(str(error)) from error
        except KeyboardInterrupt:
            message = "Interrupted. What is matched is kept; the same command goes on from there."
            Console(stderr=True, highlight=False).print(message)
            raise typer.Exit(130) from None
        _print(report, output)


def _print(report: ReconstructionReport, output: Path) -> None:
    console = Report()
    more = len(report.models) - 1
    others = f"; {more} more model{'s' if more > 1 else ''}" if more > 0 else ""
    print_line(console, "registered", f"{report.registered} of {report.images} images{others}")
    print_line(console, "points", f"{report.points}, in {report.mean_track_length:.2f} images each")
    print_line(console, "reprojection", f"{report.reprojection_error:.3f} px, mean")
    known = f"{report.known_focals} of {report.images} from EXIF data, the others guessed and refined"
    print_line(console, "focal length", known)
    if report.refused_pairs:
        print_line(console, "refused", f"{report.refused_pairs} pairs, see {output}/matches.h5.refused.txt")
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    print_line(console, "time", steps)
    print_line(console, "written", f"{output}/sparse/0, {output}/report.json, {output}/reconstruction.png")
