# SPDX-License-Identifier: Apache-2.0
"""Graphs that leave Python: ONNX, ``torch.export`` programs, AOTInductor packages. Each is checked when written.

All three are one graph of fixed shapes, :class:`~eloftr_ops.inference.static.StaticMatcher`. A file that disagrees
with the matcher it came from is not written.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from eloftr_ops.checks import MIN_SIZE, check_max_matches
from eloftr_ops.config import check_choice
from eloftr_ops.errors import FileError
from eloftr_ops.inference.export_check import ExportError, Graph, check_images, checked, samples
from eloftr_ops.inference.static import OUTPUT_NAMES, StaticMatcher, plain_operations
from eloftr_ops.io import check_output
from eloftr_ops.model.matcher import SIZE_MULTIPLE, EfficientLoFTR
from eloftr_ops.types import CELL, StaticMatches

__all__ = [
    "SUFFIXES",
    "ExportError",
    "ExportReport",
    "Format",
    "export",
    "foreign_operators",
    "operators",
    "to_onnx",
]

Format = Literal["onnx", "torch-export", "aoti"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}
OPSET = 18  # the first with all that the graph needs, and old enough for TensorRT 10 and OpenVINO
_INPUTS = ("image0", "image1", "mask0", "mask1")


class ExportReport(NamedTuple):
    """What was written, and how it compares with the matcher that it came from."""

    path: Path
    format: Format
    file_bytes: int
    seconds: float  # of the export, its check included
    matches: int  # of the float32 matcher on the check images
    shared: float  # share of these that the file finds too: the same cells, keypoints within ``tolerance``
    tolerance: float  # pixels


def export(
    matcher: EfficientLoFTR,
    path: str | os.PathLike[str],
    *,
    format: Format = "onnx",  # noqa: A002 - the field's word
    size: tuple[int, int] = (480, 640),
    size1: tuple[int, int] | None = None,
    batch: int | None = 1,
    max_matches: int = 2048,
    masks: bool = False,
    dtype: torch.dtype = torch.float32,
    open_size: bool = False,
) -> ExportReport:
    """Write a graph that matches images of one size, and check it on the CPU.

    Inputs of the graph: ``image0`` (B, 1, H0, W0) and ``image1`` (B, 1, H1, W1), float32 in [0, 1]; with ``masks`` also
    ``mask0`` (B, H0, W0) and ``mask1``, bool. Outputs: the fields of :class:`~eloftr_ops.types.StaticMatches`.

    Convention:
        Keypoints (x, y) in pixels, pixel centres at + 0.5. Values of images are not checked inside a graph. Sizes that
        are no multiple of 32 are completed inside the graph by masked pixels.

    Args:
        matcher: plain or fused; it stays as it is.
        path: the file to write; ``.onnx``, or ``.pt2``.
        format: ``onnx`` (extra ``export``), ``torch-export`` or ``aoti`` (needs a C++ compiler).
        size: (H0, W0), each at least 32.
        size1: (H1, W1); default as ``size``.
        batch: B; None leaves it open, for ``onnx`` and ``torch-export``.
        max_matches: rows per pair, at most the coarse cells of image 0.
        masks: the graph takes masks.
        dtype: float32, or float16 for the wide convolutions.
        open_size: for ``torch-export``: the program takes images of other sizes, too, both of the same, with sides that
            are multiples of 32 and not so small that there are fewer cells than ``max_matches``. It is checked at
            ``size`` and at another size.

    Returns:
        What was written. ``shared`` compares with the float32 matcher: at least 99.5 % within 0.01 pixels for float32,
        at least 90 % within one pixel for float16.

    Raises:
        ValueError, TypeError: arguments out of range, or a matcher that is optimized already.
        FileError: a path that cannot be written.
        ImportError: packages are missing; the message names the extra.
        ExportError: the exporter failed, or the file disagrees. Nothing is written then.
    """
    check_choice("format", format, Format)
    path = check_output(path, [SUFFIXES[format]])
    if format == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    size1 = size if size1 is None else size1
    _check_sizes({"size": size, "size1": size1})
    check_max_matches(max_matches, size, SIZE_MULTIPLE)
    _check_batch(batch, format)
    if open_size:
        _check_open_size(format, size, size1, max_matches)
    start = time.perf_counter()
    static = StaticMatcher(matcher, max_matches=max_matches, masks=masks, dtype=dtype)
    exact = StaticMatcher(matcher, max_matches=max_matches, masks=masks)
    with plain_operations():
        of = samples(exact, check_images(size, size1, batch or 2, masks))
        if open_size:
            larger = size[0] + 2 * SIZE_MULTIPLE, size[1] + SIZE_MULTIPLE
            of += samples(exact, check_images(larger, larger, batch or 2, masks))
        program = _traced(static, of[0].inputs, _open_dimensions(batch is None, open_size, max_matches))
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            file = Path(folder) / path.name
            agreement = checked(_WRITERS[format](program, file), of, dtype)
            file_bytes = file.stat().st_size
            file.replace(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error}).") from error
    return ExportReport(path, format, file_bytes, time.perf_counter() - start, *agreement)


def to_onnx(matcher: EfficientLoFTR, path: str | os.PathLike[str], **options: Any) -> ExportReport:
    """Write an ONNX file; see :func:`export`."""
    return export(matcher, path, format="onnx", **options)


def _check_sizes(sizes: dict[str, tuple[int, int]]) -> None:
    for name, size in sizes.items():
        if len(size) != 2 or not all(isinstance(side, int) and side >= MIN_SIZE for side in size):
            raise ValueError(f"{name}: expected (height, width), whole numbers of at least {MIN_SIZE}, got {size}.")


def _check_batch(batch: int | None, format: Format) -> None:  # noqa: A002
    if batch is None and format == "aoti":
        raise ValueError("batch: expected a number for aoti, got None. Leave it open for onnx or torch-export.")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch: expected a whole number of at least 1, or None, got {batch}.")


def _check_open_size(
    format: Format,  # noqa: A002
    size: tuple[int, int],
    size1: tuple[int, int],
    max_matches: int,
) -> None:
    if format != "torch-export":
        raise ValueError(f"open_size: expected the format torch-export, got {format}, which takes one size.")
    least = SIZE_MULTIPLE * _least_steps(max_matches)
    if size1 != size or any(side % SIZE_MULTIPLE or side < least for side in size):
        raise ValueError(
            f"size: expected one size for both images, multiples of {SIZE_MULTIPLE} of at least {least} for an open "
            f"size and max_matches={max_matches}, got {size} and {size1}."
        )


def _least_steps(max_matches: int) -> int:
    """Of 32 pixels, for both sides of an image with at least ``max_matches`` cells."""
    return max(2, math.ceil(math.sqrt(max_matches) / (SIZE_MULTIPLE // CELL)))


def _open_dimensions(batch: bool, size: bool, max_matches: int) -> dict[str, dict[int, Any]] | None:
    """Dimensions that are symbols, by the name of the input; None where all are numbers."""
    if not (batch or size):
        return None
    of_batch = {0: torch.export.Dim("batch", min=1, max=1024)} if batch else {}
    sides: list[Any] = []
    if size:
        least = _least_steps(max_matches)
        sides = [SIZE_MULTIPLE * torch.export.Dim(name, min=least, max=256) for name in ("rows", "columns")]
    return {name: {**of_batch, **dict(enumerate(sides, 2 - name.startswith("mask")))} for name in _INPUTS}


def _traced(
    static: StaticMatcher, inputs: tuple[Tensor, ...], dimensions: dict[str, dict[int, Any]] | None
) -> torch.export.ExportedProgram:
    named = dict(zip(_INPUTS, inputs, strict=False))
    shapes = None if dimensions is None else {name: dimensions[name] for name in named}
    try:
        return torch.export.export(static, (), named, dynamic_shapes=shapes, strict=False)
    except (ValueError, TypeError):
        raise
    except Exception as error:  # the exporter's exceptions have no common base
        raise ExportError(f"torch.export cannot trace the matcher: {_first_line(error)}") from error


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> Graph:
    import onnx
    import onnxruntime

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, output_names=list(OUTPUT_NAMES), verbose=False
            )
        if written is None:
            raise ExportError("torch.onnx.export returned no program.")
        written.save(file)
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the graph: {_first_line(error)}") from error
    except torch.onnx.OnnxExporterError as error:
        reason = _first_line(error.__cause__ or error)  # the cause names the operation
        raise ExportError(f"torch.onnx cannot export the matcher: {reason}") from error
    foreign = foreign_operators(file)
    if foreign:
        raise ExportError(f"The graph has operators outside the ONNX standard: {', '.join(foreign)}.")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*tensors: Tensor) -> StaticMatches:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return StaticMatches(*(torch.from_numpy(x) for x in session.run(list(OUTPUT_NAMES), feed)))

    return run


def foreign_operators(file: str | os.PathLike[str]) -> list[str]:
    """Operators of an ONNX file that do not belong to the ONNX standard, as ``domain::name``."""
    return [name for name in operators(file) if not name.startswith("::")]


def operators(file: str | os.PathLike[str]) -> dict[str, int]:
    """How often each operator stands in an ONNX file, subgraphs and functions included, as ``domain::name``.

    The domain of the ONNX standard is empty.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    counts: Counter[str] = Counter()
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        counts[f"{'' if node.domain == 'ai.onnx' else node.domain}::{node.op_type}"] += 1
        waiting += [inner for attribute in node.attribute for inner in attribute.g.node]
    return dict(sorted(counts.items()))


def _write_torch_export(program: torch.export.ExportedProgram, file: Path) -> Graph:
    buffer = io.BytesIO()  # PyTorch's own writer reports a full disk as a defect
    torch.export.save(program, buffer)
    file.write_bytes(buffer.getbuffer())
    return _by_name(torch.export.load(file).module())


def _write_aoti(program: torch.export.ExportedProgram, file: Path) -> Graph:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    try:
        aoti_compile_and_package(program, package_path=str(file))
    except Exception as error:  # the compiler's exceptions have no common base
        raise ExportError(f"AOTInductor cannot compile the matcher: {_first_line(error)}") from error
    return _by_name(aoti_load_package(str(file)))


def _by_name(loaded: Callable[..., Any]) -> Graph:
    return lambda *tensors: StaticMatches(*loaded(**dict(zip(_INPUTS, tensors, strict=False))))


_WRITERS: dict[Format, Callable[[torch.export.ExportedProgram, Path], Graph]] = {
    "onnx": _write_onnx,
    "torch-export": _write_torch_export,
    "aoti": _write_aoti,
}


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)}: needed for ONNX export and not installed. Run: pip install 'eloftr-ops[export]'"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
