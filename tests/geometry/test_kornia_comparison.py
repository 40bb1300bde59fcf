# SPDX-License-Identifier: Apache-2.0
"""The hard inputs of docs/geometry.md: ours is finite and flags what is ill-posed; kornia is shown where it is not."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _load() -> ModuleType:
    """The benchmark module by its path: `benchmarks` is not installed."""
    path = ROOT / "benchmarks" / "degenerate_geometry.py"
    spec = importlib.util.spec_from_file_location("degenerate_geometry", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


hard = _load()
HOMOGRAPHIES = {case.name: case for case in hard.homography_cases()}
FUNDAMENTALS = {case.name: case for case in hard.fundamental_cases()}


@pytest.mark.parametrize("name", HOMOGRAPHIES)
def test_our_homography_is_finite_and_flags_the_ill_posed(name: str) -> None:
    case = HOMOGRAPHIES[name]
    for estimator in ("ours", "ours, robust"):
        outcome = hard.observe(case, hard.HOMOGRAPHY_ESTIMATORS[estimator], True)
        assert outcome.valid is case.well_posed
        assert math.isfinite(outcome.value)
        assert outcome.gradient < 1e3
        assert (outcome.gradient > 0) is case.well_posed


@pytest.mark.parametrize("name", FUNDAMENTALS)
def test_our_fundamental_matrix_is_finite_and_flags_the_ill_posed(name: str) -> None:
    case = FUNDAMENTALS[name]
    outcome = hard.observe(case, hard.FUNDAMENTAL_ESTIMATORS["ours"], False)
    assert outcome.valid is case.well_posed
    assert math.isfinite(outcome.value)
    assert outcome.gradient < 1e3
    assert (outcome.gradient > 0) is case.well_posed


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("one outlier at 1e5", "kornia dlt_iterated"),
        ("collinear", "kornia dlt, svd"),
        ("collinear", "kornia dlt, lu"),
        ("collinear", "kornia dlt_iterated"),
        ("one point, repeated", "kornia dlt, svd"),
        ("one point, repeated", "kornia dlt, lu"),
        ("one point, repeated", "kornia dlt_iterated"),
        ("3 points", "kornia dlt, svd"),
    ],
)
def test_kornias_homography_fails_where_ours_holds(name: str, estimator: str) -> None:
    outcome = hard.observe(HOMOGRAPHIES[name], hard.HOMOGRAPHY_ESTIMATORS[estimator], True)
    assert not outcome.gradient < 1e6  # NaN included


def test_kornias_fundamental_fails_where_ours_holds() -> None:
    kornia = hard.FUNDAMENTAL_ESTIMATORS["kornia find_fundamental"]
    repeated = hard.observe(FUNDAMENTALS["one point, repeated"], kornia, False)
    assert math.isnan(repeated.gradient)
    # kornia divides by the last entry, which is zero for a camera that moves sideways: what is left is rounding, the
    # processor's own.
    sideways = FUNDAMENTALS["translation along x"]
    ours = hard.observe(sideways, hard.FUNDAMENTAL_ESTIMATORS["ours"], False)
    returned = hard.FUNDAMENTAL_ESTIMATORS["the same, as returned"]
    theirs = hard.observe(sideways, returned, False, as_returned=True)
    assert not theirs.gradient < 1e3 * ours.gradient


@pytest.mark.parametrize("name", ["noisy, 20 points", "exact, 20 points", "exact, 8 points", "translation along x"])
def test_both_fundamental_matrices_have_the_same_gradient_where_well_posed(name: str) -> None:
    ours, theirs = (
        hard.observe(FUNDAMENTALS[name], hard.FUNDAMENTAL_ESTIMATORS[which], False).gradient
        for which in ("ours", "kornia find_fundamental")
    )
    assert ours == pytest.approx(theirs, rel=0.05)


def test_the_page_shows_every_case_and_estimator() -> None:
    page = (ROOT / "docs" / "geometry.md").read_text(encoding="utf-8")
    for cases, estimators in (
        (HOMOGRAPHIES, hard.HOMOGRAPHY_ESTIMATORS),
        (FUNDAMENTALS, hard.FUNDAMENTAL_ESTIMATORS),
    ):
        header = "| input | well-posed | " + " | ".join(estimators) + " |"
        assert header in page
        for name in cases:
            assert f"| {name} | " in page


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    hard.main()
    printed = capsys.readouterr().out
    assert printed.count("| input | well-posed |") == 2
    assert printed.count("flagged: ") == 2 * 5 + 6
    assert "**NaN**" in printed
