# SPDX-License-Identifier: Apache-2.0
"""Without an optional package, one line names the extra."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eloftr_ops.cli import app


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("h5py", ("match-pairs", ".", "-o", "m.h5"), "sfm"),
        ("pycolmap", ("reconstruct", ".", "-o", "out"), "sfm"),
        ("ray", ("match-pairs", ".", "-o", "m.h5", "--engine", "ray"), "ray"),
    ],
)
def test_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, arguments: tuple[str, ...], extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # what Python does where it is not installed
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"the package {package}" in result.stderr
    assert f"pip install 'eloftr-ops[{extra}]'" in result.stderr
    assert not list(tmp_path.iterdir())
