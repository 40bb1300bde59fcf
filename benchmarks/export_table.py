# SPDX-License-Identifier: Apache-2.0
"""Exports the embedded weights and writes what came out into ``docs/deployment.md``, between two markers.

``python -m benchmarks.export_table``, or with ``--size 240x320 --batch 1`` (both may be repeated) fewer rows. Seconds
are those of the export with its check; how fast the graph runs is the business of ``benchmarks.run``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnxruntime
import torch

from eloftr_ops import EfficientLoFTR
from eloftr_ops.inference.export import SUFFIXES, ExportReport, Format, export

PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"
BEGIN, END = "<!-- export table: begin -->", "<!-- export table: end -->"
SIZES, BATCHES = ["480x640", "240x320", "352x480"], [1, 3]
HEAD = ["format", "size", "batch", "rows", "file, MB", "seconds", "matches", "agreement"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--batch", action="append", type=int, choices=BATCHES)
    parser.add_argument("--format", action="append", choices=list(SUFFIXES))
    arguments = parser.parse_args()
    matcher = EfficientLoFTR.from_pretrained("small")
    rows = [
        row(matcher, format, size, batch)
        for format in arguments.format or ["onnx"]  # noqa: A001 - the field's word
        for size in arguments.size or SIZES
        for batch in arguments.batch or BATCHES
    ]
    PAGE.write_text(replaced(PAGE.read_text(), table(rows)))


def row(matcher: EfficientLoFTR, format: Format, size: str, batch: int) -> list[str]:  # noqa: A002
    """One export; the file is deleted."""
    height, width = map(int, size.split("x"))
    max_matches = min(2048, height * width // 64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIXES[format]}"
        report = export(
            matcher, path, format=format, size=(height, width), batch=batch, max_matches=max_matches
        )
    print(size, batch, report, flush=True)
    return cells(report, size, batch, max_matches)


def cells(report: ExportReport, size: str, batch: int, max_matches: int) -> list[str]:
    """One line of the table."""
    return [
        report.format, size, str(batch), str(max_matches), f"{report.file_bytes / 1e6:.1f}",
        f"{report.seconds:.0f}", str(report.matches), f"{report.shared:.2%}",
    ]  # fmt: skip


def table(rows: Iterable[list[str]]) -> str:
    """Markdown, with the versions that made it."""
    lines = ["| " + " | ".join(row) + " |" for row in [HEAD, ["---"] * len(HEAD), *rows]]
    versions = f"Made with torch {torch.__version__.split('+')[0]} and onnxruntime {onnxruntime.__version__}."
    return "\n".join([*lines, "", versions])


def replaced(page: str, text: str) -> str:
    """The page with ``text`` between its markers."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{PAGE}: expected the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


if __name__ == "__main__":
    main()
