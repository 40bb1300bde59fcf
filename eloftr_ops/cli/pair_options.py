# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that match many pairs."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Pairs(enum.StrEnum):
    """Which images are matched with which."""

    exhaustive = "exhaustive"
    sequential = "sequential"
    retrieval = "retrieval"
    file = "file"


Source = Annotated[Path, typer.Argument(help="Folder of images, or text file of pairs.", show_default=False)]
PairsOption = Annotated[Pairs, typer.Option("--pairs", help="How pairs are chosen from a folder.")]
Images = Annotated[
    Path | None, typer.Option(help="Folder of the images in a file of pairs; that of the file by default.")
]
Window = Annotated[int, typer.Option(min=1, help="sequential: images behind an image that it is matched with.")]
Neighbours = Annotated[int, typer.Option(min=1, help="retrieval: images most alike that an image is matched with.")]
Resize = Annotated[int, typer.Option(min=0, help="Reduce longer images to this long side, in pixels; 0: never.")]
Threshold = Annotated[float | None, typer.Option(help="Least confidence of a match; the weights' own by default.")]
Batch = Annotated[int, typer.Option(min=1, help="Pairs of equal sizes that a GPU matches together.")]
Devices = Annotated[str, typer.Option(help="auto: all CUDA GPUs, or the CPU; or names: cuda:0,cuda:1.")]
Memory = Annotated[float, typer.Option(min=0.1, help="GiB on each device for the features of images.")]
