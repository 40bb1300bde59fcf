# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops export-matches``: matches of many pairs in the files of other programs."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from eloftr_ops.cli.common import Report, UsageError, print_line, reported_mistakes
from eloftr_ops.reconstruction.cameras import read_camera
from eloftr_ops.reconstruction.exporters import export_tracks
from eloftr_ops.reconstruction.match_file import MatchFile
from eloftr_ops.reconstruction.reconstruct import Grid, make_tracks
from eloftr_ops.reconstruction.tracks import TrackConfig

__all__ = ["export_matches"]


class Target(enum.StrEnum):
    """The program that reads the files."""

    colmap = "colmap"
    hloc = "hloc"
    opensfm = "opensfm"
    openmvg = "openmvg"


_Matches = typer.Argument(help="File of match-pairs, .h5.", show_default=False)
_Images = typer.Option(help="Folder of the images: for their pixels and EXIF data.")
_Output = typer.Option("--output", "-o", help="Folder to write into; made if it is missing.")
_To = typer.Option("--to", help="Program that reads the files.")
_CellSize = typer.Option(help="Round keypoints to cells of so many pixels, as hloc does, in place of tracks.")
_MaxError = typer.Option(help="With --cell-size: side of the squares that keypoints are rounded to.")


def export_matches(
    matches: Annotated[Path, _Matches],
    images: Annotated[Path, _Images],
    output: Annotated[Path, _Output],
    to: Annotated[Target, _To],
    cell_size: Annotated[float | None, _CellSize] = None,
    max_error: Annotated[float | None, _MaxError] = None,
) -> None:
    """Make keypoints and tracks from matches, and write them for COLMAP, hloc, OpenSfM or OpenMVG."""
    with reported_mistakes():
        if max_error is not None and cell_size is None:
            raise UsageError("--max-error: it needs --cell-size.")
        grid = None if cell_size is None else Grid(cell_size, max_error or cell_size)
        with MatchFile(matches) as file:
            resize = int(file.settings.get("resize", 0))
            found = [file.read(pair) for pair in file.pairs()]
        tracks = make_tracks(found, resize, grid or TrackConfig(), images)
        cameras = {name: read_camera(images / name) for name in tracks.names}
        written = export_tracks(to.value, output, tracks, cameras)
    console = Report()
    print_line(console, "keypoints", f"{sum(map(len, tracks.keypoints))} of {len(tracks.names)} images")
    print_line(console, "tracks", f"{tracks.report.tracks}, in {tracks.report.mean_length:.2f} images each")
    for path in written:
        print_line(console, "written", str(path))
