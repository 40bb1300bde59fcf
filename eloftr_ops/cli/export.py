# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops export``: a graph of fixed shapes for onnxruntime, ``torch.export`` or AOTInductor."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from eloftr_ops.cli.common import Report, UsageError, Weights, print_line, reported_mistakes
from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.matching import DEFAULT_WEIGHTS
from eloftr_ops.model.matcher import EfficientLoFTR

if TYPE_CHECKING:
    from eloftr_ops.inference.export import ExportReport

__all__ = ["export"]


class Format(enum.StrEnum):
    """What is written."""

    onnx = "onnx"
    torch_export = "torch-export"
    aoti = "aoti"


class Dtype(enum.StrEnum):
    """Of the wide convolutions; the rest stays in float32."""

    float32 = "float32"
    float16 = "float16"


_Output = typer.Option("--output", "-o", help="File to write: .onnx for onnx, .pt2 for the others.")
_Format = typer.Option("--format", help="onnx needs the extra export, aoti a C++ compiler.")
_Size = typer.Option(help="HEIGHTxWIDTH of image 0, each at least 32.")
_Size1 = typer.Option(help="HEIGHTxWIDTH of image 1; default: as --size.")
_MaxMatches = typer.Option(help="Rows per pair, at most the 8 x 8 cells of image 0.")
_Dtype = typer.Option(help="float16: the wide convolutions in float16.")
_Batch = typer.Option(help="Pairs per call, or 'any' (onnx and torch-export).")
_OpenSize = typer.Option("--open-size", help="torch-export: other sizes, too, multiples of 32, the same for both.")
_Masks = typer.Option("--masks", help="The graph takes mask0 and mask1, too.")


def export(
    output: Annotated[Path, _Output],
    format: Annotated[Format, _Format] = Format.onnx,  # noqa: A002 - the option's name
    weights: Weights = DEFAULT_WEIGHTS,
    size: Annotated[str, _Size] = "480x640",
    size1: Annotated[str | None, _Size1] = None,
    max_matches: Annotated[int, _MaxMatches] = 2048,
    dtype: Annotated[Dtype, _Dtype] = Dtype.float32,
    batch: Annotated[str, _Batch] = "1",
    masks: Annotated[bool, _Masks] = False,
    open_size: Annotated[bool, _OpenSize] = False,
) -> None:
    """Write the matcher as a graph of fixed shapes that runs without this library; checked when written."""
    from eloftr_ops.inference import export as exporting  # torch.export is slow to import

    with reported_mistakes():
        size0, pairs = _size("size", size), _batch(batch)
        other = None if size1 is None else _size("size1", size1)
        try:
            report = exporting.export(
                EfficientLoFTR.from_pretrained(weights),
                output,
                format=format.value,
                size=size0,
                size1=other,
                batch=pairs,
                max_matches=max_matches,
                masks=masks,
                dtype=getattr(torch, dtype.value),
                open_size=open_size,
            )
        except (ArgumentError, FileError):
            raise
        except (ValueError, TypeError, ImportError, FileNotFoundError, exporting.ExportError) as error:
            raise UsageError(str(error)) from error
        _print(report)


def _size(option: str, text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if found is None:
        raise UsageError(f"--{option}: expected HEIGHTxWIDTH such as 480x640, got {text}.")
    return int(found[1]), int(found[2])


def _batch(text: str) -> int | None:
    if text == "any":
        return None
    if re.fullmatch(r"[1-9]\d{0,5}", text) is None:
        raise UsageError(f"--batch: expected a number of at least 1, or any, got {text}.")
    return int(text)


def _print(report: ExportReport) -> None:
    console = Report()
    print_line(console, "file", f"{report.path} ({report.format}, {report.file_bytes / 1e6:.1f} MB)")
    print_line(console, "seconds", f"{report.seconds:.1f}, check included")
    agreement = f"{report.shared:.2%} of {report.matches} matches within {report.tolerance:g} pixels"
    print_line(console, "agreement", agreement)
