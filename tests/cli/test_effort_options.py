# SPDX-License-Identifier: Apache-2.0
"""``--effort`` and ``--seconds`` reach the guided matcher, and the command says what it did."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from typer.testing import CliRunner, Result

from eloftr_ops.cli import app

PAIR = [str(Path(str(resources.files("eloftr_ops") / "assets" / f"demo_{side}.jpg"))) for side in "01"]


def match(*options: str) -> Result:
    return CliRunner().invoke(app, ["match", *PAIR, "--resize", "224", *options])


def test_the_looks_are_reported() -> None:
    result = match("--effort", "normal")
    assert result.exit_code == 0
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("looks"))
    assert "the matches come from: as they are, then straightened" in " ".join(result.stdout.split())
    assert int(line.split()[1].rstrip(";")) > 1


def test_a_budget_that_ends_the_search_is_reported() -> None:
    result = match("--effort", "normal", "--seconds", "0")
    assert result.exit_code == 0
    assert "1; the matches come from: as they are; the time was spent" in " ".join(result.stdout.split())


def test_one_look_is_not_mentioned() -> None:
    assert "looks" not in match().stdout


def test_a_budget_without_effort_is_one_line() -> None:
    result = match("--seconds", "2")
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: --seconds: expected None with effort fast, which looks once. Pass effort normal or thorough.\n"
    )
