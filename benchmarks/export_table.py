# SPDX-License-Identifier: Apache-2.0
"""Exports weights and writes what came out into ``docs/deployment.md``, between two markers.

``python -m benchmarks.export_table`` makes all rows. ``--weights``, ``--format``, ``--dtype``, ``--size`` and
``--batch`` choose some, each may be repeated; rows that are there already and were not chosen stay. ``full`` has the
seeded weights of the benchmarks. Seconds are those of the export with its check, and mean nothing on a busy machine.
How fast the graph runs is the business of ``benchmarks.run``.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch

from benchmarks.stages import plain_model
from eloftr_ops import EfficientLoFTR
from eloftr_ops.inference.export import SUFFIXES, ExportReport, Format, export, operators

PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"
BEGIN, END = "<!-- export table: begin -->", "<!-- export table: end -->"
WEIGHTS, DTYPES = ["small", "full"], ["float32", "float16"]
SIZES, BATCHES = ["480x640", "240x320", "352x480"], [1, 3]
ROWS = 2048
HEAD = [
    "weights",
    "format",
    "type",
    "size",
    "batch",
    "rows",
    "file",
    "operators",
    "matches",
    "agreement",
    "seconds",
]
_KEY = 5  # the first columns say which row it is
NOTE = "Seconds of the export, its check included, on a machine busy with other work: compare nothing with them."


def main() -> None:
    """Make the chosen rows, one by one: what is done stays when the run ends early."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", action="append", choices=WEIGHTS)
    parser.add_argument("--format", action="append", choices=list(SUFFIXES))
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--batch", action="append", type=int, choices=BATCHES)
    chosen = parser.parse_args()
    for weights, format, dtype, size, batch in itertools.product(  # noqa: A001 - the field's word
        chosen.weights or WEIGHTS,
        chosen.format or list(SUFFIXES),
        chosen.dtype or DTYPES,
        chosen.size or SIZES,
        chosen.batch or BATCHES,
    ):
        made = row(plain_model(weights), weights, format, dtype, size, batch)
        print(" | ".join(made), flush=True)
        page = PAGE.read_text()
        PAGE.write_text(replaced(page, table(merged(rows_of(page), made))))


def row(
    matcher: EfficientLoFTR, weights: str, format: Format, dtype: str, size: str, batch: int  # noqa: A002
) -> list[str]:  # fmt: skip
    """One export; the file is deleted."""
    height, width = map(int, size.split("x"))
    rows = min(ROWS, height * width // 64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIXES[format]}"
        report = export(
            matcher,
            path,
            format=format,
            size=(height, width),
            batch=batch,
            max_matches=rows,
            dtype=getattr(torch, dtype),
        )
        counted = sum(operators(path).values()) if format == "onnx" else None
    return cells(report, [weights, format, dtype, size, str(batch)], rows, counted)


def cells(report: ExportReport, key: list[str], rows: int, counted: int | None) -> list[str]:
    """One line of the table."""
    return [
        *key, str(rows), f"{report.file_bytes / 1e6:.1f} MB", "" if counted is None else str(counted),
        str(report.matches), f"{report.shared:.2%} within {report.tolerance:g}", f"{report.seconds:.0f}",
    ]  # fmt: skip


def rows_of(page: str) -> list[list[str]]:
    """The rows between the markers, without the head."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    found = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in found[2:] if len(row) == len(HEAD)]


def merged(rows: Sequence[list[str]], made: list[str]) -> list[list[str]]:
    """The rows with ``made`` in the place of an older one of the same kind, in the order of the choices."""
    order = [WEIGHTS, list(SUFFIXES), DTYPES, SIZES, [str(batch) for batch in BATCHES]]
    kept = [row for row in rows if row[:_KEY] != made[:_KEY]]
    return sorted(
        [*kept, made],
        key=lambda row: [all_.index(cell) for all_, cell in zip(order, row[:_KEY], strict=True)],
    )


def table(rows: Sequence[list[str]]) -> str:
    """Markdown, with the versions that made it."""
    lines = ["| " + " | ".join(row) + " |" for row in [HEAD, ["---"] * len(HEAD), *rows]]
    versions = f"Made with torch {torch.__version__.split('+')[0]} and onnxruntime {onnxruntime.__version__}."
    return "\n".join(["", *lines, "", f"{versions} {NOTE}"])


def replaced(page: str, text: str) -> str:
    """The page with ``text`` between its markers."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{PAGE}: expected the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


if __name__ == "__main__":
    main()
