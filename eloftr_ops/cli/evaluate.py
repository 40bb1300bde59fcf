# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops evaluate``: a matcher over a data set of labelled pairs."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from eloftr_ops.cli.common import (
    Device,
    Report,
    Threads,
    UsageError,
    Weights,
    print_line,
    reported_mistakes,
)
from eloftr_ops.cli.matching import EffortChoice
from eloftr_ops.efforts import Effort
from eloftr_ops.io import FileError, check_output
from eloftr_ops.matching import DEFAULT_WEIGHTS, choose_device, load_matcher
from eloftr_ops.wording import describe_device

if TYPE_CHECKING:  # heavy, and of no use to the other commands
    from eloftr_ops.data.labelled import LabelledPairs
    from eloftr_ops.evaluation import EvaluationConfig, EvaluationResult


class Dataset(enum.StrEnum):
    """Data sets with a loader."""

    megadepth = "megadepth"
    scannet = "scannet"
    hpatches = "hpatches"
    json = "json"


class Precision(enum.StrEnum):
    """Floating point types of the matcher."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Estimator(enum.StrEnum):
    """Robust estimators."""

    magsac = "magsac"
    ransac = "ransac"
    project = "project"


class Pixels(enum.StrEnum):
    """Where pixels are counted."""

    original = "original"
    matched = "matched"


@dataclass(frozen=True)
class _Run:
    """What was asked for, as it goes into the record."""

    dataset: str
    root: str | None
    index: str | None
    weights: str
    resize: int | None
    threshold: float | None
    device: str
    dtype: str
    limit: int | None
    all_sequences: bool
    strict: bool
    threads: int | None
    effort: Effort


def _option(help_text: str, **settings: Any) -> Any:
    return typer.Option(help=help_text, **settings)


_Root = Annotated[Path | None, _option("Folder of the images; json: of its index, by default.")]
_Index = Annotated[Path | None, _option("scene_info file or folder, test.npz, or the JSON file of pairs.")]
_Resize = Annotated[
    int | None,
    _option("Reduce larger images to this longer side (hpatches: shorter); 640 (480); 0: never.", min=0),
]
_Threshold = Annotated[float | None, _option("Least confidence of a match; the weights' own by default.")]
_Count = Annotated[int | None, _option("Count the most confident matches only.", min=1)]
_Limit = Annotated[int | None, _option("Evaluate so many pairs, evenly spread.", min=1)]
_Runs = Annotated[int, _option("Robust estimations per pair, on matches in other orders.", min=1)]
_PoseThreshold = Annotated[float, _option("Inliers of a pose: pixels to the epipolar line.")]
_HomographyThreshold = Annotated[float, _option("Inliers of a homography: pixels of transfer error.")]
_EpipolarThreshold = Annotated[float | None, _option("Of the precision; 5e-4 for scannet, else 1e-4.")]
_Pixels = Annotated[Pixels | None, _option("Those that errors are in; original for megadepth and json.")]
_AllSequences = Annotated[bool, _option("hpatches: take the eight large sequences, too.")]
_Strict = Annotated[bool, _option("Stop at the first pair that cannot be read.")]
_Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write everything to a .json file.")]


def evaluate(
    dataset: Annotated[Dataset, _option("What to evaluate on.", show_default=False)],
    root: _Root = None,
    index: _Index = None,
    weights: Weights = DEFAULT_WEIGHTS,
    resize: _Resize = None,
    threshold: _Threshold = None,
    max_matches: _Count = None,
    device: Device = "auto",
    dtype: Annotated[Precision, _option("Of the matcher.")] = Precision.float32,
    limit: _Limit = None,
    estimator: Annotated[Estimator, _option("Robust estimator.")] = Estimator.magsac,
    runs: _Runs = 5,
    pose_threshold: _PoseThreshold = 0.5,
    homography_threshold: _HomographyThreshold = 3.0,
    epipolar_threshold: _EpipolarThreshold = None,
    pixels: _Pixels = None,
    all_sequences: _AllSequences = False,
    strict: _Strict = False,
    output: _Output = None,
    threads: Threads = None,
    effort: Annotated[EffortChoice, _option("fast: one look; see match.")] = EffortChoice.fast,
) -> None:
    """Measure a matcher: pose and homography AUC, precision, matches and seconds per pair."""
    paths = [None if path is None else str(path) for path in (root, index)]
    run = _Run(
        dataset.value, paths[0], paths[1], weights, resize, threshold, device, dtype.value, limit,
        all_sequences, strict, threads, effort.value,
    )  # fmt: skip
    with reported_mistakes():
        if output is not None:
            check_output(output, (".json",))
        pairs, config = _opened(
            run,
            estimator=estimator.value,
            runs=runs,
            pose_threshold=pose_threshold,
            homography_threshold=homography_threshold,
            epipolar_threshold=epipolar_threshold,
            original_pixels=None if pixels is None else pixels is Pixels.original,
            max_matches=max_matches,
        )
        _evaluate_and_report(run, pairs, config, output)


def _opened(run: _Run, **settings: Any) -> tuple[LabelledPairs, EvaluationConfig]:
    """The data set, and the configuration completed by what goes with the data set."""
    from eloftr_ops.evaluation import DATASETS, EvaluationConfig, open_pairs

    defaults = asdict(DATASETS[run.dataset])
    settings = {
        name: defaults[name] if value is None and name in defaults else value for name, value in settings.items()
    }
    try:
        config = EvaluationConfig(**settings)
        pairs = open_pairs(run.dataset, run.root, run.index, resize=run.resize, all_sequences=run.all_sequences)
    except FileError:
        raise
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        option = {"scene_info": "index"}.get(name, name).replace("_", "-")
        raise UsageError(f"--{option}:{rest}") from error
    if len(pairs) == 0:
        raise UsageError(f"--index {run.index}: it names no pair.")
    return pairs, config


def _evaluate_and_report(run: _Run, pairs: LabelledPairs, config: EvaluationConfig, output: Path | None) -> None:
    console = Report()
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    resolved = choose_device(run.device)
    matcher = load_matcher(
        run.weights,
        run.device,
        threshold=run.threshold,
        dtype=getattr(torch, run.dtype),
    )
    details = {**asdict(run), "threshold": matcher.config.threshold, "hardware": describe_device(resolved)}
    details["resize"] = pairs.options.resize
    details["shorter_side"] = pairs.options.shorter_side
    looking = matcher if run.effort == "fast" else _guided(matcher, run.effort)
    result, trouble = _collected(run, pairs, config, looking, resolved)
    if output is not None:  # before anything is printed: its reader may be gone
        result.write(output, details)
    _print_result(console, result, details, output)
    if isinstance(trouble, KeyboardInterrupt):
        raise typer.Exit(130)
    if trouble is not None:
        raise trouble
    if not result.pairs:
        raise UsageError(
            f"none of the {result.chosen} pairs could be evaluated; the first: {result.failures[0].reason}"
        )


def _guided(matcher: Any, effort: Effort) -> Any:
    from eloftr_ops.guided import GuidedMatcher

    return GuidedMatcher(matcher, effort)


def _collected(
    run: _Run, pairs: LabelledPairs, config: EvaluationConfig, matcher: Any, device: torch.device
) -> tuple[EvaluationResult, BaseException | None]:
    """What was evaluated, and what ended it before its end: hours of results outlive an interruption."""
    from eloftr_ops.evaluation import EvaluationResult, PairFailure, PairResult, evaluate_pairs
    from eloftr_ops.evaluation.runner import chosen_indexes

    indexes = chosen_indexes(len(pairs), run.limit)
    results: list[PairResult] = []
    failures: list[PairFailure] = []
    trouble: BaseException | None = None
    try:
        outcomes = evaluate_pairs(matcher, pairs, indexes, config, device=device, strict=run.strict)
        for outcome in _with_progress(outcomes, len(indexes)):
            if isinstance(outcome, PairResult):
                results.append(outcome)
            else:
                failures.append(outcome)
    except (KeyboardInterrupt, FileError, torch.OutOfMemoryError) as error:
        trouble = error
    return EvaluationResult(config, len(pairs), len(indexes), results, failures), trouble


def _with_progress(outcomes: Iterator[Any], count: int) -> Iterator[Any]:
    """The same, with a bar on standard error where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("pairs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=count)
        for outcome in outcomes:
            yield outcome
            progress.advance(task)


def _print_result(console: Console, result: EvaluationResult, details: dict[str, Any], output: Path | None) -> None:
    totals = result.totals()
    tried = totals["evaluated"] + totals["failed"]
    print_line(console, "data set", f"{details['dataset']}, {result.chosen} of {result.available} pairs")
    if not result.complete:
        print_line(console, "incomplete", f"stopped after {tried} of {result.chosen} pairs")
    if result.failures:
        print_line(console, "failed", f"{len(result.failures)} pairs could not be read and count nowhere:")
        for failure in result.failures[:5]:
            print_line(console, "", failure.reason)
        if len(result.failures) > 5:
            print_line(console, "", f"... and {len(result.failures) - 5} more, in the record (--output)")
    if result.pairs:
        seconds, median = totals["seconds_per_pair"], totals["seconds_per_pair_median"]
        print_line(console, "matches", f"{totals['matches_per_pair']:.1f} per pair")
        print_line(console, "time", f"{seconds:.3f} s per pair, median {median:.3f} s, on {details['hardware']}")
    for kind in ("pose", "homography"):
        if kind in totals:
            pixels = "original" if result.config.original_pixels else "matched"
            print_line(console, kind, f"{result.config.estimator}, pixels of the {pixels} images")
            console.print(_table(totals[kind]))
    if output is not None:
        print_line(console, "written", str(output))


def _table(measures: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in measures.items():
        table.add_row(name.replace("_", " "), f"{value}" if isinstance(value, int) else f"{value:.2f} %")
    return table
