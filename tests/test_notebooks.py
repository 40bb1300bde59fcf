# SPDX-License-Identifier: Apache-2.0
"""The notebooks of the docs run, cell by cell, in this process.

A Jupyter kernel would run the same cells in a new process, which imports torch again, and needs a dozen packages.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs").rglob("*.ipynb"))


def run(notebook: Path) -> tuple[dict[str, Any], list[Any]]:
    """The names that the cells leave, and the value of each cell that ends with an expression, as Jupyter shows it."""
    names: dict[str, Any] = {}
    shown = []
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{notebook.name}, cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), f"{notebook.name}, cell {number}", "eval"), names))
    return names, shown


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names, shown = run(notebook)
    assert shown
    if notebook.stem == "match":
        assert shown[1]._repr_html_().startswith("<iframe")
        assert shown[2].related
        assert names["error_px"] < 2  # reduced to half its size, an image is known to half a pixel of its own
        assert names["image0"].grad.abs().max() > 0
        assert (tmp_path / "matches.html").stat().st_size > 50_000
        assert "px" in capsys.readouterr().out


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
