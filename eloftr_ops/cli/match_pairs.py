# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops match-pairs``: many pairs of images into one file."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text

from eloftr_ops.cli.common import Report, Threads, UsageError, Weights, print_line, reported_mistakes
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
from eloftr_ops.reconstruction.bulk import BulkReport, PairChoice, match_pairs
from eloftr_ops.reconstruction.engine import MatchSettings, Outcome
from eloftr_ops.reconstruction.ray_engine import RayEngine

__all__ = ["match_pairs_command", "watch_pairs"]

_LISTED = 5  # refused pairs that are printed


class EngineName(enum.StrEnum):
    """Where the pairs are matched."""

    local = "local"
    ray = "ray"


_Output = typer.Option("--output", "-o", help="HDF5 file to write, in hloc's layout: .h5.")
_Loaders = typer.Option(min=1, help="Threads that read images, for each device.")
_Engine = typer.Option("--engine", help="local: this machine; ray: the workers of a Ray cluster.")
_Address = typer.Option(help="ray: of a running cluster; without it, one on this machine alone.")
_Workers = typer.Option(min=1, help="ray: how many; one per GPU, or per CPU, by default.")
_Npz = typer.Option(help="Folder for one .npz file per pair, too.")
_Overwrite = typer.Option("--overwrite", help="Begin anew; without it, a run goes on where the last one ended.")


def match_pairs_command(
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
    loaders: Annotated[int, _Loaders] = 2,
    engine: Annotated[EngineName, _Engine] = EngineName.local,
    address: Annotated[str | None, _Address] = None,
    workers: Annotated[int | None, _Workers] = None,
    npz: Annotated[Path | None, _Npz] = None,
    overwrite: Annotated[bool, _Overwrite] = False,
    threads: Threads = None,
) -> None:
    """Match many pairs of images into one HDF5 file; an interrupted run goes on where it ended."""
    with reported_mistakes():
        if threads is not None:
            torch.set_num_threads(threads)
        choice = PairChoice(source, pairs.value, images, window, neighbours)
        settings = MatchSettings(weights, resize, threshold, batch, int(memory * 2**30), loaders)
        if engine is EngineName.local and (address or workers):
            raise UsageError("--address, --workers: they need --engine ray.")
        used = None
        try:
            if engine is EngineName.ray:
                used = RayEngine(choice.folder, settings, address=address, workers=workers)
            report = match_pairs(
                choice,
                output,
                settings,
                devices=devices,
                engine=used,
                npz=npz,
                overwrite=overwrite,
                watch=watch_pairs,
            )
        except KeyboardInterrupt:
            message = "Interrupted. What is matched is kept; the same command goes on from there."
            Console(stderr=True, highlight=False).print(message)
            raise typer.Exit(130) from None
        finally:
            if used is not None:
                used.close()
        print_bulk_report(Report(), report)


def watch_pairs(outcomes: Iterable[Outcome], total: int, done: int) -> Iterator[Outcome]:
    """A progress bar on standard error with the rate and the time left; the outcomes pass through."""
    columns = (
        TextColumn("pairs"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeLeft(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("pairs", total=total, completed=done, begun=done)
        for outcome in outcomes:
            yield outcome
            progress.advance(task)


def print_bulk_report(console: Console, report: BulkReport) -> None:
    """What was matched, and what was not."""
    reused = f", {report.reused} of an earlier run" if report.reused else ""
    print_line(console, "pairs", f"{report.matched} matched{reused}")
    print_line(console, "matches", f"{report.matches}")
    rate = f" ({report.matched / report.seconds:.2f} pairs per second)" if report.matched else ""
    print_line(console, "time", f"{report.seconds:.1f} s{rate}")
    if report.refused:
        print_line(console, "refused", f"{len(report.refused)}, listed in {report.refused_list}")
        for (first, second), reason in report.refused[:_LISTED]:
            print_line(console, "", f"{first} {second}: {reason}".replace(" : ", ": "))
    print_line(console, "written", str(report.output))


class _Rate(ProgressColumn):
    """Pairs per second of this run."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["begun"]
        rate = done / task.elapsed if task.elapsed else 0.0
        return Text(f"{rate:.2f}/s")
