# SPDX-License-Identifier: Apache-2.0
"""Graphs that leave Python: ONNX, ``torch.export`` programs, AOTInductor packages. Each is checked when written.

All three are one graph of fixed shapes, :class:`~eloftr_ops.inference.static.StaticMatcher`. A file that disagrees
with the matcher it came from is not written.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_ops.config import check_choice
from eloftr_ops.inference.static import OUTPUT_NAMES, StaticMatcher, plain_operations
from eloftr_ops.io import FileError, check_output, demo_pair
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.types import CELL, StaticMatches

Format = Literal["onnx", "torch-export", "aoti"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}
OPSET = 18  # the first with all that the graph needs, and old enough for TensorRT 10 and OpenVINO
PIXELS = 0.01  # how far a keypoint of an exported float32 graph may move
LEAST_SHARED = {torch.float32: 0.995, torch.float16: 0.9}  # of the matches of the float32 matcher

Graph = Callable[..., StaticMatches]


class ExportReport(NamedTuple):
    """What was written, and how it compares with the matcher that it came from."""

    path: Path
    format: Format
    file_bytes: int
    seconds: float  # of the export, its check included
    matches: int  # of the float32 matcher on the check images
    shared: float  # share of these that the file finds too: the same cells, keypoints within ``tolerance``
    tolerance: float  # pixels


class ExportError(RuntimeError):
    """The graph cannot be exported, or disagrees with its matcher."""


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
    if batch is None and format == "aoti":
        raise ValueError(
            "batch: expected a number for aoti, got None. Leave it open for onnx or torch-export."
        )
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}.")
    start = time.perf_counter()
    options = {"max_matches": max_matches, "masks": masks}
    static = StaticMatcher(matcher, dtype=dtype, **options)  # type: ignore[arg-type]
    inputs = check_inputs(size, size1 or size, batch or 2, masks)
    with plain_operations():
        expected = StaticMatches(*StaticMatcher(matcher, **options)(*inputs))  # type: ignore[arg-type]
        program = _traced(static, inputs, dynamic=batch is None)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            file = Path(folder) / path.name
            run = _WRITERS[format](program, file, inputs)
            shared, tolerance = _agreement(run, inputs, expected, dtype)
            file_bytes = file.stat().st_size
            file.replace(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error}).") from error
    seconds = time.perf_counter() - start
    return ExportReport(path, format, file_bytes, seconds, int(expected.valid.sum()), shared, tolerance)


def to_onnx(matcher: EfficientLoFTR, path: str | os.PathLike[str], **options: Any) -> ExportReport:
    """Write an ONNX file; see :func:`export`."""
    return export(matcher, path, format="onnx", **options)


def check_inputs(
    size0: tuple[int, int], size1: tuple[int, int], batch: int, masks: bool
) -> tuple[Tensor, ...]:
    """Images that have matches: the bundled pair, and then image 0 with itself, over and over."""
    pair = demo_pair()
    image0, image1 = (
        F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
        for image, size in ((pair.image0, size0), (pair.image1, size1))
    )
    itself = F.interpolate(pair.image0, size1, mode="bilinear", align_corners=False, antialias=True).clamp(
        0, 1
    )
    images = torch.cat([image0] * batch), torch.cat([image1, *[itself] * (batch - 1)])
    if not masks:
        return images
    mask0, mask1 = (torch.ones(len(x), *x.shape[-2:], dtype=torch.bool) for x in images)
    mask0[:, -size0[0] // 8 :] = False  # something is masked, or the check would not see masks
    return *images, mask0, mask1


def agreement(got: StaticMatches, expected: StaticMatches, tolerance: float) -> float:
    """Share of matches that both have: the same cells, all coordinates within ``tolerance`` pixels; 1 of none."""
    both = [_by_cells(out) for out in (got, expected)]
    most = max(map(len, both))
    if most == 0:
        return 1.0
    near = sum(
        bool(((both[0][cells] - keypoints).abs() <= tolerance).all())
        for cells, keypoints in both[1].items()
        if cells in both[0]
    )
    return near / most


def _by_cells(matches: StaticMatches) -> dict[tuple[int, ...], Tensor]:
    """Coordinates (4,) of each valid row by its pair and cells; windows are centred on the corners of cells."""
    pair, row = matches.valid.nonzero(as_tuple=True)
    keypoints = torch.cat([matches.keypoints0[pair, row], matches.keypoints1[pair, row]], 1).double()
    cells = ((keypoints + CELL / 2) / CELL).floor().long()
    keys = torch.cat([pair[:, None], cells[:, :2]], 1).tolist()
    return {tuple(key): value for key, value in zip(keys, keypoints, strict=True)}


def _agreement(
    run: Graph, inputs: tuple[Tensor, ...], expected: StaticMatches, dtype: torch.dtype
) -> tuple[float, float]:
    """How much of the matcher's result the written file gives.

    Raises:
        ExportError: too little.
    """
    tolerance = PIXELS if dtype is torch.float32 else 1.0
    shared = agreement(run(*inputs), expected, tolerance)
    if shared < LEAST_SHARED[dtype]:
        raise ExportError(
            f"The exported graph shares {shared:.1%} of the matches with its matcher, expected at least "
            f"{LEAST_SHARED[dtype]:.1%}. Nothing was written."
        )
    return shared, tolerance


def _traced(
    static: StaticMatcher, inputs: tuple[Tensor, ...], *, dynamic: bool
) -> torch.export.ExportedProgram:
    shapes = tuple({0: torch.export.Dim("batch", min=1, max=1024)} for _ in inputs) if dynamic else None
    named = dict(zip(("image0", "image1", "mask0", "mask1"), inputs, strict=False))
    try:
        return torch.export.export(
            static, (), named, dynamic_shapes=None if shapes is None else dict(zip(named, shapes, strict=True)),
            strict=False,
        )  # fmt: skip
    except (ValueError, TypeError):
        raise
    except Exception as error:  # the exporter's exceptions have no common base
        raise ExportError(f"torch.export cannot trace the matcher: {_first_line(error)}") from error


def _write_onnx(program: torch.export.ExportedProgram, file: Path, inputs: tuple[Tensor, ...]) -> Graph:
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
        raise ExportError(f"torch.onnx cannot export the matcher: {_first_line(error)}") from error
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
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    return sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain not in ("", "ai.onnx")})


def _write_torch_export(
    program: torch.export.ExportedProgram, file: Path, inputs: tuple[Tensor, ...]
) -> Graph:
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    names = ("image0", "image1", "mask0", "mask1")
    return lambda *tensors: StaticMatches(*loaded(**dict(zip(names, tensors, strict=False))))


def _write_aoti(program: torch.export.ExportedProgram, file: Path, inputs: tuple[Tensor, ...]) -> Graph:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    try:
        aoti_compile_and_package(program, package_path=str(file))
    except Exception as error:  # the compiler's exceptions have no common base
        raise ExportError(f"AOTInductor cannot compile the matcher: {_first_line(error)}") from error
    loaded = aoti_load_package(str(file))
    names = ("image0", "image1", "mask0", "mask1")
    return lambda *tensors: StaticMatches(*loaded(**dict(zip(names, tensors, strict=False))))


_WRITERS: dict[Format, Callable[[torch.export.ExportedProgram, Path, tuple[Tensor, ...]], Graph]] = {
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
