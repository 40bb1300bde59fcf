# SPDX-License-Identifier: Apache-2.0
"""The schema of benchmark records, and the page that is generated from them."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import record, report


def row(name: str, median_s: float | None, **fields: object) -> dict:
    made = record.empty_row(name, "timed" if median_s else "not run", None if median_s else "it is not installed")
    if median_s:
        made |= {"median_s": median_s, "q1_s": 0.9 * median_s, "q3_s": 1.1 * median_s, "repeats": 5}
    return {**made, **fields}


def case(name: str, group: str, measure: str, baseline: str | None, rows: list, pixels: int | None = None) -> dict:
    fields = {"name": name, "group": group, "measure": measure, "baseline": baseline, "pixels": pixels}
    return {**fields, "gate": "held to the truth", "rows": rows}


def synthetic(suite: str, cases: list) -> dict:
    return {
        "schema": record.SCHEMA,
        "suite": suite,
        "device": {"kind": "cuda", "name": "Some GPU 9000"},
        "dtype": "fp16",
        "quick": False,
        "environment": record.environment(),
        "limits": {**dict.fromkeys(record.RECORD["limits"]), "copy_bytes_per_s": 4e12},
        "seconds": 61.0,
        "cases": cases,
    }


def kernels_record() -> dict:
    rows = [
        row("eager reference", 2e-3),
        row("triton", 5e-4, peak_bytes=3.2e6),
        row("slow", 8e-3),
        row("absent", None),
    ]
    return synthetic("kernels", [case("op full", "op", "forward", "eager reference", rows)])


def curve_record() -> dict:
    sizes = [(side, (side / 320) ** 2) for side in (320, 640, 960)]
    cases = [
        case(
            f"stages at {side}",
            "curve",
            "whole",
            None,
            [row("whole", 2 * r), row("whole: coarse", r * r)],
            side**2,
        )
        for side, r in sizes
    ]
    cases += [
        case(f"pair of {side}", "pair", "whole", "peer", [row("ours", r), row("peer", 3 * r)], side**2)
        for side, r in sizes
    ]
    return synthetic("matcher", cases)


def test_written_records_are_read_back_under_a_name_of_suite_device_and_dtype(tmp_path: Path) -> None:
    path = record.write(kernels_record(), tmp_path)
    assert path.name == "kernels--some-gpu-9000--fp16.json"
    assert record.read(path) == kernels_record() | {"environment": record.read(path)["environment"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("limits"), "record: expected the fields"),
        (lambda r: r.update(extra=1), "extra"),
        (lambda r: r.update(suite="gpu"), r"record\.suite"),
        (lambda r: r.update(schema=99), r"record\.schema: expected 1"),
        (lambda r: r["environment"].update(threads="two"), r"environment\.threads: expected int"),
        (lambda r: r["environment"].update(threads=True), r"environment\.threads"),
        (lambda r: r["environment"]["versions"].pop("triton"), r"versions"),
        (
            lambda r: r["cases"][0]["rows"][1].update(peak_bytes=float("nan")),
            r"rows\[1\]\.peak_bytes: .*finite",
        ),
        (lambda r: r["cases"][0]["rows"][1].update(status="skipped"), r"rows\[1\]\.status"),
        (
            lambda r: r["cases"][0]["rows"][1].update(status="refused", reason="x"),
            "op full, triton: .*median",
        ),
        (lambda r: r["cases"][0]["rows"][3].update(reason=None), "op full, absent: .*reason"),
    ],
)
def test_records_that_break_the_schema_are_refused_with_the_path(change: object, message: str) -> None:
    made = copy.deepcopy(kernels_record())
    record.check_record(made)
    change(made)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        record.check_record(made)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kernels--x--fp32.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="kernels--x--fp32"):
        record.read(path)


def test_the_page_shows_every_row_losing_ones_and_empty_ones_too(tmp_path: Path) -> None:
    record.write(kernels_record(), tmp_path / "results")
    page = report.write_page(tmp_path / "results", tmp_path / "docs").read_text()
    assert "| eager reference | 2 ms (1.8 ms .. 2.2 ms) | 1.00x |" in page
    assert "| triton | 500 µs (450 µs .. 550 µs) | 4.00x | 3.2 MB |" in page
    assert "| slow | 8 ms (7.2 ms .. 8.8 ms) | 0.25x |" in page
    assert "| absent | not run: it is not installed |" in page
    assert "copy 4000 GB/s" in page
    assert "held to the truth" in page


def test_plots_are_drawn_and_linked(tmp_path: Path) -> None:
    record.write(kernels_record(), tmp_path / "results")
    record.write(curve_record(), tmp_path / "results")
    page = report.write_page(tmp_path / "results", tmp_path / "docs").read_text()
    drawn = sorted((tmp_path / "docs" / "images").glob("*.png"))
    assert len(drawn) == 3  # speeds of the kernels; seconds per pair and seconds by stage of the matcher
    for path in drawn:
        assert f"](images/{path.name})" in page
        assert path.read_bytes().startswith(b"\x89PNG")


def test_growth_exponents_are_those_of_the_curve(tmp_path: Path) -> None:
    assert report.slope([(x, 5 * x**1.7) for x in (1.0, 3.0, 10.0)]) == pytest.approx(1.7)
    record.write(curve_record(), tmp_path)
    page = report.write_page(tmp_path, tmp_path / "docs").read_text()
    assert "| whole | 1.00 |" in page
    assert "| whole: coarse | 2.00 |" in page


def test_nothing_is_reported_from_quick_runs_or_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected records, found none"):
        report.write_page(tmp_path, tmp_path)
    record.write({**kernels_record(), "quick": True}, tmp_path)
    with pytest.raises(ValueError, match="--quick"):
        report.write_page(tmp_path, tmp_path)


def test_committed_records_fit_the_schema() -> None:
    for suite in record.SUITES:
        for path in record.RESULTS.glob(f"{suite}--*.json"):
            assert not record.read(path)["quick"]
            assert json.loads(path.read_text())["cases"]
