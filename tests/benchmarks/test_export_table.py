# SPDX-License-Identifier: Apache-2.0
"""The table of exports: rows are exchanged one by one, and the page keeps the rest."""

from pathlib import Path

import pytest

from benchmarks import export_table
from eloftr_ops.inference.export import ExportReport


def row(batch: int, *, seconds: float = 3.0, operators: int | None = 975) -> list[str]:
    report = ExportReport(Path("model.onnx"), "onnx", 1_234_567, seconds, 2732, 0.9975, 0.01)
    key = ["small", "onnx", "float32", "480x640", str(batch)]
    return export_table.cells(report, key, 2048, operators)


def test_rows_are_exchanged_one_by_one() -> None:
    page = f"before\n{export_table.BEGIN}\n{export_table.END}\nafter\n"
    for made in (row(3), row(1, operators=None), row(3, seconds=9.0)):
        rows = export_table.merged(export_table.rows_of(page), made)
        page = export_table.replaced(page, export_table.table(rows))
    assert export_table.rows_of(page) == [row(1, operators=None), row(3, seconds=9.0)]
    assert "| small | onnx | float32 | 480x640 | 3 | 2048 | 1.2 MB | 975 | 2732 | 99.75% within 0.01 | 9 |" in page
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the markers"):
        export_table.replaced("a page", "a table")


def test_the_page_of_the_docs_can_be_read() -> None:
    page = export_table.PAGE.read_text()
    rows = export_table.rows_of(page)
    assert export_table.replaced(page, "") != page or not rows
    assert all(row[0] in export_table.WEIGHTS for row in rows)
